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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from ... import kernels
from ..images.pixels import StoredBatch
from ..lowering.geometry import AxisSchedule
from ..lowering.graph import Graph
from ..module import turns
from .ahead import ReadAhead
from .bands import Bands
from .carries import CarryStore, HandOn, Rect, cut, empty_like_layout
from .ceiling import Ceiling
from .grid import new_accumulator
from .maps import Gradients, has_readers, let_files_go, let_rows_go, new_map
from .pages import Spare
from .reduce import Accumulator, Target, Targets
from .sweep import Carries, Sweep, Tile, area

_CAST_BY_AUTOCAST = frozenset({"conv2d", "fused_conv2d", "fused_stem", "linear"})


class Pixels(Protocol):
    """A batch of maps that is read by region: the image (a tensor or a `PixelBatch`), or a stored map."""

    @property
    def shape(self) -> Any: ...

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor: ...


class StoredMap:
    """A map that an earlier sweep has stored.

    Args:
        tensor: the map.
        axes: its image axes.
    """

    def __init__(self, tensor: Tensor, axes: tuple[int, int]):
        self.tensor, self.axes, self.shape = tensor, axes, tensor.shape

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return cut(self.tensor, self.axes, (top, bottom, left, right))


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
    sources: set[int]  # the sources that want a gradient
    needs: set[int]  # the maps that a gradient flows through
    accumulators: list[Accumulator]
    above: list[dict[int, Any]] = field(default_factory=list)  # per strip: value -> rows that enter it, full width
    left: dict[tuple[int, int], dict[int, Any]] = field(default_factory=dict)  # per tile
    recorded: dict[tuple[int, int], Recorded] = field(default_factory=dict)  # tiles that need no recomputation
    sums: dict[int, Tensor] = field(default_factory=dict)  # gradients of the smalls, summed over the tiles

    def sum_of(self, value: int, dtype: torch.dtype) -> Tensor:
        """The sum of a small's gradient, zeros at first."""
        if value not in self.sums:
            self.sums[value] = torch.zeros_like(self.smalls[value], dtype=dtype)
        return self.sums[value]


@dataclass
class Recorded:
    """A tile computed with autograd on: what is to be differentiated, and how to get the gradients for it."""

    tile: Tile
    roots: list[Tensor] = field(default_factory=list)
    grads: list[Callable[[Targets], Tensor | None]] = field(default_factory=list)

    def add(self, root: Tensor, grad: Callable[[Targets], Tensor | None]) -> None:
        self.roots.append(root)
        self.grads.append(grad)


def cast_dtype(graph: Graph, value: int, dtype: torch.dtype, autocast: Autocast) -> torch.dtype:
    """The dtype a small is given to the sweep in: weights that autocast would cast in every tile are cast once."""
    if not autocast.enabled or dtype != torch.float32:
        return dtype
    users = {local.op.name for local in graph.locals if value in local.op.inputs}
    return autocast.dtype if users <= _CAST_BY_AUTOCAST else dtype


@dataclass
class Gathered:
    """Where pass 1 puts what a tile gives: reductions, stored maps, and the carries for the tiles below and right."""

    accumulators: list[Accumulator]
    stored: dict[int, Tensor]
    below: dict[int, Tensor]
    right: dict[int, Tensor]


Read = Callable[[int, Rect], Tensor]
WindowGrads = list[tuple[tuple[int, Rect], Tensor]]  # gradients of the windows of sources, with their places


class ForwardReplay(Protocol):
    """Computes a tile of pass 1 in another way than op by op, if it can; returns whether it did."""

    def __call__(self, i: int, j: int, read: Read, carries: Carries, gathered: Gathered) -> bool: ...


class BackwardReplay(Protocol):
    """Computes and differentiates a tile of pass 2, likewise."""

    def __call__(
        self,
        i: int,
        j: int,
        read: Read,
        carries: Carries,
        carry_grads: Carries,
        handed_back: Carries,
        source_grads: Mapping[int, Tensor],
    ) -> bool: ...


class Replay(Protocol):
    """What computes tiles that are like earlier ones (replay.py)."""

    def forward(self, scan: Scan, smalls: Mapping[int, Tensor]) -> ForwardReplay | None: ...

    def backward(self, scan: Scan, kept: Kept, targets: Targets) -> BackwardReplay | None:
        """May put tensors of its own into `kept.sums`, which are used again in the next step."""
        ...


