"""Small look-alikes of public data sets, laid out as they are downloaded: same files, columns and quirks, other pixels.

Every function fills a folder and returns what a reader must find in it: the expected records by image file name.
"""

import pickle
import plistlib
from collections.abc import Callable, Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

SHAPE = (48, 40)
# What a DICOM header may hold that nothing of ours may tell: give these to `dicom` and look for the values.
SECRETS = {
    "PatientName": "Doe^Jane",
    "PatientID": "MRN-4711",
    "PatientBirthDate": "19600229",
    "AccessionNumber": "ACC-0815",
    "StudyInstanceUID": "1.2.99.1",
    "SeriesInstanceUID": "1.2.99.2",
    "InstitutionName": "St. Elsewhere",
    "StudyDate": "20180304",
}


def dicom(path: Path, shape: tuple[int, int] = SHAPE, *, pixels: np.ndarray | None = None, **elements: object) -> Path:
    """A small uncompressed mammogram (12 bit) with pixels (uint16) of that shape, by default drawn from its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1.2")
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    ds.Modality, ds.Rows, ds.Columns = "MG", *shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    for name, value in elements.items():
        setattr(ds, name, value)
    if pixels is None:
        pixels = np.random.default_rng(list(str(path).encode())).integers(0, 4096, shape, dtype=np.uint16)
    ds.add_new("PixelData", "OW", pixels.tobytes())
    ds.save_as(path, enforce_file_format=True)
    return path


def table(path: Path, header: str, rows: Sequence[Sequence[object]], separator: str = ",", end: str = "\r\n") -> Path:
    """A table with the header as it stands; cells are quoted where they hold what must be quoted."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def quoted(cell: object) -> str:
        text = str(cell)
        return f'"{text}"' if any(sign in text for sign in (separator, "\n", '"')) else text

    lines = [header, *(separator.join(quoted(cell) for cell in row) for row in rows)]
    path.write_bytes((end.join(lines) + end).encode())
    return path


def sheet(path: Path, title: str, header: str, rows: Sequence[Sequence[object]]) -> Path:
    book = pytest.importorskip("openpyxl").Workbook()
    first = book.active
    first.title = title
    first.append(header.split(","))
    for row in rows:
        first.append(list(row))
    book.create_sheet("notes").append(["not", "this", "one"])
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return path


CBIS_MASS = _MASS = (
    "patient_id,breast_density,left or right breast,image view,abnormality id,abnormality type,mass shape,mass margins,assessment,pathology,subtlety,image file path,cropped image file path,ROI mask file path"  # noqa: E501
)
_CALC = "patient_id,breast density,left or right breast,image view,abnormality id,abnormality type,calc type,calc distribution,assessment,pathology,subtlety,image file path,cropped image file path,ROI mask file path"  # noqa: E501
_OLD = "patient_id,breast_density,side,view,abn_num,mass_shape,mass_margins,assessment,pathology,subtlety,od_img_path,od_crop_path,mask_path"  # noqa: E501


