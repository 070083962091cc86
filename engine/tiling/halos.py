"""Halos, the rows and columns passed from tile to tile: their storage, and the assembly of windows from them.

The window that an op reads in a tile has up to three parts:

            |  columns from the left  |  columns of this tile
    --------+-------------------------+----------------------
    rows    |        upper halo (all columns, from the strip above)
    --------+-------------------------+----------------------
    rows of |        left halo       |  block (computed in this tile)
    the tile|                         |

In the backward the gradient of a window is split in the same way. Autograd propagates the block's part; the other
parts are added to the gradients of the halos. The tiles above and to the left add these to their own blocks.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import GigamorphError
from ..lowering.ops.base import Axes, Rect
from ..torch_private import foreach_copy
from .memory import format_bytes

Give = Callable[[tuple[Rect, Tensor]], None]


def cut(tensor: Tensor, axes: Axes, rect: Rect) -> Tensor:
    """A view of a rectangle of a map."""
    (rows, cols), (top, bottom, left, right) = axes, rect
    if right - left == tensor.shape[cols]:  # most halos cover one axis in full
        return tensor.narrow(rows, top, bottom - top)
    if bottom - top == tensor.shape[rows]:
        return tensor.narrow(cols, left, right - left)
    return tensor.narrow(rows, top, bottom - top).narrow(cols, left, right - left)


def split(rect: Rect, block: Rect) -> tuple[Rect, Rect, Rect]:
    """The parts of a window above the block's rows, left of its columns, and inside the block."""
    top, bottom, left, right = rect
    middle = min(max(top, block[0]), bottom)
    centre = min(max(left, block[2]), right)
    return (top, middle, left, right), (middle, bottom, left, centre), (middle, bottom, centre, right)


def shift(rect: Rect, row: int, col: int) -> Rect:
    """The rectangle in coordinates relative to (row, col)."""
    return rect[0] - row, rect[1] - row, rect[2] - col, rect[3] - col


def area(rect: Rect) -> int:
    return max(0, rect[1] - rect[0]) * max(0, rect[3] - rect[2])


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions in memory order, slowest first."""
    if tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.shape[1] > 1:
        return [0, 2, 3, 1]  # PyTorch infers channels_last from the strides, even of dimensions of size one
    return sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d) if tensor.shape[d] > 1 else -math.inf, d))


def unpermute(dense: Tensor, order: Sequence[int]) -> Tensor:
    """Permute a tensor whose dimensions are in memory order `order` back to their logical order."""
    inverse = [0] * len(order)
    for position, d in enumerate(order):
        inverse[d] = position
    return dense.permute(inverse)


def empty_like_layout(pattern: Tensor, axes: Axes, height: int, width: int) -> Tensor:
    """An uninitialised map with the dtype, device and memory order of `pattern` and another height and width."""
    shape = list(pattern.shape)
    shape[axes[0]], shape[axes[1]] = height, width
    return empty(pattern, shape)


def empty(pattern: Tensor, shape: Sequence[int], order: Sequence[int] | None = None) -> Tensor:
    """An uninitialised tensor of another shape with the dtype, device and (by default) memory order of `pattern`."""
    if order is None and pattern.dim() == 4:  # a shortcut for memory formats that PyTorch can name
        if pattern.stride(1) == 1 and pattern.shape[1] > 1:
            return torch.empty(shape, dtype=pattern.dtype, device=pattern.device, memory_format=torch.channels_last)
        if pattern.is_contiguous():
            return torch.empty(shape, dtype=pattern.dtype, device=pattern.device)
    order = memory_order(pattern) if order is None else order
    return unpermute(torch.empty([shape[d] for d in order], dtype=pattern.dtype, device=pattern.device), order)


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy (target, source) pairs; pairs with equal strides are copied in few launches."""
    groups: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        alike = target.stride() == source.stride()
        targets, sources = groups.setdefault((alike, target.dtype, source.dtype), ([], []))
        targets.append(target)
        sources.append(source)
    with torch.no_grad():
        for targets, sources in groups.values():
            foreach_copy(targets, sources)


