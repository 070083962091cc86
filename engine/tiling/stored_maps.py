"""Maps that exist whole: where they live, and when their memory goes back.

On the CPU a map has pages of its own (`page_pool.py`). Where memory is short, they go back row by row, as soon as the
backward has read a row for the last time: while the gradient of one map comes into being, the next map and its gradient
go. Pages of a file are written and read as memory, and are handed to the system after every tile; from then on they are
no memory of this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import TensorWeakRef

from ..lowering.ops import Axes
from .halos import empty, memory_order, unpermute
from .page_pool import ArenaPages, PagePool, Pages

LEAST_BYTES = 1 << 20  # bytes; smaller maps are left to the C library
_PAGES: WeakValueDictionary[int, Pages | ArenaPages] = WeakValueDictionary()  # by their address


def pages_of(tensor: Tensor) -> Pages | ArenaPages | None:
    """The pages that a map lives on, if it has some of its own."""
    return _PAGES.get(tensor.untyped_storage().data_ptr()) if tensor.device.type == "cpu" else None


def new_map(
    pattern: Tensor,
    shape: Sequence[int] | None = None,
    place: str = "device",
    zero: bool = False,
    page_pool: PagePool | None = None,
    order: Sequence[int] | None = None,
    later: bool = False,
) -> Tensor:
    """A tensor like `pattern` for a map that exists whole.

    Args:
        shape: if not that of `pattern`.
        place: "device", that of `pattern`; "host", pinned memory where there is a GPU; or "disk",
            a file that is mapped into memory.
        zero: filled with zeros; without it with anything.
        page_pool: pages of maps that are gone, which it may take, and to which its own go one day.
        order: of its dimensions in memory, slowest first, if not that of `pattern`.
        later: its zeros take memory row by row as they are written to, which costs time.

    Raises:
        GigamorphError: if the disk is full.
    """
    # Not as a view of the memory that it takes: as the network's output it may be changed in place.
    order = memory_order(pattern) if order is None else order
    shape = list(pattern.shape if shape is None else shape)
    return _new_map(pattern, shape, place, zero, page_pool, order, later).data


def _new_map(
    pattern: Tensor,
    shape: list[int],
    place: str,
    zero: bool,
    page_pool: PagePool | None,
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
        pages, memory = (PagePool() if page_pool is None else page_pool).take(size)
    made = unpermute(torch.frombuffer(memory, dtype=pattern.dtype).reshape([shape[d] for d in order]), order)
    _PAGES[made.data_ptr()] = pages
    if zero and later and isinstance(pages, ArenaPages):
        pages.zero_later()
        return made
    return made.zero_() if zero and not pages.clear else made


def can_be_taken(block: Tensor, shape: Sequence[int], order: Sequence[int]) -> bool:
    """Whether what a tile has made may become the map, as it lies: all of it, dense in this order, and nothing beside.

    On a CPU it never may: there a map has pages of its own.
    """
    if on_pages(block.device) or tuple(block.shape) != tuple(shape):
        return False
    alone = block.untyped_storage().nbytes() == block.numel() * block.element_size()
    return alone and block.permute(tuple(order)).is_contiguous()


def on_pages(device: torch.device) -> bool:
    """Whether maps on a device have pages of their own."""
    return device.type == "cpu"


def let_rows_go(tensor: Tensor, axes: Axes, first: int) -> None:
    """Give back the memory of a map's rows from `first` on, which nobody will read again."""
    pages = pages_of(tensor)
    if pages is None or pages.on_disk:
        return
    order = memory_order(tensor)
    position = order.index(axes[0])
    row = math.prod(tensor.shape[d] for d in order[position + 1 :]) * tensor.element_size()
    plane = row * tensor.shape[axes[0]]
    for number in range(math.prod(tensor.shape[d] for d in order[:position])):
        pages.let_go(number * plane + first * row, (number + 1) * plane)


def let_files_go(tensors: Iterable[Tensor | None]) -> None:
    """Hand the pages of those maps that live in files to the system."""
    for tensor in tensors:
        pages = None if tensor is None else pages_of(tensor)
        if pages is not None and pages.on_disk:
            pages.let_go(0, len(pages))


def add_reader(tensor: Tensor, count: int) -> None:
    """One more backward (or less) that will read a map."""
    pages = pages_of(tensor)
    if pages is not None:
        pages.readers += count


def has_readers(tensor: Tensor) -> bool:
    """Whether a backward is still to come that reads a map."""
    pages = pages_of(tensor)
    return pages is not None and pages.readers > 0


class Gradients:
    """One gradient for each stored map, which the backward of every stage that reads the map adds to.

    The first of them gives it to autograd, which hands it to the stage that wrote the map; the others give none.
    """

    def __init__(self) -> None:
        self.there: dict[int, TensorWeakRef] = {}  # weak: what autograd has let go is of a backward that was broken off

    def begin(self, value: int, make: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """The gradient of a map, and whether it has been made now."""
        there = self.there.get(value)
        found = None if there is None else there()
        if found is not None:
            return found, False
        made = make()
        self.there[value] = TensorWeakRef(made)
        return made, True

    def end(self, values: Iterable[int]) -> None:
        """The gradients of these maps are complete."""
        for value in values:
            self.there.pop(value, None)

    def clear(self) -> None:
        """Forget all of them."""
        self.there.clear()
