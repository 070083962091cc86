"""A short table of the results of `gpu.py`; ratios are speeds, so above 1 ours is faster."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

Row = dict[str, Any]
OURS = ("ours_auto", "ours")  # a user's default, and the tile in which all networks are compared


def derive(row: Row, peak: Row) -> Row:
    """Return for each candidate TFLOP/s, GB/s and the share of the roofline, max(flops / rate, bytes / bandwidth)."""
    floor = max(row["flops"] / peak["tflop_per_s"] / 1e9, row["bytes"] / peak["gb_per_s"] / 1e6)  # ms
    return {
        name: {"tflop_per_s": row["flops"] / ms / 1e9, "gb_per_s": row["bytes"] / ms / 1e6, "roofline": floor / ms}
        for name, ms in row["ms"].items()
    }


def speed(row: Row, ours: str, other: str) -> float | None:
    """Return the time of another candidate over ours: above 1 ours is faster."""
    ms = row.get("ms", {})
    return ms[other] / ms[ours] if ours in ms and other in ms else None


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mean_and_range(values: list[float]) -> str:
    """Format geometric mean, minimum and maximum."""
    if not values:
        return f"{'-':>6} {'':14}"
    mean = math.exp(statistics.fmean(map(math.log, values)))
    return f"{mean:6.2f} {f'({min(values):.2f}-{max(values):.2f})':14}"


def summary(data: dict[str, Any]) -> list[str]:
    """Return a short table of everything; ratios are speeds, so above 1 ours is faster."""
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
    lines += (
        _op_lines(data["ops"], peak)
        + _tile_lines(data["tiles"], peak)
        + _step_lines({**data["steps"], **data.get("limits", {})})
    )
    lines += _trace_lines(data.get("traces", {}))
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


def _op_lines(ops: dict[str, Row], peak: Row) -> list[str]:
    rows = {name: row for name, row in ops.items() if row.get("ms", {}).get("ours")}
    lines = [
        f"FAILED {name}: {n}: {why[:120]}" for name, row in ops.items() for n, why in row.get("failed", {}).items()
    ]
    if not rows:
        return lines[:20]
    head = f"{'op':34} {'ours ms':>8} {'stock':>8} {'speed':>6} {'fused':>6} {'compile':>7} {'roof%':>6} {'host us':>7}"
    lines = [*lines[:20], head]
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, row in rows.items():
        if peak:
            row["derived"] = derive(row, peak)
        stock = "cudnn" if "cudnn" in row["ms"] else next((n for n in row["ms"] if n.startswith("eager")), "")
        found = {
            "speed": speed(row, "ours", stock),
            "fused": speed(row, "ours_fused", "eager_fused"),
            "compile": speed(row, "ours_fused", "compile_fused") or speed(row, "ours", "compile"),
            "roof": 100 * row["derived"]["ours"]["roofline"] if peak else None,
        }
        group = name.split()[-1] if "cudnn" in row["ms"] else "others"
        for column, value in found.items():
            if value is not None:
                groups[f"{'depthwise ' if 'depthwise' in name else ''}{group}"][column].append(value)
        lines.append(
            f"{name:34} {row['ms']['ours']:8.3f} {_number(row['ms'].get(stock), 3):>8} {_number(found['speed']):>6} "
            f"{_number(found['fused']):>6} {_number(found['compile']):>7} {_number(found['roof'], 0):>6} "
            f"{row['host_us']['ours']:7.0f}"
        )
    lines.append("\nspeed of ours, geometric mean (least-most):      bare                 fused                compile")
    for group, columns in groups.items():
        lines.append(f"  {group:32}" + " ".join(_mean_and_range(columns[c]) for c in ("speed", "fused", "compile")))
    return lines


def _tile_lines(tiles: dict[str, Row], peak: Row) -> list[str]:
    lines = []
    for name, row in tiles.items():
        if not row.get("ms", {}).get("cudnn"):
            continue
        if peak:
            row["derived"] = derive(row, peak)
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


def _step_lines(steps: dict[str, Row]) -> list[str]:
    entries: dict[str, dict[str, Row]] = defaultdict(dict)
    for name, row in steps.items():
        if name != "choices":
            what, _, how = name.rpartition(" ")
            entries[what][how] = row
    if not entries:
        return []
    lines = [
        "",
        "steps: Mpx/s (torch peak GiB); then speed of ours, on the plan's tile first, to channels-last, eager, compile",
    ]
    for what, rows in entries.items():
        parts = [
            f"{how} {row['error']}"
            if "error" in row
            else f"{how} {row['mpx_per_s']:.0f} ({(row['peak_bytes'] - row['left_bytes']) / 2**30:.1f})"
            for how, row in rows.items()
        ]
        ratios = [f"; {ours} {_ratios(rows, ours)}" for ours in OURS if "mpx_per_s" in rows.get(ours, {})]
        wrong = [_disagreement(rows, ours) for ours in OURS]
        lines.append(f"{what}: {', '.join(parts)}{''.join(ratios)}{''.join(wrong)}")
    return lines


def _ratios(rows: dict[str, Row], ours: str) -> str:
    speeds = {how: row["mpx_per_s"] for how, row in rows.items() if "mpx_per_s" in row}
    others = ("channels_last", "eager", "compile")
    return " ".join(_number(speeds[ours] / speeds[how] if how in speeds else None) for how in others)


def _disagreement(rows: dict[str, Row], name: str) -> str:
    """Return a warning if ours and stock differ by more than bfloat16 explains."""
    ours, stock = rows.get(name, {}), rows.get("channels_last", {})
    for key in ("loss", "gradient") if ours.get("image_bytes") else ():  # otherwise the images differ
        if key in ours and key in stock and not abs(ours[key] - stock[key]) <= 0.03 * abs(stock[key]):
            return f"  {key.upper()} OF {name} DIFFERS: {ours[key]:.4g}, stock {stock[key]:.4g}"
    return ""
