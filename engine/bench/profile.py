"""One step looked at: bytes allocated against time and tiles, and a trace of all ops.

`trace.json` is torch's profiler's, for chrome://tracing or Perfetto; `timeline.json` is drawn from it: the allocator's
total after every allocation and release, and when each of gigamorph's tiles was done.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile, record_function

from ..accelerate import Accelerated
from ..tiling.scan import TileEvent
from .plots import save, timeline_figure

if TYPE_CHECKING:
    from .work import Work

_TILE = "tile done: "
_POINTS = 4000  # of a timeline, at most: the largest of its neighbours stands for the others


@dataclass(frozen=True)
class Timeline:
    """Bytes allocated in a step.

    Attributes:
        points: (seconds since the step began, bytes above those at its beginning).
        tiles: (seconds, phase, tile) when a tile was done; empty for all but gigamorph.
    """

    title: str
    points: list[tuple[float, int]]
    tiles: list[tuple[float, str, int]]


def profile_step(work: Work, folder: Path) -> dict[str, Any]:
    """Run one step of a measured process under the profiler and write `trace.json`, `timeline.json`, `timeline.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if work.task.device == "cuda" else [])]

    def mark(event: TileEvent) -> None:
        with record_function(f"{_TILE}{event.phase} {event.done}"):
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
    save(timeline_figure(timeline), folder / "timeline.png")
    return {"folder": str(folder)}


def read_timeline(trace: Path, title: str, device: str) -> Timeline:
    """The timeline in a trace with memory."""
    events = json.loads(trace.read_text())["traceEvents"]
    kind = 0 if device == "cpu" else 1  # as torch numbers devices
    changes = sorted(
        (e["ts"], e["args"]["Total Allocated"])
        for e in events
        if e.get("name") == "[memory]" and e["args"]["Device Type"] == kind
    )
    if not changes:
        return Timeline(title, [], [])
    begin, held = changes[0][0], changes[0][1]
    points = [((ts - begin) / 1e6, total - held) for ts, total in changes]
    step = -(-len(points) // _POINTS)
    points = [max(points[i : i + step], key=lambda p: p[1]) for i in range(0, len(points), step)]
    tiles = sorted(
        ((e["ts"] - begin) / 1e6, *e["name"].removeprefix(_TILE).rsplit(" ", 1))
        for e in events
        if str(e.get("name", "")).startswith(_TILE) and "ts" in e
    )
    return Timeline(title, points, [(seconds, phase, int(done)) for seconds, phase, done in tiles])
