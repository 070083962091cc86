"""The halo-carry scan: two passes over the tiles of an image, exact outputs and gradients in the memory of one tile.

Pass 1 goes through the tiles in raster order without a graph. Each tile is a function

    (pixels, carry from above, carry from the left, parameters) -> (outputs, carry down, carry right)

and the carries that enter each tile are kept. Pass 2 goes through the tiles in reverse raster order: it recomputes a
tile from its stored carries with autograd on, and differentiates the tile's outputs together with the carries that it
handed on, whose gradients have come back from the tiles below and to the right. Every activation is computed twice,
every gradient once; nothing is recomputed in an overlap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import in_place_runs
from .carries import CarryStore, Compose, Crop, HandOn, Layout, Rect, cut, empty_like_layout
from .geometry import AxisSchedule, Window, schedule_axis
from .graph import Graph
from .ops import Block, Local, Reduction

_CAST_BY_AUTOCAST = frozenset({"conv2d", "linear"})


class Pixels(Protocol):
    """A batch of images that is read by region: a tensor or a `PixelBatch`."""

    shape: Any

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class TileEvent:
    """Told to `on_tile` after each tile: the pass, how many of how many tiles are done, and the pixels of this one."""

    phase: str
    done: int
    total: int
    pixels: int


@dataclass(frozen=True)
class Autocast:
    """The autocast state that the forward ran in; the backward's recomputation enters it again."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device: torch.device) -> Autocast:
        kind = device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def enter(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass
class Kept:
    """What pass 1 leaves for pass 2."""

    store: CarryStore
    seed: int
    smalls: dict[int, Tensor]
    leaves: list[int]  # the smalls that want a gradient
    needs: set[int]  # the maps that a gradient flows through
    accumulators: list[Accumulator]
    above: list[dict[int, Any]] = field(default_factory=list)  # per strip: value -> rows that enter it, full width
    left: dict[tuple[int, int], dict[int, Any]] = field(default_factory=dict)  # per tile
    recorded: dict[tuple[int, int], Recorded] = field(default_factory=dict)  # tiles that need no recomputation


class Sweep:
    """The sweep of a graph cut into tiles of a given size: schedules, and the computation of one tile.

    Args:
        graph: the sorted program.
        tile: height and width of a tile in image pixels; any positive size.
    """

    def __init__(self, graph: Graph, tile: tuple[int, int]):
        self.graph = graph
        self.tile = tile
        height, width = graph.maps.size(graph.image)
        self.rows = self._schedule(0, tile[0], height)
        self.cols = self._schedule(1, tile[1], width)
        self.tiles = self.rows.steps * self.cols.steps
        self.random = any(local.random for local in graph.locals)
        self.carried = [v for v in self.rows.frontier if v != graph.image and self._is_carried(v)]
        self.in_place = in_place_runs(graph, set(self.carried))
        self.reductions: dict[int, list[int]] = {}
        for number, reduction in enumerate(graph.reductions):
            self.reductions.setdefault(reduction.value, []).append(number)
        self.reads_left: dict[int, int] = {}
        for local in graph.locals:
            for value in local.reads:
                self.reads_left[value] = self.reads_left.get(value, 0) + 1

    def _schedule(self, axis: int, tile: int, size: int) -> AxisSchedule:
        reads = [(local.op.outputs, [(v, a[axis]) for v, a in local.reads.items()]) for local in self.graph.locals]
        return schedule_axis(tile, self.graph.image, size, reads)

    def _is_carried(self, value: int) -> bool:
        for axis in (self.rows, self.cols):
            for step in range(1, axis.steps):
                lo, hi = axis.carry_in(value, step)
                if lo < hi:
                    return True
        return False

    def axes(self, value: int) -> tuple[int, int]:
        return self.graph.maps.axes[value]

    def block(self, value: int, i: int, j: int) -> Rect:
        """The rectangle of `value` that tile (i, j) computes; may be empty."""
        return (*self.rows.block(value, i), *self.cols.block(value, j))

    def carry_sizes(self, value: int, i: int, j: int) -> list[tuple[str, int, int]]:
        """(side, height, width) of the carries of `value` that enter tile (i, j); for "above" in full width."""
        sizes = []
        if i < self.rows.steps and j < self.cols.steps:
            lo, hi = self.rows.carry_in(value, i)
            if lo < hi:
                sizes.append(("above", hi - lo, self.graph.maps.size(value)[1]))
            top, bottom = self.rows.block(value, i)
            lo, hi = self.cols.carry_in(value, j)
            if lo < hi and top < bottom:
                sizes.append(("left", bottom - top, hi - lo))
        return sizes

    def computes(self, value: int, i: int, j: int) -> bool:
        top, bottom, left, right = self.block(value, i, j)
        return top < bottom and left < right

    def needs_grad(self, image: bool, smalls: Mapping[int, bool]) -> set[int]:
        """The maps that a gradient flows through, given whether image and smalls want one."""
        values = self.graph.program.values
        needs = {self.graph.image} if image else set()
        for local in self.graph.locals:
            if any(v in needs for v in local.reads) or any(smalls.get(v, False) for v in local.op.inputs):
                needs.update(v for v in local.op.outputs if values[v].dtype.is_floating_point)
        return needs


def _rects(rect: Rect, block: Rect) -> tuple[Rect, Rect, Rect]:
    """The parts of a window that lie above the block's rows, left of its columns, and in the block."""
    top, bottom, left, right = rect
    middle = min(max(top, block[0]), bottom)
    centre = min(max(left, block[2]), right)
    return (top, middle, left, right), (middle, bottom, left, centre), (middle, bottom, centre, right)


def _shift(rect: Rect, row: int, col: int) -> Rect:
    return rect[0] - row, rect[1] - row, rect[2] - col, rect[3] - col


def _area(rect: Rect) -> int:
    return max(0, rect[1] - rect[0]) * max(0, rect[3] - rect[2])


@dataclass
class Carries:
    """The carries that enter one tile (or their gradients): rows from above, in full width, and columns."""

    above: dict[int, Tensor]
    left: dict[int, Tensor]


class Tile:
    """One tile's computation; used by both passes, with or without autograd.

    Attributes:
        carries: what enters the tile.
        needs: the maps that a gradient flows through; empty without autograd.
        anchor: a scalar that requires a gradient and keeps the nodes of the carries in autograd's graph.
        carry_grads: where the gradients of `carries` are added, set before the tile is differentiated.
        handed_back: gradients of the carries that the tile handed on, likewise.
    """

    def __init__(
        self, sweep: Sweep, i: int, j: int, pixels: Callable[[Rect], Tensor], smalls: dict[int, Tensor],
        carries: Carries, needs: set[int] | None = None,
    ):  # fmt: skip
        self.sweep, self.i, self.j = sweep, i, j
        self.pixels, self.smalls, self.carries = pixels, smalls, carries
        self.needs = needs or set()
        self.blocks: dict[int, Tensor] = {}
        self.image_windows: dict[Rect, Tensor] = {}
        self.anchor: Tensor | None = None
        self.carry_grads: Carries | None = None
        self.handed_back: Carries | None = None

    def window(
        self, value: int, rect: Rect, pad: tuple[int, int, int, int], fill: float | None
    ) -> tuple[Tensor, tuple[int, int, int, int]]:
        """The rectangle of `value`, padded already if it had to be put together, and the padding still missing."""
        sweep = self.sweep
        if value == sweep.graph.image:
            if rect not in self.image_windows:
                self.image_windows[rect] = self.pixels(rect)
            return self.image_windows[rect], pad
        if not _area(rect):  # the outputs of this tile lie wholly in the padding
            info, shape = sweep.graph.program.values[value], list(sweep.graph.maps.shape(value))
            shape[sweep.axes(value)[0]], shape[sweep.axes(value)[1]] = rect[1] - rect[0], rect[3] - rect[2]
            return torch.empty(shape, dtype=info.dtype, device=info.device), pad
        block = sweep.block(value, self.i, self.j)
        above, left, inside = _rects(rect, block)
        if _area(inside) == _area(rect):
            tensor = self.blocks[value]
            if inside != block:
                part = sweep.axes(value), _shift(inside, block[0], block[2])
                tensor = Crop.apply(tensor, *part) if tensor.requires_grad else cut(tensor, *part)
            return tensor, pad
        axes = sweep.axes(value)
        parts: list[tuple[Rect, Tensor, Rect]] = []
        sinks: list[Callable[[Tensor], None]] = []
        sources = (
            (above, "above", sweep.rows.carry_in(value, self.i)[0], 0),
            (left, "left", block[0], sweep.cols.carry_in(value, self.j)[0]),
        )
        for part, side, row, col in sources:
            if _area(part):
                source = _shift(part, row, col)
                parts.append((_shift(part, rect[0], rect[2]), getattr(self.carries, side)[value], source))
                sinks.append(partial(self._add_to_carry, side, value, source))
        own = (_shift(inside, rect[0], rect[2]), _shift(inside, block[0], block[2])) if _area(inside) else None
        padding, missing = ((0, 0, 0, 0), pad) if fill is None else (pad, (0, 0, 0, 0))
        layout = Layout(axes, rect[1] - rect[0], rect[3] - rect[2], padding, fill or 0.0, parts, own)
        tensor = self.blocks[value] if own else None
        if value in self.needs:
            return Compose.apply(self.anchor, tensor, layout, sinks), missing  # pyright: ignore
        return layout.compose(tensor), missing

    def _add_to_carry(self, side: str, value: int, rect: Rect, grad: Tensor) -> None:
        cut(getattr(self.carry_grads, side)[value], self.sweep.axes(value), rect).add_(grad)

    def reads(self, local: Local, value: int) -> Rect:
        """The rectangle of `value` that an op reads in this tile."""
        top, bottom, left, right = self.sweep.block(local.op.outputs[0], self.i, self.j)
        height, width = local.reads[value]
        return (*height.span(top, bottom), *width.span(left, right))

    def run(self, local: Local) -> tuple[Tensor, ...]:
        """The output blocks of one op in this tile."""
        output = local.op.outputs[0]
        rows, cols = self.sweep.rows.block(output, self.i), self.sweep.cols.block(output, self.j)
        pad = (0, 0, 0, 0)
        env = self.smalls
        windows = []
        for value, (height, width) in local.reads.items():
            if isinstance(height, Window) and isinstance(width, Window):
                pad = (*height.padding(*rows), *width.padding(*cols))
            env[value], pad = self.window(value, self.reads(local, value), pad, local.fill)
            windows.append(value)
        result = self.sweep.in_place.get(output, local.run)(env, Block(rows, cols, pad))
        for value in windows:
            del env[value]
        return result

    def hands_on(self, value: int) -> list[tuple[str, Rect, Rect]]:
        """The parts of a block that later tiles need: (side, rectangle of the block, rectangle of the carry)."""
        sweep = self.sweep
        rect = sweep.block(value, self.i, self.j)
        result = []
        lo, hi = sweep.rows.carry_out(value, self.i)
        own = (max(lo, rect[0]), hi, rect[2], rect[3])
        if _area(own):
            result.append(("above", _shift(own, rect[0], rect[2]), _shift(own, lo, 0)))
        lo, hi = sweep.cols.carry_out(value, self.j)
        own = (rect[0], rect[1], max(lo, rect[2]), hi)
        if _area(own):
            result.append(("left", _shift(own, rect[0], rect[2]), _shift(own, rect[0], lo)))
        return result

    def add_handed_back(self, value: int, grad: Tensor) -> None:
        """Add to a block's gradient what later tiles have handed back for it."""
        axes = self.sweep.axes(value)
        for side, own, carry in self.hands_on(value):
            cut(grad, axes, own).add_(cut(getattr(self.handed_back, side)[value], axes, carry))

    def reach(self, targets: Container[int]) -> tuple[set[int], set[int]]:
        """Values whose block in this tile a gradient comes back to, and those it reaches through an op of this tile."""
        sweep, i, j = self.sweep, self.i, self.j
        reached: set[int] = set()
        through: set[int] = set()
        for local in reversed(sweep.graph.locals):
            if not sweep.computes(local.op.outputs[0], i, j):
                continue
            for value in local.op.outputs:
                if value in targets:
                    through.add(value)
                if value in through or (value in self.needs and value in sweep.carried and self.hands_on(value)):
                    reached.add(value)
            if any(v in reached for v in local.op.outputs):
                for value in local.reads:
                    if _area(_rects(self.reads(local, value), sweep.block(value, i, j))[2]):  # not carries alone
                        through.add(value)
        return reached, through


@dataclass
class Target:
    """Something taken from a map: a reduction, or (accumulator None) the map itself; and its gradient in pass 2."""

    accumulator: Accumulator | None
    grad: Tensor | None
    shares: dict[tuple[int, int], Tensor]


Targets = dict[int, list[Target]]


@dataclass
class Recorded:
    """A tile computed with autograd on: what is to be differentiated, and how to get the gradients for it."""

    tile: Tile
    roots: list[Tensor] = field(default_factory=list)
    grads: list[Callable[[Targets], Tensor | None]] = field(default_factory=list)

    def add(self, root: Tensor, grad: Callable[[Targets], Tensor | None]) -> None:
        self.roots.append(root)
        self.grads.append(grad)


class Accumulator:
    """The value of one reduction, gathered tile by tile.

    Sums run in float64 over partial sums in at least float32. Maxima remember each tile's own maximum, so that the
    gradient goes to the elements that stock PyTorch picks: all equal ones in equal parts, or the first in raster order.
    """

    def __init__(self, reduction: Reduction, dtype: torch.dtype):
        self.reduction, self.dtype = reduction, dtype
        self.total: Tensor | None = None
        self.maxima: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # per tile: its maximum, and count or place

    def add(self, i: int, j: int, block: Tensor, rect: Rect, width: int) -> None:
        """Take in the block of tile (i, j), which lies at `rect` of a map of this width."""
        reduction = self.reduction
        if reduction.kind == "sum":
            part = self.partial(block).to(torch.float64)
            self.total = part if self.total is None else self.total.add_(part)
            return
        if reduction.first_only:
            part, place = F.adaptive_max_pool2d(block, 1, return_indices=True)
            columns = rect[3] - rect[2]
            note = (place // columns + rect[0]) * width + place % columns + rect[2]
        else:
            part = self.partial(block)
            note = (block == part).sum(reduction.dims, keepdim=True)
        self.total = part if self.total is None else torch.maximum(self.total, part)
        self.maxima[i, j] = part, note

    def partial(self, block: Tensor) -> Tensor:
        """The block's own share of the reduction, kept dimensions and all."""
        reduction = self.reduction
        if reduction.kind == "sum":
            wide = torch.float32 if block.dtype in (torch.float16, torch.bfloat16) else block.dtype
            return block.sum(reduction.dims, keepdim=True, dtype=wide)
        if reduction.first_only:
            return F.adaptive_max_pool2d(block, 1)
        return block.amax(reduction.dims, keepdim=True)

    def value(self) -> Tensor:
        """The reduction's value as stock PyTorch returns it."""
        assert self.total is not None
        value = (self.total / self.reduction.count if self.reduction.count != 1 else self.total).to(self.dtype)
        return value if self.reduction.keepdim else value.squeeze(self.reduction.dims)

    def shares(self) -> dict[tuple[int, int], Tensor]:
        """For a maximum: per tile, the factor on the gradient of the tile's own maximum."""
        tops = {tile: part == self.total for tile, (part, _) in self.maxima.items()}
        notes = {tile: note for tile, (_, note) in self.maxima.items()}
        if self.reduction.first_only:
            far = torch.iinfo(torch.int64).max
            places = {tile: torch.where(top, notes[tile], far) for tile, top in tops.items()}
            first = torch.stack(list(places.values())).amin(0)
            return {tile: place == first for tile, place in places.items()}
        counts = {tile: (top * notes[tile]).double() for tile, top in tops.items()}
        total = torch.stack(list(counts.values())).sum(0)
        return {tile: count / total for tile, count in counts.items()}


def cast_dtype(graph: Graph, value: int, dtype: torch.dtype, autocast: Autocast) -> torch.dtype:
    """The dtype a small is given to the sweep in: weights that autocast would cast in every tile are cast once."""
    if not autocast.enabled or dtype != torch.float32:
        return dtype
    users = {local.op.name for local in graph.locals if value in local.op.inputs}
    return autocast.dtype if users <= _CAST_BY_AUTOCAST else dtype


class Scan:
    """One training or inference step of a sweep over one image batch.

    Args:
        sweep: the tiled program.
        pixels: the image batch.
        device: where tiles are computed.
        dtype: what pixels are converted to.
        place: where the carries are kept between the passes, see `CarryStore`.
        retained: how many of the last tiles keep their graph from pass 1, so that pass 2 need not recompute them.
        on_tile: called after each tile.
    """

    def __init__(
        self, sweep: Sweep, pixels: Pixels, device: torch.device, dtype: torch.dtype, place: str = "device",
        retained: int = 0, on_tile: Callable[[TileEvent], None] | None = None,
    ):  # fmt: skip
        self.sweep, self.pixels, self.device, self.dtype = sweep, pixels, device, dtype
        self.place, self.retained, self.on_tile = place, retained, on_tile
        self.autocast = Autocast.current(device)
        # oneDNN has no float64 kernels and the fallback is at home in NCHW; everything else is faster in NHWC.
        nhwc = device.type != "cpu" or dtype != torch.float64
        self.memory_format = torch.channels_last if nhwc else torch.contiguous_format
        self.kept: Kept | None = None
        self.taps: dict[int, list[Callable[[Tensor, Rect], None]]] = {}  # given every block of a map in pass 1

    def read(self, rect: Rect) -> Tensor:
        tensor = self.pixels.read(*rect)
        return tensor.to(device=self.device, dtype=self.dtype).contiguous(memory_format=self.memory_format)

    def prepare(self, smalls: Sequence[Tensor]) -> dict[int, Tensor]:
        """Detached smalls by value number, convolution weights in the memory order of the maps."""
        prepared = {}
        for value, small in zip(self.sweep.graph.smalls, smalls, strict=True):
            small = small.detach()
            if small.dim() == 4 and small.device.type == self.device.type:
                small = small.contiguous(memory_format=self.memory_format)
            prepared[value] = small
        return prepared

    @contextlib.contextmanager
    def _dice(self, seed: int, i: int, j: int) -> Iterator[None]:
        """The same random numbers for a tile in both passes; the caller's generators stay as they are."""
        if not self.sweep.random:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed((seed + i * self.sweep.cols.steps + j) % 2**63)
            yield

    def _tell(self, phase: str, i: int, j: int, done: int) -> None:
        if self.on_tile is not None:
            area = _area(self.sweep.block(self.sweep.graph.image, i, j)) * self.pixels.shape[0]
            self.on_tile(TileEvent(phase, done, self.sweep.tiles, area))

    # -- pass 1 -------------------------------------------------------------------------------------------------

    def forward(
        self, smalls: Sequence[Tensor], wants: Sequence[bool] = (), image_grad: bool = False
    ) -> tuple[Tensor, ...]:
        """Values of the reductions, then the stored maps.

        Args:
            smalls: the tensors of `graph.smalls`.
            wants: which of them will want a gradient; empty, and `image_grad` False, keeps nothing for `backward`.
            image_grad: whether the image will want one.
        """
        sweep, graph = self.sweep, self.sweep.graph
        env = self.prepare(smalls)
        accumulators = [Accumulator(r, graph.program.values[r.op.outputs[0]].dtype) for r in graph.reductions]
        stored: dict[int, Tensor] = {}
        seed = int(torch.randint(2**62, ())) if sweep.random else 0
        kept = None
        if any(wants) or image_grad:
            leaves = [v for v, wanted in zip(graph.smalls, wants, strict=True) if wanted]
            for value in leaves:
                env[value].requires_grad_()
            needs = sweep.needs_grad(image_grad, dict.fromkeys(leaves, True))
            kept = Kept(CarryStore(self.place), seed, env, leaves, needs, accumulators)
        above: dict[int, Tensor] = {}
        for i in range(sweep.rows.steps):
            if kept is not None:
                kept.above.append({v: kept.store.put(t) for v, t in above.items()})
            below: dict[int, Tensor] = {}
            left: dict[int, Tensor] = {}
            for j in range(sweep.cols.steps):
                index = i * sweep.cols.steps + j
                if kept is not None:
                    kept.left[i, j] = {v: kept.store.put(t) for v, t in left.items()}
                right: dict[int, Tensor] = {}
                keep = partial(self._keep, accumulators=accumulators, stored=stored, below=below, right=right)
                with self._dice(seed, i, j), self.autocast.enter():
                    if kept is not None and index >= sweep.tiles - self.retained:
                        tile = self.tile(i, j, kept, Carries(above, left), image_grad)
                        kept.recorded[i, j] = self.record(tile, self.targets(kept), keep)
                    else:
                        tile = Tile(sweep, i, j, self.read, env, Carries(above, left))
                        with torch.no_grad():
                            self.run(tile, keep)
                self._pass_right(tile, right)
                left = right
                self._tell("forward", i, j, index + 1)
            self._pass_down(i, above, below)
            above = below
        self.kept = kept
        return (*[a.value() for a in accumulators], *[stored[v] for v in graph.stored])

    def run(self, tile: Tile, publish: Callable[[Tile, int, Tensor], Tensor | None], only: set[int] | None = None):
        """Compute a tile op by op, dropping each block after its last reader.

        Args:
            publish: gets every block as it is made; may return a tensor that takes its place.
            only: outputs that are worth computing; None for all.
        """
        sweep, image = self.sweep, self.sweep.graph.image
        if image in self.taken:
            publish(tile, image, tile.window(image, sweep.block(image, tile.i, tile.j), (0, 0, 0, 0), None)[0])
        reads_left = dict(sweep.reads_left)
        for local in sweep.graph.locals:
            outputs = local.op.outputs
            if sweep.computes(outputs[0], tile.i, tile.j) and (only is None or any(v in only for v in outputs)):
                for value, block in zip(outputs, tile.run(local), strict=True):
                    replaced = publish(tile, value, block)
                    if reads_left.get(value):
                        tile.blocks[value] = block if replaced is None else replaced
            for value in local.reads:
                reads_left[value] -= 1
                if not reads_left[value]:
                    tile.blocks.pop(value, None)

    @property
    def taken(self) -> set[int]:
        """Maps that something besides local ops takes: reductions, stored maps, taps."""
        return {*self.sweep.reductions, *self.sweep.graph.stored, *self.taps}

    def _keep(
        self, tile: Tile, value: int, block: Tensor, *, accumulators: list[Accumulator], stored: dict[int, Tensor],
        below: dict[int, Tensor], right: dict[int, Tensor],
    ) -> None:  # fmt: skip
        """What pass 1 does with a block: reduce it, store it, copy the carries out of it."""
        sweep, graph = self.sweep, self.sweep.graph
        block = block.detach()
        rect, axes = sweep.block(value, tile.i, tile.j), sweep.axes(value)
        height, width = graph.maps.size(value)
        for number in sweep.reductions.get(value, ()):
            accumulators[number].add(tile.i, tile.j, block, rect, width)
        if value in graph.stored:
            if value not in stored:
                stored[value] = empty_like_layout(block, axes, height, width)
            cut(stored[value], axes, rect).copy_(block)
        for tap in self.taps.get(value, ()):
            tap(block, rect)
        for side, own, carry in tile.hands_on(value) if value in sweep.carried else ():
            target = below if side == "above" else right
            if value not in target:
                rows, cols = sweep.rows.carry_out(value, tile.i), sweep.cols.carry_out(value, tile.j)
                size = (rows[1] - rows[0], width) if side == "above" else (rect[1] - rect[0], cols[1] - cols[0])
                target[value] = empty_like_layout(block, axes, *size)
            cut(target[value], axes, carry).copy_(cut(block, axes, own))

    def _pass_right(self, tile: Tile, right: dict[int, Tensor]) -> None:
        """Columns from the left that tiles further right still need."""
        for value, columns in tile.carries.left.items():
            lo, end, start, hi = self._passed(self.sweep.cols, value, tile.j)
            if lo < end:
                axis = self.sweep.axes(value)[1]
                if value not in right:
                    right[value] = empty_like_layout(
                        columns, self.sweep.axes(value), columns.shape[self.sweep.axes(value)[0]], hi - lo
                    )
                right[value].narrow(axis, 0, end - lo).copy_(columns.narrow(axis, lo - start, end - lo))

    def _pass_down(self, i: int, above: dict[int, Tensor], below: dict[int, Tensor]) -> None:
        """Rows from above that strips further down still need."""
        for value, rows in above.items():
            lo, end, start, hi = self._passed(self.sweep.rows, value, i)
            if lo < end:
                axis, across = self.sweep.axes(value)
                if value not in below:
                    below[value] = empty_like_layout(rows, self.sweep.axes(value), hi - lo, rows.shape[across])
                below[value].narrow(axis, 0, end - lo).copy_(rows.narrow(axis, lo - start, end - lo))

    @staticmethod
    def _passed(axis: AxisSchedule, value: int, step: int) -> tuple[int, int, int, int]:
        """The indices [lo, end) that a step hands on as it got them; the carry in begins at start, out ends at hi."""
        lo, hi = axis.carry_out(value, step)
        start, known = axis.carry_in(value, step)
        return lo, min(hi, known), start, hi

    # -- pass 2 -------------------------------------------------------------------------------------------------

    def backward(self, grads: Sequence[Tensor | None], image_grad: Tensor | None) -> dict[int, Tensor]:
        """Gradients of the smalls that want one, by value number; the image's is added to `image_grad`.

        Args:
            grads: gradients of the reductions and of the stored maps, None for zero.
            image_grad: zeros of the image's shape, or None.
        """
        sweep, kept = self.sweep, self.kept
        assert kept is not None
        targets = self.targets(kept, grads)
        sums: dict[int, Tensor] = {}
        grads_below: dict[int, Tensor] = {}
        for i in reversed(range(sweep.rows.steps)):
            above = {v: kept.store.get(h) for v, h in kept.above[i].items()}
            grads_above = self._returned(sweep.rows, i, above, grads_below, kept.needs)
            grads_right: dict[int, Tensor] = {}
            for j in reversed(range(sweep.cols.steps)):
                left = {v: kept.store.get(h) for v, h in kept.left[i, j].items()}
                grads_left = self._returned(sweep.cols, j, left, grads_right, kept.needs)
                recorded = kept.recorded.pop((i, j), None)
                if recorded is None:
                    tile = self.tile(i, j, kept, Carries(above, left), image_grad is not None)
                    with self._dice(kept.seed, i, j), self.autocast.enter():
                        recorded = self.record(tile, targets)
                recorded.tile.carry_grads = Carries(grads_above, grads_left)
                recorded.tile.handed_back = Carries(grads_below, grads_right)
                self.differentiate(recorded, targets, kept, sums, image_grad)
                grads_right = grads_left
                index = i * sweep.cols.steps + j
                self._tell("backward", i, j, sweep.tiles - index)
            grads_below = grads_above
        return sums

    def tile(self, i: int, j: int, kept: Kept, carries: Carries, image_grad: bool) -> Tile:
        """A tile to be computed with autograd on."""
        read = (lambda rect: self.read(rect).detach().requires_grad_()) if image_grad else self.read
        tile = Tile(self.sweep, i, j, read, kept.smalls, carries, kept.needs)
        tile.anchor = torch.zeros((), device=self.device, requires_grad=True)
        return tile

    def targets(self, kept: Kept, grads: Sequence[Tensor | None] | None = None) -> Targets:
        """For each map, what is taken from it and, in pass 2, the gradients of that."""
        graph = self.sweep.graph
        targets: Targets = {}
        for number, accumulator in enumerate(kept.accumulators):
            reduction = accumulator.reduction
            grad = None if grads is None else grads[number]
            if grad is not None and not reduction.keepdim:
                for d in sorted(reduction.dims):
                    grad = grad.unsqueeze(d)
            shares = accumulator.shares() if accumulator.maxima and grad is not None else {}
            grad = None if grad is None else grad / reduction.count
            targets.setdefault(reduction.value, []).append(Target(accumulator, grad, shares))
        for number, value in enumerate(graph.stored, len(graph.reductions)):
            grad = None if grads is None else grads[number]
            targets.setdefault(value, []).append(Target(None, grad, {}))
        return targets

    def record(self, tile: Tile, targets: Targets, keep: Callable[..., None] | None = None) -> Recorded:
        """Compute a tile with autograd on.

        Args:
            targets: the maps that reductions and stored maps are taken from.
            keep: in pass 1, what is done with the blocks besides.
        """
        recorded = Recorded(tile)
        reached, through = tile.reach(targets)

        def publish(tile: Tile, value: int, block: Tensor) -> Tensor | None:
            if keep is not None:
                keep(tile, value, block)
            if value not in tile.needs or not block.requires_grad:
                return None
            result = None
            if value in self.sweep.carried and tile.hands_on(value):
                if value in through:
                    block = result = HandOn.apply(tile.anchor, block, partial(tile.add_handed_back, value))  # pyright: ignore
                else:
                    recorded.add(block, partial(_handed_back_alone, tile, value, block.detach()))
            for number, target in enumerate(targets.get(value, ())):
                root = block if target.accumulator is None else target.accumulator.partial(block)
                recorded.add(root, partial(self._target_grad, tile, value, number, root.detach()))
            return result

        with torch.enable_grad():
            self.run(tile, publish, None if keep is not None else reached)
        tile.blocks.clear()
        return recorded

    def _target_grad(self, tile: Tile, value: int, number: int, root: Tensor, targets: Targets) -> Tensor | None:
        target = targets[value][number]
        if target.grad is None:
            return None
        if target.accumulator is None:
            return cut(target.grad, self.sweep.axes(value), self.sweep.block(value, tile.i, tile.j))
        grad = target.grad
        if target.accumulator.reduction.kind == "max" and target.shares:
            grad = grad * target.shares[tile.i, tile.j]
        return grad.to(root.dtype).expand_as(root)

    def differentiate(
        self, recorded: Recorded, targets: Targets, kept: Kept, sums: dict[int, Tensor],
        image_grad: Tensor | None,
    ) -> None:  # fmt: skip
        """Add a recorded tile's gradients to the sums, to the image's gradient and to the carries' gradients."""
        tile = recorded.tile
        pairs = [(root, grad(targets)) for root, grad in zip(recorded.roots, recorded.grads, strict=True)]
        pairs = [(root, grad) for root, grad in pairs if grad is not None]
        recorded.roots.clear()
        recorded.grads.clear()
        if not pairs:
            return
        windows = [(r, t) for r, t in tile.image_windows.items() if t.requires_grad]
        inputs = [kept.smalls[v] for v in kept.leaves] + [t for _, t in windows]
        assert tile.anchor is not None
        inputs.append(tile.anchor)
        roots, root_grads = zip(*pairs, strict=True)
        del pairs
        result = list(torch.autograd.grad(roots, inputs, root_grads, allow_unused=True))
        for value in kept.leaves:
            grad = result.pop(0)
            if grad is not None:
                _accumulate(sums, value, grad)
        for rect, _ in windows:
            grad = result.pop(0)
            if grad is not None and image_grad is not None:
                cut(image_grad, (2, 3), rect).add_(grad)

    def _returned(
        self, axis: AxisSchedule, step: int, carries: dict[int, Tensor], handed_back: dict[int, Tensor], needs: set[int]
    ) -> dict[int, Tensor]:
        """Zeros for the gradients of carries that enter a step, plus what comes back for those it only passed on."""
        along = 0 if axis is self.sweep.rows else 1
        grads = {v: torch.zeros_like(t) for v, t in carries.items() if v in needs}
        for value, target in grads.items():
            lo, end, start, _ = self._passed(axis, value, step)
            if value in handed_back and lo < end:
                dim = self.sweep.axes(value)[along]
                target.narrow(dim, lo - start, end - lo).add_(handed_back[value].narrow(dim, 0, end - lo))
        return grads


def _handed_back_alone(tile: Tile, value: int, block: Tensor, _targets: Targets) -> Tensor:
    """The gradient of a block that nothing in its own tile reads."""
    grad = torch.zeros_like(block)
    tile.add_handed_back(value, grad)
    return grad


def _accumulate(sums: dict[int, Tensor], value: int, grad: Tensor) -> None:
    """Add a tile's parameter gradient; sixteen-bit ones are summed in float32."""
    if value in sums:
        sums[value].add_(grad)
    elif grad.dtype in (torch.float16, torch.bfloat16):
        sums[value] = grad.float()
    else:
        sums[value] = grad.clone()  # autograd may have given the same tensor to another parameter
