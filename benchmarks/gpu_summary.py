"""A summary of the results of `gpu.py`; `gigamorph bench report` has the tables of ops and steps."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

Row = dict[str, Any]


def summary(data: dict[str, Any]) -> list[str]:
    """Return lines on what failed, the speed of tiles, and the kernels of traces."""
    lines = [""]
    peak = data["ceilings"].get("ceilings", {})
    where = data["ceilings"].get("machine", {})
    if where:
        lines.append("  ".join(f"{k} {where[k]}" for k in ("gpu", "driver", "torch", "triton", "cudnn") if k in where))
    if "gb_per_s" in peak:
        lines.append(f"ceilings: {peak['gb_per_s']:.0f} GB/s, {peak['tflop_per_s']:.0f} TFLOP/s")
    for name, row in data.get("tests", {}).items():
        lines.append(f"tests: {name}: {row.get('result') or row.get('error')}")
    if checks := data["checks"]:
        bad = [name for name, row in checks.items() if not row.get("ok")]
        lines.append(f"checks: {len(checks) - len(bad)} of {len(checks)} passed")
        lines += [f"  WRONG {n}: {_complaint(checks[n])}" for n in bad[:25]]
    failed = [(name, how, why) for name, row in data["ops"].items() for how, why in row.get("failed", {}).items()]
    lines += [f"FAILED {name}: {how}: {why[:120]}" for name, how, why in failed[:20]]
    lines += _tile_lines(data["tiles"]) + _trace_lines(data.get("traces", {}))
    table = data["steps"].get("choices", {}).get("choices", [])
    if table:
        ours = sum(row["chosen"] != "stock" for row in table)
        lines.append(f"choices in the steps: ours for {ours} of {len(table)} shapes")
    lines.append(f"skipped for lack of time: {len(data['skipped'])}; seconds: {data['seconds']}")
    return lines


def _complaint(row: Row) -> str:
    if "error" in row:
        return f"{row['error']}: {row.get('message', '')[:120]}"
    worst = max(row["errors"].items(), key=lambda e: math.inf if isinstance(e[1], str) else e[1][1])
    return f"{worst[0]}: {worst[1]}{'' if row['reproducible'] else '; two runs differ'}"


def _tile_lines(tiles: dict[str, Row]) -> list[str]:
    """Return the speed of tiles relative to cuDNN: above 1 ours is faster."""
    lines = []
    for name, row in tiles.items():
        if not row.get("ms", {}).get("cudnn"):
            continue
        cudnn = row["ms"]["cudnn"]
        others = sorted((ms, n) for n, ms in row["ms"].items() if n != "cudnn")
        ranked = ", ".join(f"{n} {cudnn / ms:.2f}" for ms, n in others[:4])
        lines.append(f"{name}: cuDNN {cudnn:.3f} ms; speed: {ranked}")
    return lines


def _trace_lines(traces: dict[str, Row]) -> list[str]:
    """Return for each step the time on the GPU, and the kernels that take most of it."""
    lines = []
    for name, row in traces.items():
        if "kernels" not in row:
            continue
        total: dict[str, list[float]] = defaultdict(list)
        for number, *_, microseconds in row["kernels"]:
            total[row["names"][number]].append(microseconds)
        lines.append(f"{name}: {len(row['kernels'])} kernels, busy {row['busy_us']:.0f} of {row['span_us']:.0f} us")
        most = sorted(total.items(), key=lambda kernel: -sum(kernel[1]))
        lines += [f"    {sum(times):8.0f} us in {len(times):4}  {kernel[:70]}" for kernel, times in most[:10]]
    return lines
