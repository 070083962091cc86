"""Public data sets, read from their files as downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from ...errors import DataError
from . import cbis_ddsm, cdd_cesm, chestxray14, cmmd, csaw_cc, embed, inbreast, mini_mias, nyu, rsna, vindr_mammo
from .base import DataSet
from .cells import read_rows
from .files import Files
from .generic import missing_files, skip_absent
from .schema import Record, Table

_MODULES = (cbis_ddsm, inbreast, vindr_mammo, rsna, embed, csaw_cc, cmmd, cdd_cesm, mini_mias, nyu, chestxray14)
DATA_SETS: dict[str, DataSet] = {module.DATA_SET.name: module.DATA_SET for module in _MODULES}
_TOLD = [field.name for field in fields(Record) if field.name not in ("extra", "patient_known")]
"""What two rows of one image must agree on."""


def read_data_set(
    name: str, path: str | Path, *, label: str | None = None, check_files: bool = True, skip_missing: bool = False
) -> Table:
    """All images of a public data set as records, with the classes "0" and "1".

    name: of `DATA_SETS`. path: the folder into which it was downloaded, or its table.
    label: which label column becomes the label, by default the first of the data set's rules; its meaning is the
    table's `label_rule`. Images of which it is not known have label -1.
    check_files: refuse if image files are missing; skip_missing: leave them out instead.
    Raises `DataError` that names the file and the place in it.
    """
    if name not in DATA_SETS:
        raise DataError(f"data set {name!r} is unknown; choose from {', '.join(DATA_SETS)}")
    data_set = DATA_SETS[name]
    label = label or next(iter(data_set.rules))
    if label not in data_set.rules:
        raise DataError(f"{data_set.title} has no label {label!r}; choose from {', '.join(data_set.rules)}")
    records = [_labelled(record, label) for record in _once(path, data_set.read(Files(path)))]
    if not records:
        raise DataError(f"{path}: holds no images of {data_set.title}")
    nameless = [record for record in records if not record.patient_id]
    if nameless:  # without patients no split is safe
        raise DataError(f"{path}: the table names no patient for {nameless[0].path.name}; fetch it again")
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
    """The name of the data set whose table lies in the folder (or is the file); None if none does, or several do."""
    files = Files(path)
    found = [name for name, data_set in DATA_SETS.items() if _is_there(files, data_set)]
    return found[0] if len(found) == 1 else None


def _is_there(files: Files, data_set: DataSet) -> bool:
    path = files.table(*data_set.tables)
    return path is not None and (not data_set.columns or set(data_set.columns) <= set(read_rows(path).header))


def _once(path: str | Path, records: Sequence[Record]) -> list[Record]:
    """Each image, and each finding of it, once; `DataError` where two rows of an image say different things."""
    found: dict[tuple[Path, int | None], Record] = {}
    for record in records:
        record = replace(record, findings=tuple(dict.fromkeys(record.findings)))
        first = found.setdefault((record.path, record.frame), record)
        told = [name for name in _TOLD if getattr(first, name) != getattr(record, name)]
        if told:
            raise DataError(
                f"{path}: {record.path.name} is in two rows that disagree on {', '.join(told)}; leave one of them out"
            )
    return list(found.values())


def _labelled(record: Record, label: str) -> Record:
    return replace(record, label=int(record.labels.get(label, -1)))
