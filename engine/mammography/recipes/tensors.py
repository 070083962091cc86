"""Classification of data of one size, such as patches or embeddings, and reading of the next batch ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from ...evaluate import odds
from ...evaluate.cases import Array
from ...train.task import Task

Read = TypeVar("Read")
Measure = Callable[[ArrayLike, ArrayLike], float | None]
"""(labels (n,), log-odds (n, classes)) -> score, larger is better; None if undefined."""

_BATCH = 256


class Sliceable(Protocol):
    """A tensor (n, ...), or an object that reads a slice or a list of indices from files."""

    def __len__(self) -> int: ...
    def __getitem__(self, chosen: Any, /) -> Tensor: ...


class TensorTask(Task):
    """A network trained by cross-entropy on tensors.

    Args:
        module: (N, ...) -> (N, classes).
        inputs, labels: (n, ...) and int64 (n,).
        val: inputs and labels that select the best epoch, and the measure of their score.
        vary: random augmentation of a batch of training inputs.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Sliceable,
        labels: Tensor,
        val: tuple[Sliceable, Tensor, Measure] | None = None,
        vary: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.module, self.inputs, self.labels, self.val, self.vary = module, inputs, labels, val, vary

    def examples(self, epoch: int) -> Sequence[int]:
        return range(len(self.inputs))

    def loss(self, batch: Sequence[int]) -> Tensor:
        device = next(self.module.parameters()).device
        inputs = self.inputs[list(batch)].to(device)
        logits = self.module(inputs if self.vary is None else self.vary(inputs))
        return F.cross_entropy(logits.float(), self.labels[list(batch)].to(device))

    def score(self) -> float | None:
        if self.val is None:
            return None
        inputs, labels, measure = self.val
        return measure(labels, log_odds_of(self.module, inputs))


@torch.no_grad()
def logits_of(module: nn.Module, inputs: Sliceable, compute: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return float32 outputs of a module, or of a function of it, on the CPU; it must be in evaluation mode."""
    device, compute = next(module.parameters()).device, compute or module
    parts = (inputs[first : first + _BATCH] for first in range(0, len(inputs), _BATCH))
    return torch.cat([compute(part.to(device)).float().cpu() for part in parts])


def log_odds_of(module: nn.Module, inputs: Sliceable) -> Array:
    """Return the log-odds (n, classes) of the classes that a module predicts for inputs; see `logits_of`."""
    return odds.of_logits(logits_of(module, inputs).double().numpy())


def accuracy(labels: ArrayLike, scores: ArrayLike) -> float:
    """Return the share of rows whose largest score is the label's."""
    return float((np.asarray(scores).argmax(1) == np.asarray(labels)).mean())


class ReadAhead(Generic[Read]):
    """Batches that another thread reads while the networks compute.

    Args:
        read: returns a batch by the indices of its examples.
    """

    def __init__(self, read: Callable[[Sequence[int]], Read]) -> None:
        self._read, self._reader = read, ThreadPoolExecutor(1, "gigamorph-patches")
        self._pending: dict[tuple[int, ...], Future[Read]] = {}

    def announce(self, batch: Sequence[int]) -> None:
        """Start to read a batch."""
        if len(self._pending) > 1:  # left over by an interrupted epoch
            self.forget()
        self._pending[tuple(batch)] = self._reader.submit(self._read, batch)

    def forget(self) -> None:
        """Discard the batches that were announced and not taken."""
        self._pending.clear()

    def take(self, batch: Sequence[int]) -> Read:
        """Return a batch, which is read now unless it was announced."""
        pending = self._pending.pop(tuple(batch), None)
        return self._read(batch) if pending is None else pending.result()

    def each(self, batches: Iterable[Sequence[int]]) -> Iterator[Read]:
        """Yield batches in order; each is read while the one before is used."""
        pending: list[Future[Read]] = []
        for batch in batches:
            pending.append(self._reader.submit(self._read, batch))
            if len(pending) > 1:
                yield pending.pop(0).result()
        yield from (last.result() for last in pending)
