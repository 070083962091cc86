"""Tables: csv files and folders, and every way in which they can be wrong."""

import errno
import gzip
import os
from collections import Counter
from pathlib import Path

import lookalikes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigamorph.engine.datasets.tables import (
    SPLITS,
    Finding,
    Record,
    columns_named,
    missing_files,
    read_table,
    write_table,
)
from gigamorph.engine.datasets.tables.generic import TABLES, stream_table
from gigamorph.engine.errors import DataError, GigamorphError

HEADER = "image_path,label,patient_id,split\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "img").mkdir()
    for name in ("a.png", "b.png", "c.dcm"):
        (tmp_path / "img" / name).write_bytes(b"x")
    return tmp_path


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    (folder / "t.csv").write_bytes(text.encode(encoding))
    return folder / "t.csv"


def test_csv(folder: Path) -> None:
    text = "image_path,label,patient_id,split,laterality,view,age\nimg/a.png,0,P1,train,left,cc,50\n\n"
    path = write(folder, text + f"{folder}/img/b.png , 1,P2, Test ,R,MLO,\nimg/c.dcm,1,P3,validation,,,60\n")
    table = read_table(path)
    assert table.classes == ["0", "1"]
    assert [record.path for record in table.records] == [folder / "img" / n for n in ("a.png", "b.png", "c.dcm")]
    assert [record.label for record in table.records] == [0, 1, 1]
    assert [record.patient_id for record in table.records] == ["P1", "P2", "P3"]
    assert [record.split for record in table.records] == ["train", "test", "val"]
    assert [record.laterality for record in table.records] == ["L", "R", None]
    assert [record.view for record in table.records] == ["CC", "MLO", None]
    assert [record.extra for record in table.records] == [{"age": "50"}, {"age": ""}, {"age": "60"}]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_dialects_of_csv(folder: Path, separator: str, encoding: str, end: str) -> None:
    rows = [["image_path", "label", "patient_id"], ['"img/a.png\n"', "benign", "Müller"], ["img/b.png", "malign", "P2"]]
    path = write(folder, "".join(separator.join(row) + end for row in rows), encoding)
    table = read_table(path)
    assert table.classes == ["benign", "malign"]
    assert [record.label for record in table.records] == [0, 1]
    assert [record.patient_id for record in table.records] == ["Müller", "P2"]
    assert {record.split for record in table.records} == {None}
    assert table.records[0].path == folder / "img" / "a.png"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("first", ["", "sep=;\r\n", '"sep=;"\r\n'])
@pytest.mark.parametrize("packed", [False, True])
def test_tables_that_excel_saved(folder: Path, encoding: str, first: str, packed: bool) -> None:
    text = first + "image_path;label;patient_id\r\nimg/a.png;1;Müller, A\r\nimg/b.png;0;P2;\r\nimg/c.dcm;1;P3;x\r\n"
    path = folder / ("t.csv.gz" if packed else "t.csv")
    path.write_bytes(gzip.compress(text.encode(encoding)) if packed else text.encode(encoding))
    line = 5 if first else 4
    with pytest.raises(DataError, match=f"line {line}: has 4 cells, but the header has 3"):
        read_table(path)
    with pytest.raises(DataError, match=f"line {line}: has 4 cells, but the header has 3"):
        list(stream_table(path, ["0", "1"], Counter()))
    text = text.removesuffix("img/c.dcm;1;P3;x\r\n")
    path.write_bytes(gzip.compress(text.encode(encoding)) if packed else text.encode(encoding))
    table = read_table(path)
    assert [(r.label, r.patient_id) for r in table.records] == [(1, "Müller, A"), (0, "P2")]
    assert [record for _, record in stream_table(path, ["0", "1"], Counter())] == table.records


def test_parquet_and_excel_say_what_csv_does(folder: Path) -> None:
    """To those who train as to those who predict: the workflow has one table."""
    header, rows = ["image_path", "label", "patient_id"], [("img/a.png", 1, 7), ("img/b.png", 0, 8)]
    text = "\n".join(",".join(map(str, row)) for row in [header, *rows])
    told = read_table(write(folder, text + "\n")).records
    pq.write_table(pa.table(dict(zip(header, zip(*rows, strict=True), strict=True))), folder / "t.parquet")
    lookalikes.sheet(folder / "t.xlsx", "Sheet", ",".join(header), rows)
    for name in ("t.parquet", "t.xlsx"):
        assert name.endswith(TABLES) and read_table(folder / name).records == told
        assert [record for _, record in stream_table(folder / name, ["0", "1"], Counter())] == told


