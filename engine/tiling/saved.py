"""What autograd saves of a tile: a map that lies in a window already is not saved twice.

A ReLU saves its result for the backward, and a convolution the window that it reads, into which that result has been
copied between the halos. The window is enough: the block in it is what the ReLU asks for. Of a block that its window
has but for some rows or columns, those are kept, and it is put together again when it is asked for.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from ..lowering.ops import Axes
from .halos import Rect, area, cut

_WORTH = 0.75  # the least share of a block that lies in a window for it to be let go
_SMALL = 1 << 15  # bytes that are not worth the bookkeeping


class _Slot:
    """One tensor that autograd has saved: the tensor, or its parts, with the places where they belong."""

    __slots__ = ("__weakref__", "axes", "parts", "shape", "stride", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor

    def is_all_of(self, block: Tensor) -> bool:
        """Whether it is a block, not a part of one; both lie in one storage."""
        tensor = self.tensor
        return (
            tensor is not None
            and tensor.shape == block.shape
            and tensor.stride() == block.stride()
            and tensor.storage_offset() == block.storage_offset()
        )

    def lies_in(self, axes: Axes, parts: list[tuple[Rect, Tensor]]) -> None:
        """The tensor is the only one of these parts, or what they make up."""
        assert self.tensor is not None
        self.shape, self.stride, self.axes, self.parts = self.tensor.shape, self.tensor.stride(), axes, parts
        self.tensor = parts[0][1] if len(parts) == 1 else None

    def get(self) -> Tensor:
        if self.tensor is None:
            pattern = self.parts[0][1]
            self.tensor = torch.empty_strided(self.shape, self.stride, dtype=pattern.dtype, device=pattern.device)
            for rect, part in self.parts:
                cut(self.tensor, self.axes, rect).copy_(part)
            self.parts = []  # the window may go
        return self.tensor


class SavedTensors:
    """What autograd saves while this records; where it lies may change until it is asked for."""

    def __init__(self) -> None:
        self._slots: dict[int, list[weakref.ref[_Slot]]] = {}  # by storage, which a slot keeps alive

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Within it, all that autograd saves goes through slots; not where hooks for that are switched off."""
        if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # pyright: ignore
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield
        self._slots.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Slot:
        tensor = tensor.detach()  # an op that saves its result would hold itself, where no garbage collector sees it
        if tensor.nbytes < _SMALL:
            return tensor
        slot = _Slot(tensor)
        self._slots.setdefault(tensor.untyped_storage()._cdata, []).append(weakref.ref(slot))
        return slot

    def lies_in(self, block: Tensor, axes: Axes, inside: Rect, window: Tensor, place: Rect) -> None:
        """The rectangle `inside` of a block has been copied to a place in a window."""
        slots = self._slots.pop(block.untyped_storage()._cdata, None)
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
