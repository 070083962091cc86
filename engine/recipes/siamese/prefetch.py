"""Patches that are read, and varied, while the networks compute the batch before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class _Read:
    """A batch that was read; on the CPU varied with the random numbers of a seed, and their state afterwards."""

    pixels: Tensor
    seed: int | None = None
    state: Tensor | None = None


class Ahead:
    """Batches of patches, one ahead of the one that is asked for.

    Random numbers are those that the loss would draw itself, so that it makes no difference to a training who varies,
    and when; on a GPU, which varies faster, batches are only read.

    Args:
        read: the pixels of a batch, on the CPU.
        vary: them at random, by a generator or, without, PyTorch's own.
        device: where the networks are.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int]], Tensor],
        vary: Callable[[Tensor, Generator | None], Tensor],
        device: str,
    ) -> None:
        self._read, self._vary, self._device = read, vary, device
        self._reader = ThreadPoolExecutor(1, "gigamorph-patches")
        self._coming: dict[tuple[int, ...], Future[_Read]] = {}

    def announce(self, batch: Sequence[int], seed: int) -> None:
        """Begin with a batch, whose random numbers are those of this seed."""
        if len(self._coming) > 1:  # of an epoch that was interrupted
            self._coming.clear()
        self._coming[tuple(batch)] = self._reader.submit(self._prepared, batch, seed)

    def varied(self, batch: Sequence[int]) -> Tensor:
        """A batch at random, on the device; PyTorch's random numbers go on as if they had been drawn here."""
        coming = self._coming.pop(tuple(batch), None)
        found = _Read(self._read(batch)) if coming is None else coming.result()
        if found.state is not None and found.seed == torch.initial_seed():
            torch.set_rng_state(found.state)
            return found.pixels
        pixels = found.pixels if found.state is None else self._read(batch)
        return self._vary(pixels.to(self._device), None)

    def plain(self, batches: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Batches as they are, on the device."""
        coming: Future[Tensor] | None = None
        for batch in batches:
            following = self._reader.submit(self._read, batch)
            if coming is not None:
                yield coming.result().to(self._device)
            coming = following
        if coming is not None:
            yield coming.result().to(self._device)

    def _prepared(self, batch: Sequence[int], seed: int) -> _Read:
        pixels = self._read(batch)
        if torch.device(self._device).type != "cpu":
            return _Read(pixels)
        generator = torch.Generator().manual_seed(seed)
        return _Read(self._vary(pixels, generator), seed, generator.get_state())
