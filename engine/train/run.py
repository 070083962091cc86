"""The settings of a run (folder, device, logging), and the seeds of its random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..parallel.process_group import ProcessGroup
from .options import Precision
from .progress import Report

AUTOCAST: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Data types of PyTorch's autocast; "fp32" does not use it."""

LIGHTNING: dict[Precision, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}


@dataclass(frozen=True)
class Run:
    """The settings of a training or of a complete recipe."""

    out: Path
    seed: int = 0
    device: str = "cpu"
    memory_budget: int | None = None
    """Bytes of a step; None uses the free memory."""
    resume: bool = False
    precision: Precision = "fp32"
    report: Report | None = None
    """Called with the progress, for a progress bar."""
    say: Callable[[str], None] = lambda text: None
    """Called with lines to print."""
    log: tuple[str, ...] = ()
    """Loggers in addition to ``log.csv``, see `loggers.make_loggers`."""
    callbacks: tuple[str, ...] = ()
    """Lightning callbacks, see `loggers.make_callbacks`."""
    begun: Callable[[], object] = lambda: None
    """Called after all checks, before the first step."""
    group: ProcessGroup = field(default_factory=ProcessGroup)
    """The processes that run it together: they share the training, and each does everything else."""

    def undealt(self) -> Run:
        """The run with every batch computed by each process, for work that is too small to be distributed."""
        return replace(self, group=self.group.undealt())

    def part(self, name: str) -> Run:
        """The run of a part, in a subfolder."""
        return replace(self, out=self.out / name)


def seed_of(*numbers: int) -> int:
    """A seed that is derived from these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