def copies(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Copies of tensors by number, in few launches."""
    made = {value: torch.empty_like(tensor) for value, tensor in tensors.items()}
    copy_all(zip(made.values(), tensors.values(), strict=True))
    return made


def put_back(part: Tensor, axes: Axes, rect: Rect, height: int, width: int) -> Tensor:
    """A map with `part` at `rect` and zeros around it."""
    whole = empty_like_layout(part, axes, height, width)
    cut(whole, axes, rect).copy_(part)
    top, bottom, left, right = rect
    for around in ((0, top, 0, width), (bottom, height, 0, width), (top, bottom, 0, left), (top, bottom, right, width)):
        if area(around):
            cut(whole, axes, around).zero_()
    return whole


@dataclass(slots=True)
class Layout:
    """How a window is assembled; all rectangles are in the window's own coordinates without padding.

    Attributes:
        axes: the image axes.
        height, width: size of the window without padding.
        pad: (top, bottom, left, right), filled with `fill`.
        parts: (rectangle of the window, tensor that fills it, rectangle of that tensor).
        block: (rectangle of the window, rectangle of the block), or None if the block has no part in the window.
        in_margin: the block has space in memory for the rows above and the columns to the left; they are copied there,
            and the window is a view.
        give: receives the gradient of the block's part and its rectangle in the block, if one op gathers them
            (`Block.parts`).
    """

    axes: Axes
    height: int
    width: int
    pad: tuple[int, int, int, int]
    fill: float
    parts: list[tuple[Rect, Tensor, Rect]]
    block: tuple[Rect, Rect] | None
    in_margin: bool = False
    give: Give | None = None

    def compose(self, block: Tensor | None) -> Tensor:
        """The window: one new tensor, or a view of the block and its margin."""
        if self.in_margin:
            assert block is not None
            return self._fill_margin(block)
        top, bottom, left, right = self.pad
        pattern = block if block is not None else self.parts[0][1]
        height, width = self.height + top + bottom, self.width + left + right
        out = empty_like_layout(pattern, self.axes, height, width)
        inner = cut(out, self.axes, (top, top + self.height, left, left + self.width))
        if top:
            cut(out, self.axes, (0, top, 0, width)).fill_(self.fill)
        if bottom:
            cut(out, self.axes, (height - bottom, height, 0, width)).fill_(self.fill)
        if left:
            cut(out, self.axes, (top, height - bottom, 0, left)).fill_(self.fill)
        if right:
            cut(out, self.axes, (top, height - bottom, width - right, width)).fill_(self.fill)
        for target, tensor, source in self.parts:
            cut(inner, self.axes, target).copy_(cut(tensor, self.axes, source))
        if self.block is not None:
            assert block is not None
            target, source = self.block
            cut(inner, self.axes, target).copy_(cut(block, self.axes, source))
        return out

    def _fill_margin(self, block: Tensor) -> Tensor:
        assert self.block is not None
        target, source = self.block
        size, offset = list(block.shape), block.storage_offset()
        for axis, extent, first in zip(self.axes, (self.height, self.width), (0, 2), strict=True):
            size[axis] = extent
            offset += (source[first] - target[first]) * block.stride(axis)
        # .data: the margin is not part of the block, so autograd must not record the write.
        window = block.data.as_strided(size, block.stride(), offset)
        for part, tensor, rect in self.parts:
            cut(window, self.axes, part).copy_(cut(tensor, self.axes, rect))
        return window


class Compose(torch.autograd.Function):
    """`Layout.compose` whose backward passes the gradient of each halo part to its function in `sinks`.

    `anchor` is a scalar that requires a gradient: it makes autograd run this node even without a block.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, block: Tensor | None, layout: Layout, sinks: list[Callable[[Tensor], None]]):
        ctx.layout, ctx.sinks = layout, sinks
        ctx.block_shape = None if block is None else block.shape
        window = layout.compose(block)
        layout.parts = [(target, torch.empty(0), source) for target, _, source in layout.parts]  # free the halos
        return window

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (grad,) = grads
        layout: Layout = ctx.layout
        top, _, left, _ = layout.pad
        inner = cut(grad, layout.axes, (top, top + layout.height, left, left + layout.width))
        for (target, _, _), sink in zip(layout.parts, ctx.sinks, strict=True):
            sink(cut(inner, layout.axes, target))
        if layout.block is None or not ctx.needs_input_grad[1]:
            return None, None, None, None
        target, source = layout.block
        part = cut(inner, layout.axes, target)
        if part.shape != ctx.block_shape:
            if layout.give is not None:
                layout.give((source, part))
                return None, None, None, None
            part = put_back(part, layout.axes, source, *(ctx.block_shape[axis] for axis in layout.axes))
        return None, part, None, None


