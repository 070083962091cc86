"""The halo-halo scan: two passes over the tiles of an image, exact outputs and gradients in the memory of one tile.

Pass 1 goes through the tiles in raster order without a graph. Each tile is a function

    (pixels, halo from above, halo from the left, parameters) -> (outputs, halo down, halo right)

and the halos that enter each tile are kept. Pass 2 goes through the tiles in reverse raster order: it recomputes a
tile from its stored halos with autograd on, and differentiates the tile's outputs together with the halos that it
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
from ..lowering.stages import Stage
from ..module import turns
from .grid import new_accumulator
from .halos import HaloStore, HandOn, Rect, cut, empty_like_layout
from .memory_limit import MemoryLimit
from .page_pool import PagePool
from .prefetch import Prefetch
from .reduce import Accumulator, Consumer, Consumers
from .spatial import SpatialShard
from .stage import Halos, Tile, TiledStage, area
from .stored_maps import Gradients, has_readers, let_files_go, let_rows_go, new_map

_CAST_BY_AUTOCAST = frozenset({"conv2d", "fused_conv2d", "fused_stem", "linear"})


class Pixels(Protocol):
    """A batch of maps that is read by region: the image (a tensor or a `PixelBatch`), or a stored map."""

    @property
    def shape(self) -> Any: ...

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor: ...


class StoredMap:
    """A map that an earlier stage has stored.

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

    store: HaloStore
    seed: int
    vectors: dict[int, Tensor]
    leaves: list[int]  # the vectors that want a gradient
    sources: set[int]  # the sources that want a gradient
    needs: set[int]  # the maps that a gradient flows through
    accumulators: list[Accumulator]
    above: list[dict[int, Any]] = field(default_factory=list)  # per strip: value -> rows that enter it, full width
    left: dict[tuple[int, int], dict[int, Any]] = field(default_factory=dict)  # per tile
    recorded: dict[tuple[int, int], Recorded] = field(default_factory=dict)  # tiles that need no recomputation
    sums: dict[int, Tensor] = field(default_factory=dict)  # gradients of the vectors, summed over the tiles

    def sum_of(self, value: int, dtype: torch.dtype) -> Tensor:
        """The sum of a vector's gradient, zeros at first."""
        if value not in self.sums:
            self.sums[value] = torch.zeros_like(self.vectors[value], dtype=dtype)
        return self.sums[value]


@dataclass
class Recorded:
    """A tile computed with autograd on: what is to be differentiated, and how to get the gradients for it."""

    tile: Tile
    roots: list[Tensor] = field(default_factory=list)
    grads: list[Callable[[Consumers], Tensor | None]] = field(default_factory=list)

    def add(self, root: Tensor, grad: Callable[[Consumers], Tensor | None]) -> None:
        self.roots.append(root)
        self.grads.append(grad)


def cast_dtype(stage: Stage, value: int, dtype: torch.dtype, autocast: Autocast) -> torch.dtype:
    """The dtype a vector is given to the stage in: weights that autocast would cast in every tile are cast once."""
    if not autocast.enabled or dtype != torch.float32:
        return dtype
    users = {local.op.name for local in stage.locals if value in local.op.inputs}
    return autocast.dtype if users <= _CAST_BY_AUTOCAST else dtype


@dataclass
class Gathered:
    """Where pass 1 puts what a tile gives: reductions, stored maps, and the halos for the tiles below and right."""

    accumulators: list[Accumulator]
    stored: dict[int, Tensor]
    below: dict[int, Tensor]
    right: dict[int, Tensor]


Read = Callable[[int, Rect], Tensor]
WindowGrads = list[tuple[tuple[int, Rect], Tensor]]  # gradients of the windows of sources, with their places


class ForwardReplay(Protocol):
    """Computes a tile of pass 1 in another way than op by op, if it can; returns whether it did."""

    def __call__(self, i: int, j: int, read: Read, halos: Halos, gathered: Gathered) -> bool: ...