def test_columns_are_known_however_they_are_capitalised(folder: Path) -> None:
    path = write(folder, "Image_Path,LABEL,Patient_ID,Age,Study_ID\nimg/a.png,1,P1,50,E1\n")
    [record] = read_table(path).records
    assert (record.label, record.patient_id, record.exam_id, record.extra) == (1, "P1", "E1", {"Age": "50"})
    path = write(folder, "image_path,label,patient_id,Label,exam_id,study_id\nimg/a.png,1,P1,x,E,S\n")
    [record] = read_table(path).records
    assert (record.label, record.exam_id, record.extra) == (1, "E", {"Label": "x", "study_id": "S"})
    path = write(folder, "Image Path,Label,Patient ID,Chest Wall,Study ID,patient_id\nimg/a.png,1,x,left,E1,P1\n")
    [record] = read_table(path).records
    assert (record.patient_id, record.chest_wall, record.exam_id) == ("P1", "left", "E1")
    assert record.extra == {"Patient ID": "x"}
    [record] = read_table(write(folder, "Image Path,Label,Patient ID\nimg/a.png,1,P1\n")).records
    assert record.patient_id == "P1"


def test_paths_as_windows_writes_them(folder: Path) -> None:
    (folder / "img" / "b\\c.png").write_bytes(b"x")
    text = "image_path,label,patient_id,mask_path\nimg\\a.png,0,P1,img\\b.png\nimg/b\\c.png,1,P2,\n"
    table = read_table(write(folder, text))
    assert [record.path for record in table.records] == [folder / "img" / "a.png", folder / "img" / "b\\c.png"]
    assert table.records[0].findings == (Finding(mask=folder / "img" / "b.png"),)


def test_classes_of_a_trained_model_number_the_labels(folder: Path) -> None:
    path = write(folder, HEADER + "img/a.png,benign,P1,\n")
    assert read_table(path, classes=["malign", "benign"]).records[0].label == 1
    with pytest.raises(DataError, match=r"line 2: unknown label 'benign'; the classes are malign, normal"):
        read_table(path, classes=["malign", "normal"])


def test_table_to_predict_needs_paths_only(folder: Path) -> None:
    table = read_table(write(folder, "image_path,age\nimg/a.png,5\nimg/c.dcm,6\n"), labels=False)
    assert [record.label for record in table.records] == [-1, -1]
    assert table.classes == []
    assert len({record.patient_id for record in table.records}) == 2
    assert len(read_table(folder / "img", labels=False).records) == 3


@pytest.mark.parametrize("compressed", [False, True])
def test_a_table_of_an_older_excel(folder: Path, compressed: bool, caplog: pytest.LogCaptureFixture) -> None:
    text = HEADER + "img/a.png,gutartig,Müller,\n" + "img/b.png,bösartig,P2,\n"
    path = write(folder, text, encoding="cp1252")
    if compressed:
        path = folder / "t.csv.gz"
        path.write_bytes(gzip.compress((folder / "t.csv").read_bytes()))
    table = read_table(path)
    assert [record.patient_id for record in table.records] == ["Müller", "P2"]
    assert table.classes == ["bösartig", "gutartig"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: read as cp1252, because it is not in UTF-8; in Excel, save it as CSV UTF-8"
    ]