@dataclass(frozen=True)
class Reader:
    """Gives the sources' pixels to tiles: `read(source, rectangle)`; `advance()` before each tile."""

    read: Callable[[int, Rect], Tensor]
    advance: Callable[[], None]


class Scan:
    """One training or inference step of a sweep over one image batch.

    Args:
        sweep: the tiled program.
        sources: what the sweep reads, by value number.
        device: where tiles are computed.
        dtype: what the image's pixels are converted to.
        place: where the carries are kept between the passes, see `CarryStore`.
        retained: how many of the last tiles keep their graph from pass 1, so that pass 2 need not recompute them.
        on_tile: called after each tile.
    """

    def __init__(
        self,
        sweep: Sweep,
        sources: Mapping[int, Pixels],
        device: torch.device,
        dtype: torch.dtype,
        place: str = "device",
        retained: int = 0,
        on_tile: Callable[[TileEvent], None] | None = None,
    ):
        self.sweep, self.sources, self.device, self.dtype = sweep, sources, device, dtype
        self.place, self.retained, self.on_tile = place, retained, on_tile
        self.autocast = Autocast.current(device)
        # oneDNN has no float64 kernels and the fallback is at home in NCHW; everything else is faster in NHWC.
        nhwc = device.type != "cpu" or dtype != torch.float64 or kernels.enabled(device)
        self.memory_format = torch.channels_last if nhwc else torch.contiguous_format
        self.kept: Kept | None = None
        self.replay: Replay | None = None
        self.bands: Bands | None = None  # the processes that share the image
        self.ceiling: Ceiling | None = None  # of the memory of this process; kept after every tile
        self.deferred = False  # nobody will read what pass 1 stores, where it does nothing else it is left out
        self.stored: dict[int, Tensor] = {}  # in pass 2: what pass 1 has stored
        self.touched: set[int] = set()  # in pass 2: sources that some tile has a gradient for
        self.given: set[tuple[int, Rect]] = set()  # in pass 2: parts of `overwritten` sources that have their gradient
        self.swept: Mapping[int, int] = {}  # stored maps that sweeps alone read, and how many do
        self.map_place = "device"  # where those are kept
        self.gradients = Gradients()  # of those
        self.fell: dict[tuple[int, int], int] = {}  # of tiles with random numbers, what tells those that were drawn
        self.taps: dict[int, list[Callable[[Tensor, Rect], None]]] = {}  # given every block of a map in pass 1

    def convert(self, pixels: Tensor) -> Tensor:
        """Pixels on the device, in the dtype and memory order they are computed in."""
        moved = pixels.to(device=self.device, dtype=self.dtype, non_blocking=True)
        return moved.contiguous(memory_format=self.memory_format)

    def let_go(self) -> None:
        """Forget stored maps and smalls: autograd keeps them between the passes, and lets them go when it can."""
        self.sources = {v: s for v, s in self.sources.items() if not isinstance(s, StoredMap)}
        self.stored = {}
        if self.kept is not None and not self.kept.recorded:
            self.kept.smalls = {}

    def take(self, sources: Mapping[int, Tensor], stored: Mapping[int, Tensor], smalls: Sequence[Tensor]) -> None:
        """Take back what autograd has kept: the stored maps that are read, those that pass 1 made, and the smalls."""
        axes, kept = self.sweep.graph.maps.axes, self.kept
        self.sources = {**{v: StoredMap(t, axes[v]) for v, t in sources.items()}, **self.sources}
        self.stored = dict(stored)
        if kept is not None and not kept.smalls:
            kept.smalls = self.prepare(smalls, kept.leaves)

    def read(self, source: int, rect: Rect) -> Tensor:
        """A rectangle of a source as it is computed with; of a stored map on the device a view."""
        return self._convert(source, self.sources[source].read(*rect))

    def _convert(self, source: int, pixels: Tensor) -> Tensor:
        if source != self.sweep.graph.image:  # maps that are there have the dtype that they are meant to have
            return pixels.to(self.device, non_blocking=True)
        image = self.sources[source]
        if isinstance(image, StoredBatch):
            pixels = image.develop(pixels.to(self.device, non_blocking=True))
        return self.convert(pixels)

    def _on_device(self, source: int) -> bool:
        stored = self.sources[source]
        return isinstance(stored, StoredMap) and stored.tensor.device.type == self.device.type

    @contextlib.contextmanager
    def _reader(self, tiles: Iterable[tuple[int, int]]) -> Iterator[Reader]:
        """Reads the sources for these tiles, what is not on the device while the tile before is computed."""
        away = [source for source in self.sweep.graph.sources if not self._on_device(source)]
        if not away:
            yield Reader(self.read, lambda: None)
            return
        rects = (
            [(s, rect) for s in away for rect in self.sweep.source_rects(s, i, j, s in self.taken)] for i, j in tiles
        )
        with ReadAhead(lambda s, rect: self.sources[s].read(*rect), self._convert, self.device, rects) as ahead:
            yield Reader(lambda s, rect: ahead(s, rect) if s in away else self.read(s, rect), ahead.advance)

    def prepare(self, smalls: Sequence[Tensor], leaves: Iterable[int] = ()) -> dict[int, Tensor]:
        """Detached smalls, convolution weights in the memory order of the maps; `leaves` want a gradient."""
        prepared = {}
        for value, small in zip(self.sweep.graph.smalls, smalls, strict=True):
            small = small.detach()
            if small.dim() == 4 and small.device.type == self.device.type:
                small = small.contiguous(memory_format=self.memory_format)
            prepared[value] = small
        for value in leaves:
            prepared[value].requires_grad_()
        return prepared

    @contextlib.contextmanager
    def _dice(self, seed: int, i: int, j: int) -> Iterator[None]:
        """The same random numbers for a tile in both passes; the caller's generators stay as they are."""
        if not self.sweep.random:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with turns.DICE, torch.random.fork_rng(devices=devices):
            torch.manual_seed((seed + i * self.sweep.cols.steps + j) % 2**63)
            yield
            if self.device.type == "cpu":
                turns.check_dice(self.fell.setdefault((i, j), turns.dice()))

    def _after_tile(self, phase: str, i: int, j: int, done: int, maps: Iterable[Tensor | None]) -> None:
        if self.map_place == "disk":
            let_files_go((*maps, *(s.tensor for s in self.sources.values() if isinstance(s, StoredMap))))
        if self.ceiling is not None:
            self.ceiling.keep()
        if self.on_tile is not None:
            source = self.sweep.graph.sources[0]
            pixels = area(self.sweep.block(source, i, j)) * self.sources[source].shape[0]
            self.on_tile(TileEvent(phase, done, self.sweep.tiles, pixels))

    # -- pass 1 -------------------------------------------------------------------------------------------------

    def forward(
        self, smalls: Sequence[Tensor], wants: Sequence[bool] = (), wanted_sources: Container[int] = ()
    ) -> tuple[Tensor, ...]:
        """Values of the reductions, then the stored maps.

        Args:
            smalls: the tensors of `graph.smalls`.
            wants: which of them will want a gradient; if none and no source does, nothing is kept for `backward`.
            wanted_sources: the sources that will want one.
        """
        sweep, graph = self.sweep, self.sweep.graph
        leaves = [v for v, wanted in zip(graph.smalls, wants, strict=False) if wanted]
        env = self.prepare(smalls, leaves)
        accumulators = [new_accumulator(r, graph) for r in graph.reductions]
        stored: dict[int, Tensor] = {}
        seed = 0
        if sweep.random:
            with turns.DICE:
                seed = int(torch.randint(2**62, ()))
        kept = None
        inputs = {v for v in graph.sources if v in wanted_sources}
        if leaves or inputs:
            needs = sweep.needs_grad({*inputs, *leaves})
            kept = Kept(CarryStore(self.place), seed, env, leaves, inputs, needs, accumulators)
        if self.deferred and self.deferrable:
            return self._defer(kept)
        replay = None if self.replay is None or self.taps else self.replay.forward(self, env)
        above: dict[int, Tensor] = {}
        tiles = [(i, j) for i in range(sweep.rows.steps) for j in range(sweep.cols.steps)]
        with self._reader(tiles) as reader:
            for i in range(sweep.rows.steps):
                if kept is not None:
                    kept.above.append({v: kept.store.put(t) for v, t in above.items()})
                below: dict[int, Tensor] = {}
                left: dict[int, Tensor] = {}
                for j in range(sweep.cols.steps):
                    index = i * sweep.cols.steps + j
                    reader.advance()
                    if kept is not None:
                        kept.left[i, j] = {v: kept.store.put(t) for v, t in left.items()}
                    right: dict[int, Tensor] = {}
                    carries, gathered = Carries(above, left), Gathered(accumulators, stored, below, right)
                    keep = partial(self._keep, gathered=gathered)
                    with self._dice(seed, i, j), self.autocast.enter():
                        if kept is not None and index >= sweep.tiles - self.retained:
                            tile = self.tile(i, j, kept, carries, reader.read)
                            kept.recorded[i, j] = self.record(tile, self.targets(kept), keep)
                        elif replay is None or not replay(i, j, reader.read, carries, gathered):
                            tile = Tile(sweep, i, j, reader.read, env, carries)
                            with torch.no_grad():
                                self.run(tile, keep)
                    self._pass_right(j, left, right)
                    left = right
                    self._after_tile("forward", i, j, index + 1, stored.values())
                self._pass_down(i, above, below)
                above = below
        self.kept = kept
        for value in graph.stored:
            if value not in stored:  # a band without rows
                info = graph.program.values[value]
                stored[value] = torch.empty(info.shape, dtype=info.dtype, device=self.device)
        return (*[v for a in accumulators for v in self._values(a)], *[stored[v] for v in graph.stored])

    @property
    def deferrable(self) -> bool:
        """Whether pass 1 leaves nothing for pass 2 but what it stores."""
        sweep = self.sweep
        return not (sweep.graph.reductions or sweep.carried or sweep.random or sweep.unvalued or self.retained)

    def _defer(self, kept: Kept | None) -> tuple[Tensor, ...]:
        """What pass 1 would leave, without it: stored maps have a shape but no values."""
        sweep, values = self.sweep, self.sweep.graph.program.values
        if kept is not None:
            kept.above = [{} for _ in range(sweep.rows.steps)]
            kept.left = {(i, j): {} for i in range(sweep.rows.steps) for j in range(sweep.cols.steps)}
        self.kept = kept
        results = []
        for value in sweep.graph.stored:
            away = value in self.swept and self.map_place != "device"
            one = torch.empty((), dtype=values[value].dtype, device="cpu" if away else self.device)
            results.append(one.expand(values[value].shape))
        return tuple(results)

    def _values(self, accumulator: Accumulator) -> tuple[Tensor, ...]:
        """The values of a reduction; of a band without rows what changes no total."""
        if accumulator.total is not None:
            return accumulator.values()
        infos = [self.sweep.graph.program.values[v] for v in accumulator.reduction.outputs]
        zeros = [torch.zeros(info.shape, dtype=info.dtype, device=self.device) for info in infos]
        if accumulator.reduction.kind == "max":
            zeros[0].fill_(-torch.inf)
        return tuple(zeros)

    def run(self, tile: Tile, publish: Callable[[Tile, int, Tensor], Tensor | None], only: set[int] | None = None):
        """Compute a tile op by op, dropping each block after its last reader.

        Args:
            publish: gets every block as it is made; may return a tensor that takes its place.
            only: outputs that are worth computing; None for all.
        """
        sweep, taken = self.sweep, self.taken
        for source in sweep.graph.sources:
            if source in taken:
                rect = sweep.block(source, tile.i, tile.j)
                publish(tile, source, tile.window(source, rect, (0, 0, 0, 0), None)[0])
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

    def _keep(self, tile: Tile, value: int, block: Tensor, *, gathered: Gathered) -> None:
        """What pass 1 does with a block: reduce it, store it, copy the carries out of it."""
        sweep, i, j = self.sweep, tile.i, tile.j
        block = block.detach()
        rect, axes = sweep.block(value, i, j), sweep.axes(value)
        width = sweep.graph.maps.size(value)[1]
        for number in sweep.reductions.get(value, ()):
            accumulator = gathered.accumulators[number]
            accumulator.merge(i, j, accumulator.share(block, tile.shares.get(value), rect), rect, width)
        if value in sweep.graph.stored:
            self.room_in_store(value, i, j, block, gathered).copy_(block)
        for tap in self.taps.get(value, ()):
            tap(block, rect)
        for side, own, carry in tile.hands_on(value) if value in sweep.carried else ():
            self.room_in_carry(side, value, carry, i, j, block, gathered).copy_(cut(block, axes, own))

    def room_in_store(self, value: int, i: int, j: int, like: Tensor, gathered: Gathered) -> Tensor:
        """Where a block lies in the stored map, which is made at first; `like` gives dtype and memory order."""
        axes = self.sweep.axes(value)
        if value not in gathered.stored:
            place = self.map_place if value in self.swept else "device"
            gathered.stored[value] = new_map(like, self.sweep.graph.maps.shape(value), place, spare=self.spare)
        return cut(gathered.stored[value], axes, self.sweep.block(value, i, j))

    def room_in_carry(
        self, side: str, value: int, rect: Rect, i: int, j: int, like: Tensor, gathered: Gathered
    ) -> Tensor:
        """A rectangle of a carry that tile (i, j) hands on; the carry is made at first, as `room_in_store` does."""
        sweep, axes = self.sweep, self.sweep.axes(value)
        target = gathered.below if side == "above" else gathered.right
        if value not in target:
            rows, cols = sweep.rows.carry_out(value, i), sweep.cols.carry_out(value, j)
            top, bottom = sweep.rows.block(value, i)
            width = sweep.graph.maps.size(value)[1]
            size = (rows[1] - rows[0], width) if side == "above" else (bottom - top, cols[1] - cols[0])
            target[value] = empty_like_layout(like, axes, *size)
        return cut(target[value], axes, rect)

    def _pass_right(self, j: int, left: dict[int, Tensor], right: dict[int, Tensor]) -> None:
        """Columns from the left that tiles further right still need."""
        for value, columns in left.items():
            lo, end, start, hi = self._passed(self.sweep.cols, value, j)
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

    def source_grads(self, sources: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], set[int]]:
        """Tensors for the gradients of sources, and which of them have been made now: those are given to autograd."""

        def make(value: int, source: Tensor) -> Tensor:
            place = self.map_place if value in self.swept else "device"
            return new_map(source, None, place, zero=value not in self.overwritten, spare=self.spare)

        found, made = {}, set(sources)
        for value, source in sources.items():
            if value in self.swept:
                found[value], new = self.gradients.begin(value, partial(make, value, source))
                made -= set() if new else {value}
            else:
                found[value] = make(value, source)
        return found, made

    @property
    def spare(self) -> Spare | None:
        """Pages for new maps."""
        return None if self.ceiling is None else self.ceiling.spare

    @property
    def overwritten(self) -> set[int]:
        """Sources whose gradient has one share only at each place, so that it need not begin with zeros."""
        return {v for v in self.sweep.apportioned if self.swept.get(v, 1) == 1}

    def backward(
        self, grads: Sequence[Tensor | None], source_grads: Mapping[int, Tensor], last: bool = False
    ) -> dict[int, Tensor]:
        """Gradients of the smalls that want one, by value number; those of sources are put into `source_grads`.

        Args:
            grads: gradients of the reductions and of the stored maps, None for zero.
            source_grads: tensors like the sources that want a gradient; zeros but for `overwritten` sources.
            last: there is no further backward of this pass: maps that nobody else will read may go while it runs.
        """
        sweep, kept = self.sweep, self.kept
        assert kept is not None
        targets = self.targets(kept, grads)
        kept.sums = {}
        self.touched.clear()
        replay = None if self.replay is None else self.replay.backward(self, kept, targets)
        if not all(map(_has_grad, chain.from_iterable(targets.values()))):
            kept.recorded.clear()  # what hands gradients on was laid out for all of them
        grads_below: dict[int, Tensor] = {}
        tiles = [(i, j) for i in range(sweep.rows.steps) for j in range(sweep.cols.steps)]
        again = [tile for tile in reversed(tiles) if tile not in kept.recorded]
        ending = self._ending(grads) if last else []
        files = [*self.stored.values(), *grads, *source_grads.values()]
        with self._reader(again) as reader:
            for i in reversed(range(sweep.rows.steps)):
                above = {v: kept.store.get(h) for v, h in kept.above[i].items()}
                grads_above = self._returned(sweep.rows, i, above, grads_below, kept.needs)
                grads_right: dict[int, Tensor] = {}
                for j in reversed(range(sweep.cols.steps)):
                    left = {v: kept.store.get(h) for v, h in kept.left[i, j].items()}
                    grads_left = self._returned(sweep.cols, j, left, grads_right, kept.needs)
                    carries, carry_grads = Carries(above, left), Carries(grads_above, grads_left)
                    handed_back = Carries(grads_below, grads_right)
                    recorded = kept.recorded.pop((i, j), None)
                    replayed = False
                    if recorded is None:
                        reader.advance()
                        if replay is not None:
                            replayed = replay(i, j, reader.read, carries, carry_grads, handed_back, source_grads)
                        if not replayed:
                            recorded = self.again(self.tile(i, j, kept, carries, reader.read), targets, kept.seed)
                    if recorded is not None:
                        recorded.tile.carry_grads, recorded.tile.handed_back = carry_grads, handed_back
                        self.add_to_sources(source_grads, self.differentiate(recorded, targets, kept))
                    grads_right = grads_left
                    index = i * sweep.cols.steps + j
                    self._after_tile("backward", i, j, sweep.tiles - index, files)
                for value, tensor in ending if self.ceiling is None or self.ceiling.near else ():
                    let_rows_go(tensor, sweep.axes(value), sweep.block(value, i, 0)[0])
                grads_below = grads_above
        self._zero_the_rest(source_grads)
        return kept.sums if replay is None else {v: total.clone() for v, total in kept.sums.items()}

    def _ending(self, grads: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
        """The maps that nobody reads after this backward: what was stored, and the gradients of that."""
        own = dict(zip(self.sweep.graph.results, grads, strict=True))
        pairs = [(v, t) for v, t in self.stored.items() if not has_readers(t)]
        return [(v, t) for v, t in (*pairs, *own.items()) if v in self.swept and t is not None]

    def again(self, tile: Tile, targets: Targets, seed: int) -> Recorded:
        """Compute a tile in pass 2, as it was computed in pass 1."""
        tile.second_pass = True
        with self._dice(seed, tile.i, tile.j), self.autocast.enter():
            return self.record(tile, targets)

    def tile(self, i: int, j: int, kept: Kept, carries: Carries, read: Callable[[int, Rect], Tensor]) -> Tile:
        """A tile to be computed with autograd on."""

        def pixels(source: int, rect: Rect) -> Tensor:
            window = read(source, rect)
            return window.detach().requires_grad_() if source in kept.sources else window

        tile = Tile(self.sweep, i, j, pixels, kept.smalls, carries, kept.needs)
        tile.anchor = torch.zeros((), device=self.device, requires_grad=True)
        tile.sum_of = kept.sum_of
        return tile

    def targets(self, kept: Kept, grads: Sequence[Tensor | None] | None = None) -> Targets:
        """For each map, what is taken from it and, in pass 2, the gradients of that."""
        graph = self.sweep.graph
        targets: Targets = {}
        left = list(grads) if grads is not None else [None] * len(graph.results)
        for accumulator in kept.accumulators:
            reduction = accumulator.reduction
            own = tuple(left.pop(0) for _ in reduction.outputs)
            shares = accumulator.shares() if accumulator.has_shares and own[0] is not None else {}
            if reduction.kind != "moments":
                own = tuple(None if grad is None else reduction.keep_dims(grad) / reduction.count for grad in own)
            targets.setdefault(reduction.value, []).append(Target(accumulator, own, shares))
        for value, grad in zip(graph.stored, left, strict=True):
            targets.setdefault(value, []).append(Target(None, (grad,), {}))
        return targets

    def record(self, tile: Tile, targets: Targets, keep: Callable[..., None] | None = None) -> Recorded:
        """Compute a tile with autograd on.

        Args:
            targets: the maps that reductions and stored maps are taken from.
            keep: in pass 1, what is done with the blocks besides.
        """
        recorded = Recorded(tile)
        wanted = targets if keep is not None else {v for v, taken in targets.items() if any(map(_has_grad, taken))}
        reached, through = tile.reach(wanted)

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
            taken = targets.get(value, ())
            whole = [number for number, target in enumerate(taken) if target.of_block]
            if whole:
                recorded.add(block, partial(self._block_grad, tile, value, whole, block.detach()))
            for number, target in enumerate(taken):
                if not target.of_block:
                    assert target.accumulator is not None
                    root = target.accumulator.partial(block, self.sweep.block(value, tile.i, tile.j))
                    recorded.add(root, partial(self._partial_grad, tile, value, number, root.detach()))
            return result

        with torch.enable_grad():
            self.run(tile, publish, None if keep is not None else reached)
        tile.blocks.clear()
        return recorded

    def _partial_grad(self, tile: Tile, value: int, number: int, root: Tensor, targets: Targets) -> Tensor | None:
        """The gradient of a tile's share of a sum or maximum."""
        target = targets[value][number]
        grad = target.grads[0]
        if grad is None:
            return None
        assert target.accumulator is not None
        grad = target.accumulator.part_of(grad, _place(tile, value))
        if target.accumulator.reduction.kind == "max" and target.shares:
            grad = grad * target.shares[tile.i, tile.j]
        return grad.to(root.dtype).expand_as(root)

    def _block_grad(self, tile: Tile, value: int, numbers: list[int], block: Tensor, targets: Targets) -> Tensor | None:
        """The gradient of a block of which moments are taken, or that is stored, or both."""
        total: Tensor | None = None
        taken = [targets[value][number] for number in numbers]
        for target in sorted(taken, key=lambda target: target.accumulator is not None):  # the map itself first
            if all(grad is None for grad in target.grads):
                continue
            if target.accumulator is None:
                (grad,) = target.grads
                assert grad is not None
                total = self._own(tile, value, grad)
            else:
                valued = not (tile.second_pass and value in self.sweep.unvalued)
                x = block if valued else self._own(tile, value, self.stored[value])
                total = target.accumulator.pull(x, target.grads, total, _place(tile, value))
        return total

    def _own(self, tile: Tile, value: int, stored: Tensor) -> Tensor:
        """A tile's part of a stored map or of its gradient, on the device."""
        if tile.alone:
            return stored
        own = cut(stored, self.sweep.axes(value), self.sweep.block(value, tile.i, tile.j))
        return own.to(self.device, non_blocking=True)

    def differentiate(self, recorded: Recorded, targets: Targets, kept: Kept) -> WindowGrads:
        """Add a recorded tile's gradients to the sums and to the carries' gradients; those of sources are returned."""
        tile = recorded.tile
        pairs = [(root, grad(targets)) for root, grad in zip(recorded.roots, recorded.grads, strict=True)]
        pairs = [(root, grad) for root, grad in pairs if grad is not None]
        recorded.roots.clear()
        recorded.grads.clear()
        if not pairs:
            return []
        windows = [(place, t) for place, t in tile.source_windows.items() if t.requires_grad]
        inputs = [kept.smalls[v] for v in kept.leaves] + [t for _, t in windows]
        assert tile.anchor is not None
        inputs.append(tile.anchor)
        roots, root_grads = zip(*pairs, strict=True)
        del pairs
        result = list(torch.autograd.grad(roots, inputs, root_grads, allow_unused=True))
        for value in kept.leaves:
            grad = result.pop(0)
            if grad is not None:
                _accumulate(kept.sums, value, grad)
        return [(place, grad) for (place, _), grad in zip(windows, result, strict=False) if grad is not None]

    def add_to_sources(self, source_grads: Mapping[int, Tensor], windows: WindowGrads) -> None:
        """Put the gradients of a tile's windows of the sources where they belong."""
        overwritten = self.overwritten
        for (source, rect), grad in windows:
            if source not in source_grads:  # the gradients that there are do not reach it
                continue
            self.touched.add(source)
            target = cut(source_grads[source], self.sweep.axes(source), rect)
            if source in overwritten:
                target.copy_(grad)
                self.given.add((source, rect))
            else:
                target.add_(grad.to(target.device))

    def _zero_the_rest(self, source_grads: Mapping[int, Tensor]) -> None:
        """Zeros where no tile has given a gradient of a source that is not added up."""
        sweep = self.sweep
        for source in self.overwritten & source_grads.keys():
            for i in range(sweep.rows.steps):
                for j in range(sweep.cols.steps):
                    if (source, rect := sweep.block(source, i, j)) not in self.given:
                        cut(source_grads[source], sweep.axes(source), rect).zero_()
        self.given.clear()

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


def _has_grad(target: Target) -> bool:
    return any(grad is not None for grad in target.grads)


def _place(tile: Tile, value: int) -> Rect | None:
    """Where a tile's block lies in the map; None where what belongs to the block is there alone."""
    return None if tile.alone else tile.sweep.block(value, tile.i, tile.j)


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