def cbis_ddsm(folder: Path, *, nbia: bool = False, old_columns: bool = False) -> dict[str, Path]:
    """Four images: P_00001 left CC with two masses, its MLO; P_00002 a calcification, in train and (P_00002) in test.

    nbia: files as NBIA delivers them, 1-1.dcm in folders with dates, and metadata.csv. old_columns: the first release.
    Returns the masks that are expected by series folder.
    """
    metadata: list[list[str]] = []
    number = 0

    def series(name: str, kind: str, files: dict[str, tuple[int, int]]) -> str:
        """Write the files of a series; returns "study UID/series UID"."""
        nonlocal number
        number += 1
        uids = f"1.3.6.{number}.1", f"1.3.6.{number}.2"
        if nbia:
            place = f"CBIS-DDSM/{name}/07-20-2016-DDSM-NA-{number:05d}/1.000000-{kind}-{number:05d}"
            metadata.append([uids[1], "CBIS-DDSM", "./" + place, kind])
            names = {old: f"1-{new}.dcm" for new, old in enumerate(files, 1)}
        else:
            place = f"{name}/{uids[0]}/{uids[1]}"
            names = {old: old for old in files}
        for old, shape in files.items():
            written[f"{uids[1]}/{old}"] = dicom(folder / place / names[old], shape, SeriesDescription=kind)
        return "/".join((name, *uids))

    written: dict[str, Path] = {}
    expected: dict[str, Path] = {}

    def row(part: str, patient: str, side: str, view: str, abnormality: int, pathology: str, image: str, swap: bool):
        name = f"{part}_{patient}_{side}_{view}_{abnormality}"
        crop, mask = ("000001.dcm", "000000.dcm") if swap else ("000000.dcm", "000001.dcm")
        roi = series(
            name, "ROI mask images", {"000000.dcm": SHAPE if swap else (9, 8), "000001.dcm": (9, 8) if swap else SHAPE}
        )
        expected[name] = written[f"{roi.split('/')[2]}/{mask}"]
        # The quirk: in some rows the names stand the other way round, and only sizes tell.
        shown = (f"{roi}/{mask}\n", f"{roi}/{crop}\n") if abnormality == 2 else (f"{roi}/{crop}\n", f"{roi}/{mask}\n")
        shape = ["OVAL", "SPICULATED"]
        middle = [] if old_columns else ["mass" if part.startswith("Mass") else "calcification"]
        return [patient, 3, side, view, abnormality, *middle, *shape, 4, pathology, 2, f"{image}/000000.dcm", *shown]

    def image(part: str, patient: str, side: str, view: str) -> str:
        return series(f"{part}_{patient}_{side}_{view}", "full mammogram images", {"000000.dcm": SHAPE})

    cc, mlo = image("Mass-Training", "P_00001", "LEFT", "CC"), image("Mass-Training", "P_00001", "LEFT", "MLO")
    mass = [
        row("Mass-Training", "P_00001", "LEFT", "CC", 1, "BENIGN", cc, False),
        row("Mass-Training", "P_00001", "LEFT", "CC", 2, "MALIGNANT", cc, True),
        row("Mass-Training", "P_00001", "LEFT", "MLO", 1, "BENIGN_WITHOUT_CALLBACK", mlo, True),
    ]
    third = image("Mass-Training", "P_00002", "RIGHT", "CC")
    mass.append(row("Mass-Training", "P_00002", "RIGHT", "CC", 1, "BENIGN", third, False))
    fourth = image("Calc-Test", "P_00002", "RIGHT", "CC")
    calc = [row("Calc-Test", "P_00002", "RIGHT", "CC", 1, "MALIGNANT", fourth, True)]
    table(folder / "mass_case_description_train_set.csv", _OLD if old_columns else _MASS, mass)
    table(folder / "calc_case_description_test_set.csv", _OLD if old_columns else _CALC, calc)
    if nbia:
        table(folder / "metadata.csv", "Series UID,Collection,File Location,Series Description", metadata)
    return expected


def inbreast(folder: Path, *, excel: bytes | None = None) -> None:
    """Three images of two patients, one with a mass and a calcification point; excel: the bytes of an INbreast.xls."""
    header = "Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads"
    rows = [
        ["removed", "removed", "R", "CC", "201001", "22678622", "4", "4a"],
        ["removed", "removed", "R", "MLO", "201001", "22678646", "", "1"],
        ["removed", "removed", "L", "CC", "200809", "20586908", "2 ", "6"],
    ]
    if excel is None:
        table(folder / "INbreast.csv", header, rows, separator=";")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "INbreast.xls").write_bytes(excel)
    for row, patient, view in zip(
        rows, ("61b13c59bcba149e",) * 2 + ("6c613a14b80a8591",), ("CC", "ML", "CC"), strict=True
    ):
        dicom(folder / "AllDICOMs" / f"{row[5]}_{patient}_MG_{row[2]}_{view}_ANON.dcm")
    rois = [
        {"Name": "Mass", "Point_px": ["(3.5, 10.25)", "(12.0, 11.0)", "(7.75, 19.9)"], "NumberOfPoints": 3},
        {"Name": "Calcification", "Point_px": ["(30.2, 40.7)"], "NumberOfPoints": 1},
    ]
    (folder / "AllXML").mkdir(exist_ok=True)
    (folder / "AllXML" / "22678622.xml").write_bytes(plistlib.dumps({"Images": [{"ImageIndex": 0, "ROIs": rois}]}))


