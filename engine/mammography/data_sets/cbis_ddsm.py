"""CBIS-DDSM (TCIA): digitised films with a mask per abnormality; four tables, in two generations of column names.

A table has a row per abnormality. Its paths are those of the first release, StudyUID/SeriesUID/00000N.dcm. Later
downloads name the files 1-1.dcm, in folders named after dates and series descriptions. So files are looked up by the
UID of their series, which is the name of the last folder (tcia_utils, Kaggle's JPEG release) or in NBIA's metadata.csv.
A film with masses and calcifications is in both tables, under two names and with two labels: it is one image here, and
malignant if any finding is. Cropped image and mask are in one series and are swapped in some rows: the mask is the
larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ...datasets.tables import values
from ...datasets.tables.cells import Rows, read_rows
from ...datasets.tables.schema import Finding, Record
from ...errors import DataError
from ...images.header import read_info
from ...images.open import open_pixels
from .files import DataSet, Files, unlabelled_record

_TABLES = {
    f"{kind}_case_description_{split}_set.csv": split for split in ("train", "test") for kind in ("mass", "calc")
}
# Column names of the first generation, and the two spellings of the second.
_NAMES = {
    "side": "left_or_right_breast",
    "view": "image_view",
    "abn_num": "abnormality_id",
    "abn_type": "abnormality_type",
    "od_img_path": "image_file_path",
    "od_crop_path": "cropped_image_file_path",
    "mask_path": "roi_mask_file_path",
}
_ENDINGS = (".dcm", ".jpg")
"""Suffixes of TCIA's images, and of Kaggle's release in 8-bit JPEG: jpeg/SERIES UID/1-172.jpg."""
_PATHOLOGIES = ("MALIGNANT", "BENIGN", "BENIGN_WITHOUT_CALLBACK")
_NEEDED = ("patient_id", "left_or_right_breast", "image_view", "pathology", "image_file_path")


def read(files: Files) -> list[Record]:
    """One record per film, with a finding per abnormality."""
    series = _Series(files)
    rows = [
        {**row, "split": split, "kind": "mass" if name.startswith("mass") else "calcification"}
        for name, split in _TABLES.items()
        if (path := files.table(name)) is not None
        for row in _rows(read_rows(path))
    ]
    if not rows:
        raise DataError(f"{files.path}: contains none of {', '.join(_TABLES)}; pass the folder of the data set")
    # The tables of masses and of calcifications are split separately and share patients: a patient of either test set
    # is in test.
    test = {row["patient_id"] for row in rows if row["split"] == "test"}
    # A film with masses and calcifications is in both tables, under two names.
    films: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        film = row["patient_id"], row["left_or_right_breast"].upper(), row["image_view"].upper()
        films.setdefault(film, []).append(row)
    return [_record(group, "test" if group[0]["patient_id"] in test else "train", series) for group in films.values()]


def _rows(table: Rows) -> list[dict[str, str]]:
    plain = [name.lower().replace(" ", "_") for name in table.header]
    names = [_NAMES.get(name, name) for name in plain]
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise DataError(f"{table.path}: column {', '.join(missing)} is missing; it has {', '.join(table.header)}")
    rows = [dict(zip(names, row.values(), strict=True)) for row in table.rows]
    for place, row in zip(table.places, rows, strict=True):
        if row["pathology"].upper() not in _PATHOLOGIES:
            reason = f"pathology {row['pathology']!r} must be one of {', '.join(_PATHOLOGIES)}"
            raise DataError(f"{table.path}, {place}: {reason}; download the table again")
    return [{**row, "pathology": row["pathology"].upper()} for row in rows]


def _record(rows: Sequence[dict[str, str]], split: str, series: _Series) -> Record:
    first = rows[0]
    images = [series.image(path) for path in dict.fromkeys(row["image_file_path"] for row in rows)]
    image = next((path for path in images if path.is_file()), images[0])
    densities = [d for row in rows if (d := values.density(row.get("breast_density", "")))]
    grades = [grade for row in rows if (grade := values.birads(row.get("assessment", "")))]
    return unlabelled_record(
        path=image,
        patient_id=first["patient_id"],
        split=split,
        laterality=values.side(first["left_or_right_breast"]),
        view=first["image_view"].upper(),
        exam_id=first["patient_id"],
        density=max(densities, default=None),
        birads=max(grades, default=None),
        labels={"malignant": float(any(row["pathology"] == "MALIGNANT" for row in rows))},
        findings=tuple(_finding(row, image, series) for row in rows),
        extra={"abnormalities": str(len(rows))},
    )


def _finding(row: dict[str, str], image: Path, series: _Series) -> Finding:
    mask = series.mask(row.get("roi_mask_file_path", ""), row.get("cropped_image_file_path", ""), image)
    return Finding(
        kind=row["kind"],
        mask=mask,
        pathology=row["pathology"].lower().replace("_", " "),
        birads=values.birads(row.get("assessment", "")) or "",
    )


class _Series:
    """The files of a series by its UID, for all layouts of the download."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._folders: dict[str, Path] = {}
        if not files.path.is_dir():
            return
        # Most tools name the last folder after the series; for NBIA's tool, metadata.csv lists the folders.
        for path in files.matching(_ENDINGS):
            self._folders.setdefault(path.parent.name, path.parent)
        for path in files.matching(["metadata.csv"]):
            for row in read_rows(path).rows:
                if row.get("Series UID") and row.get("File Location"):
                    folder = row["File Location"].replace("\\", "/").removeprefix("./")
                    self._folders[row["Series UID"]] = path.parent / folder

    def files(self, path: str) -> list[Path]:
        """The image files of the series of a path in the table; empty if it was not downloaded."""
        wanted = PurePosixPath(path)
        own = self._files.folder / wanted.parent
        below = self._files.folder / "CBIS-DDSM" / wanted.parent
        for folder in (own, below, self._folders.get(wanted.parent.name)):
            if path and folder is not None and folder.is_dir():
                found = sorted(file for file in folder.iterdir() if file.suffix.lower() in _ENDINGS)
                if found:
                    return found
        return []

    def image(self, path: str) -> Path:
        """The path of the full image; the path in the table if it was not downloaded."""
        found = self.files(path)
        return found[0] if found else self._files.folder / path

    def mask(self, mask: str, crop: str, image: Path) -> Path | None:
        """The larger file of the series of mask and crop; None if only the crop was downloaded.

        Without any file, where the table expects the mask.
        """
        found = sorted({*self.files(mask), *self.files(crop)})
        if not found:
            return self._files.folder / mask if mask else None
        sizes = {path: _pixels(path) for path in found}
        largest = max(found, key=lambda path: sizes[path])
        # Some masks differ from their image by a few rows; crops are much smaller.
        if image.is_file() and 2 * sizes[largest] < _pixels(image):
            return None
        return largest


def _pixels(path: Path) -> int:
    if path.suffix.lower() == ".dcm":
        info = read_info(path)
        return info.rows * info.columns
    _, height, width = open_pixels(path).shape
    return height * width


DATA_SET = DataSet(
    name="cbis-ddsm",
    title="CBIS-DDSM",
    tables=tuple(_TABLES),
    rules={"malignant": "1 if an abnormality of the film is MALIGNANT, 0 if all are BENIGN(_WITHOUT_CALLBACK)"},
    split="train and test as published; a patient of either test set is in test",
    read=read,
)
