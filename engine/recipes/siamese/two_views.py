"""What SimCLR and BYOL share: single patches of both breasts, of each of which two random views are to be alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ...errors import GigamorphError
from ...train.task import Task
from .augment import cropped, jittered, mirrored
from .config import SiameseConfig
from .prefetch import Ahead

_LOOKED_AT = 512  # patches by which a collapse is seen
_COLLAPSED = 1e-3  # of the projections' standard deviation, which is 1 / sqrt(dim) for evenly spread ones


class Projected(nn.Module):
    """Patches (N, C, h, w) -> projections of the encoder's features."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean((2, 3)))


class TwoViews(Task):
    """Patches without labels; a method derives one and says what its `projected` network and its loss are.

    Args:
        pairs: (n, 2, C, h, w), by index; each of the two patches is an example of its own.
    """

    trainable: tuple[str, ...] = ("*",)
    """Of a `Stage`."""
    projected: Projected

    def __init__(self, pairs: Sequence[Any] | Tensor, config: SiameseConfig, device: str) -> None:
        self.pairs, self.config, self.device = pairs, config, device
        self._ahead = Ahead(self._read, self._vary, device)

    def examples(self, epoch: int) -> Sequence[int]:
        return range(2 * len(self.pairs))

    def ahead(self, batch: Sequence[int], seed: int) -> None:
        self._ahead.announce(batch, seed)

    def begin_epoch(self, epoch: int) -> None:
        if epoch:
            self.look()

    @torch.no_grad()
    def look(self) -> float:
        """Standard deviation of the normalised projections of some patches, averaged over their values.

        Raises:
            GigamorphError: it is about zero, for the network says the same of all patches.
        """
        count = 2 * len(self.pairs)
        x = self.patches(range(0, count, -(-count // _LOOKED_AT)))
        found = float(torch.cat([F.normalize(self.projected(part), dim=1) for part in x.split(128)]).std(0).mean())
        if found < _COLLAPSED:
            raise GigamorphError(f"the projections have collapsed (standard deviation {found:.1e}); lower lr")
        return found

    def views(self, batch: Sequence[int]) -> Tensor:
        """(2 n, C, h, w): one random view of each patch, then another of each."""
        return self._ahead.varied(batch)

    def _vary(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        x = mirrored(cropped(x.repeat(2, 1, 1, 1), self.config.crop, generator), generator)
        return jittered(x, self.config.jitter, self.config.noise, generator)

    def patches(self, indices: Sequence[int]) -> Tensor:
        """(n, C, h, w): left and right ones of the pairs in turn."""
        return self._read(indices).to(self.device)

    def _read(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([torch.as_tensor(self.pairs[index // 2][index % 2]) for index in indices])