def vindr_mammo(folder: Path) -> None:
    """One exam of two images in training and one in test; a mass with distortion, and an image without finding."""
    header = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,split"
    rows = [
        ["s1", "e1", "i1", "L", "CC", 48, 40, "BI-RADS 4", "DENSITY C", "training"],
        ["s1", "e1", "i2", "L", "MLO", 48, 40, "BI-RADS 4", "DENSITY C", "training"],
        ["s2", "e2", "i3", "R", "CC", 48, 40, "BI-RADS 2", "DENSITY A", "test"],
    ]
    table(folder / "breast-level_annotations.csv", header, rows, end="\n")
    header = header.replace(",split", ",finding_categories,finding_birads,xmin,ymin,xmax,ymax,split")
    findings = [
        [*rows[0][:-1], "['Mass', 'Architectural Distortion']", "BI-RADS 4", 2.4, 5.6, 20.2, 30.9, "training"],
        [*rows[0][:-1], "['Suspicious Calcification']", "BI-RADS 3", 1, 2, 3, 4, "training"],
        [*rows[2][:-1], "['No Finding']", "", "", "", "", "", "test"],
    ]
    table(folder / "finding_annotations.csv", header, findings, end="\n")
    table(folder / "metadata.csv", "SOP Instance UID,Manufacturer", [["i1", "SIEMENS"], ["i3", "IMS"]], end="\n")
    for row in rows:
        dicom(folder / "images" / str(row[0]) / f"{row[2]}.dicom")


def rsna(folder: Path) -> None:
    header = "site_id,patient_id,image_id,laterality,view,age,cancer,biopsy,invasive,BIRADS,implant,density,machine_id,difficult_negative_case"  # noqa: E501
    rows = [
        [1, 10, 100, "L", "CC", 60.0, 1, 1, 1, 0.0, 0, "B", 49, "False"],
        [1, 10, 101, "R", "MLO", 60.0, 0, 0, 0, 1.0, 0, "B", 49, "True"],
        [2, 11, 102, "L", "MLO", "", 0, 0, 0, "", 1, "", 21, "False"],
    ]
    table(folder / "train.csv", header, rows, end="\n")
    header = "site_id,patient_id,image_id,laterality,view,age,implant,machine_id,prediction_id"
    table(folder / "test.csv", header, [[2, 12, 103, "L", "MLO", 81, 0, 21, "12_L"]], end="\n")
    for part, patient, image in (("train", 10, 100), ("train", 10, 101), ("train", 11, 102), ("test", 12, 103)):
        dicom(folder / f"{part}_images" / str(patient) / f"{image}.dcm")


def embed(folder: Path) -> None:
    """Exam 1: cancer left, negative right; exam 2: recalled, no pathology; exam 3: bilateral negative; a screenshot."""
    header = "empi_anon,acc_anon,anon_dicom_path,study_date_anon,FinalImageType,ImageLateralityFinal,ViewPosition,spot_mag,num_roi,ROI_coords,Manufacturer"  # noqa: E501
    old = "/mnt/NAS2/mammo/anon_dicom"

    def row(patient: int, exam: int, name: str, side: str, kind: str = "2D", roi: str = "[]") -> list[object]:
        path = f"{old}/cohort_1/{patient}/{exam}/{name}.dcm"
        return [patient, exam, path, "2013-05-01", kind, side, "MLO", "", int(roi != "[]"), roi, "HOLOGIC, Inc."]

    rows = [
        row(1, 11, "a", "L", roi="[[5, 6, 25, 30]]"),
        row(1, 11, "b", "R"),
        row(2, 22, "c", "L"),
        row(3, 33, "d", "L", "cview"),
        row(1, 11, "e", "L", "ROI_SSC"),
    ]
    table(folder / "tables" / "EMBED_OpenData_metadata.csv", header, rows, end="\n")
    header = "empi_anon,acc_anon,tissueden,asses,side,path_severity"
    clinical = [
        [1, 11, 3.0, "M", "L", 1.0],
        [1, 11, 3.0, "S", "L", 4.0],
        [1, 11, 3.0, "N", "R", ""],
        [2, 22, 5.0, "A", "L", ""],
        [3, 33, 1.0, "N", "", ""],
    ]
    table(folder / "tables" / "EMBED_OpenData_clinical.csv", header, clinical, end="\n")
    for patient, exam, name in ((1, 11, "a"), (1, 11, "b"), (2, 22, "c"), (3, 33, "d")):
        dicom(folder / "images" / "cohort_1" / str(patient) / str(exam) / f"{name}.dcm")


