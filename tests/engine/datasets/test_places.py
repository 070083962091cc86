"""Odd places and odd tables: links, pipes, formulas, labels that are none, downloads in other layouts."""

import errno
import os
import pickle
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import imagecodecs
import lookalikes
import numpy as np
import pytest
from image_files import write_dicom

from gigamorph.engine.datasets.check import check_images
from gigamorph.engine.datasets.grey import kind_of_file
from gigamorph.engine.datasets.index import index_folder
from gigamorph.engine.datasets.tables import Record, missing_masks, read_table, write_table
from gigamorph.engine.datasets.tables.cells import escape, read_rows
from gigamorph.engine.errors import DataError
from gigamorph.engine.images.header import read_info
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.mammography.data_sets import detect, read_data_set
from gigamorph.engine.mammography.data_sets.files import Files
from gigamorph.engine.mammography.data_sets.nyu import read_pickle
from gigamorph.engine.models.checkpoints import Inert
from gigamorph.engine.predict.convert import names_of
from gigamorph.engine.train.inputs import training_data


def save(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((9, 8), value, np.uint8)
    pixels[0, 0] = 255
    path.write_bytes(imagecodecs.png_encode(pixels))
    return path


def test_links_in_a_circle_are_walked_once(tmp_path: Path) -> None:
    """Two of them made two to the power of forty paths."""
    save(tmp_path / "a" / "x.png")
    save(tmp_path / "b" / "y.png")
    for folder in "ab":
        for name in ("one", "two"):
            (tmp_path / folder / name).symlink_to(tmp_path)
    found = index_folder(tmp_path)
    assert [record.path.name for record in found.records] == ["x.png", "y.png"]
    assert Files(tmp_path).find("y.png") == tmp_path / "b" / "y.png"
    assert len(read_table(tmp_path).records) == 2


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.dcm")
    save(tmp_path / "x.png")
    found = index_folder(tmp_path)
    assert [record.path.name for record in found.records] == ["x.png"]
    assert all("is not a regular file" in str(error) for error in found.errors)
    assert len(found.errors) == 2
    for reader in (open_pixels, read_info):
        with pytest.raises(DataError, match=r"pipe\.dcm: is not a regular file"):
            reader(tmp_path / "pipe.dcm")
    assert [problem.kind for problem in check_images([Record(tmp_path / "pipe", 0, "p")])] == ["unreadable"]


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+x", "'+x"),
        ("-x", "'-x"),
        ("@SUM(1)", "'@SUM(1)"),
        ("'=1", "''=1"),
        ("''-x", "'''-x"),
        ("-1.5", "-1.5"),
        ("+3", "+3"),
        ("-1e-05", "-1e-05"),
        ("-inf", "-inf"),
        ("-.5", "-.5"),
        ("-1.5x", "'-1.5x"),
        ("-", "'-"),
        ("'quoted'", "'quoted'"),
        ("plain", "plain"),
        ("", ""),
    ],
)
def test_formulas_are_escaped_and_numbers_are_not(tmp_path: Path, cell: str, written: str) -> None:
    assert escape(cell) == written
    image = save(tmp_path / "x.png")
    path = write_table(tmp_path / "t.csv", [Record(image, 0, cell or "p", extra={"note": cell, "n": "1"})], ["0", "1"])
    assert f",{written},".replace(",,", ",") in path.read_text().replace("\n", ",")
    [record] = read_table(path).records
    assert (record.patient_id, record.extra.get("note", "")) == (cell or "p", cell)
    assert read_rows(path).rows[0].get("note", "") == cell


def test_numbers_of_labels_are_written_in_full(tmp_path: Path) -> None:
    labels = {"score": -1.5, "third": 1 / 3, "count": 12345678.0}
    path = write_table(tmp_path / "t.csv", [Record(save(tmp_path / "x.png"), 0, "p", labels=labels)], ["0", "1"])
    assert read_table(path).records[0].labels == labels


