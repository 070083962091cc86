"""Predicts the memory of a step for a given tile size.

    peak of a training step = parameters, their gradients, and the stage's copies and sums of them
                            + halos stored between the passes
                            + the maximum over time of: gradients of two strips' halos
                              + one tile, computed and differentiated
                              + retained tiles + whole maps, and the ops after them
                            + memory of libraries

The tile is simulated on tensors without values (`simulate.py`); the rest is arithmetic on the schedules. Only the last
term is fitted to measurements (benchmarks/results/memory_cpu.json).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..cuda_graphs import buffers
from ..cuda_graphs.replay import buffer_bytes
from ..cuda_graphs.step_checks import MARGIN, is_one_step
from ..cuda_graphs.whole_passes import MEMORY_SHARE, MOST_TILES
from ..lowering.stages import ProgramStage, StagedProgram
from ..tiling.arena import arena
from ..tiling.scan import Autocast, cast_dtype
from ..tiling.stage import TiledStage
from . import constants
from .candidate_tiles import stage_sides
from .graph_memory import captured
from .interstage import value_bytes
from .library_overhead import cpu_libraries, gpu_libraries, least_cpu_libraries
from .lifetimes import made_whole, stored_times
from .peak_memory import AtOnce
from .plan import AtPeak, Plan
from .simulate import halo_shape, tile_peak, tile_weights
from .strategy import stage_cost
from .tile_peaks import Known, TilePeak


def _nbytes(shape: Any, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class _Cut:
    """The parts of a plan that depend on the schedules only.

    Attributes:
        sides: (height, width) of each stage's tiles.
        tiles: (rows, columns) of tiles of the first stage.
        alone: whether there is a single stage with a single tile.
        halo_bytes: bytes of all halos of all stages.
        strip_bytes: bytes of the halos that enter each stage's heaviest strip.
        away_bytes: per stage, resident bytes of the offloaded maps that it reads and writes.
    """

    sides: tuple[tuple[int, int], ...]
    tiles: tuple[int, int]
    alone: bool
    halo_bytes: int
    strip_bytes: tuple[int, ...]
    away_bytes: tuple[int, ...]


class Estimator:
    """Computes plans for tile sizes; holds the parts of a plan that do not depend on the tile.

    Args:
        staged: the network, divided into stages.
        training: whether there is a backward.
        image_grad: whether the image requires a gradient.
        known: a cache of results for other choices of this program.
        records: bytes that recording and planning allocated.
        alone: whether the image is not split over processes.
    """

    def __init__(
        self,
        staged: StagedProgram,
        training: bool,
        image_grad: bool,
        known: Known | None = None,
        records: int = 0,
        alone: bool = True,
    ):
        self._alone = alone and not image_grad
        self.staged, self.training, self.records = staged, training, records
        self.known = known or Known()
        self.image = staged.program.values[staged.program.image]
        self.wanted = staged.wanted(image_grad)
        self._kept_away: Container[int] = () if staged.place == "device" else staged.stage_maps()
        self._places = [number for number, step in enumerate(staged.steps) if isinstance(step, ProgramStage)]
        self._at_once = AtOnce(stored_times(staged, training, self.wanted), self._places)
        self.stored_bytes = self._at_once.stored
        self._count_vectors()
        if image_grad:
            self.stored_bytes += _nbytes(self.image.shape, self.image.dtype)
        self._cuts: dict[tuple[int, int], _Cut] = {}
        self._latest: tuple[tuple[int, int] | None, list[TiledStage]] = (None, [])

    def _count_vectors(self) -> None:
        """Count parameters, computed vectors (folded weights), reordered and packed copies of weights, and gradients.

        Vectors that `stored_peak` counts are left out.
        """
        staged, values = self.staged, self.staged.program.values
        autocast = Autocast.current(self.image.device)
        vectors: dict[int, int] = {}
        copies = self.stage_bytes = 0
        for stage in staged.stages:
            dtypes = {v: cast_dtype(stage, v, values[v].dtype, autocast) for v in stage.vectors}
            own = {v: _nbytes(values[v].shape, dtype) for v, dtype in dtypes.items()}
            vectors.update(own)
            alone = {one.weight for one in stage.packings if not one.reads_weight}  # see `Scan.prepare`
            kernels = (own[v] for v in stage.kernels - alone if v in own and max(values[v].shape[2:]) > 1)
            packed = sum(one.nbytes(values[one.weight].shape, dtypes[one.weight]) for one in stage.packings)
            copies = max(copies, sum(kernels) + packed)
            read = {v for local in stage.locals if "conv" in local.op.name for v in local.op.inputs} - alone
            self.stage_bytes = max(self.stage_bytes, sum(own[v] for v in read & own.keys()))
        counted = made_whole(staged) if self.stored_bytes else frozenset[int]()
        # Folded weights have the names of the weights. In inference they are freed with their stage.
        folds = [{v for op in stage.prelude for v in op.outputs} for stage in staged.stages]
        folded = frozenset[int]().union(*folds)
        named = {v.name: value_bytes(v) for n, v in enumerate(values) if v.name is not None and n not in folded}
        others = vectors.keys() - counted - folded
        made = sum(value_bytes(values[v]) for v in others if values[v].name is None)
        of_stages = [sum(value_bytes(values[v]) for v in own - counted) for own in folds]
        made += sum(of_stages) if self.training else max(of_stages, default=0)
        self.gradient_bytes = sum(vectors.values())
        self.parameter_bytes = sum(named.values()) + made + copies
        if self.training:
            summed = {values[v].name for v in vectors}  # the sums become their gradients
            wanted = {v.name: value_bytes(v) for n, v in enumerate(values) if n in self.wanted and v.name}
            self.parameter_bytes += sum(n for v, n in vectors.items() if v not in counted)
            self.parameter_bytes += sum(n for name, n in wanted.items() if name not in summed)

    def floor(self, count_tile: bool = True) -> int:
        """A lower bound of the peak for all tile sizes; see `plan`."""
        libraries = 0
        if self.on_cpu and count_tile:
            locals = [local for stage in self.staged.stages for local in stage.locals]
            libraries = least_cpu_libraries(locals, self.staged.program.values, self.stage_bytes, self.training)
        return self.parameter_bytes + self.stored_bytes + self.records + libraries

    def plan(
        self,
        tile: tuple[int, int],
        halos: str,
        budget: int | None,
        count_tile: bool = True,
        limit: int = 0,
        room: int | None = None,
        exact: bool = True,
    ) -> Plan:
        """The plan for a tile size.

        Args:
            tile: (height, width) of a tile of the image.
            halos: storage of the halos: "device", "host" or "disk".
            budget: the budget in bytes, or None.
            count_tile: whether to count the tile's own bytes; without them the peak is a lower bound.
            limit: tiles are replayed if the peak then stays below this limit.
            room: the peak up to which graphs of tiles are retained; None for the budget.
            exact: whether to simulate a tile of this size; otherwise a known tile of another size is scaled.
        """
        cut = self._cut(tile)
        # In pass 2 the gradients of two strips are resident, and the halos of one strip if they are offloaded.
        times = (2 if halos == "device" else 3) if self.training else 2
        pairs = zip(cut.strip_bytes, cut.away_bytes, strict=True)
        strips = [times * strip + away for strip, away in pairs]
        # Pass 2 would immediately recompute the graph of a single tile, so it is retained.
        alone = self.training and budget is None and cut.alone
        plan = Plan(
            image=tuple(self.image.shape),  # pyright: ignore[reportArgumentType]
            tile=tile,
            tiles=cut.tiles,
            training=self.training,
            halos=halos,
            retained=int(alone),
            retained_tiles=(1,) if alone else (),
            parameter_bytes=self.parameter_bytes,
            halo_bytes=cut.halo_bytes if self.training else 0,
            strip_bytes=max(strips),
            tile_bytes=0,
            retained_bytes=0,
            stored_bytes=self.stored_bytes,
            library_bytes=0,
            heap_bytes=0,
            sides=cut.sides,
            record_bytes=self.records,
            budget=budget,
            apart_bytes=self._at_once.apart(strips, max(strips)),
            at_peak=self._at_peak(strips, strips),
        )
        if not count_tile:
            return plan
        return self._with_tile(plan, strips, limit, budget if room is None else room, exact)

    def _tiled(self, tile: tuple[int, int]) -> list[TiledStage]:
        """The stages divided into tiles, for a tile of the image; the latest result is cached."""
        if self._latest[0] != tile:
            sides = stage_sides(self.staged, tile)
            graphs = zip(self.staged.stages, sides, strict=True)
            self._latest = tile, [TiledStage(stage, side, self.known.schedules) for stage, side in graphs]
        return self._latest[1]

    def _cut(self, tile: tuple[int, int]) -> _Cut:
        if tile not in self._cuts:
            stages = self._tiled(tile)
            kept, strips = 0, list[int]()
            for tiled in stages:
                entering, heaviest = halo_bytes(tiled.stage, tiled)
                kept += entering
                strips.append(heaviest if tiled.rows.steps > 1 else 0)
            count = bytes_in_files if self.on_cpu else _away_bytes
            away = tuple(count(self._kept_away, tiled) for tiled in stages)
            sides = tuple(tiled.tile for tiled in stages)
            tiles = stages[0].rows.steps, stages[0].cols.steps
            alone = [tiled.tiles for tiled in stages] == [1]
            self._cuts[tile] = _Cut(sides, tiles, alone, kept, tuple(strips), away)
        return self._cuts[tile]

    def _with_tile(self, plan: Plan, strips: Sequence[int], limit: int, room: int | None, exact: bool) -> Plan:
        """A plan with the bytes of its heaviest tile, of libraries, and of retained graphs of tiles.

        Args:
            strips: bytes of the resident strips of each stage.
        """
        stages = self._tiled(plan.tile)
        weights = [tile_weights(tiled) for tiled in stages]
        peaks = self._tile_peaks(stages, [int(own.max()) for own in weights], strips, exact)
        counted = max(peaks, key=lambda one: one.peak)
        works = [strip + own.peak for strip, own in zip(strips, peaks, strict=True)]
        activations = max(0, counted.peak - counted.fixed)
        plan = replace(
            plan,
            tile_bytes=counted.peak,
            library_bytes=self._library(stages, counted.peak),
            heap_bytes=int(constants.HEAP_SHARE * activations) * self.on_cpu,
            apart_bytes=self._at_once.apart(works, plan.strip_bytes + counted.peak),
            at_peak=self._at_peak(works, strips),
        )
        retain = partial(self._retain, stages=stages, weights=weights, peaks=peaks, strips=strips, exact=exact)
        if self.staged.place == "device" and buffers.executor(self.image.device):
            return self._with_captures(plan, stages, counted, limit, room, retain)
        return retain(self._loosen(plan, activations), room=room)

    def _with_captures(
        self,
        plan: Plan,
        stages: Sequence[TiledStage],
        counted: TilePeak,
        limit: int,
        room: int | None,
        retain: Callable[..., Plan],
    ) -> Plan:
        """A plan for a GPU: the step is captured as a whole if that fits, else its passes or its tiles.

        Args:
            counted: the heaviest tile.
            retain: `_retain` of these stages.
        """
        buffered = max(buffer_bytes(tiled, self.training) for tiled in stages)
        arena = -(-constants.ARENA_SHARE * buffered // buffers.CHUNK_BYTES) * buffers.CHUNK_BYTES
        copies = self.gradient_bytes * (2 if self.training else 1)  # vectors, and sums of gradients
        replay = counted.peak + arena + copies if buffered else 0
        if self._alone and plan.halos == "device" and is_one_step(self.staged, stages):
            most = limit if plan.budget is not None else int(MEMORY_SHARE / constants.FREE_SHARE * limit)
            kept = retain(plan, room=None if room is None else min(room, int(most / MARGIN)))
            whole = captured(kept, stages, most)
            if whole is not None:
                again = any(tiled.tiles > kept.retained_of(n) for n, tiled in enumerate(stages))
                return replace(whole, replay_bytes=replay if again and kept.parts_bytes + replay <= limit else 0)
        retained, tiles = retain(plan, room=room), stages[0].tiles
        passes = tiles <= retained.retained and tiles <= MOST_TILES and plan.budget is None
        if passes or (tiles == 1 and retained.retained):
            return replace(retained, op_by_op=not passes)  # everything is captured, or nothing is replayed
        # Tiles that retain their graph run op by op, which took an H200 over four times as long as replaying twice
        # (benchmarks/results/gpu_h200.json: "ours_third" and "ours").
        if replay and plan.parts_bytes + replay <= limit:
            return replace(plan, replay_bytes=replay)
        return replace(retained, op_by_op=True)

    def _tile_peaks(
        self, stages: Sequence[TiledStage], weights: Sequence[int], strips: Sequence[int], exact: bool
    ) -> list[TilePeak]:
        """The peak of each stage's heaviest tile: simulated for stages that determine the peak, scaled for others.

        Args:
            weights: bytes of the blocks of each stage's heaviest tile.
        """
        heaviest = max(range(len(stages)), key=weights.__getitem__)
        first = self._tile_peak(stages[heaviest], weights[heaviest], exact)
        peaks = [first.scaled(tiled.tile, own) for tiled, own in zip(stages, weights, strict=True)]
        at = [sum((self._at_once.whole_maps[n], strips[n], own.peak)) for n, own in enumerate(peaks)]
        for n in {heaviest, *sorted(range(len(stages)), key=at.__getitem__)[-constants.COUNTED :]}:
            peaks[n] = self._tile_peak(stages[n], weights[n], exact)
        return peaks

    @property
    def on_cpu(self) -> bool:
        """Whether the step runs on the CPU, where libraries and the heap share the budget with the tiles."""
        return self.image.device.type == "cpu"

    @property
    def in_heap(self) -> bool:
        """Whether blocks of tiles come from the C library's heap instead of the arena."""
        return self.on_cpu and arena() is None

    def _tile_peak(self, tiled: TiledStage, blocks: int, exact: bool) -> TilePeak:
        """`tile_peak`, cached for stages that are equal in several choices."""
        stage = tiled.stage
        made = (v for local in stage.locals for v in (*local.op.outputs, *local.reads))
        known = self.known.peaks.setdefault((*stage.sources, -1, *stage.results, -1, *made), [])
        found = next((one for one in known if one.tile == tiled.tile), None)
        if found is None and known and not exact:
            return min(known, key=lambda one: abs(one.blocks - blocks)).scaled(tiled.tile, blocks)
        if found is None:
            values = stage.program.values
            leaves = [values[v] for v in stage.vectors if v in self.wanted] if self.training else []
            fixed = sum(_nbytes(value.shape, value.dtype) for value in leaves)
            found = TilePeak(tiled.tile, blocks, *tile_peak(stage, tiled, self.training, self.wanted), fixed)
            known.append(found)
        return found

    def _retain(
        self,
        plan: Plan,
        stages: Sequence[TiledStage],
        weights: Sequence[np.ndarray],
        peaks: Sequence[TilePeak],
        strips: Sequence[int],
        exact: bool,
        room: int | None,
    ) -> Plan:
        """Retain the last tiles of each stage in the bytes that a plan leaves of `room`.

        Stages with the most recomputation per byte come first.
        """
        if room is None or not max(one.held for one in peaks) or plan.peak_bytes > room:
            return plan
        works = [strip + own.peak for strip, own in zip(strips, peaks, strict=True)]
        left, alone = room - plan.peak_bytes, self._at_once.most(works)
        numbers, graphs = [0] * len(stages), [0] * len(stages)
        for n in self._retainable(stages, weights):
            own = peaks[0] if len(stages) == 1 else self._tile_peak(stages[n], int(weights[n].max()), exact)
            held = (self._held_share(stages[n], own) * np.cumsum(weights[n].flat[::-1])).astype(int)
            before, works[n] = works[n], strips[n] + own.peak
            works[n] -= int(held[0])  # the first differentiated graph is the current tile
            added = self._at_once.most(works, graphs, n) - alone
            numbers[n] = int(np.searchsorted(held, left - added, "right"))
            graphs[n], works[n] = (int(held[numbers[n] - 1]), works[n]) if numbers[n] else (0, before)
            if numbers[n] < stages[n].tiles:
                break
        added = max(0, self._at_once.most(works, graphs) - alone)
        at_peak = self._at_peak(works, strips, graphs) if added else plan.at_peak
        return replace(
            plan, retained=sum(numbers), retained_tiles=tuple(numbers), retained_bytes=added, at_peak=at_peak
        )

    def _at_peak(self, works: Sequence[int], strips: Sequence[int], graphs: Sequence[int] = ()) -> AtPeak:
        """The parts of the memory at the moment of the peak.

        Args:
            works: bytes of the strips and the tile of each stage.
            strips: bytes of the strips of each stage.
            graphs: bytes of the retained graphs of each stage.
        """
        moment = self._at_once.moment(works, graphs)
        strip = 0 if moment.stage is None else strips[moment.stage]
        throughout = self.stored_bytes - self._at_once.stored
        return AtPeak(throughout + moment.maps, strip, moment.work - strip, moment.graphs)

    def _held_share(self, tiled: TiledStage, counted: TilePeak) -> float:
        """Bytes that a retained tile holds per byte of its blocks."""
        values = self.staged.program.values
        blocks = sum(value_bytes(values[v]) for local in tiled.stage.locals for v in local.op.outputs)
        again = sum(value_bytes(values[v]) for v in tiled.reread)  # pass 1 retains these
        held = counted.held / max(1, counted.blocks) + again / max(1, blocks)
        return held * (1 + constants.HELD_SHARE * self.on_cpu)

    def _retainable(self, stages: Sequence[TiledStage], weights: Sequence[np.ndarray]) -> list[int]:
        """The stages whose tiles may be retained, those with the most work per byte first."""
        if len(stages) == 1:
            return [0]
        if not self.on_cpu or self.staged.place != "device":
            return []
        again = {n for part in self.staged.segments for n in part}
        usable = [n for n, place in enumerate(self._places) if place not in again]
        return sorted(usable, key=lambda n: -stage_cost(self.staged, stages[n].stage) / max(1.0, weights[n].sum()))

    def _library(self, stages: list[TiledStage], tile_bytes: int) -> int:
        """Bytes of compiled kernels and weight copies on the CPU, or of scratch memory on a GPU."""
        if not tile_bytes:
            return 0
        if self.on_cpu:
            return cpu_libraries(stages, self.stage_bytes, self.training)
        return gpu_libraries(stages, self.training)

    def _loosen(self, plan: Plan, activations: int) -> Plan:
        """Let the heap use its usual share without a budget; under a budget, as much of it as is left.

        A smaller heap returns pages to the system after most tiles. Obtaining them again costs more than retained
        graphs would save. In inference the heap may use the rest of the budget, except a small reserve.
        """
        if not self.in_heap:
            return plan
        few = plan.tiles[0] * plan.tiles[1] <= constants.LOOSE_FEW_TILES
        share = constants.LOOSE_SHARE_FEW_TILES if few else constants.LOOSE_SHARE
        if plan.budget is None:
            most = math.inf
        elif self.training:
            most = plan.budget
        else:
            most, share = constants.LOOSE_UNDER * plan.budget, constants.LOOSE_SHARE_INFERENCE
        more = max(0, int(min((share - constants.HEAP_SHARE) * activations, most - plan.peak_bytes)))
        return replace(plan, heap_bytes=plan.heap_bytes + more)


