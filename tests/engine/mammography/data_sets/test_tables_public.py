"""Readers of public data sets: the real tables, and look-alikes of each layout with its quirks."""

from collections import Counter
from pathlib import Path

import lookalikes
import pytest

from gigamorph.engine.datasets.tables import Finding, Record, read_table, write_table
from gigamorph.engine.datasets.tables.cells import read_rows
from gigamorph.engine.errors import DataError
from gigamorph.engine.mammography.data_sets import DATA_SETS, detect, read_data_set


def by_name(records: list[Record]) -> dict[str, Record]:
    return {record.path.stem: record for record in records}


@pytest.mark.parametrize(
    ("name", "images", "abnormalities", "patients"),
    [
        ("mass_case_description_train_set.csv", 1231, 1318, 691),
        ("mass_case_description_test_set.csv", 361, 378, 201),
        ("calc_case_description_test_set.csv", 284, 326, 151),
    ],
)
def test_every_row_of_the_real_cbis_tables(real_data: Path, name: str, images: int, abnormalities: int, patients: int):
    table = read_data_set("cbis-ddsm", real_data / "tables" / name, check_files=False)
    assert len(table.records) == images
    assert sum(len(record.findings) for record in table.records) == abnormalities
    assert len({record.patient_id for record in table.records}) == patients
    rows = read_rows(real_data / "tables" / name).rows
    pathology = Counter(finding.pathology for record in table.records for finding in record.findings)
    assert pathology == Counter(row["pathology"].lower().replace("_", " ") for row in rows)
    malignant = {row["image file path"] for row in rows if row["pathology"] == "MALIGNANT"}
    assert sum(record.label for record in table.records) == len(malignant)
    assert {record.laterality for record in table.records} == {"L", "R"}
    assert {record.view for record in table.records} == {"CC", "MLO"}
    assert all(finding.mask for record in table.records for finding in record.findings)
    assert {record.split for record in table.records} == {name.split("_")[3]}


def test_real_cbis_tables_together_do_not_leak(real_data: Path) -> None:
    records = read_data_set("cbis-ddsm", real_data / "tables", check_files=False).records
    # 19 films have masses and calcifications; of four the two tables have different labels.
    assert len(records) == 1231 + 361 + 284 - 19
    both = [record for record in records if len({finding.kind for finding in record.findings}) == 2]
    assert len(both) == 19
    malignant = [{f.kind for f in record.findings if f.pathology == "malignant"} for record in both]
    assert sum(len(kinds) == 1 for kinds in malignant) == 4
    assert [record.label for record in both] == [int(bool(kinds)) for kinds in malignant]
    splits: dict[str, set[str | None]] = {}
    for record in records:
        splits.setdefault(record.patient_id, set()).add(record.split)
    assert all(len(found) == 1 for found in splits.values())
    # 13 patients of the training set of masses are in the test set of calcifications.
    moved = {r.patient_id for r in records if r.split == "test" and "Mass-Training" in str(r.path)}
    assert len(moved) == 13


def test_every_row_of_the_real_chestxray14_table(real_data: Path) -> None:
    path = real_data / "tables" / "nih_Data_Entry_2017_v2020.csv.gz"
    table = read_data_set("chestxray14", path, check_files=False)
    assert len(table.records) == 112_120
    assert len({record.patient_id for record in table.records}) == 30_805
    assert Counter(record.label for record in table.records) == {0: 60_361, 1: 51_759}
    found = Counter(name for record in table.records for name, value in record.labels.items() if value)
    assert (found["Infiltration"], found["Hernia"], found["Pleural_Thickening"]) == (19_894, 227, 3_385)
    assert {record.view for record in table.records} == {"PA", "AP"}
    assert table.records[0].extra == {"age": "57", "sex": "M"}


