"""An order of the examples that depends on nothing but the seed and the epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from ..parallel.process_group import ProcessGroup


class EpochSampler(Sampler[int]):
    """A permutation per epoch, drawn from (seed, epoch): a resumed run sees the order of an uninterrupted one.

    ``skip`` examples of the next epoch to run are left out, once: they were done before the interruption. Lightning
    calls `set_epoch` before each epoch. Of what remains the processes of a group have their shares. ``on_epoch`` is
    called with the epoch before its first example: images that vary from epoch to epoch draw anew.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        epoch: int = 0,
        skip: int = 0,
        group: ProcessGroup | None = None,
        on_epoch: Callable[[int], None] | None = None,
    ) -> None:
        self.size, self.seed, self.epoch, self.skip = size, seed, epoch, skip
        self._group, self._on_epoch = group or ProcessGroup(), on_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self._on_epoch is not None:
            self._on_epoch(self.epoch)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        skip, self.skip = self.skip, 0
        yield from self._group.share(order[skip:].tolist())

    def __len__(self) -> int:
        return -(-self.size // self._group.at_once)
