"""Computes one tile from its pixels and halos, with or without autograd."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..lowering.ops import Block, Local, SumOf
from .halos import Compose, Crop, Give, Layout, Rect, area, cut, shift, split
from .saved_tensors import SavedTensors
from .stage import TiledStage

_NONE = (0, 0, 0, 0)  # no padding


@dataclass
class Halos:
    """The halos that enter one tile, or their gradients.

    Attributes:
        above: rows from above, in full width, by value number.
        left: columns from the left, by value number.
        origin: for tensors that hold a part of their halo only: its first row and column, by side and value number.
    """

    above: dict[int, Tensor]
    left: dict[int, Tensor]
    origin: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    def place(self, side: str, value: int, rect: Rect) -> Rect:
        """A rectangle of a halo in coordinates of its tensor."""
        return shift(rect, *self.origin.get((side, value), (0, 0)))


@dataclass(frozen=True)
class Returned:
    """The gradients of halos in pass 2.

    Attributes:
        grads: gradients of the halos that entered the tile, to which the tile adds.
        handed_back: gradients of the halos that the tile passed on, as later tiles returned them.
    """

    grads: Halos
    handed_back: Halos


@dataclass(frozen=True)
class Autograd:
    """The autograd state for recording a tile.

    Attributes:
        needs: the maps that a gradient flows through.
        anchor: a scalar that requires a gradient and connects the nodes of halos to autograd's graph.
        sum_of: see `Block`.
        saved: the tensors that autograd saves.
    """

    needs: set[int]
    anchor: Tensor
    sum_of: SumOf
    saved: SavedTensors


class Tile:
    """One tile's computation; used by both passes.

    Args:
        tiled: the stage.
        i, j: row and column of the tile.
        pixels: returns the pixels of a rectangle of a source.
        vectors: the vectors by value number; `run` adds the windows of an op temporarily.
        halos: the halos that enter the tile.
        autograd: the autograd state if the tile will be differentiated.
        second_pass: whether this is pass 2, where stored maps are available.
        whole: see `Block`.

    Attributes:
        blocks: blocks that later ops of the tile read, by value number.
        source_windows: the windows of sources that the tile read.
        shares: moments that ops computed of their own outputs.
        returned: the gradients of halos, set when the tile is differentiated.
    """

    def __init__(
        self,
        tiled: TiledStage,
        i: int,
        j: int,
        pixels: Callable[[int, Rect], Tensor],
        vectors: dict[int, Tensor],
        halos: Halos,
        autograd: Autograd | None = None,
        second_pass: bool = False,
        whole: bool = False,
    ):
        self.tiled, self.i, self.j = tiled, i, j
        self.pixels, self.vectors, self.halos = pixels, vectors, halos
        self.needs = set[int]() if autograd is None else autograd.needs
        self.anchor = None if autograd is None else autograd.anchor
        self.sum_of = None if autograd is None else autograd.sum_of
        self.saved = None if autograd is None else autograd.saved
        self.second_pass, self.whole = second_pass, whole
        self.blocks: dict[int, Tensor] = {}
        self.source_windows: dict[tuple[int, Rect], Tensor] = {}
        self.shares: dict[int, tuple[Tensor, ...]] = {}
        self.returned: Returned | None = None
        self._parts: dict[int, list[tuple[Rect, Tensor]]] = {}  # gathered maps: gradients of parts of their blocks
        self.lacking: dict[int, list[Tensor]] = {}  # see `Block.grad_terms`
        self._hands_on: dict[int, list[tuple[str, Rect, Rect]]] = {}
        self._margins: dict[int, tuple[int, int]] = {}  # space for rows above and columns to the left

    def window(
        self, value: int, rect: Rect, pad: tuple[int, int, int, int], fill: float | None
    ) -> tuple[Tensor, tuple[int, int, int, int]]:
        """Returns the window `rect` of `value` and the padding that is still missing; assembled windows are padded."""
        tiled = self.tiled
        if value in tiled.stage.sources:
            if (value, rect) not in self.source_windows:
                self.source_windows[value, rect] = self.pixels(value, rect)
            return self.source_windows[value, rect], pad
        block = tiled.block(value, self.i, self.j)
        # For uneven padding an op would copy the block and save both; an assembled window contains the block.
        uneven = fill is not None and (pad[0] != pad[1] or pad[2] != pad[3])
        if rect == block and value in self.blocks and not uneven:  # no halo: the most frequent case
            return self.blocks[value], pad
        if not area(rect):  # the tile reads only padding
            info, shape = tiled.stage.program.values[value], list(tiled.stage.maps.shape(value))
            shape[tiled.axes(value)[0]], shape[tiled.axes(value)[1]] = rect[1] - rect[0], rect[3] - rect[2]
            return torch.empty(shape, dtype=info.dtype, device=info.device), pad
        above, left, inside = split(rect, block)
        if area(inside) == area(rect) and not uneven:
            tensor = self.blocks[value]
            if inside != block:
                part = tiled.axes(value), shift(inside, block[0], block[2])
                give = self._give(value)
                tensor = Crop.apply(tensor, *part, give) if tensor.requires_grad else cut(tensor, *part)
            return tensor, pad
        axes = tiled.axes(value)
        parts: list[tuple[Rect, Tensor, Rect]] = []
        sinks: list[Callable[[Tensor], None]] = []
        sources = (
            (above, "above", tiled.rows.halo_in(value, self.i)[0], 0),
            (left, "left", block[0], tiled.cols.halo_in(value, self.j)[0]),
        )
        for part, side, row, col in sources:
            if area(part):
                source = shift(part, row, col)
                place = self.halos.place(side, value, source)
                parts.append((shift(part, rect[0], rect[2]), getattr(self.halos, side)[value], place))
                sinks.append(partial(self._add_to_halo, side, value, source))
        own = (shift(inside, rect[0], rect[2]), shift(inside, block[0], block[2])) if area(inside) else None
        padding, missing = (_NONE, pad) if fill is None else (pad, _NONE)
        tensor = self.blocks[value] if own else None
        room = self._margins.get(value, (0, 0)) if own and fill is None else (0, 0)
        in_margin = room[0] >= block[0] - rect[0] and room[1] >= block[2] - rect[2] and value in self._margins
        size = rect[1] - rect[0], rect[3] - rect[2]
        layout = Layout(axes, *size, padding, fill or 0.0, parts, own, bool(own) and in_margin, self._give(value))
        if value not in self.needs:
            return layout.compose(tensor), missing
        window: Tensor = Compose.apply(self.anchor, tensor, layout, sinks)  # pyright: ignore
        if self.saved is not None and tensor is not None and not layout.in_margin:
            place = shift(inside, rect[0] - padding[0], rect[2] - padding[2])
            self.saved.lies_in(tensor, axes, shift(inside, block[0], block[2]), window, place)
        return window, missing

    def _give(self, value: int) -> Give | None:
        """The function that collects gradients of parts of a block, if an op that gathers them has run."""
        return self._parts[value].append if value in self._parts else None

    def _add_to_halo(self, side: str, value: int, rect: Rect, grad: Tensor) -> None:
        assert self.returned is not None
        place = self.returned.grads.place(side, value, rect)
        cut(getattr(self.returned.grads, side)[value], self.tiled.axes(value), place).add_(grad)

    def run(self, local: Local) -> tuple[Tensor, ...]:
        """The output blocks of one op in this tile."""
        output = local.op.outputs[0]
        rows, cols = self.tiled.rows.block(output, self.i), self.tiled.cols.block(output, self.j)
        pad = _NONE
        env = self.vectors
        windows = []
        for value in local.reads:
            rect = self.tiled.reads(local, value, self.i, self.j)
            lacks = self.tiled.padding(local, value, self.i, self.j)
            env[value], lacks = self.window(value, rect, lacks, local.fill)
            if lacks != _NONE:
                pad = (max(pad[0], lacks[0]), max(pad[1], lacks[1]), max(pad[2], lacks[2]), max(pad[3], lacks[3]))
            windows.append(value)
        margin = self._margin(output) if local.memory.leaves_room else (0, 0)
        run = self.tiled.in_place.get(output, local.run)
        if self.second_pass:
            run = self.tiled.unvalued.get(output, run)
        shares = self.shares if output in self.tiled.moments and not self.second_pass else None
        parts = None
        if local.gathers is not None and self.saved is not None:
            parts = self._parts[local.gathers.value] = []
        lacking = None
        if local.adds and self.saved is not None:
            lacking = self.lacking[output] = []
        result = run(env, Block(rows, cols, pad, self.sum_of, margin, shares, parts, self.whole, lacking))
        if margin != (0, 0):
            self._margins[output] = margin
        for value in windows:
            del env[value]
        return result

    def _margin(self, value: int) -> tuple[int, int]:
        """The number of rows above and columns to the left of a block that this tile's windows need."""
        block = self.tiled.block(value, self.i, self.j)
        windows = [
            self.tiled.reads(local, value, self.i, self.j)
            for local in self.tiled.readers.get(value, ())
            if self.tiled.computes(local.op.outputs[0], self.i, self.j)
        ]
        windows = [rect for rect in windows if area(rect)]
        above = max((block[0] - rect[0] for rect in windows), default=0)
        left = max((block[2] - rect[2] for rect in windows), default=0)
        return max(above, 0), max(left, 0)

    def hands_on(self, value: int) -> list[tuple[str, Rect, Rect]]:
        """The parts of a block that later tiles need: (side, rectangle of the block, rectangle of the halo)."""
        if value not in self._hands_on:  # cached because several callers use it
            self._hands_on[value] = self.tiled.hands_on(value, self.i, self.j)
        return self._hands_on[value]

    def add_handed_back(self, value: int, block: Tensor | None, grad: Tensor) -> None:
        """Add the gradients that later tiles returned to a block's gradient.

        `block` is needed only if the op that gathers the gradients applies a slope.
        """
        assert self.returned is not None
        axes, handed_back = self.tiled.axes(value), self.returned.handed_back
        gather = self.tiled.gathered.get(value)
        slope = None if gather is None else gather.slope
        for side, own, halo in self.hands_on(value):
            place = handed_back.place(side, value, halo)
            part = cut(getattr(handed_back, side)[value], axes, place)
            if slope is not None and block is not None:
                part = part * slope(cut(block, axes, own))
            cut(grad, axes, own).add_(part)

    def reach(self, consumers: Container[int]) -> tuple[set[int], set[int]]:
        """The values whose block is needed for gradients, and those that get a gradient from ops of this tile."""
        tiled, i, j = self.tiled, self.i, self.j
        values = tiled.stage.program.values
        reached: set[int] = set()
        through: set[int] = set()
        read: set[int] = set()  # only their values are needed
        for local in reversed(tiled.stage.locals):
            outputs = local.op.outputs
            if not tiled.computes(outputs[0], i, j):
                continue
            through.update(v for v in outputs if v in consumers)
            # Outputs get a gradient from these ops or from later tiles.
            handed_on = {v for v in outputs if v in self.needs and v in tiled.with_halo and self.hands_on(v)}
            graded = handed_on.union(v for v in outputs if v in through)
            # Random ops always run, otherwise later ops would draw other random numbers.
            reached.update(v for v in outputs if v in graded or v in read or local.random)
            if local.gathers is not None and (local.gathers.value in through or local.gathers.value in consumers):
                reached.update(outputs)
            if any(v in reached for v in outputs):
                flows = any(values[v].takes_grad for v in graded)
                for value in local.reads:
                    window = tiled.reads(local, value, i, j)
                    if area(split(window, tiled.block(value, i, j))[2]):  # more than halos
                        (through if flows else read).add(value)
        return reached, through