@pytest.mark.parametrize(("nbia", "old"), [(False, False), (True, False), (False, True)])
def test_cbis_ddsm(tmp_path: Path, nbia: bool, old: bool) -> None:
    masks = lookalikes.cbis_ddsm(tmp_path, nbia=nbia, old_columns=old)
    table = read_data_set("cbis-ddsm", tmp_path)
    assert [(r.patient_id, r.laterality, r.view, r.split, r.label, r.density, r.birads) for r in table.records] == [
        ("P_00001", "L", "CC", "train", 1, "C", "4"),
        ("P_00001", "L", "MLO", "train", 0, "C", "4"),
        ("P_00002", "R", "CC", "test", 1, "C", "4"),  # in both tables: a benign mass, a malignant calcification
    ]
    assert all("full mammogram" in str(r.path) if nbia else r.path.name == "000000.dcm" for r in table.records)
    assert len({record.path for record in table.records}) == 3
    assert [len(record.findings) for record in table.records] == [2, 1, 2]
    found = [finding for record in table.records for finding in record.findings]
    assert [finding.mask for finding in found] == list(masks.values())
    assert [finding.kind for finding in found] == ["mass"] * 4 + ["calcification"]
    assert [finding.pathology for finding in found][1:3] == ["malignant", "benign without callback"]
    # Without its mask file only the crop is left, which is no mask.
    masks["Mass-Training_P_00001_LEFT_CC_1"].unlink()
    assert read_data_set("cbis-ddsm", tmp_path).records[0].findings[0].mask is None


@pytest.mark.parametrize(
    ("grade", "labels"),
    [
        ("1", {"suspicious": 0, "suspicious_without_3": 0}),
        ("3", {"suspicious": 0}),
        ("4b", {"suspicious": 1, "suspicious_without_3": 1}),
        ("0", {}),
    ],
)
def test_birads_3_of_inbreast_may_be_left_out(tmp_path: Path, grade: str, labels: dict[str, float]) -> None:
    header = "Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads\r\n"
    (tmp_path / "INbreast.csv").write_text(header + f"removed;removed;Right;CC;201001;22678622;4;{grade}\r\n")
    table = read_data_set("inbreast", tmp_path, label="suspicious_without_3", check_files=False)
    assert table.records[0].labels == labels
    assert table.records[0].label == labels.get("suspicious_without_3", -1)  # -1 goes to unlabelled.csv


@pytest.mark.parametrize("excel", [False, True])
def test_inbreast(tmp_path: Path, excel: bool) -> None:
    if excel:
        pytest.importorskip("python_calamine")
    content = (Path(__file__).parent / "files" / "inbreast.xls").read_bytes() if excel else None
    lookalikes.inbreast(tmp_path, excel=content)
    records = by_name(read_data_set("inbreast", tmp_path).records)
    assert len(records) == 3
    first = records["22678622_61b13c59bcba149e_MG_R_CC_ANON"]
    assert (first.patient_id, first.laterality, first.view) == ("61b13c59bcba149e", "R", "CC")
    assert (first.density, first.birads, first.label, first.exam_id) == ("D", "4A", 1, "61b13c59bcba149e_201001")
    mass, calcification = first.findings
    assert mass.kind == "mass"
    assert mass.box == (10, 20, 3, 13)
    assert mass.outline == ((10.25, 3.5), (11.0, 12.0), (19.9, 7.75))
    assert calcification == Finding(kind="calcification", box=(40, 41, 30, 31))
    second = records["22678646_61b13c59bcba149e_MG_R_ML_ANON"]  # the file name says ML for MLO
    assert (second.view, second.density, second.birads, second.label) == ("MLO", None, "1", 0)
    third = records["20586908_6c613a14b80a8591_MG_L_CC_ANON"]
    assert (third.density, third.birads, third.label, third.findings) == ("B", "6", 1, ())
    labels = {first.birads: first.labels["suspicious_without_3"], second.birads: second.labels["suspicious_without_3"]}
    assert labels == {"4A": 1, "1": 0}
    (tmp_path / "AllXML" / "22678622.xml").write_text("<plist>")
    with pytest.raises(DataError, match=r"22678622\.xml: damaged outlines"):
        read_data_set("inbreast", tmp_path)


