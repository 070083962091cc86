"""Maps stored as a whole between stages: their allocation, and the release of their memory.

On the CPU a map has its own pages (`pages.py`). If memory is short, they are returned row by row after the last
read in the backward: while the gradient of one map grows, the next map and its gradient shrink. Maps on disk are
memory-mapped files. Their pages are released after every tile, and then no longer count as memory of this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ..lowering.ops import Axes
from ..torch_private import FakeTensor
from .halos import empty, memory_order, unpermute
from .pages import ArenaPages, Pages, pages_in_memory

LEAST_BYTES = 1 << 20  # smaller maps are allocated by PyTorch
_PAGES: WeakValueDictionary[int, Pages | ArenaPages] = WeakValueDictionary()  # by address


def pages_of(tensor: Tensor) -> Pages | ArenaPages | None:
    """The pages of a map, or None if it has no pages of its own."""
    return _PAGES.get(tensor.untyped_storage().data_ptr()) if tensor.device.type == "cpu" else None


def new_map(
    pattern: Tensor,
    shape: Sequence[int] | None = None,
    place: str = "device",
    zero: bool = False,
    order: Sequence[int] | None = None,
    later: bool = False,
) -> Tensor:
    """A tensor like `pattern` for a whole map.

    Args:
        pattern: gives the dtype and the defaults of device, shape and memory order.
        shape: shape of the map; by default that of `pattern`.
        place: "device" for the device of `pattern`; "host" for host memory, pinned if there is a GPU; or "disk" for a
            memory-mapped file.
        zero: whether to fill the map with zeros; otherwise it is uninitialised.
        order: dimensions in memory order, slowest first; by default that of `pattern`.
        later: whether zero pages become resident only when they are written, which is slower.

    Raises:
        GigamorphError: if the disk is full.
    """
    # .data: the map must not be a view of its buffer, because users may change the network's output in place.
    order = memory_order(pattern) if order is None else order
    shape = list(pattern.shape if shape is None else shape)
    return _new_map(pattern, shape, place, zero, order, later).data


def _new_map(
    pattern: Tensor,
    shape: list[int],
    place: str,
    zero: bool,
    order: Sequence[int],
    later: bool,
) -> Tensor:
    size = math.prod(shape) * pattern.element_size()
    here = pattern.device.type if place == "device" else "cpu"
    if place == "host" and torch.cuda.is_available():
        dense = torch.empty([shape[d] for d in order], dtype=pattern.dtype, pin_memory=True)
        return unpermute(dense.zero_() if zero else dense, order)
    if here != "cpu" or size < LEAST_BYTES or isinstance(pattern, FakeTensor):
        made = empty(pattern if place == "device" else pattern.new_empty(0, device="cpu"), shape, order)
        return made.zero_() if zero else made
    if place == "disk":
        pages = Pages.make(size, on_disk=True)
        memory = memoryview(pages)
    else:
        pages, memory = pages_in_memory(size)
    made = unpermute(torch.frombuffer(memory, dtype=pattern.dtype).reshape([shape[d] for d in order]), order)
    _PAGES[made.data_ptr()] = pages
    if not zero or isinstance(pages, Pages):  # new pages are zero
        return made
    if not later:
        return made.zero_()
    pages.zero_later()
    return made


def can_be_taken(block: Tensor, shape: Sequence[int], order: Sequence[int]) -> bool:
    """Whether a block may be used as the map: it has the full shape, is dense in this order, and owns its storage.

    Always False on the CPU, where a map has its own pages.
    """
    if on_pages(block.device) or tuple(block.shape) != tuple(shape):
        return False
    alone = block.untyped_storage().nbytes() == block.numel() * block.element_size()
    return alone and block.permute(tuple(order)).is_contiguous()


def on_pages(device: torch.device) -> bool:
    """Whether maps on a device have their own pages."""
    return device.type == "cpu"


def let_rows_go(tensor: Tensor, axes: Axes, first: int) -> None:
    """Return the memory of a map's rows from `first` on to the system; they must not be read again."""
    pages = pages_of(tensor)
    if pages is None or pages.on_disk:
        return
    order = memory_order(tensor)
    position = order.index(axes[0])
    row = math.prod(tensor.shape[d] for d in order[position + 1 :]) * tensor.element_size()
    plane = row * tensor.shape[axes[0]]
    for number in range(math.prod(tensor.shape[d] for d in order[:position])):
        pages.release(number * plane + first * row, (number + 1) * plane)


def let_files_go(tensors: Iterable[Tensor | None]) -> None:
    """Release the resident pages of maps on disk."""
    for tensor in tensors:
        pages = None if tensor is None else pages_of(tensor)
        if pages is not None and pages.on_disk:
            pages.release(0, len(pages))


def add_reader(tensor: Tensor, count: int) -> None:
    """Add `count` (may be negative) to the number of backwards that will read a map."""
    pages = pages_of(tensor)
    if pages is not None:
        pages.readers += count


def has_readers(tensor: Tensor) -> bool:
    """Whether a later backward reads a map."""
    pages = pages_of(tensor)
    return pages is not None and pages.readers > 0


class Gradients:
    """One gradient per stored map, to which the backward of every stage that reads the map adds.

    The first of these backwards returns it to autograd, which passes it to the stage that wrote the map. The others
    return None.
    """

    def __init__(self) -> None:
        self.there: dict[int, TensorWeakRef] = {}  # weak: a gradient of an aborted backward is freed by autograd

    def begin(self, value: int, make: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """The gradient of a map, and whether this call created it."""
        there = self.there.get(value)
        found = None if there is None else there()
        if found is not None:
            return found, False
        made = make()
        self.there[value] = TensorWeakRef(made)
        return made, True

    def end(self, values: Iterable[int]) -> None:
        """Remove the gradients of these maps, which are complete."""
        for value in values:
            self.there.pop(value, None)

    def clear(self) -> None:
        """Remove all gradients."""
        self.there.clear()