def test_other_names_of_columns(folder: Path) -> None:
    header, row = "Datei;Krebs ja/nein;label;Nummer;Label_Dichte\n", "img/{};{};x;5004.0;{}\n"
    path = write(folder, header + row.format("a.png", "ja", 1) + row.format("b.png", "nein", 0))
    names = {"image_path": "datei", "label": "Krebs ja/nein", "patient_id": "Nummer", "label_density": "label_dichte"}
    with pytest.raises(DataError, match=r"column image_path, patient_id is missing; .*--column image_path=COLUMN"):
        read_table(path)
    with columns_named(names):
        table = read_table(path)
        streamed = [record for _, record in stream_table(path, table.classes, Counter())]
    assert table.classes == ["ja", "nein"] and [record.label for record in table.records] == [0, 1]
    for record, density in zip(table.records, (1, 0), strict=True):
        assert (record.patient_id, record.labels, record.extra) == ("5004", {"density": density}, {"other label": "x"})
    assert streamed == table.records
    with pytest.raises(DataError, match="column image_path, patient_id is missing"):  # only inside the block
        read_table(path)
    for wrong, message in (
        ({"label": "Krebs"}, "has no column Krebs, to be read as label; it has Datei, Krebs ja/nein, "),
        ({"path": "Datei"}, "path must be one of birads, .*, or begin with label_"),
        ({"patient_id": "Nummer", "exam_id": "nummer"}, "name one column, and copy it in the table to read it as two"),
        ({"patient_id": ""}, "column patient_id=: name one column"),
    ):
        with pytest.raises(DataError, match=message), columns_named(wrong):
            read_table(path)


def test_an_exact_spelling_precedes_others(folder: Path) -> None:
    path = write(folder, "image_path,Cancer,cancer,patient_id\nimg/a.png,0,1,P1\nimg/b.png,1,0,P2\n")
    for name, labels in (("Cancer", [0, 1]), ("cancer", [1, 0])):
        with columns_named({"label": name}) as used:
            table = read_table(path)
        assert [record.label for record in table.records] == labels and used == {"label"}
    message = "columns Cancer and cancer could be label=CANCER; write the name as in the table"
    with pytest.raises(DataError, match=message), columns_named({"label": "CANCER"}):
        read_table(path)
    with pytest.raises(DataError, match="name one col"), columns_named({"label": "x"}), columns_named({"view": "X"}):
        pass


def test_only_decimals_that_are_zero_are_taken_from_numbers_of_patients(folder: Path) -> None:
    same = {"5004.0": "5004", "007.00": "007", "7": "7"}
    kept = ["12345678901234567890", "12345678901234567891", "12,000", "1.5e1", "15.5", "-3.0", "P1.0", "1.0.0"]
    ids = [*same, *kept]
    rows = "".join(f'img/{number}.png,0,"{one}","{one}"\n' for number, one in enumerate(ids))
    table = read_table(write(folder, "image_path,label,patient_id,exam_id\n" + rows), check_files=False)
    assert [record.patient_id for record in table.records] == [*same.values(), *kept]
    assert [record.exam_id for record in table.records] == [*same.values(), *kept]


def test_identical_rows_are_read_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = HEADER + "img/a.png,0,P1,\nimg/b.png,1,P2,\n" + 2 * "img/a.png,0,P1,\n"
    assert len(read_table(write(folder, text)).records) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 't.csv'}: 2 rows are copies of an earlier row and left out, the first in line 4"
    ]
    assert len(read_table(folder / "t.csv", repeated=True).records) == 4
    other = write(folder, text + "img/a.png,1,P1,\nimg/b.png,0,P2,\n")
    message = r"line 6: a.png is already in line 2; keep one of them \(1 more: gigamorph data check lists all\)"
    with pytest.raises(DataError, match=message):
        read_table(other)


