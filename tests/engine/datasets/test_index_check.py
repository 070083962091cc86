"""Folders as tables, and data sets looked through: every kind of problem is found, and none is invented."""

import shutil
from dataclasses import replace
from pathlib import Path

import imagecodecs
import lookalikes
import numpy as np
import pytest

from gigamorph.engine.datasets.check import KINDS, Problem, check_images
from gigamorph.engine.datasets.index import index_folder
from gigamorph.engine.datasets.phantom import write_phantoms
from gigamorph.engine.datasets.tables import Record, read_table, write_table
from gigamorph.engine.errors import DataError
from gigamorph.engine.images.open import open_pixels


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
    assert [record.patient_id for record in found.records] == ["P00001", "P00002", "P00003", "P00002"]
    assert [record.exam_id for record in found.records] == ["E00001", "E00002", "E00003", "E00004"]
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
    assert found.records[0].extra == {"rows": "5", "columns": "7", "channels": "1"}
    named = index_folder(tmp_path, identifiers=True).records
    assert [record.patient_id for record in named[1:]] == ["B", "A", "B"]
    assert [record.exam_id for record in named[1:]] == ["1.0", "1.1", "1.2"]
    table = read_table(write_table(tmp_path / "index.csv", found.records, []), labels=False)
    assert table.records == found.records
    with pytest.raises(DataError, match="no such folder"):
        index_folder(tmp_path / "absent")


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


def test_frames_are_all_read(real_data: Path, tmp_path: Path) -> None:
    path = real_data / "dicom" / "dbt_4frames_jpeg2000.dcm"
    shutil.copy(path, tmp_path / "copy.dcm")
    found = problems([Record(path, 0, "a"), Record(tmp_path / "copy.dcm", 0, "a")])
    assert [problem.kind for problem in found if problem.kind != "flag"] == ["duplicate"]


def test_messages_name_no_patient(tmp_path: Path) -> None:
    first, second = (lookalikes.dicom(tmp_path / f"{n}.dcm", **lookalikes.SECRETS) for n in "ab")
    records = [Record(first, 0, "MRN-4711", "train", "L"), Record(second, 0, "x", "test", "L")]
    text = " ".join(f"{problem.path} {problem.message}" for problem in check_images(records))
    assert "PatientID of" in text
    assert [value for value in lookalikes.SECRETS.values() if value in text] == []
