"""The computation of one tile from its pixels and halos, with or without autograd."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..lowering.ops import Block, Local, SumOf
from .halos import Compose, Crop, Give, Layout, Rect, area, cut, shift, split
from .saved import SavedTensors
from .stage import TiledStage

_NONE = (0, 0, 0, 0)  # no padding


@dataclass
class Halos:
    """The halos that enter one tile (or their gradients): rows from above, in full width, and columns.

    `origin` says, by side and value, where a tensor begins that holds only a part of its halo.
    """

    above: dict[int, Tensor]
    left: dict[int, Tensor]
    origin: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    def place(self, side: str, value: int, rect: Rect) -> Rect:
        """A rectangle of a halo in the tensor that is here."""
        return shift(rect, *self.origin.get((side, value), (0, 0)))


@dataclass(frozen=True)
class Returned:
    """Where gradients of halos go in pass 2.

    Attributes:
        grads: those of the halos that entered the tile: added to.
        handed_back: those of the halos that it handed on, which later tiles have left.
    """

    grads: Halos
    handed_back: Halos


@dataclass(frozen=True)
class Autograd:
    """What a tile needs to be recorded.

    Attributes:
        needs: the maps that a gradient flows through.
        anchor: a scalar that requires a gradient and keeps the nodes of the halos in autograd's graph.
        sum_of: see `Block`.
        saved: what autograd saves meanwhile.
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
        pixels: gives the sources' pixels.
        vectors: by value; ops get their windows beside them.
        halos: what enters the tile.
        autograd: given if it is to be differentiated.
        second_pass: the stored maps are there.
        whole: see `Block`.

    Attributes:
        blocks: the maps' blocks that a later op of the tile reads.
        source_windows: what has been read.
        shares: what ops have computed of the moments of their outputs.
        returned: set when the tile is differentiated.
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
        self._parts: dict[int, list[tuple[Rect, Tensor]]] = {}  # of gathered maps: gradients of parts of their blocks
        self.lacking: dict[int, list[Tensor]] = {}  # of blocks whose op adds that: see `Block.grad_terms`
        self._hands_on: dict[int, list[tuple[str, Rect, Rect]]] = {}
        self._margins: dict[int, tuple[int, int]] = {}  # blocks that have room for rows above and columns to the left

    def window(
        self, value: int, rect: Rect, pad: tuple[int, int, int, int], fill: float | None
    ) -> tuple[Tensor, tuple[int, int, int, int]]:
        """The rectangle of `value`, padded already if it had to be put together, and the padding still missing."""
        tiled = self.tiled
        if value in tiled.stage.sources:
            if (value, rect) not in self.source_windows:
                self.source_windows[value, rect] = self.pixels(value, rect)
            return self.source_windows[value, rect], pad
        block = tiled.block(value, self.i, self.j)
        # An op would copy it for uneven padding, and keep the block besides; put together, the block lies in it.
        uneven = fill is not None and (pad[0] != pad[1] or pad[2] != pad[3])
        if rect == block and value in self.blocks and not uneven:  # without a halo, as most reads are
            return self.blocks[value], pad
        if not area(rect):  # the outputs of this tile lie wholly in the padding
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
        """Where the gradient of a part of a block goes: to the op that gathers them, once that has run."""
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
        margin = self._margin(output) if local.leaves_room else (0, 0)
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
        """How many rows above and columns to the left of a block the windows of this tile need."""
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
        if value not in self._hands_on:  # asked for in both passes, and to see what is differentiated
            self._hands_on[value] = self.tiled.hands_on(value, self.i, self.j)
        return self._hands_on[value]

    def add_handed_back(self, value: int, block: Tensor | None, grad: Tensor) -> None:
        """Add to a block's gradient what later tiles have handed back for it; the block where that wants a slope."""
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
        """Values whose block in this tile is needed for gradients, and those they reach through an op of this tile."""
        tiled, i, j = self.tiled, self.i, self.j
        values = tiled.stage.program.values
        reached: set[int] = set()
        through: set[int] = set()
        read: set[int] = set()  # for their values alone
        for local in reversed(tiled.stage.locals):
            outputs = local.op.outputs
            if not tiled.computes(outputs[0], i, j):
                continue
            through.update(v for v in outputs if v in consumers)
            # A gradient comes to those, and to what later tiles have handed one back for.
            handed_on = {v for v in outputs if v in self.needs and v in tiled.with_halo and self.hands_on(v)}
            graded = handed_on.union(v for v in outputs if v in through)
            # Random numbers are drawn whoever reads them, or those after them would be others.
            reached.update(v for v in outputs if v in graded or v in read or local.random)
            if local.gathers is not None and (local.gathers.value in through or local.gathers.value in consumers):
                reached.update(outputs)
            if any(v in reached for v in outputs):
                flows = any(values[v].takes_grad for v in graded)
                for value in local.reads:
                    window = tiled.reads(local, value, i, j)
                    if area(split(window, tiled.block(value, i, j))[2]):  # not halos alone
                        (through if flows else read).add(value)
        return reached, through
