"""NumPy arrays that a forward takes of tensors.

PyTorch gives an array on the tensor's memory; a recording gives a copy, as its tensors have no values. What is written
to it does not come to the tensor, so such writes are refused where the tensor is read afterwards, or is of the
network's state. They are found by comparing: a write that changes nothing now changes nothing in later calls either, as
long as what it was computed from is the same, which the guard looks after.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UnsupportedError
from .holders import Holder
from .state import Snapshot
from .values import Values

_ON_THE_SAME_MEMORY = frozenset({torch.as_tensor, torch.asarray})


@dataclass(slots=True)
class _Given:
    """An array in the place of one on a tensor's memory: what it held, and where it was asked for."""

    array: np.ndarray
    before: bytes
    where: str
    again: Callable[[], np.ndarray | None]  # what it holds now; None if only the image tells
    written: bool = False  # by a tensor on its memory

    def changed(self) -> bool:
        return self.written or self.array.tobytes() != self.before


class Arrays:
    """The arrays of a recording, by the tensor whose memory they stand for."""

    def __init__(self, values: Values, snapshot: Snapshot):
        self.values, self.snapshot = values, snapshot
        self._given: dict[int, list[_Given]] = {}  # id of a root
        self._tensors: list[tuple[Tensor, _Given]] = []  # on the memory of an array
        before = zip(snapshot.found.holders, snapshot.contents, strict=True)
        self._kept = [(h, contents) for h, contents in before if isinstance(h.owner, np.ndarray)]
        self._lying_on: dict[int, list[tuple[Holder, Mapping[Any, Any]]]] = {}  # of a real tensor's root: those of it

    def give(self, array: np.ndarray, of: Tensor, again: Callable[[], np.ndarray | None]) -> None:
        """An array that stands for one on the memory of `of`."""
        given = _Given(array, array.tobytes(), self.values.where(), again)
        self._given.setdefault(self._root(of), []).append(given)

    def follow(self, tensor: Tensor) -> None:
        """A call has written to a tensor: its arrays that the forward still has show what it holds now."""
        for given in tuple(self._given.get(self._root(tensor), ())):
            now = given.again() if sys.getrefcount(given.array) > 2 else None
            if now is not None:
                given.array[...] = now
                given.before = given.array.tobytes()

    def made(self, func: Any, args: Any, tensor: Any) -> None:
        """A call has made a tensor, which may lie on an array's memory."""
        if func in _ON_THE_SAME_MEMORY and args and isinstance(args[0], np.ndarray):
            self._lies_on(args[0], tensor)

    def from_numpy(self, array: np.ndarray, tensor: Tensor) -> None:
        """A real tensor on an array's memory; of an array that the forward has made each call has another."""
        self._lies_on(array, tensor)
        if not self._was_there(array):
            self.values.passing.append(tensor)

    def _lies_on(self, array: np.ndarray, tensor: Tensor) -> None:
        found = [given for given in self._all() if np.may_share_memory(given.array, array)]
        self._tensors += [(tensor, given) for given in found]

    def write(self, tensor: Tensor) -> None:
        """A call writes to a tensor."""
        for other, given in self._tensors:
            given.written |= self._root(self.values.known(other)) == self._root(tensor)

    def read(self, tensor: Tensor) -> None:
        """A call reads a tensor.

        Raises:
            UnsupportedError: if an array of it was written to.
        """
        for given in self._given.get(self._root(tensor), ()) if self._given else ():
            _refuse(given)
        if self._kept:
            self._refuse_kept(self._root(tensor))

    def _refuse_kept(self, root: int) -> None:
        """Refuse to read a tensor on a kept array that the forward has written to: calls write to it at their end."""
        if root not in self._lying_on:
            real = self.values.reals.get(root)
            self._lying_on[root] = [kept for kept in self._kept if real is not None and shares(kept[0].owner, real)]
        for holder, before in self._lying_on[root]:
            if holder.read() != before:
                raise UnsupportedError(
                    f"{self.values.where()} reads a tensor on the memory of the NumPy array {holder.name}, which the "
                    "forward has written to; write to the tensor (copy_, add_), or make it of the array (torch.tensor)"
                )

    def finish(self) -> None:
        """The forward is over, and what it leaves in the network's state is right.

        Raises:
            UnsupportedError: if an array of the state was written to.
        """
        passing = {id(self.values.known(tensor)) for tensor in self.values.passing}
        for root, given in self._given.items():
            if root in self.values.first and root not in passing:
                for one in given:
                    _refuse(one)

    def forget(self) -> None:
        """Let all tensors and arrays of the recording go."""
        self._given.clear()
        self._tensors.clear()
        self._lying_on.clear()

    def _all(self) -> Iterator[_Given]:
        for given in self._given.values():
            yield from given

    def _root(self, tensor: Tensor) -> int:
        alias = self.values.aliases.of.get(id(tensor))
        return id(tensor if alias is None else alias.memory.root)

    def _was_there(self, array: np.ndarray) -> bool:
        """Whether an array's memory is of before the recording, so that what is written there stays."""
        base: Any = array
        while isinstance(base, np.ndarray):
            if self.snapshot.was_there(base):
                return True
            base = base.base
        return base is not None


def shares(array: np.ndarray, tensor: Tensor) -> bool:
    """Whether an array lies in a tensor's memory, or a part of it does."""
    memory = tensor.untyped_storage()
    first = array.__array_interface__["data"][0]
    steps = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    start, end = first + sum(s for s in steps if s < 0), first + sum(s for s in steps if s > 0) + array.itemsize
    return array.size > 0 and start < memory.data_ptr() + memory.nbytes() and memory.data_ptr() < end


def _refuse(given: _Given) -> None:
    if given.changed():
        raise UnsupportedError(
            f"{given.where} writes to the NumPy array of a tensor, which changes the tensor; write to the tensor "
            "(copy_, add_), or to a copy of the array (.copy())"
        )