def csaw_cc(folder: Path, separator: str = ";") -> None:
    header = "anon_patientid;exam_year;x_age;x_case;x_cancer_laterality;x_type;rad_timing;imagelaterality;viewposition;libra_percentdensity;anon_filename"  # noqa: E501
    rows = [
        ["00001", 2012, 55, 1, "Right", 2, 1, "Right", "CC", 12.5, "00001_20990909_R_CC_1.dcm"],
        ["00001", 2012, 55, 1, "Right", 2, 1, "Left", "MLO", 11.5, "00001_20990909_L_MLO_1.dcm"],
        ["00002", 2014, 48, 0, "", "", "", "Left", "CC", 30.1, "00002_20990909_L_CC_1.dcm"],
    ]
    name = "CSAW-CC_breast_cancer_screening_data.csv"
    table(folder / name, header.replace(";", separator), rows, separator=separator, end="\n")
    for row in rows:
        dicom(folder / str(row[-1]))
    mask = np.zeros(SHAPE, np.uint8)
    mask[10:20, 5:15] = 255
    (folder / "00001_20990909_R_CC_1_mask.png").write_bytes(imagecodecs.png_encode(mask))


def cmmd(folder: Path) -> None:
    """Side and view stand only in the headers; D1-0002's left breast is not in the table."""
    header = "ID1,LeftRight,Age,number,abnormality,classification,subtype"
    rows = [
        ["D1-0001", "R", 44, 2, "calcification", "Benign", None],
        ["D2-0002", "L", 66, 2, "mass", "Malignant", "Luminal A"],
    ]
    sheet(folder / "CMMD_clinicaldata_revision.xlsx", "Sheet1", header, rows)
    views = {"CC": "399162004", "MLO": "399368009"}
    images = [("D1-0001", "R", "CC"), ("D1-0001", "R", "MLO"), ("D2-0002", "L", "CC"), ("D2-0002", "R", "CC")]
    for number, (patient, side, view) in enumerate(images, 1):
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = views[view], "SCT", view
        place = folder / "CMMD" / patient / "07-18-2010-NA-NA-79377" / "1.000000-NA-70244" / f"1-{number}.dcm"
        dicom(place, PatientID=patient, ImageLaterality=side, ViewCodeSequence=[code])


def cdd_cesm(folder: Path) -> None:
    header = "Image_name,Patient_ID,Side,Type,Age,Breast density (ACR),BIRADS,Findings,View,Tags,Machine,Pathology Classification/ Follow up"  # noqa: E501
    rows = [
        ["P1_L_DM_MLO ", 1, "L", "DM", 51, "C", "5$4", "mass$Skin thickening", "MLO", "", 1, "Malignant"],
        ["P1_L_CM_MLO", 1, "L", "CESM", 51, "C", "5", "Mass enhancement", "MLO", "", 1, "Malignant"],
        ["P2_R_DM_CC", 2, "R", "DM", 60, "B", 2, "", "CC", "", 2, "Benign"],
        ["P2_R_DM_CC", 2, "R", "DM", 60, "B", 1, "", "CC", "", 2, "Normal"],
        ["P3_L_DM_CC", 3, "L", "DM", 44, "A", 1, "", "CC", "", 2, "Normal"],
    ]
    sheet(folder / "Radiology manual annotations.xlsx", "all", header, rows)
    polygon = '{""name"":""polygon"",""all_points_x"":[3,12,7],""all_points_y"":[10,11,19]}'
    ellipse = '{""name"":""ellipse"",""cx"":20,""cy"":20,""rx"":4,""ry"":6,""theta"":0}'
    lines = [
        "#filename,file_size,region_shape_attributes",
        f'P1_L_DM_MLO .jpg,1,"{polygon}"',
        f'P1_L_DM_MLO.jpg,1,"{ellipse}"',
        'P3_L_DM_CC.jpg,1,"{}"',
    ]
    (folder / "Radiology_hand_drawn_segmentations_v2.csv").write_text("\n".join(lines) + "\n")
    for name in ("P1_L_DM_MLO", "P2_R_DM_CC", "P3_L_DM_CC", "P1_L_CM_MLO"):
        place = folder / ("Subtracted" if "CM" in name else "Low energy")
        place = place.with_name(f"{place.name} images of CDD-CESM")
        place.mkdir(exist_ok=True)
        grey = np.random.default_rng(list(name.encode())).integers(0, 256, SHAPE, dtype=np.uint8)
        (place / f"{name}.jpg").write_bytes(imagecodecs.jpeg8_encode(grey, level=95))


