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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .carries import CarryStore, Compose, Crop, HandOn, Layout, Rect, cut, empty_like_layout
from .geometry import AxisSchedule, Window, schedule_axis
from .graph import Graph
from .ops import Block, Local, Reduction


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
    above: list[dict[int, Any]] = field(default_factory=list)  # per strip: value -> rows that enter it, full width
    left: dict[tuple[int, int], dict[int, Any]] = field(default_factory=dict)  # per tile


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
    """One tile's computation; used by both passes, with or without autograd."""

    def __init__(
        self, sweep: Sweep, i: int, j: int, pixels: Callable[[Rect], Tensor], smalls: dict[int, Tensor],
        carries: Carries,
    ):  # fmt: skip
        self.sweep, self.i, self.j = sweep, i, j
        self.pixels, self.smalls, self.carries = pixels, smalls, carries
        self.blocks: dict[int, Tensor] = {}
        self.image_windows: dict[Rect, Tensor] = {}
        # for the backward: a scalar that requires a gradient, and where the gradients of the carries go
        self.anchor: Tensor | None = None
        self.carry_grads: Carries | None = None
        self.needs: set[int] = set()

    def window(self, value: int, rect: Rect, pad: tuple[int, int, int, int], fill: float | None):
        """The rectangle of `value`, with its padding if it had to be put together anyway.

        Returns the tensor and the padding that is still missing.
        """
        sweep = self.sweep
        if value == sweep.graph.image:
            if rect not in self.image_windows:
                self.image_windows[rect] = self.pixels(rect)
            return self.image_windows[rect], pad
        block = sweep.block(value, self.i, self.j)
        above, left, inside = _rects(rect, block)
        if _area(inside) == _area(rect):
            tensor = self.blocks[value]
            if inside != block:
                part = sweep.axes(value), _shift(inside, block[0], block[2])
                tensor = Crop.apply(tensor, *part) if tensor.requires_grad else cut(tensor, *part)
            return tensor, pad
        return self._compose(value, rect, above, left, inside, block, pad, fill)

    def _compose(self, value: int, rect: Rect, above: Rect, left: Rect, inside: Rect, block: Rect, pad: Any, fill: Any):
        sweep, axes = self.sweep, self.sweep.axes(value)
        parts: list[tuple[Rect, Tensor, Rect]] = []
        sinks: list[Callable[[Tensor], None]] = []
        sources = (
            (above, "above", sweep.rows.carry_in(value, self.i)[0], 0),
            (left, "left", block[0], sweep.cols.carry_in(value, self.j)[0]),
        )
        for part, side, row, col in sources:
            if not _area(part):
                continue
            source = _shift(part, row, col)
            parts.append((_shift(part, rect[0], rect[2]), getattr(self.carries, side)[value], source))
            if self.carry_grads is not None and value in self.needs:
                sinks.append(partial(_add_at, getattr(self.carry_grads, side)[value], axes, source))
        own = None
        if _area(inside):
            own = (_shift(inside, rect[0], rect[2]), _shift(inside, block[0], block[2]))
        missing = pad if fill is None else (0, 0, 0, 0)
        layout = Layout(
            axes, rect[1] - rect[0], rect[3] - rect[2], (0, 0, 0, 0) if fill is None else pad, fill or 0.0, parts, own
        )
        tensor = self.blocks[value] if own else None
        if self.anchor is not None and value in self.needs:
            return Compose.apply(self.anchor, tensor, layout, sinks), missing
        return layout.compose(tensor), missing

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
            rect = self.reads(local, value)
            if isinstance(height, Window) and isinstance(width, Window):
                pad = (*height.padding(*rows), *width.padding(*cols))
            tensor, missing = self.window(value, rect, pad, local.fill)
            pad = missing
            env[value] = tensor
            windows.append(value)
        result = local.run(env, Block(rows, cols, pad))
        for value in windows:
            del env[value]
        return result


def _add_at(target: Tensor, axes: tuple[int, int], rect: Rect, grad: Tensor) -> None:
    cut(target, axes, rect).add_(grad)


class _Accumulator:
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