def table(folder: Path, labels: list[str], header: str = "label") -> Path:
    rows = [f"{save(folder / f'{n}.png', n).name},{label},p{n}" for n, label in enumerate(labels)]
    path = folder / "t.csv"
    path.write_text("\n".join([f"image_path,{header},patient_id", *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([str(0.1 * n) for n in range(24)], "label 0.1 is not a class; number classes 0, 1, ... or name them"),
        (["0", "1", "-1"], "label -1 is not a class"),
        (["0", "1", "nan"], "label nan is not a class"),
        (["benign", "malignant", "NaN"], "label NaN is not a class"),
        (["0", "1", "NA"], "label NA is not a class"),
        (["0.0", "None", "1.0"], "label None is not a class"),
        (["0.5", "1.5"], "label 0.5 is not a class"),
        (["inf", "1"], "label inf is not a class"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, labels: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(table(tmp_path, labels))


def test_patients_that_nobody_knows_are_not_one(tmp_path: Path) -> None:
    """`str(nan)` in each row would be one patient: it is refused to train, as an empty cell is."""
    path = tmp_path / "table.csv"
    names = ["nan", "NaN", "None", "NULL", "#N/A", "", "NA", "NA"]
    rows = [f"{n}.png,{n % 2},{name},{name}" for n, name in enumerate(names)]
    for n in range(len(names)):
        (tmp_path / f"{n}.png").touch()
    path.write_text("\n".join(["image_path,label,patient_id,exam_id", *rows]))
    with pytest.raises(DataError, match="line 2: patient_id is nan; fill it in"):
        read_table(path)
    records = read_table(path, labels=False).records
    assert [record.patient_known for record in records] == [False] * 6 + [True] * 2
    assert len({record.patient_id for record in records}) == 7
    assert [record.exam_id for record in records] == [None] * 6 + ["NA"] * 2


def test_whole_numbers_may_have_a_point(tmp_path: Path) -> None:
    read = read_table(table(tmp_path, ["0.0", "1.0", "1"]))
    assert (read.classes, [record.label for record in read.records]) == (["0", "1"], [0, 1, 1])
    named = read_table(table(tmp_path, ["1_0", "2_0"]))
    assert named.classes == ["1_0", "2_0"]
    assert read_table(table(tmp_path, ["none", "mass"])).classes == ["mass", "none"]


@pytest.mark.parametrize(("labels", "name"), [(["1"] * 9, "1"), (["0"] * 9, "0"), (["benign"] * 9, "benign")])
def test_one_label_is_nothing_to_learn(tmp_path: Path, labels: list[str], name: str) -> None:
    with pytest.raises(DataError, match=f"training images have label {name}; training needs two classes"):
        training_data(table(tmp_path, labels))


def test_label_columns(tmp_path: Path) -> None:
    path = table(tmp_path, [f"{n % 2},{'' if n == 4 else n // 3}" for n in range(9)], "label_cancer,label_kind")
    with pytest.raises(
        DataError, match=r"use one of label_cancer, label_kind as the label: gigamorph data convert .*cancer"
    ):
        read_table(path)
    read = read_table(path, label="kind")
    assert (read.classes, [r.label for r in read.records]) == (["0", "1", "2"], [0, 0, 0, 1, -1, 1, 2, 2, 2])
    with pytest.raises(DataError, match="has no column label_size; it has image_path, label_cancer"):
        read_table(path, label="size")
    # What is beside the label is told, unless the label was made from it.
    told = []

    def warn(line: str) -> None:
        told.extend([line] * ("nearly black" not in line))  # as the images are

    both = tmp_path / "both.csv"
    text = path.read_text().replace("label_cancer,label_kind", "label,label_kind")
    both.write_text(text)
    training_data(both, warn=warn)
    assert told == ["columns label_kind are not learnt, only label (choose it with data convert --label)"]
    told.clear()
    both.write_text("\n".join(line.rpartition(",")[0] + f",{line.rpartition(',')[2]}" for line in text.splitlines()))
    cancer = read_table(path, label="cancer")
    training_data(write_table(tmp_path / "made.csv", cancer.records, cancer.classes), warn=warn)
    assert told == []


def test_patients_that_nobody_names_are_told(tmp_path: Path) -> None:
    for n in range(12):
        save(tmp_path / "in" / "ab"[n % 2] / f"{n}.png", n)
    told = []
    training_data(tmp_path / "in", warn=told.append)
    assert told[0] == "the patient of 12 of 12 images is unknown, so a patient may be in two splits"


def test_nothing_but_missing_files(tmp_path: Path) -> None:
    path = table(tmp_path, ["0", "1", "1"])
    (tmp_path / "1.png").unlink()
    assert [r.path.name for r in read_table(path, skip_missing=True).records] == ["0.png", "2.png"]
    for n in (0, 2):
        (tmp_path / f"{n}.png").unlink()
    with pytest.raises(DataError, match=r"t\.csv: none of the 3 images exists: .*0\.png, .*download them"):
        read_table(path, skip_missing=True)
    lookalikes.vindr_mammo(tmp_path / "vindr")
    shutil.rmtree(tmp_path / "vindr" / "images")
    with pytest.raises(DataError, match=r"none of the .* images exists"):
        read_data_set("vindr-mammo", tmp_path / "vindr", skip_missing=True)


def relaid(folder: Path, jpeg: bool) -> None:
    """CBIS-DDSM as tcia_utils lays it out, a folder per series, or as Kaggle's release does, in JPEG."""
    for path in sorted(folder.rglob("*.dcm")):
        target = folder / ("jpeg" if jpeg else "tciaDownload") / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        name = "1-" + str(int(path.stem) + 1)
        if jpeg:
            pixels = open_pixels(path, flip=False).read(0, *sum(((s, 0) for s in open_pixels(path).shape[1:]), ())[:3])
            grey = (pixels[0].numpy() * 255).astype(np.uint8)
            (target / f"{name}.jpg").write_bytes(imagecodecs.jpeg8_encode(grey))
        else:
            shutil.copy(path, target / f"{name}.dcm")
        path.unlink()


@pytest.mark.parametrize("jpeg", [False, True])
def test_cbis_ddsm_in_other_layouts(tmp_path: Path, jpeg: bool) -> None:
    lookalikes.cbis_ddsm(tmp_path)
    before = read_data_set("cbis-ddsm", tmp_path).records
    relaid(tmp_path, jpeg)
    after = read_data_set("cbis-ddsm", tmp_path).records
    assert [replace(r, path=Path(), findings=()) for r in after] == [
        replace(r, path=Path(), findings=()) for r in before
    ]
    assert [r.path.parent.name for r in after] == [r.path.parent.name for r in before]
    assert missing_masks(after) == []
    shapes = {open_pixels(f.mask, flip=False).shape for r in after for f in r.findings if f.mask}
    assert shapes == {(1, *lookalikes.SHAPE)}


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_exam_lists_of_nyu(tmp_path: Path, protocol: int) -> None:
    mask = lookalikes.nyu(tmp_path, protocol)
    assert detect(tmp_path) == "nyu"
    found = read_data_set("nyu", tmp_path)
    assert [(r.path.stem, r.patient_id, r.laterality, r.view, r.label, r.chest_wall) for r in found.records] == [
        ("0_L-CC", "exam0", "L", "CC", 0, "left"),
        ("0_R-CC", "exam0", "R", "CC", 1, "right"),
        ("0_L-MLO", "exam0", "L", "MLO", 0, "left"),
        ("0_R-MLO", "exam0", "R", "MLO", 1, "right"),
        ("1_L_CC", "exam1", "L", "CC", -1, "right"),
        ("1_R_CC", "exam1", "R", "CC", -1, "left"),
        ("1_R_CC_2", "exam1", "R", "CC", -1, "left"),
    ]
    assert {record.white for record in found.records} == {"auto"}
    assert [(f.mask, f.pathology) for f in found.records[1].findings] == [(mask, "malignant")]
    assert [r.label for r in read_data_set("nyu", tmp_path, label="benign").records][:4] == [1, 0, 1, 0]


class Trap:
    """Unpickled by the usual means this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_are_read_and_not_run(tmp_path: Path, protocol: int) -> None:
    trap = tmp_path / "made"
    exams = [{**lookalikes.EXAMS[0], "more": Trap(trap), "array": np.arange(3), "order": OrderedDict(a=1)}]
    path = tmp_path / "exam_list.pkl"
    path.write_bytes(pickle.dumps(exams, protocol))
    read = read_pickle(path)
    assert isinstance(read[0]["more"], Inert)
    assert read[0]["L-CC"] == ["0_L-CC"]
    assert len(read_data_set("nyu", tmp_path, check_files=False).records) == 4
    assert not trap.exists()
    for wrong, message in (
        (b"no pickle", "not a pickle file, or damaged"),
        (path.read_bytes()[:-40], "not a pickle file, or damaged"),
        (pickle.dumps({"a": 1}), "must be a list of exams"),
        (pickle.dumps([{"L-CC": "0_L_CC"}]), "exam 0: L-CC must be a list of file names"),
        (
            pickle.dumps([{**lookalikes.EXAMS[0], "cancer_label": {"left_malignant": 3}}]),
            "exam 0: cancer_label left_malignant",
        ),
        (pickle.dumps([{**lookalikes.EXAMS[0], "horizontal_flip": "MAYBE"}]), "exam 0: horizontal_flip"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=rf"exam_list\.pkl.*{message}|exam_list\.pkl, {message}"):
            read_data_set("nyu", tmp_path, check_files=False)


def test_long_headers_are_quoted_in_brief(tmp_path: Path) -> None:
    pixels = np.arange(63, dtype=np.uint16).reshape(7, 9)
    for elements in (
        {"PhotometricInterpretation": "X" * 5000},
        {"VOILUTFunction": "Y" * 5000, "WindowCenter": 1, "WindowWidth": 9},
    ):
        path = write_dicom(tmp_path / "x.dcm", pixels, **elements)
        with pytest.raises(DataError) as error:
            open_pixels(path)
        assert len(str(error.value)) < len(str(path)) + 300
    with pytest.raises(DataError, match="is MONOCHROME2 with 31 samples per pixel, not 1; correct the header"):
        open_pixels(write_dicom(tmp_path / "x.dcm", pixels, SamplesPerPixel=31))


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    with pytest.raises(DataError, match=r"t\.csv: cannot be written: .*udce9.*rename the file"):
        write_table(tmp_path / "t.csv", [Record(tmp_path / name, 0, "p")], ["0", "1"])


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(DataError, match=r"cannot be listed \(Permission denied\)"):
        index_folder(tmp_path)


def test_a_sub_folder_that_cannot_be_listed_stands_for_its_images(tmp_path, monkeypatch):
    for name in ("a", "closed", "z"):
        (tmp_path / "benign" / name).mkdir(parents=True)
        imagecodecs.imwrite(str(tmp_path / "benign" / name / "1.png"), np.zeros((8, 8), np.uint8))
    closed, iterdir, listdir = tmp_path / "benign" / "closed", Path.iterdir, os.listdir

    def refuse(path, ask):
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied")
        return ask(path)

    monkeypatch.setattr(Path, "iterdir", lambda path: refuse(path, iterdir))
    monkeypatch.setattr(os, "listdir", lambda path=".": refuse(path, listdir))
    found = index_folder(tmp_path, workers=1)
    assert [record.path.parent.name for record in found.records] == ["a", "z"]
    assert [str(error) for error in found.errors] == [f"{closed}: cannot be read (Permission denied)"]
    assert [record.path.name for record in read_table(tmp_path, labels=False).records] == ["1.png", "closed", "1.png"]
    with pytest.raises(DataError, match=r"closed: cannot be listed \(Permission denied\)"):
        read_table(tmp_path)


def test_results_among_the_images_are_no_images_of_a_class(tmp_path, caplog):
    save(tmp_path / "benign" / "1.png", 1)
    save(tmp_path / "malign" / "2.png", 2)
    for folder, note, text in (
        ("run", "last.ckpt", ""),
        ("found", "run.json", '{"checkpoint": "best.ckpt"}'),
        ("malign/maps", "run.json", '{"checkpoint": "best.ckpt", "kind": "explain"}'),
    ):
        save(tmp_path / folder / "heatmaps" / "3.png", 3)
        (tmp_path / folder / note).write_text(text)
    assert [record.path.name for record in read_table(tmp_path).records] == ["1.png", "2.png"]
    assert f"{tmp_path / 'found'}: left out, because it contains results of gigamorph predict" in caplog.text
    assert [record.path.name for record in index_folder(tmp_path, workers=1).records] == ["1.png", "2.png"]
    assert len(index_folder(tmp_path / "run", workers=1).records) == 1  # who names it means it


def test_converted_images_are_left_out_beside_those_that_they_were_made_of(tmp_path, caplog):
    """They are the same images once more, mostly of the same patients, and would fall into other splits."""
    for name in ("benign", "malign"):
        save(tmp_path / name / "images" / "1.png", 1)
        save(tmp_path / name / "parts" / "no image.png", 2)
        (tmp_path / name / "run.json").write_text('{"checkpoint": "", "kind": "data convert"}')
    assert read_table(tmp_path).classes == ["benign", "malign"]  # each was converted alone
    assert len(index_folder(tmp_path, workers=1).records) == 2 and not caplog.text
    shutil.copytree(tmp_path / "benign", tmp_path / "flat" / "converted")
    save(tmp_path / "flat" / "4.png", 4)
    with pytest.raises(DataError, match="flat: contains no images in a sub-folder per class"):
        read_table(tmp_path / "flat")
    shutil.rmtree(tmp_path / "flat")
    save(tmp_path / "other" / "3.png", 3)
    assert [record.path.name for record in read_table(tmp_path).records] == ["3.png"]
    caplog.clear()
    assert [record.path.name for record in index_folder(tmp_path, workers=1).records] == ["3.png"]
    told = f"{tmp_path / 'benign'}: left out, because it contains results of gigamorph data convert"
    assert f"{told}; {tmp_path / 'benign' / 'table.csv'} lists its images" in caplog.text


def test_an_image_under_two_names_is_there_once(tmp_path):
    save(tmp_path / "a.png", 1)
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    for other in ("b.png", tmp_path / "a.png", f"../{tmp_path.name}/a.png"):
        (tmp_path / "t.csv").write_text(f"image_path,label,patient_id\na.png,0,p\n{other},1,q\n")
        with pytest.raises(DataError, match=r"line 3: [ab].png is already in line 2; keep one of them"):
            read_table(tmp_path / "t.csv")


def test_files_are_called_after_uids_and_as_makers_call_them(tmp_path: Path) -> None:
    """As DCMTK's storescp writes them; what stands after the last dot of a UID is no suffix."""
    names = ["1.2.840.55", "MG.1.2.840.10008.1", "MG.1.2.840.10008.2", "x.IMA", "y.dic"]
    for name in names:
        lookalikes.dicom(tmp_path / name, PatientID="P")
    found = index_folder(tmp_path, workers=1).records
    assert [record.path.name for record in found] == names
    assert names_of(found) == [*names[:3], "x", "y"]
    assert {kind_of_file(path) for path in (Path("x.dcm"), *map(Path, names))} == {"DICOM"}


def test_formats_that_are_not_read_are_told(tmp_path, caplog):
    for name in ("benign/1.png", "benign/2.BMP", "malign/p/3.bmp", "malign/4.png"):
        save(tmp_path / Path(name).with_suffix(".png"), 1).rename(tmp_path / name)
    assert len(read_table(tmp_path).records) == len(index_folder(tmp_path, workers=1).records) == 2
    told = [text.partition(": ") for text in caplog.messages]
    assert [(Path(folder).name, text) for folder, _, text in told] == [
        (name, f"left out files of unsupported formats: {count} .bmp; convert them to PNG or TIFF")
        for name, count in (("benign", 1), ("malign", 1), (tmp_path.name, 2))
    ]
