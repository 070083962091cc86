"""The processes of a group that train together: which images each has, and what they have to agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeVar

from torch import Tensor
from torch import distributed as dist

from ..errors import GigamorphError
from .launch import neighbours
from .processes import world

T = TypeVar("T")
_NOTHING: Any = object()


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that train together.

    Each has an image of its own at a time and the gradients are averaged, or all of them share one, or some share each:
    neighbours by rank, whose gradients are those of their image. The first process reports and writes. Each method that
    is called a collective must be called by all processes.

    Attributes:
        split: as `accelerate` takes it: whether all processes share an image, or the group of those that share this
            one's.
        together: how many do, where they are not all.
    """

    rank: int = 0
    size: int = 1
    split: Any = False
    together: int = 1

    @classmethod
    def here(cls, split: bool | int) -> ProcessGroup:
        """This process in the group of `torch.distributed`; alone without one.

        Args:
            split: whether all processes share an image, or how many share each.

        Raises:
            GigamorphError: if the processes cannot be dealt to images.
        """
        rank, size = dist.get_rank() if world() > 1 else 0, world()
        if isinstance(split, bool) or split in (1, size):
            return cls(rank, size, split if isinstance(split, bool) else split > 1)
        if split < 1 or size % split:
            raise GigamorphError(f"{size} processes cannot share images {split} at a time; take a multiple of {split}")
        return cls(rank, size, neighbours(split), split)

    def undealt(self) -> ProcessGroup:
        """The same processes, each of which computes every batch, as when they share each image."""
        return replace(self, split=True)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def at_once(self) -> int:
        """Images that are computed at a time."""
        return 1 if self.split is True else self.size // self.together

    @property
    def turn(self) -> int:
        """Which of the images that are computed at a time is this process's."""
        return 0 if self.split is True else self.rank // self.together

    @property
    def speaks(self) -> bool:
        """Whether this process is the first of those that share its image."""
        return self.leads if self.split is True else self.rank % self.together == 0

    def share(self, order: Sequence[int]) -> list[int]:
        """This process's images of an order: one in `at_once`.

        All processes have equally many, for they wait for each other; those that would have one less repeat one, which
        `counts` tells.
        """
        rounds = -(-len(order) // self.at_once)
        return [order[(n * self.at_once + self.turn) % len(order)] for n in range(rounds)]

    def counts(self, number: int, images: int) -> bool:
        """Whether this process's image of a number is not one that is repeated."""
        return number * self.at_once + self.turn < images

    def done(self, number: int, images: int) -> int:
        """Images that are done when each process has done this many."""
        return min(number * self.at_once, images)

    def all(self, mine: T) -> list[T]:
        """What each process has; a collective."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def in_order(self, mine: Sequence[T]) -> list[T]:
        """What the processes have found of their images (without repeated ones), in order; a collective."""
        if self.at_once == 1:
            return list(mine)
        rounds = zip_longest(*self.all(list(mine))[:: self.together], fillvalue=_NOTHING)
        return [found for one in rounds for found in one if found is not _NOTHING]

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the images that are computed at a time; a collective."""
        if self.at_once == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Go on when all processes are here; a collective."""
        if self.size > 1:
            dist.barrier()
