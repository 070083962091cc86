"""Computes a run in mixed precision, with PyTorch's autocast around each image."""

from __future__ import annotations

from typing import Any

import torch

from ..datasets.tables import Record
from ..train.options import AUTOCAST, Precision
from .decoders import Opened
from .job import Result, Start, Unit
from .rows import Work


class MixedPrecisionUnit:
    """A unit (`job.Unit`) that computes with autocast; images are opened unchanged.

    Args:
        unit: the wrapped unit.
        precision: "bf16" or "fp16".
        device: "cpu" or "cuda".
    """

    def __init__(self, unit: Unit, precision: Precision, device: str) -> None:
        self._unit, self._dtype, self._device = unit, AUTOCAST[precision], device

    @property
    def net(self) -> Any:
        return self._unit.net

    def open(self, record: Record, work: Work) -> dict[str, Any]:
        return self._unit.open(record, work)

    def __call__(self, opened: Opened) -> Result:
        with torch.autocast(self._device, self._dtype):
            return self._unit(opened)


def in_precision(unit: Unit, precision: Precision, device: str) -> Unit:
    """The unit, in mixed precision unless `precision` is "fp32"."""
    return unit if precision == "fp32" else MixedPrecisionUnit(unit, precision, device)


def start_in_precision(start: Start, precision: Precision, *, device: str) -> Unit:
    """A `job.Start` for computing processes."""
    return in_precision(start(device=device), precision, device)
