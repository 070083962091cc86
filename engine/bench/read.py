"""Reads results of gigamorph bench and benchmarks/gpu.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..errors import DataError
from .results import FAILED, FORMAT, OK, OUT_OF_MEMORY, ROWS, WRONG, BenchTask, Check, KernelRow, Results, StepRow, Try

_PEERS = {
    "ours": "gigamorph",
    "eager": "stock",
    "channels_last": "channels-last",
    "compile": "compile",
    "checkpoint": "checkpoint",
    "ours_stock": "gigamorph, PyTorch's kernels",
    "ours_op_by_op": "gigamorph, no replay",
    "ours_third": "gigamorph, a third of stock's memory",
    "ours_auto": "gigamorph, the plan's tile",
    "ours_equal": "gigamorph, stock's memory",
    "ours_8GiB": "gigamorph, 8 GiB",
}
LIVE = "_live"  # suffix of models whose norms use batch statistics
_AGAINST = "channels_last"
_BOUND = 0.03  # on loss and gradient norm, in bfloat16


def read(path: Path) -> Results:
    """Read results of `gigamorph bench` or `benchmarks/gpu.py`.

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
        return _from_gpu(data)
    raise DataError(f"{path}: not results of gigamorph bench ({FORMAT!r}) or benchmarks/gpu.py; measure again")


def _parse_results(data: dict[str, Any]) -> Results:
    rows = {name: [_row(kind, row) for row in data.get(name, ())] for name, kind in ROWS.items()}
    return Results(data["what"], data["provenance"], data.get("ceilings", {}), **rows)


def _row(kind: type, row: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    row = {name: value for name, value in row.items() if name in known}
    if "task" in row:
        row["task"] = _row(BenchTask, row["task"])
    if "image" in row:
        row["image"] = tuple(row["image"])
    if row.get("check"):
        row["check"] = _row(Check, row["check"])
    if row.get("worst"):
        row["worst"] = tuple(row["worst"])
    if "tries" in row:
        row["tries"] = [Try(**one) for one in row["tries"]]
    return kind(**row)


def _from_gpu(data: dict[str, Any]) -> Results:
    """Convert the steps and kernels of a run; its kernel checks set the status of their rows."""
    found = data["ceilings"].get("ceilings", {})
    ceilings = {"gb_per_s": found["gb_per_s"], "tflop_per_s bf16": found["tflop_per_s"]} if "gb_per_s" in found else {}
    machine = {k: v for k, v in data["ceilings"].get("machine", {}).items() if k != "clocks"}
    steps = data["steps"] | data.get("front", {}) | data.get("limits", {})
    return Results(
        "benchmarks/gpu.py",
        machine,
        ceilings,
        steps=[_step(name, row, steps) for name, row in steps.items() if name != "choices"],
        kernels=[_kernel(name, row) for name, row in data["ops"].items()],
    )


def _step(name: str, row: dict[str, Any], others: dict[str, dict[str, Any]]) -> StepRow:
    model, mode, side, how = name.split(" ")
    norms, image = "live" if model.endswith(LIVE) else "frozen", (1, row.get("channels", 1), int(side), int(side))
    task = BenchTask(model.removesuffix(LIVE), image, mode == "train", norms, "bf16", "cuda")
    made = StepRow(task, row.get("peer") or _PEERS.get(how, how))
    if "error" in row:
        made.status = OUT_OF_MEMORY if row["error"] == OUT_OF_MEMORY else FAILED
        made.reason = row.get("message") or row["error"]
        return made
    made.seconds, made.first_seconds = row["seconds"], row["warm_up_seconds"]
    made.peak_bytes = row["peak_bytes"] - row["left_bytes"] - row["image_bytes"]
    made.nvml_bytes, made.predicted_bytes = row.get("nvml_bytes"), row.get("planned_bytes")
    made.settings = {k: row[k] for k in ("tile", "retained", "replayed", "carries") if k in row}
    # An image in host memory has other pixels than stock's.
    expected = others.get(f"{model} {mode} {side} {_AGAINST}", {})
    if how != _AGAINST and row["image_bytes"] and "loss" in expected:
        errors = [abs(row[k] - expected[k]) / abs(expected[k]) for k in ("loss", "gradient") if k in row]
        made.check = Check("channels-last", errors[0], errors[1] if len(errors) > 1 else None)
        if not all(error <= _BOUND for error in errors):
            made.status, made.reason = WRONG, f"loss or gradients differ from channels-last's by {max(errors):.1e}"
    return made


def _kernel(name: str, row: dict[str, Any]) -> KernelRow:
    made = KernelRow(name, "bf16", row.get("flops", 0), row.get("bytes", 0), row.get("ms", {}), OK)
    if "error" in row or "failed" in row:
        made.status = FAILED
        made.reason = row.get("message") or "; ".join(f"{k}: {v}" for k, v in row["failed"].items())
    return made
