"""Deduplication of the tensors that autograd saves: a map that is part of a saved window is not saved twice.

A ReLU saves its result for the backward. The next convolution saves the window that it reads, into which that result
was copied between the halos. The window suffices, because it contains the ReLU's result. If the window lacks some rows
or columns of a block, only these are saved in addition, and the block is reassembled on access.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from ..lowering.ops import Axes
from ..torch_private import memory_of, why_no_saved_tensors_hooks
from .halos import Rect, area, cut

_WORTH = 0.75  # a block is freed if a window contains at least this share of it
_SMALL = 1 << 15  # smaller tensors, in bytes, are not worth the bookkeeping


class _Slot:
    """A tensor that autograd saved: the tensor itself, or its parts and their rectangles."""

    __slots__ = ("__weakref__", "axes", "parts", "shape", "stride", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor

    def is_all_of(self, block: Tensor) -> bool:
        """Whether the slot's tensor is the whole block; both share one storage."""
        tensor = self.tensor
        return (
            tensor is not None
            and tensor.shape == block.shape
            and tensor.stride() == block.stride()
            and tensor.storage_offset() == block.storage_offset()
        )

    def lies_in(self, axes: Axes, parts: list[tuple[Rect, Tensor]]) -> None:
        """Replace the tensor by these parts, or by the part itself if there is only one."""
        assert self.tensor is not None
        self.shape, self.stride, self.axes, self.parts = self.tensor.shape, self.tensor.stride(), axes, parts
        self.tensor = parts[0][1] if len(parts) == 1 else None

    def get(self) -> Tensor:
        if self.tensor is None:
            pattern = self.parts[0][1]
            self.tensor = torch.empty_strided(self.shape, self.stride, dtype=pattern.dtype, device=pattern.device)
            for rect, part in self.parts:
                cut(self.tensor, self.axes, rect).copy_(part)
            self.parts = []  # free the window
        return self.tensor


class SavedTensors:
    """The tensors that autograd saves during `record`; their storage may be replaced until they are accessed."""

    def __init__(self) -> None:
        self._slots: dict[int, list[weakref.ref[_Slot]]] = {}  # by storage; slots keep it alive

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Context in which autograd saves tensors in slots, unless saved-tensor hooks are disabled."""
        if why_no_saved_tensors_hooks() is not None:
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield
        self._slots.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Slot:
        tensor = tensor.detach()  # a saved result would form a reference cycle that no collector sees
        if tensor.nbytes < _SMALL:
            return tensor
        slot = _Slot(tensor)
        self._slots.setdefault(memory_of(tensor), []).append(weakref.ref(slot))
        return slot

    def lies_in(self, block: Tensor, axes: Axes, inside: Rect, window: Tensor, place: Rect) -> None:
        """Note that the rectangle `inside` of a block was copied to the rectangle `place` of a window."""
        slots = self._slots.pop(memory_of(block), None)
        height, width = block.shape[axes[0]], block.shape[axes[1]]
        if slots is None or area(inside) < _WORTH * height * width:
            return
        same = [slot for reference in slots if (slot := reference()) is not None and slot.is_all_of(block)]
        if same:
            top, bottom, left, right = inside
            around = (
                (0, top, 0, width),
                (bottom, height, 0, width),
                (top, bottom, 0, left),
                (top, bottom, right, width),
            )
            rest = [(rect, cut(block.detach(), axes, rect).clone()) for rect in around if area(rect)]
            for slot in same:
                slot.lies_in(axes, [(inside, cut(window.detach(), axes, place)), *rest])


def _unpack(saved: Tensor | _Slot) -> Tensor:
    return saved.get() if isinstance(saved, _Slot) else saved
