"""Reads results of gigamorph bench, benchmarks/gpu.py and benchmarks/morph_training.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..errors import DataError
from .results import FORMAT, ROWS, Check, Results, Task, Try


def read(path: Path) -> Results:
    """Read results of `gigamorph bench`, `benchmarks/gpu.py` or `benchmarks/morph_training.py`.

    Raises:
        DataError: the file is something else.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); use a JSON file of gigamorph bench") from error
    if isinstance(data, dict) and data.get("format") == FORMAT:
        return _parse_results(data)
    if isinstance(data, dict) and {"ceilings", "checks", "ops", "steps", "skipped"} <= data.keys():
        from .gpu_results import from_gpu

        return from_gpu(data)
    if isinstance(data, dict) and {"settings", "seeds", "summary"} <= data.keys():
        from .scripts import morph_rows

        return Results("benchmarks/morph_training.py", data.get("provenance", {}), morphs=morph_rows(data))
    raise DataError(
        f"{path}: not results of gigamorph bench ({FORMAT!r}), benchmarks/gpu.py or benchmarks/morph_training.py; "
        "run the measurement again"
    )


def _parse_results(data: dict[str, Any]) -> Results:
    rows = {name: [_row(kind, row) for row in data.get(name, ())] for name, kind in ROWS.items()}
    return Results(data["what"], data["provenance"], data.get("ceilings", {}), **rows)


def _row(kind: type, row: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    row = {name: value for name, value in row.items() if name in known}
    if "task" in row:
        row["task"] = Task(**{**row["task"], "image": tuple(row["task"]["image"])})
    if row.get("check"):
        worst = row["check"].get("worst")
        row["check"] = Check(**{**row["check"], "worst": tuple(worst) if worst else None})
    if "tries" in row:
        row["tries"] = [Try(**one) for one in row["tries"]]
    if "curve" in row:
        row["curve"] = [tuple(point) for point in row["curve"]]
    return kind(**row)
