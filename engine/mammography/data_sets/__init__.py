"""Public data sets, read from the files as downloaded; one file each."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from ...datasets.tables.cells import read_rows
from ...datasets.tables.generic import missing_files, skip_absent
from ...datasets.tables.schema import Record, Table
from ...errors import DataError
from . import cbis_ddsm, cdd_cesm, chestxray14, cmmd, csaw_cc, embed, inbreast, mini_mias, nyu, rsna, vindr_mammo
from .files import DataSet, Files, Records

_MODULES = (cbis_ddsm, inbreast, vindr_mammo, rsna, embed, csaw_cc, cmmd, cdd_cesm, mini_mias, nyu, chestxray14)
DATA_SETS: dict[str, DataSet] = {module.DATA_SET.name: module.DATA_SET for module in _MODULES}
_COMPARED = [field.name for field in fields(Record) if field.name not in ("extra", "patient_known")]
"""The fields that must be equal in two rows of one image."""


def read_data_set(
    name: str, path: str | Path, *, label: str | None = None, check_files: bool = True, skip_missing: bool = False
) -> Table:
    """All images of a public data set as records, with the classes "0" and "1".

    Args:
        name: a key of `DATA_SETS`.
        path: the folder of the download, or its table.
        label: the label column to use as the label, by default the first of the data set's rules; its meaning is the
            table's `label_rule`. Images with an unknown label have label -1.
        check_files: whether missing image files raise an error.
        skip_missing: leaves missing image files out instead.

    Raises:
        DataError: names the file and the line.
    """
    if name not in DATA_SETS:
        raise DataError(f"unknown data set {name!r}; choose from {', '.join(DATA_SETS)}")
    data_set = DATA_SETS[name]
    label = label or next(iter(data_set.rules))
    if label not in data_set.rules:
        raise DataError(f"{data_set.title} has no label {label!r}; choose from {', '.join(data_set.rules)}")
    records = _unique(path, data_set.read(Files(path)))
    records = [replace(record, label=int(record.labels.get(label, -1))) for record in records]
    if not records:
        raise DataError(f"{path}: contains no images of {data_set.title}; check the path")
    nameless = [record for record in records if not record.patient_id]
    if nameless:  # splits would leak without patients
        raise DataError(f"{path}: the table has no patient for {nameless[0].path.name}; download it again")
    if skip_missing or check_files:
        missing = set(missing_files(records))
        if missing and not skip_missing:
            first = ", ".join(str(path) for path in sorted(missing)[:3])
            raise DataError(
                f"{path}: {len(missing)} of {len(records)} images of {data_set.title} are missing: {first}; "
                "download them, or leave them out (--skip-missing)"
            )
        records = skip_absent(path, records)
    return Table(records, ["0", "1"], f"{label}: {data_set.rules[label]}", name)


def detect(path: str | Path) -> str | None:
    """The name of the data set whose table is in the folder (or is the file); None without a unique one."""
    files = Files(path)
    found = [name for name, data_set in DATA_SETS.items() if _is_there(files, data_set)]
    return found[0] if len(found) == 1 else None


def _is_there(files: Files, data_set: DataSet) -> bool:
    path = files.table(*data_set.tables)
    return path is not None and (not data_set.columns or set(data_set.columns) <= set(read_rows(path).header))


def _unique(path: str | Path, records: Records) -> list[Record]:
    """The records without duplicate images and findings; `DataError` if two rows of an image disagree."""
    found: dict[tuple[Path, int | str | None], Record] = {}
    for record in records:
        record = replace(record, findings=tuple(dict.fromkeys(record.findings)))
        first = found.setdefault((record.path, record.frame), record)
        differing = [name for name in _COMPARED if getattr(first, name) != getattr(record, name)]
        if differing:
            raise DataError(
                f"{path}: {record.path.name} is in two rows that disagree on {', '.join(differing)}; remove one of them"
            )
    return list(found.values())
