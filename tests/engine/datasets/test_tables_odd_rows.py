"""Odd rows of public data sets: cells that say nothing, rows that repeat, boxes beyond the film."""

from pathlib import Path

import lookalikes
import pytest

from gigamorph.engine.datasets.tables import Finding, Record, read_table, write_table
from gigamorph.engine.errors import DataError
from gigamorph.engine.images.affine import Affine
from gigamorph.engine.mammography.data_sets import read_data_set
from gigamorph.engine.predict.convert import Conversion

VINDR = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,split"


def rsna(tmp_path: Path, *cancer: str) -> list[Record]:
    header = "patient_id,image_id,laterality,view,cancer"
    rows = [[number, number, "L", "CC", cell] for number, cell in enumerate(cancer)]
    lookalikes.table(tmp_path / "train.csv", header, rows)
    return read_data_set("rsna", tmp_path, check_files=False).records


def test_truths_of_rsna(tmp_path: Path) -> None:
    assert [r.label for r in rsna(tmp_path, "1", "0.0", "", "nan", "TRUE", "False")] == [1, 0, -1, -1, 1, 0]
    for odd in ("2", "0.5", "yes"):
        with pytest.raises(DataError, match=rf"train.csv, line 3: cancer '{odd}' must be 0 or 1; download"):
            rsna(tmp_path, "1", odd)


def test_pathologies_of_cbis_ddsm(tmp_path: Path) -> None:
    def label(pathology: str) -> int:
        row = ["P_00001", 3, "LEFT", "CC", 1, "mass", "OVAL", "SPICULATED", 4, pathology, 2, "a/1/2/000000.dcm", "", ""]
        lookalikes.table(tmp_path / "mass_case_description_train_set.csv", lookalikes.CBIS_MASS, [row])
        return read_data_set("cbis-ddsm", tmp_path, check_files=False).records[0].label

    assert [label(text) for text in ("MALIGNANT ", "malignant", "BENIGN_WITHOUT_CALLBACK")] == [1, 1, 0]
    for odd in ("", "BENGIN"):
        with pytest.raises(DataError, match=rf"_set.csv, line 2: pathology '{odd}' must be one of MALIGNANT, BENIGN, "):
            label(odd)


def test_cases_of_csaw_cc_whose_side_is_not_known(tmp_path: Path) -> None:
    """Neither breast of such a case is known to have the cancer, or not to have it."""
    header = "anon_patientid,x_case,x_cancer_laterality,imagelaterality,viewposition,anon_filename"
    rows = [
        [1, 1, "Left", "Left", "CC", "a.dcm"],
        [1, 1, "Left", "Right", "CC", "b.dcm"],
        [2, 1, "", "Left", "CC", "c.dcm"],
        [2, 1, "", "", "CC", "d.dcm"],
        [3, 1, "Bilateral", "Left", "CC", "e.dcm"],
        [4, "", "", "Left", "CC", "f.dcm"],
        [5, 0, "", "", "CC", "g.dcm"],
    ]
    lookalikes.table(tmp_path / "CSAW-CC_breast_cancer_screening_data.csv", header, rows)
    records = read_data_set("csaw-cc", tmp_path, check_files=False).records
    assert [record.label for record in records] == [1, 0, -1, -1, -1, -1, 0]


@pytest.mark.parametrize("first", ["Malignant", "Benign"])
def test_a_breast_in_two_rows_of_cmmd_is_malignant_if_one_is(tmp_path: Path, first: str) -> None:
    second = {"Malignant": "Benign", "Benign": "Malignant"}[first]
    rows = [["D1-0001", "R", first, "mass"], ["D1-0001", "R", second, "calcification"]]
    lookalikes.table(tmp_path / "CMMD_clinicaldata_revision.csv", "ID1,LeftRight,classification,abnormality", rows)
    lookalikes.dicom(tmp_path / "CMMD" / "D1-0001" / "1-1.dcm", PatientID="D1-0001", ImageLaterality="R")
    (record,) = read_data_set("cmmd", tmp_path).records
    assert record.label == 1 and record.extra["abnormality"] == {"Malignant": "mass"}.get(first, "calcification")


def test_severity_nan_of_embed(tmp_path: Path) -> None:
    header = "empi_anon,acc_anon,anon_dicom_path,ImageLateralityFinal,ViewPosition"
    lookalikes.table(tmp_path / "EMBED_OpenData_metadata.csv", header, [[1, 11, "a.dcm", "L", "CC"]])
    header = "empi_anon,acc_anon,asses,side,path_severity"
    lookalikes.table(tmp_path / "EMBED_OpenData_clinical.csv", header, [[1, 11, "N", "L", "nan"]])
    assert read_data_set("embed", tmp_path, check_files=False).records[0].label == 0