def test_vindr_mammo(tmp_path: Path) -> None:
    lookalikes.vindr_mammo(tmp_path)
    records = by_name(read_data_set("vindr-mammo", tmp_path).records)
    first, second, third = (records[name] for name in ("i1", "i2", "i3"))
    assert (first.patient_id, first.exam_id, first.split, first.density, first.birads) == (
        "s1",
        "s1",
        "train",
        "C",
        "4",
    )
    assert first.path == tmp_path / "images" / "s1" / "i1.dicom"
    assert [record.label for record in (first, second, third)] == [1, 1, 0]
    assert [record.split for record in (first, second, third)] == ["train", "train", "test"]
    assert [record.manufacturer for record in (first, second, third)] == ["SIEMENS", None, "IMS"]
    mass, calcification = first.findings
    assert mass == Finding(kind="mass, architectural distortion", box=(6, 31, 2, 20), birads="4")
    assert calcification == Finding(kind="suspicious calcification", box=(2, 4, 1, 3), birads="3")
    assert second.findings == third.findings == ()


def test_rsna(tmp_path: Path) -> None:
    lookalikes.rsna(tmp_path)
    table = read_data_set("rsna", tmp_path)
    assert table.label_rule.startswith("cancer: 1 if the breast has a cancer")
    assert [record.label for record in table.records] == [1, 0, 0]
    assert [record.birads for record in table.records] == ["0", "1", None]
    assert [record.density for record in table.records] == ["B", "B", None]
    assert table.records[1].labels == {"cancer": 0, "biopsy": 0, "invasive": 0, "difficult_negative_case": 1}
    assert table.records[2].extra == {"site_id": "2", "implant": "1", "machine_id": "21"}
    assert table.records[0].path == tmp_path / "train_images" / "10" / "100.dcm"
    (tmp_path / "train.csv").unlink()
    test = read_data_set("rsna", tmp_path).records
    assert [(record.label, record.path.name, record.view) for record in test] == [(-1, "103.dcm", "MLO")]


def test_embed(tmp_path: Path) -> None:
    lookalikes.embed(tmp_path)
    records = by_name(read_data_set("embed", tmp_path).records)
    assert sorted(records) == ["a", "b", "c", "d"]  # not the screenshot
    assert {name: record.label for name, record in records.items()} == {"a": 1, "b": 0, "c": -1, "d": 0}
    assert [records[name].birads for name in "abcd"] == ["5", "1", "0", "1"]
    assert [records[name].density for name in "abcd"] == ["C", "C", None, "A"]
    assert records["a"].findings == (Finding(box=(5, 25, 6, 30)),)
    assert records["a"].manufacturer == "HOLOGIC, Inc."
    assert (records["d"].exam_id, records["d"].patient_id) == ("33", "3")
    assert records["d"].extra["FinalImageType"] == "cview"
    assert records["a"].path == tmp_path / "images" / "cohort_1" / "1" / "11" / "a.dcm"


@pytest.mark.parametrize("separator", [";", ","])
def test_csaw_cc(tmp_path: Path, separator: str) -> None:
    lookalikes.csaw_cc(tmp_path, separator)
    records = read_data_set("csaw-cc", tmp_path).records
    assert [(r.patient_id, r.laterality, r.view, r.label) for r in records] == [
        ("00001", "R", "CC", 1),
        ("00001", "L", "MLO", 0),  # the other breast of a case
        ("00002", "L", "CC", 0),
    ]
    mask = tmp_path / "00001_20990909_R_CC_1_mask.png"
    assert records[0].findings == (Finding(kind="tumour", mask=mask, pathology="malignant"),)
    assert records[0].exam_id == "00001_2012"
    assert records[0].extra["rad_timing"] == "1"