class Crop(torch.autograd.Function):
    """A part of a block. Autograd's own slicing would change the memory order of its gradient.

    `give` is that of `Layout`.
    """

    @staticmethod
    def forward(ctx: Any, block: Tensor, axes: Axes, rect: Rect, give: Give | None = None):
        ctx.where, ctx.give = (axes, rect, block.shape[axes[0]], block.shape[axes[1]]), give
        return cut(block, axes, rect)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        if ctx.give is not None:
            ctx.give((ctx.where[1], grads[0]))
            return None, None, None, None
        return put_back(grads[0], *ctx.where), None, None, None


class HandOn(torch.autograd.Function):
    """Returns the block unchanged; in the backward, `add` adds the gradients that later tiles returned.

    `own`: no other branch holds the incoming gradient, so it may be changed in place.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, block: Tensor, add: Callable[[Tensor], None], own: bool = False):
        ctx.add, ctx.own = add, own
        return block.narrow(0, 0, block.shape[0])  # not view_as: it loses the memory order of a batch of one

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        # Cloned because autograd may pass the same tensor to another branch.
        grad = grads[0] if ctx.own else grads[0].clone()
        ctx.add(grad)
        return None, grad, None, None


@contextlib.contextmanager
def disk_errors(size: int) -> Iterator[None]:
    """Context that turns a full disk into a one-line error, while a temporary file grows by `size` bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise GigamorphError(
            f"{tempfile.gettempdir()}: cannot store another {format_bytes(size)} of halos or maps ({error.strerror}); "
            "set TMPDIR to a larger disk, or increase the memory budget"
        ) from None


class HaloStore:
    """Stores the halos that enter each tile between the two passes.

    Args:
        place: "device" leaves them on the device, "host" copies them to (pinned) host memory, "disk" writes them to a
            temporary file. The file is never memory-mapped, so it does not count as memory of this process.
    """

    def __init__(self, place: str):
        self.place = place
        self.bytes = 0
        self._file = tempfile.TemporaryFile(prefix="gigamorph-halos-") if place == "disk" else None  # noqa: SIM115

    def put(self, tensor: Tensor) -> Any:
        """Store a tensor; returns a handle for `get`."""
        self.bytes += tensor.nbytes
        if self.place == "device" or (self.place == "host" and tensor.device.type == "cpu"):
            return tensor
        if self.place == "host":
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            return host.copy_(tensor, non_blocking=True), tensor.device
        assert self._file is not None
        order = memory_order(tensor)
        dense = tensor.permute(order).contiguous().cpu()
        with disk_errors(tensor.nbytes):
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(dense.reshape(-1).view(torch.uint8).numpy().data)
        return offset, order, dense.shape, tensor.dtype, tensor.device

    def get(self, handle: Any) -> Tensor:
        """The tensor stored under a handle."""
        if isinstance(handle, Tensor):
            return handle
        if len(handle) == 2:
            return handle[0].to(handle[1], non_blocking=True)
        assert self._file is not None
        offset, order, shape, dtype, device = handle
        dense = torch.empty(shape, dtype=dtype)
        with disk_errors(dense.nbytes):  # seek flushes buffered writes
            self._file.seek(offset)
        self._file.readinto(dense.reshape(-1).view(torch.uint8).numpy().data)
        return unpermute(dense, order).to(device)
