"""Reads and augments the next batch of patches while the networks compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class _Batch:
    """A batch that was read; on the CPU also augmented with a seed, with the random state afterwards."""

    pixels: Tensor
    seed: int | None = None
    state: Tensor | None = None


class Prefetcher:
    """Batches of patches, prefetched one step ahead.

    Random numbers are those that the loss itself would draw, so that prefetching does not change a training. On a GPU,
    where augmentation is faster, batches are only read.

    Args:
        read: returns the pixels of a batch on the CPU.
        vary: augments them at random, with a generator or, by default, PyTorch's own.
        device: device of the networks.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int]], Tensor],
        vary: Callable[[Tensor, Generator | None], Tensor],
        device: str,
    ) -> None:
        self._read, self._vary, self._device = read, vary, device
        self._reader = ThreadPoolExecutor(1, "gigamorph-patches")
        self._pending: dict[tuple[int, ...], Future[_Batch]] = {}

    def announce(self, batch: Sequence[int], seed: int) -> None:
        """Start to prepare a batch with the random numbers of this seed."""
        if len(self._pending) > 1:  # left over by an interrupted epoch
            self._pending.clear()
        self._pending[tuple(batch)] = self._reader.submit(self._prepare, batch, seed)

    def varied(self, batch: Sequence[int]) -> Tensor:
        """Return an augmented batch on the device; PyTorch's random state advances as if it had been augmented here."""
        pending = self._pending.pop(tuple(batch), None)
        found = _Batch(self._read(batch)) if pending is None else pending.result()
        if found.state is not None and found.seed == torch.initial_seed():
            torch.set_rng_state(found.state)
            return found.pixels
        pixels = found.pixels if found.state is None else self._read(batch)
        return self._vary(pixels.to(self._device), None)

    def plain(self, batches: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Yield batches without augmentation, on the device."""
        pending: Future[Tensor] | None = None
        for batch in batches:
            next_batch = self._reader.submit(self._read, batch)
            if pending is not None:
                yield pending.result().to(self._device)
            pending = next_batch
        if pending is not None:
            yield pending.result().to(self._device)

    def _prepare(self, batch: Sequence[int], seed: int) -> _Batch:
        pixels = self._read(batch)
        if torch.device(self._device).type != "cpu":
            return _Batch(pixels)
        generator = torch.Generator().manual_seed(seed)
        return _Batch(self._vary(pixels, generator), seed, generator.get_state())
