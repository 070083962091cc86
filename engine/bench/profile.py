"""Profile of one step: allocated bytes against time and tiles, and a trace of all ops.

`trace.json` is torch's profile for chrome://tracing or Perfetto. `timeline.json` is derived from it: the allocator's
total after every allocation and release, and the time when each of gigamorph's tiles was done.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..accelerate import Accelerated
from ..report.figure import panel, save_figure
from ..tiling.scan import TileEvent
from .plots import colour

_TILE = "tile done: "  # name in the trace, before phase and number
_MAX_POINTS = 4000  # maximum in a timeline: each is the largest of a group


@dataclass(frozen=True)
class Timeline:
    """Allocated bytes during a step.

    Attributes:
        points: (seconds since the step began, bytes above those at its beginning).
        tiles: (seconds, phase, tile) when a tile was done; only for gigamorph.
    """

    title: str
    points: list[tuple[float, int]]
    tiles: list[tuple[float, str, int]]


def read_timeline(trace: Path, title: str, device: str) -> Timeline:
    """Read the timeline from a trace with memory."""
    events = json.loads(trace.read_text())["traceEvents"]
    kind = 0 if device == "cpu" else 1  # torch's device numbers
    changes = sorted(
        (e["ts"], e["args"]["Total Allocated"])
        for e in events
        if e.get("name") == "[memory]" and e["args"]["Device Type"] == kind
    )
    if not changes:
        return Timeline(title, [], [])
    begin, held = changes[0][0], changes[0][1]
    points = [((ts - begin) / 1e6, total - held) for ts, total in changes]
    step = -(-len(points) // _MAX_POINTS)
    points = [max(points[i : i + step], key=lambda p: p[1]) for i in range(0, len(points), step)]
    tiles = sorted(
        ((e["ts"] - begin) / 1e6, *e["name"].removeprefix(_TILE).rsplit(" ", 1))
        for e in events
        if str(e.get("name", "")).startswith(_TILE) and "ts" in e
    )
    return Timeline(title, points, [(seconds, phase, int(done)) for seconds, phase, done in tiles])


def timeline_figure(timeline: Timeline) -> Figure:
    """Plot allocated bytes of one step against time, with a tick when a tile was done."""
    figure, axes = panel(9.5, 4, timeline.title)
    seconds, held = [p[0] for p in timeline.points], [p[1] / 2**20 for p in timeline.points]
    axes.plot(seconds, held, color=colour("gigamorph"), linewidth=1)
    top = max(held, default=1)
    for phase, shade in (("forward", "#b7950b"), ("backward", "#884ea0")):
        marks = [s for s, name, _ in timeline.tiles if name == phase]
        if marks:
            axes.vlines(marks, 0, 0.03 * top, color=shade, linewidth=1)
            text = f"{phase}: {len(marks)} tiles, each tick is one done"
            axes.text(marks[0], 0.04 * top, text, color=shade, fontsize=9)
    axes.set(xlabel="seconds since the step began", ylabel="allocated in the step, MiB", ylim=(0, 1.1 * top))
    return figure


def profile_step(runs: nn.Module, step: Callable[[], Any], title: str, device: str, folder: Path) -> None:
    """Run one step under the profiler and write `trace.json`, `timeline.json`, `timeline.png`.

    Args:
        runs: module that runs the step's forward.
    """
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]

    def mark(event: TileEvent) -> None:
        with record_function(f"{_TILE}{event.phase} {event.done}"):
            pass

    if isinstance(runs, Accelerated):
        runs.on_tile = mark
    with profile(activities=activities, profile_memory=True) as recorded:
        step()
    if isinstance(runs, Accelerated):
        runs.on_tile = None
    recorded.export_chrome_trace(str(folder / "trace.json"))
    timeline = read_timeline(folder / "trace.json", title, device)
    (folder / "timeline.json").write_text(json.dumps(vars(timeline)) + "\n")
    save_figure(timeline_figure(timeline), folder / "timeline.png")
