"""Offloads the keys and values that autograd saves between the passes, if the plan offloads maps.

During a stage and its backward, the keys and values of all its queries are on the device. In between they are stored
where stored maps are. Each tensor is written once, however often it is saved, and loaded on its first use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ..tiling.stored_maps import let_files_go, new_map


class _Kept:
    """The storage of one tensor, which is offloaded when the tensor is first saved."""

    def __init__(self, place: str):
        self.place = place
        self.values: set[int] = set()  # values in this storage
        self._away: Tensor | None = None
        self._here: TensorWeakRef | None = None

    def write(self, memory: Tensor) -> None:
        if self._away is None:
            self._away = new_map(memory, None, self.place).copy_(memory)
            let_files_go([self._away])

    def bring(self, device: torch.device) -> Tensor:
        """The storage on the device; concurrent users share one copy."""
        assert self._away is not None
        here = None if self._here is None else self._here()
        if here is None:
            here = self._away.to(device, non_blocking=True)
            self._here = TensorWeakRef(here)
        return here


@dataclass(frozen=True)
class OffloadedTensor:
    """A saved tensor that is offloaded."""

    kept: _Kept
    device: torch.device
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int

    def bring(self) -> Tensor:
        return self.kept.bring(self.device).as_strided(self.shape, self.strides, self.offset)


class OffloadedTensors:
    """The offloaded tensors of one forward.

    Args:
        values: the values to offload, none of which is changed in place.
        place: "host" or "disk".
    """

    def __init__(self, values: Collection[int], place: str):
        self.values, self.place = values, place
        self._kept: dict[int, _Kept] = {}  # by address, while allocated

    def add(self, env: Mapping[int, Tensor], made: Collection[int]) -> None:
        """Register the tensors that a step made."""
        for value in made:
            if value in self.values:
                self._kept.setdefault(_address(env[value]), _Kept(self.place)).values.add(value)

    def forget(self, value: int, tensor: Tensor | None) -> None:
        """Unregister a tensor that is freed, because its address may be reused."""
        kept = None if tensor is None or value not in self.values else self._kept.get(_address(tensor))
        if kept is not None and tensor is not None:
            kept.values.discard(value)
            if not kept.values:
                del self._kept[_address(tensor)]

    def pack(self, tensor: Tensor) -> Tensor | OffloadedTensor:
        """The object that autograd saves for a tensor; offloads registered tensors."""
        kept = self._kept.get(_address(tensor)) if self._kept else None
        if kept is None:
            return tensor
        memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        kept.write(memory)
        return OffloadedTensor(kept, tensor.device, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def saving(self, read: Collection[int]) -> contextlib.AbstractContextManager[None]:
        """Context of a call that reads these values; offloads the tensors that autograd saves for it."""
        if not self._kept or not any(value in self.values for value in read):
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self.pack, _unpack)


def _unpack(saved: Tensor | OffloadedTensor) -> Tensor:
    return saved.bring() if isinstance(saved, OffloadedTensor) else saved


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
