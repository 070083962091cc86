"""Folders as tables, and data sets looked through: every kind of problem is found, and none is invented."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import imagecodecs
import lookalikes
import numpy as np
import pytest
from image_files import picture, write_dicom
from pydicom import dcmread
from pydicom.fileset import FileSet
from pydicom.uid import generate_uid

from gigamorph.engine.datasets.check import KINDS, Problem, check_images
from gigamorph.engine.datasets.index import find_pattern, index_folder
from gigamorph.engine.datasets.splits import assign_splits
from gigamorph.engine.datasets.tables import Finding, Record, read_table, write_table
from gigamorph.engine.datasets.tables.folders import LeftOutMasks, image_files, images_without_masks, iter_image_files
from gigamorph.engine.errors import DataError
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.mammography.phantom import write_phantoms


def test_the_index_of_a_medium_is_no_image(tmp_path: Path) -> None:
    """Every CD of images has a DICOMDIR beside them."""
    made = write_dicom(tmp_path / "image.dcm", picture(12))
    one = dcmread(made)
    one.PatientID, one.StudyID, one.StudyDate, one.StudyTime = "p", "1", "20200101", "1200"
    one.PatientName, one.SeriesNumber, one.InstanceNumber = "n", 1, 1
    one.StudyInstanceUID, one.SeriesInstanceUID = generate_uid(), generate_uid()
    medium = FileSet()
    medium.add(one)
    medium.write(tmp_path / "medium")
    (file,) = image_files(tmp_path / "medium")
    assert file.name == "IM000000" and open_pixels(file).shape == (1, 37, 53)
    with pytest.raises(
        DataError, match=r"DICOMDIR: is a DICOMDIR, the index of a medium, not an image; pass the folder"
    ):
        open_pixels(tmp_path / "medium" / "DICOMDIR")


def test_index(tmp_path: Path) -> None:
    for number, patient in enumerate(("B", "A", "B")):
        place = tmp_path / "x" / f"{number}.dcm"
        lookalikes.dicom(
            place,
            PatientID=patient,
            StudyInstanceUID=f"1.{number}",
            ImageLaterality="R",
            ViewPosition="CC",
            PatientOrientation=["P", "L"],
            Manufacturer="GE",
            ImagerPixelSpacing=[0.1, 0.1],
            BreastImplantPresent="YES",
        )
    (tmp_path / "p.png").write_bytes(imagecodecs.png_encode(np.zeros((5, 7), np.uint16)))
    (tmp_path / "notes").write_text("no image")
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "x" / "0.dcm").read_bytes()[:300])
    (tmp_path / "table.csv").write_text("not looked at")
    seen = []
    found = index_folder(tmp_path, on_start=lambda n: seen.append(n), on_done=lambda: seen.append(1))
    assert seen == [6, 1, 1, 1, 1, 1, 1]
    assert [record.path.name for record in found.records] == ["p.png", "0.dcm", "1.dcm", "2.dcm"]
    assert [record.patient_id for record in found.records][1:] == ["P00001", "P00002", "P00001"]
    assert [record.exam_id for record in found.records] == [None, "E00001", "E00002", "E00003"]
    assert [record.patient_known for record in found.records] == [False, True, True, True]
    assert sorted(str(error).split(":")[0] for error in found.errors) == [
        str(tmp_path / n) for n in ("cut.dcm", "notes")
    ]
    record = found.records[1]
    assert (record.laterality, record.view, record.manufacturer) == ("R", "CC", "GE")
    assert record.extra["rows"] == "48"
    assert (record.extra["spacing"], record.extra["orientation"], record.extra["flags"]) == (
        "0.1 0.1",
        "P L",
        "implant",
    )
    nameless = lookalikes.dicom(tmp_path / "n" / "3.dcm", StudyInstanceUID="1.9")
    [alone] = index_folder(nameless.parent).records
    assert alone.exam_id == "E00001" and not alone.patient_known
    shutil.rmtree(nameless.parent)
    assert found.records[0].extra == {"rows": "5", "columns": "7", "channels": "1"}
    named = index_folder(tmp_path, identifiers=True).records
    assert [record.patient_id for record in named[1:]] == ["B", "A", "B"]
    assert [record.exam_id for record in named[1:]] == ["1.0", "1.1", "1.2"]
    table = read_table(write_table(tmp_path / "index.csv", found.records, []), labels=False)
    assert table.records[1:] == found.records[1:]
    assert [record.patient_known for record in table.records] == [False, True, True, True]
    with pytest.raises(DataError, match="no such folder"):
        index_folder(tmp_path / "absent")


def save_exams(folder: Path, name: str, patients: Sequence[str] = ("0", "1")) -> None:
    """PNG files of four views."""
    for patient in patients:
        for side in "LR":
            for view in ("CC", "MLO"):
                path = folder / name.format(patient=patient, laterality=side, view=view)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(imagecodecs.png_encode(np.zeros((5, 7), np.uint16)))


MASKS = ("a_mask.png", "a_MASK_2.png", "masks/a.png", "x/roi_masks/b.png", "1.0-ROI mask images-7/1-1.png")
IMAGES = ("a.png", "x/b.png", "c_mask.png", "no_mask/d.png", "unmasks/e.png")


def test_masks_are_no_images(tmp_path: Path) -> None:
    """By the names of their folders, and by their own where the image is there too; unless there is nothing else."""
    for name in (*MASKS, *IMAGES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(imagecodecs.png_encode(np.zeros((5, 7), np.uint8)))
    found = index_folder(tmp_path)
    assert {record.path.relative_to(tmp_path).as_posix() for record in found.records} == set(IMAGES)
    assert {path.relative_to(tmp_path).as_posix() for path in found.masks} == set(MASKS)
    read, left = read_table(tmp_path, labels=False), LeftOutMasks()
    assert {record.path for record in read.records} == {record.path for record in found.records}
    assert read.masks == found.masks
    one_by_one = images_without_masks(partial(iter_image_files, tmp_path), tmp_path, left)
    assert set(one_by_one) == {record.path for record in found.records} and left.count == len(MASKS)
    for folder in ("masks", "x/roi_masks"):
        alone = index_folder(tmp_path / folder)
        assert len(alone.records) == 1 and not alone.masks
        below = tmp_path / folder
        files = list(images_without_masks(partial(iter_image_files, below), below, left))
        assert len(files) == 1 and left.count == len(MASKS)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("{patient}_{laterality}-{view}.png", "{patient}_{laterality}-{view}"),
        ("{patient}_{laterality}_{view}.png", "{patient}_{laterality}_{view}"),
        ("deep/p_{patient}_{laterality}{view}.png", "{patient}_{laterality}{view}"),
        ("{patient}/{laterality}{view}.png", "{patient}/{laterality}{view}"),
        ("{patient}/{laterality}-{view}.png", "{patient}/{laterality}-{view}"),
        ("A_000{patient}_1.{laterality}_{view}.png", "{patient}.{laterality}_{view}"),
        ("{patient}_{laterality}-{view}_0.png", "{patient}_{laterality}-{view}_{any}"),
        ("226_{patient}_MG_{laterality}_{view}_ANON.png", "{any}_{patient}_MG_{laterality}_{view}_ANON"),
    ],
)
def test_names_tell_what_headers_do_not(tmp_path: Path, name: str, pattern: str) -> None:
    save_exams(tmp_path, name)
    found = index_folder(tmp_path)
    assert found.pattern == pattern
    assert len({record.patient_id for record in found.records}) == 2
    assert sorted(f"{r.laterality} {r.view}" for r in found.records) == sorted(["L CC", "L MLO", "R CC", "R MLO"] * 2)
    assert all(record.patient_known for record in found.records)
    records = assign_splits([replace(record, label=0) for record in found.records], fractions=(0.5, 0.5, 0))
    assert len({(record.patient_id, record.split) for record in records}) == 2


def test_sides_in_other_languages() -> None:
    names = [Path("P1_links_CC.png"), Path("P1_Rechts_MLO.png"), Path("P2_gauche_CC.png"), Path("P2_droite_MLO.png")]
    pattern = find_pattern(names)
    assert pattern is not None
    assert [(pattern.match(name) or {})["laterality"] for name in names] == ["L", "R", "L", "R"]


def test_a_pattern_of_ones_own(tmp_path: Path) -> None:
    save_exams(tmp_path, "site7/x{patient}/2019-{view}--{laterality}.png")
    plain = index_folder(tmp_path)
    assert plain.pattern is None
    assert not any(record.patient_known for record in plain.records)
    found = index_folder(tmp_path, pattern="x{patient}/{exam}-{view}--{laterality}")
    assert {(r.patient_id, r.exam_id, r.laterality, r.view) for r in found.records} == {
        (patient, "2019", side, view) for patient in "01" for side in "LR" for view in ("CC", "MLO")
    }
    # A header's patient stays unless a pattern is named.
    lookalikes.dicom(tmp_path / "d" / "7_L_CC.dcm", PatientID="B")
    assert index_folder(tmp_path).records[0].patient_id == "P00001"
    named = index_folder(tmp_path / "d", pattern="{patient}_{laterality}_{view}").records[0]
    assert (named.patient_id, named.laterality, named.view) == ("7", "L", "CC")
    partly = index_folder(tmp_path, pattern="{patient}_{laterality}_{view}")
    assert len(partly.records) == 1
    assert "2019-CC--L does not fit the pattern {patient}_{laterality}_{view}: it has no _{laterality} (L, R" in str(
        partly.errors[0]
    )
    other = index_folder(tmp_path / "d", pattern="{patient}_{laterality}").errors[0]
    assert str(other).endswith(": it has other text after _{laterality}; rename it, or change the pattern")
    for wrong in ("{laterality}-{view}", "{patient}_{side}", "{patient}_{patient}"):
        with pytest.raises(DataError, match="pattern"):
            index_folder(tmp_path, pattern=wrong)


def test_index_tells_nothing_that_identifies(tmp_path: Path) -> None:
    lookalikes.dicom(tmp_path / "x.dcm", **lookalikes.SECRETS)
    path = write_table(tmp_path / "index.csv", index_folder(tmp_path).records, [])
    assert [value for value in lookalikes.SECRETS.values() if value in path.read_text()] == []


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("p")
    return read_table(write_phantoms(folder, patients=4, height=200, width=160, breasts=2, seed=2)).records


def problems(records: list[Record], **options: int) -> list[Problem]:
    """All but the flag that every phantom has."""
    return [problem for problem in check_images(records, **options) if problem.message != "phantom"]


def test_nothing_is_invented(phantoms: list[Record]) -> None:
    assert problems(phantoms) == []
    flags = check_images(phantoms)
    assert {(problem.kind, problem.message) for problem in flags} == {("flag", "phantom")}
    assert len(flags) == len(phantoms)


def test_unreadable_missing_and_blank(phantoms: list[Record], tmp_path: Path) -> None:
    cut, blank = tmp_path / "cut.dcm", tmp_path / "blank.png"
    cut.write_bytes(phantoms[0].path.read_bytes()[:9000])
    blank.write_bytes(imagecodecs.png_encode(np.full((40, 30), 7, np.uint8)))
    bad = [Record(path, 0, f"Q{n}", "train") for n, path in enumerate((cut, tmp_path / "absent.dcm", blank))]
    done = []
    found = check_images([bad[0], *phantoms[:2], *bad[1:]], on_done=lambda: done.append(1))
    assert len(done) == 5
    found = [problem for problem in found if problem.kind != "flag"]
    assert [(problem.path, problem.kind) for problem in found] == [
        (cut, "unreadable"),
        (tmp_path / "absent.dcm", "unreadable"),
        (blank, "blank"),
    ]
    assert "truncated" in found[0].message
    assert "No such file" in found[1].message


def test_duplicates_even_mirrored_and_in_another_format(phantoms: list[Record], tmp_path: Path) -> None:
    first = phantoms[0]
    grey = open_pixels(first.path, flip=False).read(0, 200, 0, 160)[0].numpy()
    np.save(tmp_path / "same.npy", grey)
    np.save(tmp_path / "mirrored.npy", grey[:, ::-1])
    shutil.copy(first.path, tmp_path / "copy.dcm")
    twins = [
        Record(tmp_path / name, 0, patient, split, first.laterality, first.view)
        for name, patient, split in (
            ("same.npy", first.patient_id, first.split),
            ("mirrored.npy", "other", first.split),
            ("copy.dcm", "another", "val" if first.split != "val" else "train"),
        )
    ]
    found = problems([*phantoms, *twins])
    assert [(problem.path.name, problem.kind) for problem in found] == [
        ("same.npy", "duplicate"),
        ("mirrored.npy", "duplicate"),
        ("copy.dcm", "leak"),
        ("copy.dcm", "leak"),
    ]
    assert all(str(first.path) in problem.message for problem in found)
    assert found[1].message.endswith("under another patient")
    assert "has the PatientID of" in found[3].message
    assert problems([*phantoms, *twins], workers=2) == found


def test_an_image_in_several_rows(phantoms: list[Record]) -> None:
    first = phantoms[0]
    split = "val" if first.split != "val" else "train"
    found = problems([*phantoms, first, replace(first, patient_id="other"), replace(first, split=split)])
    text = "is in several rows of the table"
    assert [problem.message for problem in found if text in problem.message] == [
        text,
        f"{text}, under another patient",
        f"{text}, in splits {first.split} and {split}",
    ]


def test_rows_without_a_label(phantoms: list[Record]) -> None:
    labels = ["0", "", *["1"] * (len(phantoms) - 2)]
    found = check_images(phantoms, labels=labels, workers=1)
    assert [problem.path for problem in found if problem.kind == "label"] == [phantoms[1].path]
    none = check_images(phantoms, labels=[""] * len(phantoms), workers=1)  # a table for predictions
    assert not any(problem.kind == "label" for problem in none)


def test_patients_in_two_splits(phantoms: list[Record]) -> None:
    moved = [replace(phantoms[0], split="val"), replace(phantoms[1], split="train"), *phantoms[4:]]
    [found] = problems(moved)
    assert (found.path, found.kind) == (phantoms[0].path, "leak")
    assert found.message == "its patient is in train and val"


def test_one_patient_under_two_names(tmp_path: Path) -> None:
    paths = [lookalikes.dicom(tmp_path / f"{n}.dcm", PatientID="same") for n in range(6)]
    two = [Record(path, 0, f"P{n}", "train") for n, path in enumerate(paths[:2])]
    [found] = check_images(two)
    assert (found.path, found.kind) == (paths[1], "patient")
    [found] = check_images([two[0], replace(two[1], split="test")])
    assert (found.kind, found.message.rpartition("; ")[2]) == ("leak", "they are in train and test")
    assert check_images([replace(record, patient_id=str(record.path)) for record in two]) == []  # no patients given
    # What all files are called by is no patient.
    assert check_images([Record(path, 0, f"P{n}", "train") for n, path in enumerate(paths)]) == []


def test_sides_and_views(phantoms: list[Record], tmp_path: Path) -> None:
    left = next(record for record in phantoms if record.laterality == "L" and record.view == "CC")
    [found] = problems([replace(left, laterality="R")])
    assert (found.kind, found.message) == ("laterality", "is R in the table, L in the header")
    [found] = problems([replace(left, view="MLO")])
    assert (found.kind, found.message) == ("view", "is MLO in the table, CC in the header")
    # Pixels that contradict PatientOrientation.
    import pydicom

    ds = pydicom.dcmread(left.path)
    ds.PixelData = ds.pixel_array[:, ::-1].tobytes()
    ds.save_as(tmp_path / "mirrored.dcm")
    [found] = problems([replace(left, path=tmp_path / "mirrored.dcm")])
    assert found.kind == "laterality"
    assert "PatientOrientation puts the breast on the left, the pixels on the right" in found.message


def test_sides_without_a_header_are_learnt_from_the_others(phantoms: list[Record], tmp_path: Path) -> None:
    def saved(record: Record, name: str, *, mirrored: bool) -> Record:
        grey = open_pixels(record.path, flip=False).read(0, 200, 0, 160)[0].numpy()
        np.save(tmp_path / name, grey[:, ::-1] if mirrored else grey)
        return replace(record, path=tmp_path / name)

    right = [record for record in phantoms if record.laterality == "R"]
    assert len(right) == 8
    records = [saved(record, f"{n}.npy", mirrored=n == 5) for n, record in enumerate(right)]
    [found] = problems(records)
    assert found.path.name == "5.npy"
    assert "other R images have the breast on the right, the pixels on the left" in found.message
    # A set in which all chest walls are left is as good.
    assert problems([saved(record, f"m{n}.npy", mirrored=True) for n, record in enumerate(right)]) == []
    assert problems(records[4:6]) == []  # two tell nothing


def test_flags_and_frames(tmp_path: Path) -> None:
    spot = lookalikes.dicom(tmp_path / "s.dcm", PaddleDescription="SPOT COMPRESSION", BreastImplantPresent="YES")
    raw = lookalikes.dicom(tmp_path / "r.dcm", PresentationIntentType="FOR PROCESSING")
    found = check_images([Record(spot, 0, "a"), Record(raw, 0, "b")])
    assert [(problem.path, problem.kind) for problem in found] == [(spot, "flag"), (raw, "unreadable")]
    assert found[0].message == "implant, spot"
    assert "For Processing" in found[1].message
    assert {problem.kind for problem in found} <= set(KINDS)


def test_frames_that_no_run_takes_are_to_mend(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (2, 20, 30), dtype=np.uint16)
    path = lookalikes.dicom(tmp_path / "f.dcm", (20, 30), pixels=pixels, NumberOfFrames=2)
    assert [problem.kind for problem in problems([Record(path, 0, "a")])] == ["frames"]
    assert problems([Record(path, 0, "a", frame=1)]) == []


def test_frames_with_the_same_pixels_are_not_one_row_twice(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (1, 20, 30), dtype=np.uint16).repeat(2, 0)
    path = lookalikes.dicom(tmp_path / "f.dcm", (20, 30), pixels=pixels, NumberOfFrames=2)
    for frames, message in (((0, 1), f"has the pixels of {path}"), ((1, 1), "is in several rows of the table")):
        [found] = problems([Record(path, 0, "a", frame=frame) for frame in frames])
        assert (found.kind, found.message) == ("duplicate", message)


def test_frames_are_all_read(real_data: Path, tmp_path: Path) -> None:
    path = real_data / "dicom" / "dbt_4frames_jpeg2000.dcm"
    shutil.copy(path, tmp_path / "copy.dcm")
    found = problems([Record(path, 0, "a"), Record(tmp_path / "copy.dcm", 0, "a")])
    assert sorted(problem.kind for problem in found if problem.kind != "flag") == ["duplicate", "frames", "frames"]
    advice = (
        "has 4 frames, and all were checked; a run reads one: name it in the column frame, or write all for a volume"
    )
    assert [problem.message for problem in found if problem.kind == "frames"] == [advice, advice]
    assert not any("4 frames" in p.message for p in problems([Record(path, 0, "a", frame=1)]))


def test_messages_name_no_patient(tmp_path: Path) -> None:
    first, second = (lookalikes.dicom(tmp_path / f"{n}.dcm", **lookalikes.SECRETS) for n in "ab")
    records = [Record(first, 0, "MRN-4711", "train", "L"), Record(second, 0, "x", "test", "L")]
    text = " ".join(f"{problem.path} {problem.message}" for problem in check_images(records))
    assert "PatientID of" in text
    assert [value for value in lookalikes.SECRETS.values() if value in text] == []


def test_images_on_another_grey_scale(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (30, 20)).astype(np.uint16)
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(pixels))
    np.save(tmp_path / "y.npy", pixels[::-1, ::-1].T.astype(np.float32))
    records = [Record(tmp_path / name, 0, name) for name in ("x.png", "y.npy")]
    dark, bright = check_images(records)
    assert (dark.kind, bright.kind) == ("grey", "grey")
    most = int(pixels.max())
    assert dark.message == (
        f"grey values reach only {most} of 65535, nearly black; set the white level: --white 4095, or a column white"
    )
    assert bright.message.startswith(f"grey values reach {most}, but white is 1; set the white level: --white 4095")
    assert check_images([replace(record, white="auto") for record in records]) == []
    assert check_images(records, white=4095) == []
    [found] = check_images([replace(records[0], white=1023)])
    assert (found.kind, found.message.split(";")[0]) == ("unreadable", f"contains {most}, above white 1023")


def test_masks_are_looked_at(tmp_path: Path) -> None:
    def save(name: str, pixels: np.ndarray) -> Path:
        (tmp_path / name).write_bytes(imagecodecs.png_encode(pixels))
        return tmp_path / name

    rng = np.random.default_rng(0)
    image = save("image.png", rng.integers(0, 256, (40, 30)).astype(np.uint8))
    good = save("good.png", np.eye(40, 30, dtype=np.uint8))
    cut = tmp_path / "cut.png"
    cut.write_bytes(save("noise.png", rng.integers(0, 2, (40, 30)).astype(np.uint8)).read_bytes()[:90])
    masks = {
        good: "",
        tmp_path / "absent.png": "absent.png: cannot be read (No such file or directory)",
        save("small.png", np.ones((4, 3), np.uint8)): "small.png is 4 x 3, but its image is 40 x 30",
        save("empty.png", np.zeros((40, 30), np.uint8)): "empty.png is empty",
        cut: "cut.png: damaged or truncated image",
    }
    record = Record(image, 0, "p", findings=(Finding(), *(Finding(mask=mask) for mask in masks)))
    found = check_images([record])
    assert {problem.kind for problem in found} == {"mask"}
    assert [text in problem.message for text, problem in zip(list(masks.values())[1:], found, strict=True)] == [
        True
    ] * 4


def test_pixels_that_are_no_numbers(tmp_path: Path) -> None:
    pixels = np.ones((40, 30), np.float32)
    pixels[0, 1] = np.nan
    np.save(tmp_path / "nan.npy", pixels)
    [found] = check_images([Record(tmp_path / "nan.npy", 0, "p")])
    assert found.kind == "unreadable" and found.message.startswith("contains NaN or infinite pixels")
    np.save(tmp_path / "blank.npy", np.ones((40, 30), np.uint8))
    [found] = check_images([Record(tmp_path / "blank.npy", 0, "p")])
    assert found.message == "all pixels are equal"
