"""Pass 1 of the scan: computes the tiles in row-major order without a graph, and stores the halos that pass 2 needs."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..lowering.geometry import AxisSchedule
from ..module import locks
from .grid import new_accumulator
from .halos import HaloStore, Rect, cut, empty_like_layout
from .record import PassState, Read, Recorded, consumers_of, run_tile
from .reduce import Accumulator
from .scan import Reader, Scan
from .stored_maps import can_be_taken, new_map
from .tile import Halos, Tile


class ForwardReplay(Protocol):
    """Computes a tile of pass 1 by replay instead of op by op, if it can; returns whether it did."""

    def __call__(self, i: int, j: int, read: Read, halos: Halos, gathered: Gathered) -> bool: ...


@dataclass(frozen=True)
class Gathered:
    """Collects the results of tiles in pass 1: reductions, stored maps, and halos for the tiles below and right."""

    scan: Scan
    accumulators: list[Accumulator]
    stored: dict[int, Tensor]
    below: dict[int, Tensor]
    right: dict[int, Tensor]

    def keep(self, tile: Tile, value: int, block: Tensor) -> None:
        """Process a block in pass 1: reduce it, store it, and copy the halos from it."""
        scan, tiled, i, j = self.scan, self.scan.tiled, tile.i, tile.j
        block = block.detach()
        rect, axes = tiled.block(value, i, j), tiled.axes(value)
        width = tiled.stage.maps.size(value)[1]
        for number in tiled.reductions.get(value, ()):
            accumulator = self.accumulators[number]
            accumulator.merge(i, j, accumulator.share(block, tile.shares.get(value), rect), rect, width)
        if value in tiled.stage.stored and not self._takes(value, block):
            self.stored_view(value, i, j, block).copy_(block)
        for observer in scan.observers.get(value, ()):
            observer(block, rect)
        for side, own, halo in tile.hands_on(value) if value in tiled.with_halo else ():
            self.halo_view(side, value, halo, i, j, block).copy_(cut(block, axes, own))

    def _takes(self, value: int, block: Tensor) -> bool:
        """Use a block as the stored map if it is the whole map; returns whether it does."""
        scan, stage = self.scan, self.scan.tiled.stage
        # A source may be the user's own tensor, and a graph's saved tensors must not change with the network's output.
        if value in stage.sources or (scan.retained and value not in scan.maps.readers):
            return False
        if scan.maps.place_of(value) != "device":
            return False
        if not can_be_taken(block, stage.maps.shape(value), scan.maps.order_of(value, block)):
            return False
        self.stored[value] = block
        return True

    def stored_view(self, value: int, i: int, j: int, like: Tensor) -> Tensor:
        """A view of the stored map for a block of tile (i, j); the first call creates the map.

        `like` gives the dtype and the memory order; maps that the network returns have their own memory order.
        """
        scan, tiled = self.scan, self.scan.tiled
        if value not in self.stored:
            shape, maps = tiled.stage.maps.shape(value), scan.maps
            order = maps.order_of(value, like)
            self.stored[value] = new_map(like, shape, maps.place_of(value), order=order)
        return cut(self.stored[value], tiled.axes(value), tiled.block(value, i, j))

    def halo_view(self, side: str, value: int, rect: Rect, i: int, j: int, like: Tensor) -> Tensor:
        """A view of a rectangle of a halo that tile (i, j) passes on; the first call creates the halo."""
        tiled, axes = self.scan.tiled, self.scan.tiled.axes(value)
        room = self.below if side == "above" else self.right
        if value not in room:
            rows, cols = tiled.rows.halo_out(value, i), tiled.cols.halo_out(value, j)
            top, bottom = tiled.rows.block(value, i)
            width = tiled.stage.maps.size(value)[1]
            size = (rows[1] - rows[0], width) if side == "above" else (bottom - top, cols[1] - cols[0])
            room[value] = empty_like_layout(like, axes, *size)
        return cut(room[value], axes, rect)


class ForwardReplays(Protocol):
    """Replays tiles that are equivalent to earlier ones (see `cuda_graphs/`)."""

    def forward(self, scan: Scan, vectors: Mapping[int, Tensor]) -> ForwardReplay | None: ...


class ForwardPass:
    """Pass 1 of a stage.

    Args:
        scan: the scan to run.
        vectors: the tensors of `stage.vectors`.
        wants: which vectors require a gradient; if no vector and no source does, no state is stored.
        wanted_sources: the sources that require a gradient.
        replay: replays tiles that are equivalent to earlier ones.

    Attributes:
        kept: the state for the backward, complete after `run`; None without a backward.
    """

    def __init__(
        self,
        scan: Scan,
        vectors: Sequence[Tensor],
        wants: Sequence[bool] = (),
        wanted_sources: Container[int] = (),
        replay: ForwardReplays | None = None,
    ):
        tiled, stage = scan.tiled, scan.tiled.stage
        leaves = [v for v, wanted in zip(stage.vectors, wants, strict=False) if wanted]
        inputs = {v for v in stage.sources if v in wanted_sources}
        self.scan, self.replay = scan, replay
        self.env = scan.prepare(vectors, leaves)
        self.accumulators = [new_accumulator(r, stage) for r in stage.reductions]
        self.stored: dict[int, Tensor] = {}
        self.seed = 0
        if tiled.random:
            with locks.RANDOM:
                self.seed = int(torch.randint(2**62, ()))
        self.kept: PassState | None = None
        if leaves or inputs:
            needs = tiled.needs_grad({*inputs, *leaves})
            store = HaloStore(scan.halo_place)
            self.kept = PassState(store, self.seed, self.env, leaves, inputs, needs, self.accumulators)

    def run(self) -> tuple[Tensor, ...]:
        """Returns the values of the reductions, then the stored maps."""
        scan, stage = self.scan, self.scan.tiled.stage
        if scan.deferred and _deferrable(scan):
            return _defer(scan, self.kept)
        replay = None if self.replay is None or scan.observers else self.replay.forward(scan, self.env)
        above: dict[int, Tensor] = {}
        if self.kept is not None and scan.memory_limit is not None:
            scan.memory_limit.may_drop(self.kept)
        with scan.watched(), scan.reader(scan.tiles) as reader:
            for i in range(scan.tiled.rows.steps):
                above = self._strip(i, above, reader, replay)
        for value in stage.stored:
            if value not in self.stored:  # a shard without rows
                info = stage.program.values[value]
                self.stored[value] = torch.empty(info.shape, dtype=info.dtype, device=scan.device)
        values = [v for a in self.accumulators for v in _values(scan, a)]
        return (*values, *[self.stored[v] for v in stage.stored])

    def _strip(
        self, i: int, above: dict[int, Tensor], reader: Reader, replay: ForwardReplay | None
    ) -> dict[int, Tensor]:
        """Compute a strip (a row of tiles); returns the halos for the next strip, by value number."""
        scan, kept = self.scan, self.kept
        if kept is not None:
            kept.above.append({v: kept.store.put(t) for v, t in above.items()})
        below: dict[int, Tensor] = {}
        left: dict[int, Tensor] = {}
        for j in range(scan.tiled.cols.steps):
            reader.advance()
            if kept is not None:
                kept.left[i, j] = {v: kept.store.put(t) for v, t in left.items()}
            right: dict[int, Tensor] = {}
            self._tile(
                i, j, Halos(above, left), Gathered(scan, self.accumulators, self.stored, below, right), reader, replay
            )
            _pass_right(scan, j, left, right)
            left = right
            scan.after_tile("forward", i, j, i * scan.tiled.cols.steps + j + 1, self.stored.values())
        _pass_down(scan, i, above, below)
        return below

    def _tile(
        self, i: int, j: int, halos: Halos, gathered: Gathered, reader: Reader, replay: ForwardReplay | None
    ) -> None:
        scan, kept, index = self.scan, self.kept, i * self.scan.tiled.cols.steps + j
        with scan.tile_state(self.seed, i, j, {} if kept is None else kept.drawn):
            if kept is not None and index >= scan.tiled.tiles - scan.retained:
                consumers = consumers_of(scan, kept)
                kept.recorded[i, j] = Recorded(scan, kept, (i, j), halos, reader.read, consumers, gathered.keep)
            elif replay is None or not replay(i, j, reader.read, halos, gathered):
                with torch.no_grad():
                    tile = Tile(scan.tiled, i, j, reader.read, self.env, halos, whole=scan.whole)
                    run_tile(scan, tile, gathered.keep)


def _deferrable(scan: Scan) -> bool:
    """Whether pass 1 only stores maps, so that it can be omitted if nobody reads them."""
    tiled = scan.tiled
    return not (tiled.stage.reductions or tiled.with_halo or tiled.random or tiled.unvalued or scan.retained)


def _defer(scan: Scan, kept: PassState | None) -> tuple[Tensor, ...]:
    """The results of pass 1 without running it: stored maps have a shape but no values."""
    values = scan.tiled.stage.program.values
    if kept is not None:
        kept.above = [{} for _ in range(scan.tiled.rows.steps)]
        kept.left = {tile: {} for tile in scan.tiles}
    results = []
    for value in scan.tiled.stage.stored:
        away = scan.maps.place_of(value) != "device"
        one = torch.empty((), dtype=values[value].dtype, device="cpu" if away else scan.device)
        results.append(one.expand(values[value].shape))
    return tuple(results)


def _values(scan: Scan, accumulator: Accumulator) -> tuple[Tensor, ...]:
    """The values of a reduction; for a shard without rows, neutral elements."""
    if accumulator.total is not None:
        return accumulator.values()
    infos = [scan.tiled.stage.program.values[v] for v in accumulator.reduction.outputs]
    zeros = [torch.zeros(info.shape, dtype=info.dtype, device=scan.device) for info in infos]
    if accumulator.reduction.kind == "max":
        zeros[0].fill_(-torch.inf)
    return tuple(zeros)


def _pass_right(scan: Scan, j: int, left: dict[int, Tensor], right: dict[int, Tensor]) -> None:
    """Copy the columns of the left halo that tiles further right still need."""
    for value, columns in left.items():
        lo, end, start, hi = passed_on(scan.tiled.cols, value, j)
        if lo < end:
            height, along = scan.tiled.axes(value)
            if value not in right:
                right[value] = empty_like_layout(columns, (height, along), columns.shape[height], hi - lo)
            right[value].narrow(along, 0, end - lo).copy_(columns.narrow(along, lo - start, end - lo))


def _pass_down(scan: Scan, i: int, above: dict[int, Tensor], below: dict[int, Tensor]) -> None:
    """Copy the rows of the upper halo that strips further down still need."""
    for value, rows in above.items():
        lo, end, start, hi = passed_on(scan.tiled.rows, value, i)
        if lo < end:
            along, width = scan.tiled.axes(value)
            if value not in below:
                below[value] = empty_like_layout(rows, (along, width), hi - lo, rows.shape[width])
            below[value].narrow(along, 0, end - lo).copy_(rows.narrow(along, lo - start, end - lo))


def passed_on(axis: AxisSchedule, value: int, step: int) -> tuple[int, int, int, int]:
    """Returns (lo, end, start, hi): a step passes on the indices [lo, end) of a halo unchanged.

    The incoming halo begins at `start`, the outgoing halo ends at `hi`.
    """
    lo, hi = axis.halo_out(value, step)
    start, known = axis.halo_in(value, step)
    return lo, min(hi, known), start, hi
