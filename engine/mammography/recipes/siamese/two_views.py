"""The common part of SimCLR and BYOL: random views of single patches of both breasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ....errors import GigamorphError
from ....train.task import Task
from .augment import cropped, jittered, mirrored
from .config import SiameseConfig
from .prefetch import Prefetcher

_CHECKED_PATCHES = 512  # patches in the check for collapse
_COLLAPSED = 1e-3  # minimal standard deviation of projections, which is 1 / sqrt(dim) if evenly spread


class Projected(nn.Module):
    """Patches (N, C, h, w) -> projections of the encoder's features."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean((2, 3)))


class TwoViews(Task):
    """Training on patches without labels; a method derives a class with its `projected` network and its loss.

    Args:
        pairs: (n, 2, C, h, w), by index; each of the two patches is an example.
    """

    trainable: tuple[str, ...] = ("*",)
    """`trainable` of the `Stage`."""
    projected: Projected

    def __init__(self, pairs: Sequence[Any] | Tensor, config: SiameseConfig, device: str) -> None:
        self.pairs, self.config, self.device = pairs, config, device
        self._ahead = Prefetcher(self._read, self._vary, device)

    def examples(self, epoch: int) -> Sequence[int]:
        return range(2 * len(self.pairs))

    def ahead(self, batch: Sequence[int], seed: int) -> None:
        self._ahead.announce(batch, seed)

    def begin_epoch(self, epoch: int) -> None:
        if epoch:
            self.check_collapse()

    @torch.no_grad()
    def check_collapse(self) -> float:
        """Return the mean standard deviation of the normalised projections' values over some patches.

        Raises:
            GigamorphError: it is close to zero, because the network's output is the same for all patches.
        """
        count = 2 * len(self.pairs)
        x = self.patches(range(0, count, -(-count // _CHECKED_PATCHES)))
        found = float(torch.cat([F.normalize(self.projected(part), dim=1) for part in x.split(128)]).std(0).mean())
        if found < _COLLAPSED:
            raise GigamorphError(f"the projections have collapsed (standard deviation {found:.1e}); reduce lr")
        return found

    def views(self, batch: Sequence[int]) -> Tensor:
        """Return (2 n, C, h, w): one random view of each patch, then another of each."""
        return self._ahead.varied(batch)

    def _vary(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        x = mirrored(cropped(x.repeat(2, 1, 1, 1), self.config.crop, generator), generator)
        return jittered(x, self.config.jitter, self.config.noise, generator)

    def patches(self, indices: Sequence[int]) -> Tensor:
        """Return (n, C, h, w): the pairs' left and right patches alternately."""
        return self._read(indices).to(self.device)

    def _read(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([torch.as_tensor(self.pairs[index // 2][index % 2]) for index in indices])