def test_numbers_of_embed_with_and_without_decimals(tmp_path: Path) -> None:
    header = "empi_anon,acc_anon,anon_dicom_path,ImageLateralityFinal,ViewPosition"
    lookalikes.table(tmp_path / "EMBED_OpenData_metadata.csv", header, [["5004.0", "9011.0", "a.dcm", "L", "CC"]])
    header = "empi_anon,acc_anon,asses,side,path_severity"
    lookalikes.table(tmp_path / "EMBED_OpenData_clinical.csv", header, [[5004, 9011, "S", "L", "0"]])
    record = read_data_set("embed", tmp_path, check_files=False).records[0]
    assert (record.patient_id, record.exam_id, record.label) == ("5004", "9011", 1)


def vindr(tmp_path: Path, *rows: list[object]) -> list[Record]:
    lookalikes.table(tmp_path / "breast-level_annotations.csv", VINDR, rows)
    return read_data_set("vindr-mammo", tmp_path, check_files=False).records


def test_an_image_in_two_rows(tmp_path: Path) -> None:
    """It is one image if they say the same, and an error where they do not: no table may hold it twice."""
    row = ["s", "e", "i", "L", "CC", 96, 80, "BI-RADS 5", "DENSITY C", "training"]
    (record,) = vindr(tmp_path, row, row)
    assert record.label == 1
    with pytest.raises(DataError, match=r"i.dicom is in two rows that disagree on birads, labels; remove one"):
        vindr(tmp_path, row, [*row[:7], "BI-RADS 1", *row[8:]])
    with pytest.raises(DataError, match="disagree on split; "):
        vindr(tmp_path, row, [*row[:9], "test"])


def test_a_finding_in_two_rows_is_one(tmp_path: Path) -> None:
    found = ["i", "['Mass']", "BI-RADS 5", 10, 20, 30, 40]
    header = "image_id,finding_categories,finding_birads,xmin,ymin,xmax,ymax"
    lookalikes.table(tmp_path / "finding_annotations.csv", header, [found, found, [*found[:3], 11, 20, 30, 40]])
    (record,) = vindr(tmp_path, ["s", "e", "i", "L", "CC", 96, 80, "BI-RADS 5", "DENSITY C", "training"])
    assert [finding.box for finding in record.findings] == [(20, 40, 10, 30), (20, 40, 11, 30)]


def test_a_place_beside_the_film_of_mini_mias(tmp_path: Path) -> None:
    (tmp_path / "Info.txt").write_text("mdb001 G CIRC M 1200 1100 10\nmdb002 G CIRC B 1020 3 10\n")
    beside, at_the_border = read_data_set("mini-mias", tmp_path, check_files=False).records
    assert beside.findings[0].box is None and beside.label == 1
    assert at_the_border.findings[0].box == (1010, 1024, 1010, 1024)


def test_an_image_in_both_lists_of_chestxray14(tmp_path: Path) -> None:
    header = "Image Index,Finding Labels,Patient ID,View Position"
    lookalikes.table(tmp_path / "Data_Entry_2017.csv", header, [["a.png", "No Finding", 1, "PA"]])
    for name in ("train_val_list.txt", "test_list.txt"):
        (tmp_path / name).write_text("a.png\n")
    with pytest.raises(DataError, match=r"test_list.txt: a.png is also in train_val_list.txt; download both again"):
        read_data_set("chestxray14", tmp_path, check_files=False)


def test_boxes_beyond_the_image_are_cut_when_it_is_mirrored(tmp_path: Path) -> None:
    """What `data convert --images` writes is read back, wherever a box of the table ends."""
    boxes = (10, 20, 30, 500), (10, 20, 90, 120), (5, 15, 5, 15)
    record = Record(tmp_path / "a.tif", 1, "p", findings=tuple(Finding("mass", box) for box in boxes))
    mirrored = Affine(-1.0, 0.0, 80.0, 0.0, 1.0, 0.0)
    found = Conversion(tmp_path).converted(record, "a", (), mirrored, "a.tif")
    assert [finding.box for finding in found.findings] == [(10, 20, 0, 50), None, (5, 15, 65, 75)]
    table = write_table(tmp_path / "table.csv", [found], ["0", "1"])
    assert read_table(table, check_files=False).records[0].findings == found.findings
