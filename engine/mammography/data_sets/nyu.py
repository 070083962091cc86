"""Exam lists of NYU's classifiers (breast_cancer_classifier, GMIC, mammography_metarepository): a pickled list of
dictionaries, one per exam, and 16-bit PNG files.

An exam lists its files by view, without suffix, as {'L-CC': ['0_L_CC'], ...}; 'horizontal_flip' states whether they are
all stored mirrored; the optional 'cancer_label' has labels per breast; keys such as 'L-CC_malignant_seg' list masks.
Layout and meaning are those of the README files of the three repositories.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...datasets.tables.schema import Finding, Record
from ...errors import DataError
from ...images.rawfile import one_line
from ...models.checkpoints import Inert
from .files import DataSet, Files, unlabelled_record


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        return Inert

    def persistent_load(self, pid: Any, /) -> Any:
        return Inert()


def read_pickle(path: Path) -> Any:
    """The contents of a pickle file: lists, tuples, sets, dictionaries, text, numbers, None, and `Inert` for others.

    Raises:
        DataError: if the file is not a pickle, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle raises errors of all kinds
        raise DataError(f"{path}: not a pickle file, or damaged ({one_line(error)}); download it again") from error


_TABLES = ("exam_list_before_cropping.pkl", "cropped_exam_list.pkl", "exam_list.pkl")
_VIEWS = ("L-CC", "R-CC", "L-MLO", "R-MLO")
_SIDES = {"L": "left", "R": "right"}
_OTHER = {"left": "right", "right": "left"}


def read(files: Files) -> list[Record]:
    """One record per image; the lists have no patients, so each exam is used as a patient."""
    path = files.path if files.path.is_file() else files.table(*_TABLES)
    if path is None:
        raise DataError(f"{files.path}: contains none of {', '.join(_TABLES)}; pass the folder or the list")
    exams = read_pickle(path)
    if not isinstance(exams, list) or not all(isinstance(e, dict) and any(v in e for v in _VIEWS) for e in exams):
        raise DataError(f"{path}: must be a list of exams with {', '.join(_VIEWS)}; pass another pickle file")
    return [
        _record(files, path, exam, number, view, name, index)
        for number, exam in enumerate(exams)
        for view in _VIEWS
        for index, name in enumerate(_file_names(path, number, exam, view))
    ]


def _record(files: Files, path: Path, exam: dict[str, Any], number: int, view: str, name: str, index: int) -> Record:
    laterality, _, projection = view.partition("-")
    side = _SIDES[laterality]
    flip = exam.get("horizontal_flip", "NO")
    if flip not in ("YES", "NO"):
        raise DataError(f"{path}, exam {number}: horizontal_flip must be YES or NO")
    return unlabelled_record(
        path=files.expect(_png(name)),
        patient_id=f"exam{number}",
        laterality=laterality,
        view=projection,
        exam_id=f"exam{number}",
        labels=_labels(path, exam, number, side),
        findings=tuple(_masks(files, path, exam, number, view, index)),
        # Some exams store 12 bits unchanged, others rescaled to 16.
        white="auto",
        chest_wall=_OTHER[side] if flip == "YES" else side,
    )


def _labels(path: Path, exam: dict[str, Any], number: int, side: str) -> dict[str, float]:
    given = exam.get("cancer_label") or {}
    found = {}
    for kind in ("malignant", "benign"):
        value = given.get(f"{side}_{kind}") if isinstance(given, dict) else None
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(f"{path}, exam {number}: cancer_label {side}_{kind} must be 0 or 1")
        found[kind] = float(value)
    return found


def _masks(files: Files, path: Path, exam: dict[str, Any], number: int, view: str, index: int) -> Iterator[Finding]:
    for kind in ("malignant", "benign"):
        names = _file_names(path, number, exam, f"{view}_{kind}_seg")
        if index < len(names) and (mask := files.find(_png(names[index]))) is not None:
            yield Finding(mask=mask, pathology=kind)


def _file_names(path: Path, number: int, exam: dict[str, Any], key: str) -> list[str]:
    names = exam.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}, exam {number}: {key} must be a list of file names")
    return names


def _png(name: str) -> str:
    return name if name.lower().endswith(".png") else f"{name}.png"


DATA_SET = DataSet(
    name="nyu",
    title="an exam list of NYU's classifiers",
    tables=_TABLES,
    rules={
        "malignant": "1 if the breast has a malignant finding (cancer_label), 0 if not",
        "benign": "1 if the breast has a benign finding (cancer_label), 0 if not",
    },
    split="none; the list names no patients, so each exam counts as one patient",
    read=read,
)
