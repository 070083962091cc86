"""NumPy arrays that a forward takes of tensors.

PyTorch gives an array on the tensor's memory; a recording gives a copy, as its tensors have no values. What is written
to it does not come to the tensor, so such writes are refused where the tensor is read afterwards, or is of the
network's state. They are found by comparing: a write that changes nothing now changes nothing in later calls either, as
long as what it was computed from is the same, which the guard looks after.
"""

from __future__ import annotations

import copy
import sys
from array import array as PythonArray
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..errors import UnsupportedError
from .holders import Holder
from .state import Snapshot
from .values import Values
from .walk import ARRAY_BYTES

MEMORY = (np.ndarray, PythonArray, bytearray)
ON_MEMORY = frozenset({torch.as_tensor, torch.asarray})  # of what they are given, if they can


@dataclass(slots=True)
class _Given:
    """An array and a tensor that stock has on one memory, and a recording on two.

    Attributes:
        array: an array in the place of one on the tensor's memory, or the array itself whose tensor is on a copy.
        before: what it held when both were the same.
        where: it was asked for.
        again: what the tensor holds now; None if only the image tells.
        owner: of the memory.
        tensor: that on a copy.
        written: by a tensor on its memory.
    """

    array: np.ndarray
    before: bytes
    where: str
    again: Callable[[], np.ndarray | None]
    owner: Any
    tensor: Tensor | None = None
    written: bool = False

    def changed(self) -> bool:
        return self.written or self.array.tobytes() != self.before

    def is_used(self) -> bool:
        """Whether the forward still has it; three references are the owner's, the array's and the call's own."""
        return sys.getrefcount(self.owner) > 3

    def settle(self) -> None:
        """Both are the same again."""
        self.before, self.written = self.array.tobytes(), False


class Arrays:
    """The arrays of a recording, by the tensor whose memory they stand for."""

    def __init__(self, values: Values, snapshot: Snapshot):
        self.values, self.snapshot = values, snapshot
        self._given: dict[int, list[_Given]] = {}  # id of a root
        self._tensors: list[tuple[Tensor, _Given]] = []  # on the memory of an array
        before = zip(snapshot.found.holders, snapshot.contents, strict=True)
        self._kept = [(h, contents) for h, contents in before if isinstance(h.owner, np.ndarray)]
        self._memories = [thing for thing in snapshot.found.ids.values() if isinstance(thing, MEMORY)]
        self._lying_on: dict[int, list[tuple[Holder, Mapping[Any, Any]]]] = {}  # of a real tensor's root: those of it

    def give(self, array: np.ndarray, of: Tensor, again: Callable[[], np.ndarray | None]) -> None:
        """An array that stands for one on the memory of `of`."""
        given = _Given(array, array.tobytes(), self.values.where(), again, array)
        self._given.setdefault(self._root(of), []).append(given)

    def follow(self, tensor: Tensor) -> None:
        """A call has written to a tensor: its arrays that the forward still has show what it holds now.

        Raises:
            UnsupportedError: if only the image tells.
        """
        for given in tuple(self._given.get(self._root(tensor), ())):
            if not given.is_used():
                continue
            now = given.again()
            if now is None:
                raise UnsupportedError(
                    f"{self.values.where()} writes what depends on the image to a tensor, and has a NumPy array on its "
                    "memory; take a copy of the array (.copy()), or compute with tensors"
                )
            given.array[...] = now
            given.settle()

    def on_memory(self, owner: Any, tensor: Tensor, again: Callable[[Tensor], np.ndarray | None]) -> Tensor:
        """What stands for a real tensor on an array's memory: itself, or one on a copy if the forward made the array.

        Args:
            again: what a tensor holds now; None if only the image tells.
        """
        found = [given for given in self._all() if np.may_share_memory(given.array, flat(owner))]
        if self._was_there(owner):
            self._tensors += [(tensor, given) for given in found]
            return tensor
        with unset_fake_temporarily():
            own, array = tensor.clone(), tensor.numpy()
        self._tensors += [(own, given) for given in found]
        self.values.passing.append(own)
        twin = self.values.twin(own)
        while isinstance(getattr(owner, "base", None), MEMORY):
            owner = owner.base
        given = _Given(array, array.tobytes(), self.values.where(), lambda: again(twin), owner, twin)
        self._given.setdefault(self._root(twin), []).append(given)
        return own

    def as_now(self, argument: Any) -> Any:
        """An argument of a call as it is now: what is written to an array later does not come to earlier calls."""
        if not isinstance(argument, MEMORY) or (self._was_there(argument) and flat(argument).nbytes > ARRAY_BYTES):
            return argument
        return copy.copy(argument)

    def write(self, tensor: Tensor) -> None:
        """A call writes to a tensor.

        Raises:
            UnsupportedError: if it is on the memory of an array that the network keeps.
        """
        real = self.values.reals.get(self._root(tensor))
        if real is not None and any(shares(thing, real) for thing in self._memories):
            raise UnsupportedError(
                f"{self.values.where()} writes to a tensor on the memory of a NumPy array that the network keeps; keep "
                "the tensor alone, and take the array of it where it is read (tensor.numpy())"
            )
        for other, given in self._tensors:
            given.written |= self._root(self.values.known(other)) == self._root(tensor)

    def read(self, tensor: Tensor) -> None:
        """A call reads a tensor.

        Raises:
            UnsupportedError: if an array of it was written to.
        """
        for given in self._given.get(self._root(tensor), ()) if self._given else ():
            if given.tensor is None:
                _refuse(given)
            elif given.changed():
                self._renew(given, given.tensor)
        if self._kept:
            self._refuse_kept(self._root(tensor))

    def _renew(self, given: _Given, tensor: Tensor) -> None:
        """What was written to an array comes to its tensor."""
        with unset_fake_temporarily():
            now = torch.tensor(given.array)
        self.values.passing.append(now)
        self.values.write(tensor, self.values.present(self.values.twin(now)), tracked=False)
        given.settle()

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

    def hand_out(self, owner: Any, where: str, tensors: Iterable[Tensor]) -> None:
        """An array is left for the caller, beside tensors.

        Raises:
            UnsupportedError: if it is on the memory of one of them, or of one that the network keeps.
        """
        left = set(map(self._root, tensors))
        for root, given in self._given.items():
            lasting = [one for one in given if root in left or (one.tensor is None and root in self.values.first)]
            if any(np.may_share_memory(one.array, flat(owner)) for one in lasting):
                raise UnsupportedError(
                    f"{where} holds a NumPy array on the memory of a tensor, with which it would change; give a copy "
                    "(.copy()), or the tensor"
                )

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

    def _was_there(self, owner: Any) -> bool:
        """Whether an array's memory is of before the recording, so that what is written there stays."""
        if not isinstance(owner, np.ndarray):
            return self.snapshot.was_there(owner)
        base: Any = owner
        while isinstance(base, np.ndarray):
            if self.snapshot.was_there(base):
                return True
            base = base.base
        return base is not None


def flat(owner: Any) -> np.ndarray:
    """An array as NumPy's, on the same memory."""
    return owner if isinstance(owner, np.ndarray) else np.frombuffer(owner, np.uint8)


def shares(owner: Any, tensor: Tensor) -> bool:
    """Whether an array lies in a tensor's memory, or a part of it does."""
    memory, array = tensor.untyped_storage(), flat(owner)
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