def _away_bytes(maps: Container[int], tiled: TiledStage) -> int:
    """Resident bytes of the offloaded maps that a stage reads and writes: tile-sized parts."""
    stage, values = tiled.stage, tiled.stage.program.values
    total = sum(value_bytes(values[v]) for v in (*stage.sources, *stage.stored) if v in maps)
    return constants.AWAY_TILES * total // tiled.tiles


def bytes_in_files(maps: Container[int], tiled: TiledStage) -> int:
    """Resident bytes of maps in files that a stage reads and writes: whole rows of tiles.

    Linux also maps the pages around an accessed page, up to megabytes with large folios of the file system.
    """
    stage, total = tiled.stage, 0
    for v in (v for v in (*stage.sources, *stage.stored) if v in maps):
        height, _ = stage.maps.size(v)
        total += value_bytes(stage.program.values[v]) // height * -(-height // tiled.rows.steps)
    return constants.MAPPED_TILES * total


def halo_bytes(stage: ProgramStage, tiled: TiledStage) -> tuple[int, int]:
    """Bytes of all halos that enter all tiles, and of the rows that enter the heaviest strip."""
    rows, cols = tiled.rows, tiled.cols
    total = 0
    strips = [0] * rows.steps
    for value in tiled.with_halo:
        pixel = _nbytes(halo_shape(stage, value, 1, 1), stage.program.values[value].dtype)
        height, width = stage.maps.size(value)
        for i in range(rows.steps):
            lo, hi = rows.halo_in(value, i)
            strips[i] += (hi - lo) * width * pixel
        columns = sum(hi - lo for lo, hi in (cols.halo_in(value, j) for j in range(cols.steps)))
        total += columns * height * pixel
    return total + sum(strips), max(strips)