class BackwardReplay(Protocol):
    """Computes and differentiates a tile of pass 2, likewise."""

    def __call__(
        self,
        i: int,
        j: int,
        read: Read,
        halos: Halos,
        halo_grads: Halos,
        handed_back: Halos,
        source_grads: Mapping[int, Tensor],
    ) -> bool: ...


class Replay(Protocol):
    """What computes tiles that are like earlier ones (replay.py)."""

    def forward(self, scan: Scan, vectors: Mapping[int, Tensor]) -> ForwardReplay | None: ...

    def backward(self, scan: Scan, kept: Kept, consumers: Consumers) -> BackwardReplay | None:
        """May put tensors of its own into `kept.sums`, which are used again in the next step."""
        ...


@dataclass(frozen=True)
class Reader:
    """Gives the sources' pixels to tiles: `read(source, rectangle)`; `advance()` before each tile."""

    read: Callable[[int, Rect], Tensor]
    advance: Callable[[], None]


class Scan:
    """One training or inference step of a stage over one image batch.

    Args:
        stage: the tiled program.
        sources: what the stage reads, by value number.
        device: where tiles are computed.
        dtype: what the image's pixels are converted to.
        place: where the halos are kept between the passes, see `HaloStore`.
        retained: how many of the last tiles keep their graph from pass 1, so that pass 2 need not recompute them.
        on_tile: called after each tile.
    """

    def __init__(
        self,
        tiled: TiledStage,
        sources: Mapping[int, Pixels],
        device: torch.device,
        dtype: torch.dtype,
        place: str = "device",
        retained: int = 0,
        on_tile: Callable[[TileEvent], None] | None = None,
    ):
        self.tiled, self.sources, self.device, self.dtype = tiled, sources, device, dtype
        self.place, self.retained, self.on_tile = place, retained, on_tile
        self.autocast = Autocast.current(device)
        # oneDNN has no float64 kernels and the fallback is at home in NCHW; everything else is faster in NHWC.
        nhwc = device.type != "cpu" or dtype != torch.float64 or kernels.enabled(device)
        self.memory_format = torch.channels_last if nhwc else torch.contiguous_format
        self.kept: Kept | None = None
        self.replay: Replay | None = None
        self.shard: SpatialShard | None = None  # the processes that share the image
        self.memory_limit: MemoryLimit | None = None  # of the memory of this process; kept after every tile
        self.deferred = False  # nobody will read what pass 1 stores, where it does nothing else it is left out
        self.stored: dict[int, Tensor] = {}  # in pass 2: what pass 1 has stored
        self.touched: set[int] = set()  # in pass 2: sources that some tile has a gradient for
        self.given: set[tuple[int, Rect]] = set()  # in pass 2: parts of `overwritten` sources that have their gradient
        self.stage_maps: Mapping[int, int] = {}  # stored maps that stages alone read, and how many do
        self.map_place = "device"  # where those are kept
        self.gradients = Gradients()  # of those
        self.drawn: dict[tuple[int, int], int] = {}  # of tiles with random numbers, what tells those that were drawn
        self.observers: dict[int, list[Callable[[Tensor, Rect], None]]] = {}  # given every block of a map in pass 1

    def convert(self, pixels: Tensor) -> Tensor:
        """Pixels on the device, in the dtype and memory order they are computed in."""
        moved = pixels.to(device=self.device, dtype=self.dtype, non_blocking=True)
        return moved.contiguous(memory_format=self.memory_format)

    def let_go(self) -> None:
        """Forget stored maps and vectors: autograd keeps them between the passes, and lets them go when it can."""
        self.sources = {v: s for v, s in self.sources.items() if not isinstance(s, StoredMap)}
        self.stored = {}
        if self.kept is not None and not self.kept.recorded:
            self.kept.vectors = {}

    def take(self, sources: Mapping[int, Tensor], stored: Mapping[int, Tensor], vectors: Sequence[Tensor]) -> None:
        """Take back what autograd has kept: the stored maps that are read, those that pass 1 made, and the vectors."""
        axes, kept = self.tiled.stage.maps.axes, self.kept
        self.sources = {**{v: StoredMap(t, axes[v]) for v, t in sources.items()}, **self.sources}
        self.stored = dict(stored)
        if kept is not None and not kept.vectors:
            kept.vectors = self.prepare(vectors, kept.leaves)

    def read(self, source: int, rect: Rect) -> Tensor:
        """A rectangle of a source as it is computed with; of a stored map on the device a view."""
        return self._convert(source, self.sources[source].read(*rect))

    def _convert(self, source: int, pixels: Tensor) -> Tensor:
        if source != self.tiled.stage.image:  # maps that are there have the dtype that they are meant to have
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
        away = [source for source in self.tiled.stage.sources if not self._on_device(source)]
        if not away:
            yield Reader(self.read, lambda: None)
            return
        rects = (
            [(s, rect) for s in away for rect in self.tiled.source_rects(s, i, j, s in self.taken)] for i, j in tiles
        )
        with Prefetch(lambda s, rect: self.sources[s].read(*rect), self._convert, self.device, rects) as ahead:
            yield Reader(lambda s, rect: ahead(s, rect) if s in away else self.read(s, rect), ahead.advance)

    def prepare(self, vectors: Sequence[Tensor], leaves: Iterable[int] = ()) -> dict[int, Tensor]:
        """Detached vectors, convolution weights in the memory order of the maps; `leaves` want a gradient."""
        prepared = {}
        for value, vector in zip(self.tiled.stage.vectors, vectors, strict=True):
            vector = vector.detach()
            if vector.dim() == 4 and vector.device.type == self.device.type:
                vector = vector.contiguous(memory_format=self.memory_format)
            prepared[value] = vector
        for value in leaves:
            prepared[value].requires_grad_()
        return prepared

    @contextlib.contextmanager
    def _random_state(self, seed: int, i: int, j: int) -> Iterator[None]:
        """The same random numbers for a tile in both passes; the caller's generators stay as they are."""
        if not self.tiled.random:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with turns.RANDOM, torch.random.fork_rng(devices=devices):
            torch.manual_seed((seed + i * self.tiled.cols.steps + j) % 2**63)
            yield
            if self.device.type == "cpu":
                turns.check_drawn(self.drawn.setdefault((i, j), turns.dice()))

    def _after_tile(self, phase: str, i: int, j: int, done: int, maps: Iterable[Tensor | None]) -> None:
        if self.map_place == "disk":
            let_files_go((*maps, *(s.tensor for s in self.sources.values() if isinstance(s, StoredMap))))
        if self.memory_limit is not None:
            self.memory_limit.keep()
        if self.on_tile is not None:
            source = self.tiled.stage.sources[0]
            pixels = area(self.tiled.block(source, i, j)) * self.sources[source].shape[0]
            self.on_tile(TileEvent(phase, done, self.tiled.tiles, pixels))

    # -- pass 1 -------------------------------------------------------------------------------------------------

    def forward(
        self, vectors: Sequence[Tensor], wants: Sequence[bool] = (), wanted_sources: Container[int] = ()
    ) -> tuple[Tensor, ...]:
        """Values of the reductions, then the stored maps.

        Args:
            vectors: the tensors of `stage.vectors`.
            wants: which of them will want a gradient; if none and no source does, nothing is kept for `backward`.
            wanted_sources: the sources that will want one.
        """
        tiled, stage = self.tiled, self.tiled.stage
        leaves = [v for v, wanted in zip(stage.vectors, wants, strict=False) if wanted]
        env = self.prepare(vectors, leaves)
        accumulators = [new_accumulator(r, stage) for r in stage.reductions]
        stored: dict[int, Tensor] = {}
        seed = 0
        if tiled.random:
            with turns.RANDOM:
                seed = int(torch.randint(2**62, ()))
        kept = None
        inputs = {v for v in stage.sources if v in wanted_sources}
        if leaves or inputs:
            needs = tiled.needs_grad({*inputs, *leaves})
            kept = Kept(HaloStore(self.place), seed, env, leaves, inputs, needs, accumulators)
        if self.deferred and self.deferrable:
            return self._defer(kept)
        replay = None if self.replay is None or self.observers else self.replay.forward(self, env)
        above: dict[int, Tensor] = {}
        tiles = [(i, j) for i in range(tiled.rows.steps) for j in range(tiled.cols.steps)]
        with self._reader(tiles) as reader:
            for i in range(tiled.rows.steps):
                if kept is not None:
                    kept.above.append({v: kept.store.put(t) for v, t in above.items()})
                below: dict[int, Tensor] = {}
                left: dict[int, Tensor] = {}
                for j in range(tiled.cols.steps):
                    index = i * tiled.cols.steps + j
                    reader.advance()
                    if kept is not None:
                        kept.left[i, j] = {v: kept.store.put(t) for v, t in left.items()}
                    right: dict[int, Tensor] = {}
                    halos, gathered = Halos(above, left), Gathered(accumulators, stored, below, right)
                    keep = partial(self._keep, gathered=gathered)
                    with self._random_state(seed, i, j), self.autocast.enter():
                        if kept is not None and index >= tiled.tiles - self.retained:
                            tile = self.tile(i, j, kept, halos, reader.read)
                            kept.recorded[i, j] = self.record(tile, self.consumers(kept), keep)
                        elif replay is None or not replay(i, j, reader.read, halos, gathered):
                            tile = Tile(tiled, i, j, reader.read, env, halos)
                            with torch.no_grad():
                                self.run(tile, keep)
                    self._pass_right(j, left, right)
                    left = right
                    self._after_tile("forward", i, j, index + 1, stored.values())
                self._pass_down(i, above, below)
                above = below
        self.kept = kept
        for value in stage.stored:
            if value not in stored:  # a band without rows
                info = stage.program.values[value]
                stored[value] = torch.empty(info.shape, dtype=info.dtype, device=self.device)
        return (*[v for a in accumulators for v in self._values(a)], *[stored[v] for v in stage.stored])

    @property
    def deferrable(self) -> bool:
        """Whether pass 1 leaves nothing for pass 2 but what it stores."""
        tiled = self.tiled
        return not (tiled.stage.reductions or tiled.with_halo or tiled.random or tiled.unvalued or self.retained)

    def _defer(self, kept: Kept | None) -> tuple[Tensor, ...]:
        """What pass 1 would leave, without it: stored maps have a shape but no values."""
        tiled, values = self.tiled, self.tiled.stage.program.values
        if kept is not None:
            kept.above = [{} for _ in range(tiled.rows.steps)]
            kept.left = {(i, j): {} for i in range(tiled.rows.steps) for j in range(tiled.cols.steps)}
        self.kept = kept
        results = []
        for value in tiled.stage.stored:
            away = value in self.stage_maps and self.map_place != "device"
            one = torch.empty((), dtype=values[value].dtype, device="cpu" if away else self.device)
            results.append(one.expand(values[value].shape))
        return tuple(results)

    def _values(self, accumulator: Accumulator) -> tuple[Tensor, ...]:
        """The values of a reduction; of a band without rows what changes no total."""
        if accumulator.total is not None:
            return accumulator.values()
        infos = [self.tiled.stage.program.values[v] for v in accumulator.reduction.outputs]
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
        tiled, taken = self.tiled, self.taken
        for source in tiled.stage.sources:
            if source in taken:
                rect = tiled.block(source, tile.i, tile.j)
                publish(tile, source, tile.window(source, rect, (0, 0, 0, 0), None)[0])
        reads_left = dict(tiled.reads_left)
        for local in tiled.stage.locals:
            outputs = local.op.outputs
            if tiled.computes(outputs[0], tile.i, tile.j) and (only is None or any(v in only for v in outputs)):
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
        return {*self.tiled.reductions, *self.tiled.stage.stored, *self.observers}

    def _keep(self, tile: Tile, value: int, block: Tensor, *, gathered: Gathered) -> None:
        """What pass 1 does with a block: reduce it, store it, copy the halos out of it."""
        tiled, i, j = self.tiled, tile.i, tile.j
        block = block.detach()
        rect, axes = tiled.block(value, i, j), tiled.axes(value)
        width = tiled.stage.maps.size(value)[1]
        for number in tiled.reductions.get(value, ()):
            accumulator = gathered.accumulators[number]
            accumulator.merge(i, j, accumulator.share(block, tile.shares.get(value), rect), rect, width)
        if value in tiled.stage.stored:
            self.room_in_store(value, i, j, block, gathered).copy_(block)
        for observer in self.observers.get(value, ()):
            observer(block, rect)
        for side, own, halo in tile.hands_on(value) if value in tiled.with_halo else ():
            self.room_in_halo(side, value, halo, i, j, block, gathered).copy_(cut(block, axes, own))

    def room_in_store(self, value: int, i: int, j: int, like: Tensor, gathered: Gathered) -> Tensor:
        """Where a block lies in the stored map, which is made at first; `like` gives dtype and memory order."""
        axes = self.tiled.axes(value)
        if value not in gathered.stored:
            place = self.map_place if value in self.stage_maps else "device"
            gathered.stored[value] = new_map(like, self.tiled.stage.maps.shape(value), place, page_pool=self.page_pool)
        return cut(gathered.stored[value], axes, self.tiled.block(value, i, j))

    def room_in_halo(
        self, side: str, value: int, rect: Rect, i: int, j: int, like: Tensor, gathered: Gathered
    ) -> Tensor:
        """A rectangle of a halo that tile (i, j) hands on; the halo is made at first, as `room_in_store` does."""
        tiled, axes = self.tiled, self.tiled.axes(value)
        target = gathered.below if side == "above" else gathered.right
        if value not in target:
            rows, cols = tiled.rows.halo_out(value, i), tiled.cols.halo_out(value, j)
            top, bottom = tiled.rows.block(value, i)
            width = tiled.stage.maps.size(value)[1]
            size = (rows[1] - rows[0], width) if side == "above" else (bottom - top, cols[1] - cols[0])
            target[value] = empty_like_layout(like, axes, *size)
        return cut(target[value], axes, rect)

    def _pass_right(self, j: int, left: dict[int, Tensor], right: dict[int, Tensor]) -> None:
        """Columns from the left that tiles further right still need."""
        for value, columns in left.items():
            lo, end, start, hi = self._passed(self.tiled.cols, value, j)
            if lo < end:
                axis = self.tiled.axes(value)[1]
                if value not in right:
                    right[value] = empty_like_layout(
                        columns, self.tiled.axes(value), columns.shape[self.tiled.axes(value)[0]], hi - lo
                    )
                right[value].narrow(axis, 0, end - lo).copy_(columns.narrow(axis, lo - start, end - lo))

    def _pass_down(self, i: int, above: dict[int, Tensor], below: dict[int, Tensor]) -> None:
        """Rows from above that strips further down still need."""
        for value, rows in above.items():
            lo, end, start, hi = self._passed(self.tiled.rows, value, i)
            if lo < end:
                axis, across = self.tiled.axes(value)
                if value not in below:
                    below[value] = empty_like_layout(rows, self.tiled.axes(value), hi - lo, rows.shape[across])
                below[value].narrow(axis, 0, end - lo).copy_(rows.narrow(axis, lo - start, end - lo))

    @staticmethod
    def _passed(axis: AxisSchedule, value: int, step: int) -> tuple[int, int, int, int]:
        """The indices [lo, end) that a step hands on as it got them; the halo in begins at start, out ends at hi."""
        lo, hi = axis.halo_out(value, step)
        start, known = axis.halo_in(value, step)
        return lo, min(hi, known), start, hi

    # -- pass 2 -------------------------------------------------------------------------------------------------

    def source_grads(self, sources: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], set[int]]:
        """Tensors for the gradients of sources, and which of them have been made now: those are given to autograd."""

        def make(value: int, source: Tensor) -> Tensor:
            place = self.map_place if value in self.stage_maps else "device"
            return new_map(source, None, place, zero=value not in self.overwritten, page_pool=self.page_pool)

        found, made = {}, set(sources)
        for value, source in sources.items():
            if value in self.stage_maps:
                found[value], new = self.gradients.begin(value, partial(make, value, source))
                made -= set() if new else {value}
            else:
                found[value] = make(value, source)
        return found, made

    @property
    def page_pool(self) -> PagePool | None:
        """Pages for new maps."""
        return None if self.memory_limit is None else self.memory_limit.page_pool

    @property
    def overwritten(self) -> set[int]:
        """Sources whose gradient has one share only at each place, so that it need not begin with zeros."""
        return {v for v in self.tiled.apportioned if self.stage_maps.get(v, 1) == 1}

    def backward(
        self, grads: Sequence[Tensor | None], source_grads: Mapping[int, Tensor], last: bool = False
    ) -> dict[int, Tensor]:
        """Gradients of the vectors that want one, by value number; those of sources are put into `source_grads`.

        Args:
            grads: gradients of the reductions and of the stored maps, None for zero.
            source_grads: tensors like the sources that want a gradient; zeros but for `overwritten` sources.
            last: there is no further backward of this pass: maps that nobody else will read may go while it runs.
        """
        tiled, kept = self.tiled, self.kept
        assert kept is not None
        consumers = self.consumers(kept, grads)
        kept.sums = {}
        self.touched.clear()
        replay = None if self.replay is None else self.replay.backward(self, kept, consumers)
        if not all(map(_has_grad, chain.from_iterable(consumers.values()))):
            kept.recorded.clear()  # what hands gradients on was laid out for all of them
        grads_below: dict[int, Tensor] = {}
        tiles = [(i, j) for i in range(tiled.rows.steps) for j in range(tiled.cols.steps)]
        again = [tile for tile in reversed(tiles) if tile not in kept.recorded]
        ending = self._ending(grads) if last else []
        files = [*self.stored.values(), *grads, *source_grads.values()]
        with self._reader(again) as reader:
            for i in reversed(range(tiled.rows.steps)):
                above = {v: kept.store.get(h) for v, h in kept.above[i].items()}
                grads_above = self._returned(tiled.rows, i, above, grads_below, kept.needs)
                grads_right: dict[int, Tensor] = {}
                for j in reversed(range(tiled.cols.steps)):
                    left = {v: kept.store.get(h) for v, h in kept.left[i, j].items()}
                    grads_left = self._returned(tiled.cols, j, left, grads_right, kept.needs)
                    halos, halo_grads = Halos(above, left), Halos(grads_above, grads_left)
                    handed_back = Halos(grads_below, grads_right)
                    recorded = kept.recorded.pop((i, j), None)
                    replayed = False
                    if recorded is None:
                        reader.advance()
                        if replay is not None:
                            replayed = replay(i, j, reader.read, halos, halo_grads, handed_back, source_grads)
                        if not replayed:
                            recorded = self.again(self.tile(i, j, kept, halos, reader.read), consumers, kept.seed)
                    if recorded is not None:
                        recorded.tile.halo_grads, recorded.tile.handed_back = halo_grads, handed_back
                        self.add_to_sources(source_grads, self.differentiate(recorded, consumers, kept))
                    grads_right = grads_left
                    index = i * tiled.cols.steps + j
                    self._after_tile("backward", i, j, tiled.tiles - index, files)
                for value, tensor in ending if self.memory_limit is None or self.memory_limit.near else ():
                    let_rows_go(tensor, tiled.axes(value), tiled.block(value, i, 0)[0])
                grads_below = grads_above
        self._zero_the_rest(source_grads)
        return kept.sums if replay is None else {v: total.clone() for v, total in kept.sums.items()}

    def _ending(self, grads: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
        """The maps that nobody reads after this backward: what was stored, and the gradients of that."""
        own = dict(zip(self.tiled.stage.results, grads, strict=True))
        pairs = [(v, t) for v, t in self.stored.items() if not has_readers(t)]
        return [(v, t) for v, t in (*pairs, *own.items()) if v in self.stage_maps and t is not None]

    def again(self, tile: Tile, consumers: Consumers, seed: int) -> Recorded:
        """Compute a tile in pass 2, as it was computed in pass 1."""
        tile.second_pass = True
        with self._random_state(seed, tile.i, tile.j), self.autocast.enter():
            return self.record(tile, consumers)

    def tile(self, i: int, j: int, kept: Kept, halos: Halos, read: Callable[[int, Rect], Tensor]) -> Tile:
        """A tile to be computed with autograd on."""

        def pixels(source: int, rect: Rect) -> Tensor:
            window = read(source, rect)
            return window.detach().requires_grad_() if source in kept.sources else window

        tile = Tile(self.tiled, i, j, pixels, kept.vectors, halos, kept.needs)
        tile.anchor = torch.zeros((), device=self.device, requires_grad=True)
        tile.sum_of = kept.sum_of
        return tile

    def consumers(self, kept: Kept, grads: Sequence[Tensor | None] | None = None) -> Consumers:
        """For each map, what is taken from it and, in pass 2, the gradients of that."""
        stage = self.tiled.stage
        consumers: Consumers = {}
        left = list(grads) if grads is not None else [None] * len(stage.results)
        for accumulator in kept.accumulators:
            reduction = accumulator.reduction
            own = tuple(left.pop(0) for _ in reduction.outputs)
            shares = accumulator.shares() if accumulator.has_shares and own[0] is not None else {}
            if reduction.kind != "moments":
                own = tuple(None if grad is None else reduction.keep_dims(grad) / reduction.count for grad in own)
            consumers.setdefault(reduction.value, []).append(Consumer(accumulator, own, shares))
        for value, grad in zip(stage.stored, left, strict=True):
            consumers.setdefault(value, []).append(Consumer(None, (grad,), {}))
        return consumers

    def record(self, tile: Tile, consumers: Consumers, keep: Callable[..., None] | None = None) -> Recorded:
        """Compute a tile with autograd on.

        Args:
            targets: the maps that reductions and stored maps are taken from.
            keep: in pass 1, what is done with the blocks besides.
        """
        recorded = Recorded(tile)
        wanted = consumers if keep is not None else {v for v, taken in consumers.items() if any(map(_has_grad, taken))}
        reached, through = tile.reach(wanted)

        def publish(tile: Tile, value: int, block: Tensor) -> Tensor | None:
            if keep is not None:
                keep(tile, value, block)
            if value not in tile.needs or not block.requires_grad:
                return None
            result = None
            if value in self.tiled.with_halo and tile.hands_on(value):
                if value in through:
                    block = result = HandOn.apply(tile.anchor, block, partial(tile.add_handed_back, value))  # pyright: ignore
                else:
                    recorded.add(block, partial(_handed_back_alone, tile, value, block.detach()))
            taken = consumers.get(value, ())
            whole = [number for number, target in enumerate(taken) if target.of_block]
            if whole:
                recorded.add(block, partial(self._block_grad, tile, value, whole, block.detach()))
            for number, target in enumerate(taken):
                if not target.of_block:
                    assert target.accumulator is not None
                    root = target.accumulator.partial(block, self.tiled.block(value, tile.i, tile.j))
                    recorded.add(root, partial(self._partial_grad, tile, value, number, root.detach()))
            return result

        with torch.enable_grad():
            self.run(tile, publish, None if keep is not None else reached)
        tile.blocks.clear()
        return recorded

    def _partial_grad(self, tile: Tile, value: int, number: int, root: Tensor, consumers: Consumers) -> Tensor | None:
        """The gradient of a tile's share of a sum or maximum."""
        target = consumers[value][number]
        grad = target.grads[0]
        if grad is None:
            return None
        assert target.accumulator is not None
        grad = target.accumulator.part_of(grad, _place(tile, value))
        if target.accumulator.reduction.kind == "max" and target.shares:
            grad = grad * target.shares[tile.i, tile.j]
        return grad.to(root.dtype).expand_as(root)

    def _block_grad(
        self, tile: Tile, value: int, numbers: list[int], block: Tensor, consumers: Consumers
    ) -> Tensor | None:
        """The gradient of a block of which moments are taken, or that is stored, or both."""
        total: Tensor | None = None
        taken = [consumers[value][number] for number in numbers]
        for target in sorted(taken, key=lambda target: target.accumulator is not None):  # the map itself first
            if all(grad is None for grad in target.grads):
                continue
            if target.accumulator is None:
                (grad,) = target.grads
                assert grad is not None
                total = self._own(tile, value, grad)
            else:
                valued = not (tile.second_pass and value in self.tiled.unvalued)
                x = block if valued else self._own(tile, value, self.stored[value])
                total = target.accumulator.pull(x, target.grads, total, _place(tile, value))
        return total

    def _own(self, tile: Tile, value: int, stored: Tensor) -> Tensor:
        """A tile's part of a stored map or of its gradient, on the device."""
        if tile.alone:
            return stored
        own = cut(stored, self.tiled.axes(value), self.tiled.block(value, tile.i, tile.j))
        return own.to(self.device, non_blocking=True)

    def differentiate(self, recorded: Recorded, consumers: Consumers, kept: Kept) -> WindowGrads:
        """Add a recorded tile's gradients to the sums and to the halos' gradients; those of sources are returned."""
        tile = recorded.tile
        pairs = [(root, grad(consumers)) for root, grad in zip(recorded.roots, recorded.grads, strict=True)]
        pairs = [(root, grad) for root, grad in pairs if grad is not None]
        recorded.roots.clear()
        recorded.grads.clear()
        if not pairs:
            return []
        windows = [(place, t) for place, t in tile.source_windows.items() if t.requires_grad]
        inputs = [kept.vectors[v] for v in kept.leaves] + [t for _, t in windows]
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
            target = cut(source_grads[source], self.tiled.axes(source), rect)
            if source in overwritten:
                target.copy_(grad)
                self.given.add((source, rect))
            else:
                target.add_(grad.to(target.device))

    def _zero_the_rest(self, source_grads: Mapping[int, Tensor]) -> None:
        """Zeros where no tile has given a gradient of a source that is not added up."""
        tiled = self.tiled
        for source in self.overwritten & source_grads.keys():
            for i in range(tiled.rows.steps):
                for j in range(tiled.cols.steps):
                    if (source, rect := tiled.block(source, i, j)) not in self.given:
                        cut(source_grads[source], tiled.axes(source), rect).zero_()
        self.given.clear()

    def _returned(
        self, axis: AxisSchedule, step: int, halos: dict[int, Tensor], handed_back: dict[int, Tensor], needs: set[int]
    ) -> dict[int, Tensor]:
        """Zeros for the gradients of halos that enter a step, plus what comes back for those it only passed on."""
        along = 0 if axis is self.tiled.rows else 1
        grads = {v: torch.zeros_like(t) for v, t in halos.items() if v in needs}
        for value, target in grads.items():
            lo, end, start, _ = self._passed(axis, value, step)
            if value in handed_back and lo < end:
                dim = self.tiled.axes(value)[along]
                target.narrow(dim, lo - start, end - lo).add_(handed_back[value].narrow(dim, 0, end - lo))
        return grads


def _has_grad(target: Consumer) -> bool:
    return any(grad is not None for grad in target.grads)


def _place(tile: Tile, value: int) -> Rect | None:
    """Where a tile's block lies in the map; None where what belongs to the block is there alone."""
    return None if tile.alone else tile.tiled.block(value, tile.i, tile.j)


def _handed_back_alone(tile: Tile, value: int, block: Tensor, _targets: Consumers) -> Tensor:
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
