"""The bytes allocated in one step, read from a trace."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

TILE = "tile done: "  # what a trace calls it, before phase and number
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
        ((e["ts"] - begin) / 1e6, *e["name"].removeprefix(TILE).rsplit(" ", 1))
        for e in events
        if str(e.get("name", "")).startswith(TILE) and "ts" in e
    )
    return Timeline(title, points, [(seconds, phase, int(done)) for seconds, phase, done in tiles])
