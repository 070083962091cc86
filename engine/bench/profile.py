"""One step looked at: bytes allocated against time and tiles, and a trace of all ops.

`trace.json` is torch's profiler's, for chrome://tracing or Perfetto; `timeline.json` is drawn from it: the allocator's
total after every allocation and release, and when each of gigamorph's tiles was done.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile, record_function

from ..accelerate import Accelerated
from ..report.figure import save_figure
from ..tiling.scan import TileEvent
from .plots import timeline_figure
from .timeline import TILE, read_timeline

if TYPE_CHECKING:
    from .work import Work


def profile_step(work: Work, folder: Path) -> dict[str, Any]:
    """Run one step of a measured process under the profiler and write `trace.json`, `timeline.json`, `timeline.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if work.task.device == "cuda" else [])]

    def mark(event: TileEvent) -> None:
        with record_function(f"{TILE}{event.phase} {event.done}"):
            pass

    if isinstance(work.runs, Accelerated):
        work.runs.on_tile = mark
    with profile(activities=activities, profile_memory=True) as recorded:
        work.step(work.image)
    if isinstance(work.runs, Accelerated):
        work.runs.on_tile = None
    recorded.export_chrome_trace(str(folder / "trace.json"))
    timeline = read_timeline(folder / "trace.json", f"{work.task}, {work.label}", work.task.device)
    (folder / "timeline.json").write_text(json.dumps(vars(timeline)) + "\n")
    save_figure(timeline_figure(timeline), folder / "timeline.png")
    return {"folder": str(folder)}