def test_cmmd(tmp_path: Path) -> None:
    pytest.importorskip("python_calamine")
    lookalikes.cmmd(tmp_path)
    records = read_data_set("cmmd", tmp_path).records
    assert [(r.patient_id, r.laterality, r.view, r.label) for r in records] == [
        ("D1-0001", "R", "CC", 0),
        ("D1-0001", "R", "MLO", 0),
        ("D2-0002", "L", "CC", 1),
        ("D2-0002", "R", "CC", -1),  # a breast of which the table says nothing
    ]
    assert records[2].extra == {"abnormality": "mass", "subtype": "Luminal A", "Age": "66"}


def test_cdd_cesm(tmp_path: Path) -> None:
    pytest.importorskip("python_calamine")
    lookalikes.cdd_cesm(tmp_path)
    records = by_name(read_data_set("cdd-cesm", tmp_path).records)
    assert {name: (r.label, r.labels["abnormal"], r.birads) for name, r in records.items()} == {
        "P1_L_DM_MLO": (1, 1, "5"),
        "P1_L_CM_MLO": (1, 1, "5"),
        "P2_R_DM_CC": (0, 1, "2"),  # two rows of one image
        "P3_L_DM_CC": (0, 0, "1"),
    }
    first = records["P1_L_DM_MLO"]
    assert first.path.parent.name == "Low energy images of CDD-CESM"
    assert records["P1_L_CM_MLO"].path.parent.name == "Subtracted images of CDD-CESM"
    assert first.findings == (
        Finding(box=(10, 20, 3, 13), outline=((10, 3), (11, 12), (19, 7))),
        Finding(box=(14, 27, 16, 25)),
    )
    assert (first.patient_id, first.density, first.extra["type"]) == ("1", "C", "DM")
    assert first.extra["findings_text"] == "mass, Skin thickening"


def test_mini_mias(tmp_path: Path) -> None:
    lookalikes.mini_mias(tmp_path)
    records = by_name(read_data_set("mini-mias", tmp_path).records)
    found = {name: (r.patient_id, r.laterality, r.label, r.labels["abnormal"]) for name, r in records.items()}
    assert found == {
        "mdb001": ("mias001", "L", 0, 1),
        "mdb002": ("mias001", "R", 0, 0),
        "mdb005": ("mias003", "L", 1, 1),
        "mdb059": ("mias030", "L", 0, 1),
    }
    # y counts from the bottom: row 1023 - 425 = 598.
    assert records["mdb001"].findings == (
        Finding(kind="circumscribed mass", box=(598 - 197, 598 + 198, 535 - 197, 535 + 198), pathology="benign"),
    )
    assert [finding.pathology for finding in records["mdb005"].findings] == ["benign", "malignant"]
    assert records["mdb059"].findings[0].box is None
    (tmp_path / "Info.txt").write_text("mdb001 G CIRC B 535 425 197\nmdb002 X NORM\n")
    with pytest.raises(DataError, match=r"Info\.txt, line 2: 'mdb002 X NORM' must be REFNUM BG CLASS"):
        read_data_set("mini-mias", tmp_path)


@pytest.mark.parametrize("first_release", [False, True])
def test_chestxray14(tmp_path: Path, first_release: bool) -> None:
    lookalikes.chestxray14(tmp_path, first_release=first_release)
    records = by_name(read_data_set("chestxray14", tmp_path).records)
    first, second, third = (records[name] for name in ("00000001_000", "00000001_001", "00000002_000"))
    assert [record.label for record in (first, second, third)] == [1, 0, 1]
    assert [record.split for record in (first, second, third)] == ["train", "train", "test"]
    assert [name for name, value in first.labels.items() if value] == ["finding", "Cardiomegaly", "Emphysema"]
    assert first.findings == (Finding(kind="cardiomegaly", box=(5, 16, 2, 22)),)
    assert first.extra == {"age": "58", "sex": "M"}
    assert (first.patient_id, first.exam_id, second.view) == ("1", "1_0", "AP")
    assert third.path == tmp_path / "images_003" / "images" / "00000002_000.png"
    single = read_data_set("chestxray14", tmp_path, label="Emphysema")
    assert [record.label for record in single.records] == [1, 0, 0]
    assert single.label_rule == "Emphysema: 1 if the report names Emphysema, 0 if not"