def mini_mias(folder: Path) -> None:
    """Four films: benign, normal, with two abnormalities of which one malignant, and a note instead of a place."""
    text = """
mdb001 G CIRC B 535 425 197
mdb002 D NORM
mdb005 F CIRC B 477 133 30
mdb005 F CIRC M 500 168 26
mdb059 F CIRC B *NOTE 3*
"""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Info.txt").write_text("MINI-MIAS\nREFNUM BG CLASS SEVERITY X Y RADIUS\n" + text)
    for name in ("mdb001", "mdb002", "mdb005", "mdb059"):
        (folder / f"{name}.pgm").write_bytes(b"P5\n1024 1024\n255\n" + bytes(1024 * 1024))


def chestxray14(folder: Path, *, first_release: bool = False) -> None:
    """Three images of two patients; first_release: the table of 2017 with its trailing comma and ages like 058Y."""
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"  # noqa: E501
    end, age = ([""], "058Y") if first_release else ([], "58")
    rows = [
        ["00000001_000.png", "Cardiomegaly|Emphysema", 0, 1, age, "M", "PA", 2682, 2749, 0.143, 0.143, *end],
        ["00000001_001.png", "No Finding", 1, 1, age, "M", "AP", 2894, 2729, 0.143, 0.143, *end],
        ["00000002_000.png", "Pleural_Thickening", 0, 2, age, "F", "PA", 2500, 2048, 0.168, 0.168, *end],
    ]
    name = "Data_Entry_2017.csv" if first_release else "Data_Entry_2017_v2020.csv"
    table(folder / name, header + "," * len(end), rows, end="\n")
    (folder / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n")
    (folder / "test_list.txt").write_text("00000002_000.png")
    boxes = [["00000001_000.png", "Cardiomegaly", 2.5, 5.25, 20.0, 10.5, "", "", ""]]
    table(folder / "BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h],,,", boxes, end="\n")
    for number, row in enumerate(rows):
        place = folder / f"images_{number + 1:03d}" / "images" / str(row[0])
        place.parent.mkdir(parents=True)
        place.write_bytes(imagecodecs.png_encode(np.full(SHAPE, number, np.uint8)))


EXAMS: list[dict[str, object]] = [
    {
        "horizontal_flip": "NO",
        "L-CC": ["0_L-CC"],
        "R-CC": ["0_R-CC"],
        "L-MLO": ["0_L-MLO"],
        "R-MLO": ["0_R-MLO"],
        "best_center": {"L-CC": [(1136.0, 158.0)]},
        "cancer_label": {"unknown": 0, "left_benign": 1, "right_benign": 0, "left_malignant": 0, "right_malignant": 1},
        "R-CC_malignant_seg": ["0_R-CC_malignant"],
    },
    {"horizontal_flip": "YES", "L-CC": ["1_L_CC"], "R-CC": ["1_R_CC", "1_R_CC_2"], "L-MLO": [], "R-MLO": []},
]


def nyu(folder: Path, protocol: int = 4) -> Path:
    """Two exams of seven images, the second stored mirrored and without labels; returns the one mask."""
    names = [f"images/{n}" for n in ("0_L-CC", "0_R-CC", "0_L-MLO", "0_R-MLO", "1_L_CC", "1_R_CC", "1_R_CC_2")]
    for number, name in enumerate([*names, "segmentation/0_R-CC_malignant"]):
        place = folder / f"{name}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(imagecodecs.png_encode(np.full(SHAPE, number, np.uint16)))
    (folder / "exam_list_before_cropping.pkl").write_bytes(pickle.dumps(EXAMS, protocol))
    return place


WRITERS: dict[str, Callable[[Path], object]] = {
    "cbis-ddsm": cbis_ddsm,
    "inbreast": inbreast,
    "vindr-mammo": vindr_mammo,
    "rsna": rsna,
    "embed": embed,
    "csaw-cc": csaw_cc,
    "cmmd": cmmd,
    "cdd-cesm": cdd_cesm,
    "mini-mias": mini_mias,
    "nyu": nyu,
    "chestxray14": chestxray14,
}
