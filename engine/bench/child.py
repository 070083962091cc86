"""Processes that run one peer's steps; they keep its network between requests, so that peers can run alternately."""

from __future__ import annotations

import dataclasses
from typing import Any

from .process import Answer, Process
from .results import OK, Task


class Child(Process):
    """A process that runs one peer's steps; see `Process`, and `Server` in `work.py`."""

    def __init__(self, longest: float = 600.0, lean: bool = False):
        super().__init__(f"{__package__}.work", longest, lean)

    def start(self, task: Task, peer: str, settings: dict[str, Any], cap: int | None) -> Answer:
        """Prepare a peer's network."""
        return self.ask("start", task=dataclasses.asdict(task), peer=peer, settings=settings, cap=cap)

    def run(self, steps: int, warm: int = 0) -> Answer:
        """Run steps; see `Work.run`."""
        return self.ask("run", steps=steps, warm=warm)


def measure_in_new_process(
    task: Task,
    peer: str,
    settings: dict[str, Any],
    steps: int,
    *,
    cap: int | None = None,
    longest: float = 600.0,
    lean: bool = False,
) -> Answer:
    """Run steps of a peer in a new process; see `Child` and `Work.run`."""
    with Child(longest, lean) as child:
        answer = child.start(task, peer, settings, cap)
        return child.run(steps) if answer["status"] == OK else answer
