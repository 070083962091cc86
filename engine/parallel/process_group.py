"""The processes that train together: the distribution of images, and collectives of their results."""

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

    Either each process has its own image and the gradients are averaged, or all processes share an image, or groups of
    neighbouring ranks share one. The first process reports and writes. Methods that are collectives must be called by
    all processes.

    Attributes:
        rank: rank of this process.
        size: number of processes.
        split: the argument of `accelerate`: whether all processes share an image, or the group that shares this one's.
        together: number of processes that share an image, if not all do.
    """

    rank: int = 0
    size: int = 1
    split: Any = False
    together: int = 1

    @classmethod
    def here(cls, split: bool | int) -> ProcessGroup:
        """This process in the group of `torch.distributed`; a single process without a group.

        Args:
            split: whether all processes share an image, or how many share each.

        Raises:
            GigamorphError: if the number of processes is not a multiple of `split`.
        """
        rank, size = dist.get_rank() if world() > 1 else 0, world()
        if isinstance(split, bool) or split in (1, size):
            return cls(rank, size, split if isinstance(split, bool) else split > 1)
        if split < 1 or size % split:
            raise GigamorphError(
                f"{size} processes cannot share images in groups of {split}; use a multiple of {split}"
            )
        return cls(rank, size, neighbours(split), split)

    def undealt(self) -> ProcessGroup:
        """The same processes without distribution of images: each process computes every batch."""
        return replace(self, split=True)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def at_once(self) -> int:
        """The number of images that are computed concurrently."""
        return 1 if self.split is True else self.size // self.together

    @property
    def turn(self) -> int:
        """The index of this process's image among those that are computed concurrently."""
        return 0 if self.split is True else self.rank // self.together

    @property
    def speaks(self) -> bool:
        """Whether this process is the first of those that share its image."""
        return self.leads if self.split is True else self.rank % self.together == 0

    def share(self, order: Sequence[int]) -> list[int]:
        """This process's images of an order: every `at_once`-th.

        All processes get equally many images because they wait for each other; some repeat an image, see `counts`.
        """
        rounds = -(-len(order) // self.at_once)
        return [order[(n * self.at_once + self.turn) % len(order)] for n in range(rounds)]

    def counts(self, number: int, images: int) -> bool:
        """Whether this process's image with this number is not a repetition."""
        return number * self.at_once + self.turn < images

    def done(self, number: int, images: int) -> int:
        """The number of images that are done when each process has done `number`."""
        return min(number * self.at_once, images)

    def all(self, mine: T) -> list[T]:
        """The objects of all processes by rank; a collective."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def in_order(self, mine: Sequence[T]) -> list[T]:
        """The results of all processes in the order of the images, without repetitions; a collective."""
        if self.at_once == 1:
            return list(mine)
        rounds = zip_longest(*self.all(list(mine))[:: self.together], fillvalue=_NOTHING)
        return [found for one in rounds for found in one if found is not _NOTHING]

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the images that are computed concurrently; a collective."""
        if self.at_once == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Wait for all processes; a collective."""
        if self.size > 1:
            dist.barrier()