@pytest.mark.parametrize("name", list(DATA_SETS))
def test_detected_written_and_read_back(tmp_path: Path, name: str) -> None:
    """Every data set has a look-alike, is recognised, and survives the csv of our own schema."""
    if name in ("cmmd", "cdd-cesm"):
        pytest.importorskip("python_calamine")
    lookalikes.WRITERS[name](tmp_path / "in")
    assert detect(tmp_path / "in") == name
    table = read_data_set(name, tmp_path / "in")
    labelled = [record for record in table.records if record.label >= 0]
    back = read_table(write_table(tmp_path / "t.csv", labelled, table.classes))
    assert back.classes == table.classes
    assert back.records == labelled
    for ours, theirs in zip(labelled, back.records, strict=True):
        assert ours.labels == theirs.labels
        assert {key: value for key, value in ours.extra.items() if value} == {
            k: v for k, v in theirs.extra.items() if v
        }


@pytest.mark.parametrize("name", [name for name in DATA_SETS if name != "cmmd"])  # of CMMD only files tell what it has
def test_missing_images_are_refused_or_left_out(tmp_path: Path, name: str) -> None:
    if name == "cdd-cesm":
        pytest.importorskip("python_calamine")
    lookalikes.WRITERS[name](tmp_path)
    records = read_data_set(name, tmp_path).records
    records[0].path.unlink()
    with pytest.raises(DataError, match=f"1 of {len(records)} images of .* are missing: .*; download them"):
        read_data_set(name, tmp_path)
    assert read_data_set(name, tmp_path, skip_missing=True).records == records[1:]
    assert len(read_data_set(name, tmp_path, check_files=False).records) == len(records)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown data set 'ddsm'; choose from cbis-ddsm, inbreast"):
        read_data_set("ddsm", tmp_path)
    for name, data_set in DATA_SETS.items():
        with pytest.raises(DataError, match="no label 'cancers'; choose from"):
            read_data_set(name, tmp_path, label="cancers")
        with pytest.raises(DataError, match=r"contains no"):
            read_data_set(name, tmp_path)
        assert all(": " not in rule for rule in data_set.rules)
    with pytest.raises(DataError, match="no such file or folder"):
        read_data_set("rsna", tmp_path / "absent")
    (tmp_path / "train.csv").write_text("image_path,label\nx.png,0\n")
    assert detect(tmp_path) is None  # anybody may call a table so
    (tmp_path / "train.csv").write_text("patient_id,laterality,view\n1,L,CC\n")
    with pytest.raises(DataError, match=r"train\.csv: column image_id is missing; it has patient_id, laterality, view"):
        read_data_set("rsna", tmp_path)
    lookalikes.rsna(tmp_path)
    assert detect(tmp_path) == "rsna"
    lookalikes.chestxray14(tmp_path)
    assert detect(tmp_path) is None  # which of the two?


def test_excel_without_its_library_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lookalikes.cmmd(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "python_calamine", None)
    with pytest.raises(DataError, match=r"revision\.xlsx: Excel files need python-calamine: pip install"):
        read_data_set("cmmd", tmp_path)


def test_damaged_excel(tmp_path: Path) -> None:
    pytest.importorskip("python_calamine")
    (tmp_path / "CMMD_clinicaldata_revision.xlsx").write_bytes(b"PK\3\4 no")
    with pytest.raises(DataError, match=r"revision\.xlsx: is not a readable Excel file"):
        read_data_set("cmmd", tmp_path)


def test_documentation_states_every_rule() -> None:
    text = (Path(__file__).parents[4] / "docs" / "data.md").read_text()
    for name, data_set in DATA_SETS.items():
        label, rule = next(iter(data_set.rules.items()))
        assert f"| `{name}` | {label} | {rule} | {data_set.split} |" in text
        more = list(data_set.rules.items())[1:] if name != "chestxray14" else []
        assert all(f"|  | {label} | {rule} |  |" in text for label, rule in more)