def test_single_class_of_zeros_and_ones(folder: Path) -> None:
    assert read_table(write(folder, HEADER + "img/a.png,1,P1,\n")).classes == ["0", "1"]
    many = "".join(f"img/{name},{label},P{label},\n" for label, name in enumerate(["a.png", "b.png", "c.dcm"]))
    assert read_table(write(folder, HEADER + many)).classes == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        (HEADER, "contains no images"),
        ("path,label,patient_id\nimg/a.png,0,P1\n", "column image_path is missing; it has path, label, patient_id"),
        ("image_path\nimg/a.png\n", "column label, patient_id is missing"),
        ("image_path,label,patient_id,label\nimg/a.png,0,P1,0\n", "duplicate column label"),
        (HEADER + "img/a.png,0,P1\n", "line 2: has 3 cells, but the header has 4"),
        (HEADER + "img/a.png,0,P1,train\n,0,P1,train\n", "line 3: image_path is empty"),
        (HEADER + "img/a.png,,P1,train\n", "line 2: label is empty"),
        (HEADER + "img/a.png,0,,train\n", "line 2: patient_id is empty"),
        (HEADER + "img/a.png,0,P1,holdout\n", "line 2: split 'holdout' must be one of train, val, test"),
        (HEADER + "img/a.png,0,P1,\nimg/a.png,1,P1,\n", "line 3: a.png is already in line 2"),
        (HEADER + "img/a.png,0,P1,\nimg/b.png,3,P2,\n", "labels 0, 3 lack 1, 2"),
        (HEADER + "img/z.png,0,P1,\nimg/b.png,1,P2,\n", "1 of 2 images do not exist: .*z.png"),
        (HEADER + '"img/a.png,0,P1,\n', "is not a csv file"),
        ("image_path,label,patient_id,laterality\nimg/a.png,0,P1,both\n", "laterality 'both' must be L or R"),
    ],
)
def test_wrong_tables(folder: Path, text: str, message: str) -> None:
    path = write(folder, text)
    with pytest.raises(DataError, match=message) as error:
        read_table(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_missing_among_a_thousand(folder: Path) -> None:
    for number in range(1000):
        (folder / "img" / f"{number}.png").touch()
    rows = "".join(f"img/{number}.png,{number % 2},P{number},train\n" for number in range(1000))
    path = write(folder, HEADER + rows)
    assert len(read_table(path).records) == 1000
    (folder / "img" / "537.png").unlink()
    with pytest.raises(DataError, match=r"1 of 1000 images do not exist: .*537\.png"):
        read_table(path)
    records = read_table(path, check_files=False).records
    assert missing_files(records) == [folder / "img" / "537.png"]
    for number in range(5):
        (folder / "img" / f"{number}.png").unlink()
    with pytest.raises(DataError, match=r"6 of 1000 images do not exist: .*0\.png, .*1\.png, .*2\.png, \.\.\."):
        read_table(path)


def test_other_encoding_and_binary(folder: Path) -> None:
    write(folder, HEADER, encoding="utf-16").write_bytes(HEADER.encode("utf-16")[:-1])
    with pytest.raises(DataError, match=r"is damaged .*; save it again"):
        read_table(folder / "t.csv")
    (folder / "t.csv").write_bytes(gzip.compress(HEADER.encode()))
    with pytest.raises(DataError, match=r"t\.csv"):
        read_table(folder / "t.csv")
    with pytest.raises(DataError, match="no such file"):
        read_table(folder / "absent.csv")


def test_folder_per_class(tmp_path: Path) -> None:
    for name in ("benign/1.png", "benign/P7/2.dcm", "benign/P7/3.dcm", "malign/1.png", "malign/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "malign" / "notes.txt").touch()
    table = read_table(tmp_path)
    assert table.classes == ["benign", "malign"]
    assert [(record.path.name, record.label) for record in table.records] == [
        ("1.png", 0),
        ("2.dcm", 0),
        ("3.dcm", 0),
        ("1.png", 1),
    ]
    patients = [record.patient_id for record in table.records]
    assert patients[1] == patients[2] == "P7"
    assert len(set(patients)) == 3  # benign/1.png and malign/1.png are two patients
    (tmp_path / "malign" / "empty").mkdir()
    with pytest.raises(DataError, match="contains no images"):
        read_table(tmp_path / "malign" / "empty")


@pytest.mark.parametrize("name", ["masks", "ROI_masks"])
def test_a_folder_of_masks_is_no_class(tmp_path: Path, name: str) -> None:
    for folder in ("images", name):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").touch()
    with pytest.raises(DataError, match=rf"{name}: has the name of a folder of masks, .*gigamorph data index"):
        read_table(tmp_path)
    assert [record.path.parent.name for record in read_table(tmp_path, labels=False).records] == ["images"]


def test_masks_beside_the_images_of_a_class_are_refused(tmp_path: Path) -> None:
    """BUSI has them so; nothing is to be learnt from them as from images."""
    for name in ("benign/benign (1).png", "benign/benign (1)_mask.png", "no_mask/a_mask.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"1 file has the name of a mask, the first .*\(1\)_mask.png; move"):
        read_table(tmp_path)
    (tmp_path / "benign" / "benign (1)_mask.png").unlink()
    assert len(read_table(tmp_path).records) == 2


def test_folder_per_split_and_class(tmp_path: Path) -> None:
    for name in ("train/0/a.png", "train/1/b.png", "val/1/c.png", "test/0/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    records = {record.path.name: record for record in read_table(tmp_path).records}
    assert {name: (record.split, record.label) for name, record in records.items()} == {
        "a.png": ("train", 0),
        "b.png": ("train", 1),
        "c.png": ("val", 1),
        "d.png": ("test", 0),
    }


def test_real_table_says_which_columns_it_lacks(real_data: Path) -> None:
    path = real_data / "tables" / "mass_case_description_test_set.csv"
    with pytest.raises(DataError, match=r"column image_path, label is missing; it has patient_id, .*data convert"):
        read_table(path)


def test_columns_of_the_schema(folder: Path) -> None:
    header = (
        "dicom_path,label,patient_id,study_id,density,birads,manufacturer,findings,mask_path,label_cancer,label_age"
    )
    findings = '"[{""kind"": ""mass"", ""box"": [1, 5, 2, 9], ""mask"": ""img/m.png"", ""birads"": ""4A""}]"'
    path = write(folder, f"{header}\nimg/a.png,0,P1,E1,C,BI-RADS 4a,GE,{findings},img/n.png,1,\n")
    record = read_table(path).records[0]
    assert (record.exam_id, record.density, record.birads, record.manufacturer) == ("E1", "C", "4A", "GE")
    assert record.labels == {"cancer": 1.0}  # an empty label is not known
    first, second = record.findings
    assert first == Finding(kind="mass", box=(1, 5, 2, 9), mask=folder / "img" / "m.png", birads="4A")
    assert second == Finding(mask=folder / "img" / "n.png")
    assert record.extra == {}


def test_densities_and_assessments_of_a_tables_own_are_kept(folder: Path) -> None:
    path = write(folder, "image_path,label,patient_id,density,birads\nimg/a.png,0,P1,3.0,4.0\nimg/b.png,1,P2,fatty,V\n")
    assert [(one.density, one.birads) for one in read_table(path).records] == [("C", "4"), ("fatty", "V")]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('"[{""box"": [5, 1, 2, 9]}]"', r"line 2: findings must be a JSON list of findings \(box \[5, 1, 2, 9\]"),
        ('"[{""bbox"": [1, 5, 2, 9]}]"', "unknown entry 'bbox'"),
        ('"[{""box"": [1, 5]}]"', "line 2: findings must be"),
        ('"{""box"": 1}"', "line 2: findings must be"),
        ("5", "line 2: findings must be"),
        ("[", "line 2: findings must be"),
    ],
)
def test_wrong_findings(folder: Path, cell: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(write(folder, f"image_path,label,patient_id,findings\nimg/a.png,0,P1,{cell}\n"))


def test_frames_of_one_file(folder: Path) -> None:
    text = "image_path,frame,label,patient_id\nimg/c.dcm,0,0,P1\nimg/c.dcm,3,1,P1\nimg/a.png,,1,P2\n"
    assert [record.frame for record in read_table(write(folder, text)).records] == [0, 3, None]
    with pytest.raises(DataError, match=r"line 5: c\.dcm is already in line 3; keep one"):
        read_table(write(folder, text + "img/c.dcm,3,0,P1\n"))
    # As pandas writes a column that has empty cells.
    pointed = text.replace(",3,", ",3.0,").replace("a.png,,", "a.png,nan,")
    assert [record.frame for record in read_table(write(folder, pointed)).records] == [0, 3, None]
    with pytest.raises(DataError, match=r"line 5: frame '0\.5' must be a number from 0"):
        read_table(write(folder, text + "img/c.dcm,0.5,0,P1\n"))
    with pytest.raises(DataError, match="line 5: frame 'first' must be a number from 0"):
        read_table(write(folder, text + "img/c.dcm,first,0,P1\n"))


def test_wrong_label_column(folder: Path) -> None:
    with pytest.raises(DataError, match="line 2: label_cancer 'perhaps' is not a number; leave it empty"):
        read_table(write(folder, "image_path,label,patient_id,label_cancer\nimg/a.png,0,P1,perhaps\n"))


@pytest.mark.parametrize(("word", "value"), [("yes", 1), ("No", 0), ("TRUE", 1), ("ja", 1), ("Nein", 0), ("oui", 1)])
def test_yes_and_no_are_labels(folder: Path, word: str, value: int) -> None:
    table = read_table(write(folder, f"image_path,label,patient_id,label_cancer\nimg/a.png,0,P1,{word}\n"))
    assert table.records[0].labels == {"cancer": value}


@pytest.mark.parametrize(("word", "side"), [("links", "L"), ("Rechts", "R"), ("gauche", "L"), ("Droite", "R")])
def test_sides_in_german_and_french(folder: Path, word: str, side: str) -> None:
    table = read_table(write(folder, f"image_path,label,patient_id,laterality\nimg/a.png,0,P1,{word}\n"))
    assert table.records[0].laterality == side


NAMES = st.text("abcÄ ,;\"'\t", min_size=1, max_size=6).map(str.strip).filter(bool)
BOXES = st.tuples(*[st.integers(0, 50)] * 2, *[st.integers(1, 50)] * 2).map(
    lambda v: (v[0], v[0] + v[2], v[1], v[1] + v[3])
)
FINDINGS = st.builds(
    Finding,
    kind=st.sampled_from(["", "mass", "a; b"]),
    box=st.none() | BOXES,
    outline=st.just(()) | st.just(((1.5, 2.0), (3.0, 4.0), (5.25, 6.0))),
    mask=st.none() | st.just(Path("/elsewhere/m.png")),
    pathology=st.sampled_from(["", "benign"]),
    birads=st.sampled_from(["", "4A"]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            NAMES,
            st.sampled_from([None, *SPLITS]),
            st.sampled_from([None, "L", "R"]),
            st.none() | NAMES,
            st.lists(FINDINGS, max_size=2),
            st.dictionaries(st.sampled_from(["cancer", "mass"]), st.sampled_from([0.0, 1.0, 0.25])),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_written_tables_are_read_back(tmp_path: Path, rows: list) -> None:
    records = [
        Record(
            tmp_path / f"{number}.png",
            number % 2,
            patient,
            split,
            side,
            None,
            {},
            exam,
            labels=labels,
            findings=tuple(findings),
        )
        for number, (patient, split, side, exam, findings, labels) in enumerate(rows)
    ]
    table = read_table(write_table(tmp_path / "out.csv", records, ["0", "1"]), check_files=False)
    assert table.records == records
    assert [record.labels for record in table.records] == [record.labels for record in records]


def test_table_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GigamorphError, match=r"file/t\.csv: the table cannot be written"):
        write_table(tmp_path / "file" / "t.csv", [], [])
    with pytest.raises(DataError, match=r"t\.parquet: tables are written as csv; the name must end in \.csv"):
        write_table(tmp_path / "t.parquet", [], [])


def test_a_table_that_does_not_fit_the_disk_leaves_the_former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_table(tmp_path / "t.csv", [Record(Path("a.npy"), 0, "P")], ["0"])
    before = written.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GigamorphError, match="No space left on device; the existing file is unchanged"):
        write_table(tmp_path / "t.csv", [], [])
    assert written.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_zarr_folders_are_one_image(tmp_path: Path) -> None:
    for name in ("0/a.zarr/c/0", "0/a.zarr/zarr.json", "1/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [record.path.name for record in read_table(tmp_path).records] == ["a.zarr", "b.jpg"]


def test_labels_with_a_decimal_comma_are_numbers(tmp_path):
    """They went on as names of classes, a score's every value as one of its own."""
    for number in range(2):
        (tmp_path / f"{number}.png").touch()
    (tmp_path / "t.csv").write_text("image_path;label;patient_id\n0.png;0,0;p\n1.png;1,0;q\n")
    assert read_table(tmp_path / "t.csv").classes == ["0", "1"]
    (tmp_path / "t.csv").write_text("image_path;label;patient_id\n0.png;0,2;p\n1.png;0,73;q\n")
    with pytest.raises(DataError, match=r"label 0,2 is not a class; .* turn scores into classes by a threshold"):
        read_table(tmp_path / "t.csv")
