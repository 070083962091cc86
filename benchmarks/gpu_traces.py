"""GPU work in one step, in order, for `gpu.py`: each kernel's microseconds, and the idle time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_steps import GpuStep, once, picture, prepare, synchronize
from torch.profiler import ProfilerActivity, profile

WARM = 3  # steps before the trace: compiled, captured, replayed
LONGEST = 100  # characters of a kernel's name


def traces(dry: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return traces by name, the most important first. A dry run has no GPU and none."""
    if dry:
        return {}
    wanted = [
        ("resnet50_live", True, ("ours_auto", "compile")),
        ("resnet50", True, ("ours_auto", "compile")),
        ("convnext_tiny", False, ("ours_auto", "compile")),
        ("efficientnet_b2_live", True, ("ours_auto", "compile")),
        ("convnext_tiny", True, ("ours_auto",)),
        ("densenet121", True, ("ours_auto",)),
        ("vgg16", True, ("ours_auto",)),
    ]
    steps = [GpuStep(model, training, 4096, how) for model, training, hows in wanted for how in hows]
    return {str(step): partial(trace, step) for step in steps}


def trace(step: GpuStep) -> dict[str, Any]:
    """Return kernel names, and [index of the name, grid, registers, start, microseconds] of each in order of start."""
    network = prepare(step, None)
    image = picture(step, step.side)
    for _ in range(WARM):
        once(step, network, image)
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        once(step, network, image)
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return summarized(events)


def summarized(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Extract the work on the GPU from a Chrome trace."""
    work = [e for e in events if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    work.sort(key=lambda e: e["ts"])
    names: dict[str, int] = {}
    rows, busy, reached = [], 0.0, 0.0
    for event in work:
        begun, args = event["ts"] - work[0]["ts"], event.get("args", {})
        number = names.setdefault(event["name"][:LONGEST], len(names))
        grid = args.get("grid") or args.get("bytes")
        rows.append([number, grid, args.get("registers per thread"), round(begun, 1), round(event["dur"], 1)])
        busy += max(0.0, begun + event["dur"] - max(begun, reached))
        reached = max(reached, begun + event["dur"])
    return {"span_us": round(reached, 1), "busy_us": round(busy, 1), "names": list(names), "kernels": rows}