class Scan:
    """One training or inference step of a sweep over one image batch.

    Args:
        sweep: the tiled program.
        pixels: the image batch.
        device: where tiles are computed.
        dtype: what pixels are converted to.
        place: where the carries are kept between the passes, see `CarryStore`.
        on_tile: called after each tile.
    """

    def __init__(
        self, sweep: Sweep, pixels: Pixels, device: torch.device, dtype: torch.dtype, place: str = "device",
        on_tile: Callable[[TileEvent], None] | None = None,
    ):  # fmt: skip
        self.sweep, self.pixels, self.device, self.dtype = sweep, pixels, device, dtype
        self.place, self.on_tile = place, on_tile
        self.autocast = Autocast.current(device)
        # oneDNN has no float64 kernels and the fallback is at home in NCHW; everything else is faster in NHWC.
        nhwc = device.type != "cpu" or dtype != torch.float64
        self.memory_format = torch.channels_last if nhwc else torch.contiguous_format
        self.kept: Kept | None = None
        self.accumulators: list[_Accumulator] = []
        self.taps: dict[int, Callable[[Tensor, Rect], None]] = {}

    # -- shared by both passes ----------------------------------------------------------------------------------

    def _read(self, rect: Rect) -> Tensor:
        tensor = self.pixels.read(*rect)
        return tensor.to(device=self.device, dtype=self.dtype).contiguous(memory_format=self.memory_format)

    def _prepare(self, smalls: Sequence[Tensor]) -> dict[int, Tensor]:
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

    def forward(self, smalls: Sequence[Tensor], keep: bool) -> tuple[Tensor, ...]:
        """Values of the reductions, then the stored maps.

        Args:
            smalls: the tensors of `graph.smalls`.
            keep: whether the carries are kept for `backward`.
        """
        sweep, graph = self.sweep, self.sweep.graph
        env = self._prepare(smalls)
        values = graph.program.values
        accumulators = [_Accumulator(r, values[r.op.outputs[0]].dtype) for r in graph.reductions]
        stored: dict[int, Tensor] = {}
        seed = int(torch.randint(2**62, ())) if sweep.random else 0
        kept = Kept(CarryStore(self.place), seed) if keep else None
        above: dict[int, Tensor] = {}
        for i in range(sweep.rows.steps):
            if kept is not None:
                kept.above.append({v: kept.store.put(t) for v, t in above.items()})
            below: dict[int, Tensor] = {}
            left: dict[int, Tensor] = {}
            for j in range(sweep.cols.steps):
                if kept is not None:
                    kept.left[i, j] = {v: kept.store.put(t) for v, t in left.items()}
                tile = Tile(sweep, i, j, self._read, env, Carries(above, left))
                with self._dice(seed, i, j):
                    left = self._forward_tile(tile, below, accumulators, stored)
                self._tell("forward", i, j, i * sweep.cols.steps + j + 1)
            self._pass_down(i, above, below)
            above = below
        if kept is not None:
            self.kept, self.accumulators = kept, accumulators
        return (*[a.value() for a in accumulators], *[stored[v] for v in graph.stored])

    def _forward_tile(
        self, tile: Tile, below: dict[int, Tensor], accumulators: list[_Accumulator], stored: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        sweep, graph, i, j = self.sweep, self.sweep.graph, tile.i, tile.j
        right: dict[int, Tensor] = {}
        carried = set(sweep.carried)
        reads_left = dict(sweep.reads_left)

        def publish(value: int, block: Tensor) -> None:
            rect = sweep.block(value, i, j)
            for number in sweep.reductions.get(value, ()):
                accumulators[number].add(i, j, block, rect, graph.maps.size(value)[1])
            if value in graph.stored:
                if value not in stored:
                    stored[value] = empty_like_layout(block, sweep.axes(value), *graph.maps.size(value))
                cut(stored[value], sweep.axes(value), rect).copy_(block)
            if value in self.taps:
                self.taps[value](block, rect)
            if value in carried:
                self._hand_on(tile, value, block, rect, below, right)

        image = graph.image
        if image in sweep.reductions or image in graph.stored or image in self.taps:
            publish(image, self._read(sweep.block(image, i, j)))
        for local in graph.locals:
            outputs = local.op.outputs
            if sweep.computes(outputs[0], i, j):
                for value, block in zip(outputs, tile.run(local), strict=True):
                    if reads_left.get(value):
                        tile.blocks[value] = block
                    publish(value, block)
            for value in local.reads:
                reads_left[value] -= 1
                if not reads_left[value]:
                    tile.blocks.pop(value, None)
        for value in carried:  # values without new columns in this tile hand on what they got
            if value not in right and value in tile.carries.left:
                lo, hi = sweep.cols.carry_out(value, j)
                if lo < hi and not sweep.computes(value, i, j):
                    start = sweep.cols.carry_in(value, j)[0]
                    right[value] = tile.carries.left[value].narrow(sweep.axes(value)[1], lo - start, hi - lo)
        return right

    def _hand_on(
        self, tile: Tile, value: int, block: Tensor, rect: Rect, below: dict[int, Tensor], right: dict[int, Tensor]
    ) -> None:
        """Copy a block's share of the carries that the next strip and the next tile need."""
        sweep, axes, i, j = self.sweep, self.sweep.axes(value), tile.i, tile.j
        lo, hi = sweep.rows.carry_out(value, i)
        if lo < hi:
            if value not in below:
                below[value] = empty_like_layout(block, axes, hi - lo, sweep.graph.maps.size(value)[1])
            own = (max(lo, rect[0]), hi, rect[2], rect[3])
            cut(below[value], axes, _shift(own, lo, 0)).copy_(cut(block, axes, _shift(own, rect[0], rect[2])))
        lo, hi = sweep.cols.carry_out(value, j)
        if lo < hi:
            carry = empty_like_layout(block, axes, rect[1] - rect[0], hi - lo)
            own = (rect[0], rect[1], max(lo, rect[2]), hi)
            cut(carry, axes, _shift(own, rect[0], lo)).copy_(cut(block, axes, _shift(own, rect[0], rect[2])))
            if lo < rect[2]:
                old = (rect[0], rect[1], lo, rect[2])
                start = sweep.cols.carry_in(value, j)[0]
                cut(carry, axes, _shift(old, rect[0], lo)).copy_(
                    cut(tile.carries.left[value], axes, _shift(old, rect[0], start))
                )
            right[value] = carry

    def _pass_down(self, i: int, above: dict[int, Tensor], below: dict[int, Tensor]) -> None:
        """Rows from above that the strip after this one still needs."""
        sweep = self.sweep
        for value, rows in above.items():
            lo, hi = sweep.rows.carry_out(value, i)
            start, end = sweep.rows.carry_in(value, i)
            if lo >= min(hi, end):
                continue
            axes = sweep.axes(value)
            width = rows.shape[axes[1]]
            old = (lo, min(hi, end), 0, width)
            if value not in below:
                below[value] = empty_like_layout(rows, axes, hi - lo, width)
            cut(below[value], axes, _shift(old, lo, 0)).copy_(cut(rows, axes, _shift(old, start, 0)))

    # -- pass 2 -------------------------------------------------------------------------------------------------

    def backward(
        self, smalls: Sequence[Tensor], wants: Sequence[bool], image_grad: Tensor | None, grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of the smalls (None where not wanted); the image's is added to `image_grad` where given.

        Args:
            smalls: the same tensors as in `forward`.
            wants: which of them get a gradient.
            image_grad: zeros of the image's shape, or None.
            grads: gradients of the reductions and of the stored maps, None for zero.
        """
        sweep, graph, kept = self.sweep, self.sweep.graph, self.kept
        assert kept is not None
        env = self._prepare(smalls)
        leaves = []
        for value, wanted in zip(graph.smalls, wants, strict=True):
            if wanted:
                env[value].requires_grad_()
                leaves.append(value)
        needs = sweep.needs_grad(image_grad is not None, dict.fromkeys(leaves, True))
        sums: dict[int, Tensor] = {}
        targets = self._targets(grads)
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        grads_below: dict[int, Tensor] = {}
        done = 0
        for i in reversed(range(sweep.rows.steps)):
            above = {v: kept.store.get(h) for v, h in kept.above[i].items()}
            grads_above = self._grads_passed_up(i, above, grads_below, needs)
            grads_right: dict[int, Tensor] = {}
            for j in reversed(range(sweep.cols.steps)):
                left = {v: kept.store.get(h) for v, h in kept.left[i, j].items()}
                grads_left = self._grads_passed_left(j, left, grads_right, needs)
                tile = Tile(sweep, i, j, self._read, env, Carries(above, left))
                tile.anchor, tile.needs = anchor, needs
                tile.carry_grads = Carries(grads_above, grads_left)
                with self._dice(kept.seed, i, j), self.autocast.enter(), torch.enable_grad():
                    roots, root_grads = self._recompute(tile, targets, Carries(grads_below, grads_right), image_grad)
                if roots:
                    windows = [(r, t) for r, t in tile.image_windows.items() if t.requires_grad]
                    inputs = [env[v] for v in leaves] + [t for _, t in windows] + [anchor]
                    tile.blocks.clear()
                    result = torch.autograd.grad(roots, inputs, root_grads, allow_unused=True)
                    del roots, root_grads
                    for value, grad in zip(leaves, result, strict=False):
                        if grad is not None:
                            _accumulate(sums, value, grad)
                    for (rect, _), grad in zip(windows, result[len(leaves) :], strict=False):
                        if grad is not None and image_grad is not None:
                            cut(image_grad, (2, 3), rect).add_(grad)
                grads_right = grads_left
                done += 1
                self._tell("backward", i, j, done)
            grads_below = grads_above
        result = []
        for value, small, wanted in zip(graph.smalls, smalls, wants, strict=True):
            total = sums.get(value)
            result.append(None if not wanted else torch.zeros_like(small) if total is None else total.to(small.dtype))
        return result

    def _targets(self, grads: Sequence[Tensor | None]) -> dict[int, list[Any]]:
        """For each map: the gradients of what is taken from it, in a form that `_recompute` can apply to a block."""
        graph = self.sweep.graph
        targets: dict[int, list[Any]] = {}
        for accumulator, grad in zip(self.accumulators, grads, strict=False):
            if grad is None:
                continue
            reduction = accumulator.reduction
            if not reduction.keepdim:
                for d in sorted(reduction.dims):
                    grad = grad.unsqueeze(d)
            shares = accumulator.shares() if reduction.kind == "max" else None
            targets.setdefault(reduction.value, []).append((accumulator, grad / reduction.count, shares))
        for value, grad in zip(graph.stored, grads[len(graph.reductions) :], strict=True):
            if grad is not None:
                targets.setdefault(value, []).append((None, grad, None))
        return targets

    def _recompute(
        self, tile: Tile, targets: dict[int, list[Any]], handed_back: Carries, image_grad: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run a tile with autograd on; returns the tensors to differentiate and their gradients."""
        sweep, graph, i, j = self.sweep, self.sweep.graph, tile.i, tile.j
        roots: list[Tensor] = []
        root_grads: list[Tensor] = []
        reached, through = self._reach(tile, targets, handed_back)
        if image_grad is not None:
            read = tile.pixels
            tile.pixels = lambda rect: read(rect).detach().requires_grad_()

        def publish(value: int, block: Tensor) -> Tensor:
            if value not in tile.needs or not block.requires_grad:
                return block
            rect = sweep.block(value, i, j)
            back = self._handed_back(value, rect, i, j, handed_back)
            if back and value in through:
                block = HandOn.apply(tile.anchor, block, partial(_add_all, sweep.axes(value), back))  # pyright: ignore
            elif back:
                grad = torch.zeros_like(block)
                _add_all(sweep.axes(value), back, grad)
                roots.append(block)
                root_grads.append(grad)
            for accumulator, grad, shares in targets.get(value, ()):
                if accumulator is None:
                    roots.append(block)
                    root_grads.append(cut(grad, sweep.axes(value), rect))
                    continue
                part = accumulator.partial(block)
                if shares is not None:
                    grad = grad * shares[i, j]
                roots.append(part)
                root_grads.append(grad.to(part.dtype).expand_as(part))
            return block

        if graph.image in targets and image_grad is not None:
            rect = sweep.block(graph.image, i, j)
            publish(graph.image, tile.window(graph.image, rect, (0, 0, 0, 0), None)[0])
        reads_left = dict(sweep.reads_left)
        for local in graph.locals:
            outputs = local.op.outputs
            if sweep.computes(outputs[0], i, j) and any(v in reached for v in outputs):
                for value, block in zip(outputs, tile.run(local), strict=True):
                    block = publish(value, block)
                    if reads_left.get(value):
                        tile.blocks[value] = block
            for value in local.reads:
                reads_left[value] -= 1
                if not reads_left[value]:
                    tile.blocks.pop(value, None)
        return roots, root_grads

    def _reach(self, tile: Tile, targets: Mapping[int, Any], handed_back: Carries) -> tuple[set[int], set[int]]:
        """Values whose block in this tile matters, and those that matter through an op of this tile."""
        sweep, i, j = self.sweep, tile.i, tile.j
        reached: set[int] = set()
        through: set[int] = set()
        for local in reversed(sweep.graph.locals):
            if not sweep.computes(local.op.outputs[0], i, j):
                continue
            for value in local.op.outputs:
                if value in targets:
                    through.add(value)
                if value in through or value in handed_back.above or value in handed_back.left:
                    reached.add(value)
            if any(v in reached for v in local.op.outputs):
                for value in local.reads:
                    rect, block = tile.reads(local, value), sweep.block(value, i, j)
                    if _area(_rects(rect, block)[2]):  # else it reads nothing but carries
                        through.add(value)
        return reached, through

    def _handed_back(self, value: int, rect: Rect, i: int, j: int, grads: Carries) -> list[tuple[Rect, Tensor]]:
        """Gradients of the carries that a block handed on, with the rectangles of the block that they belong to."""
        sweep, axes = self.sweep, self.sweep.axes(value)
        result = []
        if value in grads.above:
            lo, hi = sweep.rows.carry_out(value, i)
            own = (max(lo, rect[0]), hi, rect[2], rect[3])
            if _area(own):
                result.append((_shift(own, rect[0], rect[2]), cut(grads.above[value], axes, _shift(own, lo, 0))))
        if value in grads.left:
            lo, hi = sweep.cols.carry_out(value, j)
            own = (rect[0], rect[1], max(lo, rect[2]), hi)
            if _area(own):
                result.append((_shift(own, rect[0], rect[2]), cut(grads.left[value], axes, _shift(own, rect[0], lo))))
        return result

    def _grads_passed_up(
        self, i: int, above: dict[int, Tensor], grads_below: dict[int, Tensor], needs: set[int]
    ) -> dict[int, Tensor]:
        """Zeros for the gradients of the rows that enter a strip, plus what comes back for rows it only passed on."""
        sweep = self.sweep
        grads = {v: torch.zeros_like(t) for v, t in above.items() if v in needs}
        for value, target in grads.items():
            if value not in grads_below:
                continue
            lo, hi = sweep.rows.carry_out(value, i)
            start, end = sweep.rows.carry_in(value, i)
            if lo < min(hi, end):
                axes = sweep.axes(value)
                old = (lo, min(hi, end), 0, target.shape[axes[1]])
                cut(target, axes, _shift(old, start, 0)).add_(cut(grads_below[value], axes, _shift(old, lo, 0)))
        return grads

    def _grads_passed_left(
        self, j: int, left: dict[int, Tensor], grads_right: dict[int, Tensor], needs: set[int]
    ) -> dict[int, Tensor]:
        """The same for the columns that enter a tile."""
        sweep = self.sweep
        grads = {v: torch.zeros_like(t) for v, t in left.items() if v in needs}
        for value, target in grads.items():
            if value not in grads_right:
                continue
            lo, hi = sweep.cols.carry_out(value, j)
            start, end = sweep.cols.carry_in(value, j)
            if lo < min(hi, end):
                axes = sweep.axes(value)
                old = (0, target.shape[axes[0]], lo, min(hi, end))
                cut(target, axes, _shift(old, 0, start)).add_(cut(grads_right[value], axes, _shift(old, 0, lo)))
        return grads


def _add_all(axes: tuple[int, int], parts: list[tuple[Rect, Tensor]], grad: Tensor) -> None:
    for rect, part in parts:
        cut(grad, axes, rect).add_(part)


def _accumulate(sums: dict[int, Tensor], value: int, grad: Tensor) -> None:
    """Add a tile's parameter gradient; sixteen-bit ones are summed in float32."""
    if value in sums:
        sums[value].add_(grad)
    elif grad.dtype in (torch.float16, torch.bfloat16):
        sums[value] = grad.float()
    else:
        sums[value] = grad.clone()  # autograd may have given the same tensor to another parameter


__all__ = ["Autocast", "Pixels", "Scan", "Sweep", "TileEvent"]
