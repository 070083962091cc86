"""Where, and with what, something is trained; and the seeds of its random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..parallel.process_group import ProcessGroup
from .precision import Precision
from .progress import Report


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class Run:
    """Where, and with what, a training or a whole recipe runs."""

    out: Path
    seed: int = 0
    device: str = "cpu"
    memory_budget: int | None = None
    """Bytes of a step; None lets the engine take what is free."""
    resume: bool = False
    precision: Precision = "fp32"
    report: Report | None = None
    """Called while it works, for a progress bar."""
    say: Callable[[str], None] = _silent
    """Called with a line for people."""
    log: tuple[str, ...] = ()
    """Loggers beside ``log.csv``, see `loggers.make_loggers`."""
    callbacks: tuple[str, ...] = ()
    """Callbacks of Lightning, see `loggers.make_callbacks`."""
    begun: Callable[[], object] = lambda: None
    """Called when all has been checked, before the first step."""
    group: ProcessGroup = field(default_factory=ProcessGroup)
    """The processes that run it together: each does all of it but the training, which they share."""

    def undealt(self) -> Run:
        """The run of what is too small to be dealt to processes, or is one batch a step: each computes all of it."""
        return replace(self, group=self.group.undealt())

    def part(self, name: str) -> Run:
        """The run of a part of the whole, in a folder of its own."""
        return replace(self, out=self.out / name)


def seed_of(*numbers: int) -> int:
    """A seed for random numbers that belong to these."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
