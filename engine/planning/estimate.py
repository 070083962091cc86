"""How many bytes a step takes with a given tile.

    peak of a training step = parameters, their gradients, and the stage's copies and sums of them
                            + halos kept between the passes + gradients of two strips' halos
                            + one tile, computed and differentiated
                            + retained tiles + maps that must exist whole, and what runs after them

                            + what libraries take besides

The tile's share is counted on fake tensors (`simulate.py`), the rest is arithmetic on the schedules; only the last
term is fitted to measurements (benchmarks/memory.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..cuda_graphs import buffers
from ..cuda_graphs.replay import buffer_bytes
from ..lowering.stages import Stage, StagedProgram
from ..tiling.scan import Autocast, cast_dtype
from ..tiling.stage import TiledStage
from . import constants
from .plan import Plan
from .simulate import halo_shape, tile_peak
from .strategy import stored_peak


def _nbytes(shape: Any, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


Peaks = dict[Any, tuple[int, int]]  # by stage and tile, see `tile_peak`


class Estimate:
    """The parts of a plan that do not depend on the tile, and plans for tiles."""

    def __init__(self, staged: StagedProgram, training: bool, image_grad: bool, peaks: Peaks | None = None):
        self.staged, self.training = staged, training
        self.peaks = {} if peaks is None else peaks
        values, image = staged.program.values, staged.program.image
        self.image = values[image]
        self.wanted = staged.wanted(image_grad)
        autocast = Autocast.current(self.image.device)
        vectors: dict[int, int] = {}
        copies = self.stage_bytes = 0
        for stage in staged.stages:
            own = {v: _nbytes(values[v].shape, cast_dtype(stage, v, values[v].dtype, autocast)) for v in stage.vectors}
            vectors.update(own)
            alone = set() if training else {packing.weight for packing in stage.packings}  # see `Scan.prepare`
            kernels = (
                own[v] for v in own if len(values[v].shape) == 4 and max(values[v].shape[2:]) > 1 and v not in alone
            )
            packed = sum(own[packing.weight] for packing in stage.packings)
            copies, self.stage_bytes = max(copies, sum(kernels) + packed), max(self.stage_bytes, sum(own.values()))
        named = {v.name: _nbytes(v.shape, v.dtype) for v in values if v.name is not None}
        made = sum(_nbytes(values[v].shape, values[v].dtype) for v in vectors if values[v].name is None)
        # parameters; made vectors (folded weights); copies of a stage's kernels in the maps' memory order and packed;
        # sums of gradients
        self.gradient_bytes = sum(vectors.values())
        self.parameter_bytes = sum(named.values()) + made + copies + (self.gradient_bytes if training else 0)
        self.stored_bytes = stored_peak(staged, training, self.wanted)
        if image_grad:
            self.stored_bytes += _nbytes(self.image.shape, self.image.dtype)

    def plan(
        self,
        tile: tuple[int, int],
        halos: str,
        budget: int | None,
        count_tile: bool = True,
        limit: int = 0,
        room: int | None = None,
    ) -> Plan:
        """The plan for a tile; without `count_tile` a lower bound that leaves the tile's own bytes out.

        Args:
            limit: tiles are replayed where that keeps the peak below it.
            room: the peak up to which graphs of tiles are retained; None for the budget.
        """
        graphs = self.staged.stages
        sides = stage_sides(self.staged, tile)
        stages = [TiledStage(stage, side) for stage, side in zip(graphs, sides, strict=True)]
        kept, strip = 0, 0
        for tiled in stages:
            entering, heaviest = halo_bytes(tiled.stage, tiled)
            kept, strip = kept + entering, max(strip, heaviest if tiled.rows.steps > 1 else 0)
        peak = held = 0
        if count_tile:
            for tiled in sorted(stages, key=_block_bytes)[-constants.COUNTED :]:
                own, held = self._tile_peak(tiled)
                peak = max(peak, own)
        # In pass 2 two strips' gradients are in work, and one strip's halos where they are not on the device.
        strips = strip * ((2 if halos == "device" else 3) if self.training else 2)
        if self.staged.place != "device":
            strips += constants.AWAY_TILES * max(_away_bytes(self.staged, tiled) for tiled in stages)
        kernels, slack = self._library(stages, peak)
        plan = Plan(
            image=tuple(self.image.shape),  # pyright: ignore[reportArgumentType]
            tile=tile,
            tiles=(stages[0].rows.steps, stages[0].cols.steps),
            training=self.training,
            halos=halos,
            retained=0,
            parameter_bytes=self.parameter_bytes,
            halo_bytes=kept if self.training else 0,
            strip_bytes=strips,
            tile_bytes=peak,
            retained_bytes=0,
            stored_bytes=self.stored_bytes,
            library_bytes=kernels + slack,
            sides=tuple(sides),
            budget=budget,
        )
        room = budget if room is None else room
        retained = self._loosen(self._retain(plan, stages, held, slack, room), stages)
        if (
            count_tile
            and self.staged.place == "device"
            and buffers.executor(self.image.device)
            and stages[0].tiles > retained.retained
        ):
            buffered = max(buffer_bytes(tiled, self.training) for tiled in stages)
            arena = -(-constants.ARENA_SHARE * buffered // buffers.CHUNK_BYTES) * buffers.CHUNK_BYTES
            copies = self.gradient_bytes * (2 if self.training else 1)  # of vectors, and the sums of their gradients
            replayed = replace(plan, replay_bytes=peak + arena + copies if buffered else 0)
            if replayed.peak_bytes <= limit:
                return self._retain(replayed, stages, held, slack, room)
        return retained

    def _tile_peak(self, tiled: TiledStage) -> tuple[int, int]:
        """`tile_peak`, once for stages of several choices that do the same."""
        stage = tiled.stage
        made = (v for local in stage.locals for v in (*local.op.outputs, *local.reads))
        key = (tiled.tile, *stage.sources, -1, *stage.results, -1, *made)
        if key not in self.peaks:
            self.peaks[key] = tile_peak(stage, tiled, self.training, self.wanted)
        return self.peaks[key]

    def _retain(self, plan: Plan, stages: list[TiledStage], held: int, slack: int, room: int | None) -> Plan:
        """Retain tiles with what a plan leaves of `room`; each holds `held` bytes, its part of the heap's slack."""
        if len(stages) > 1 or not self.training:
            return plan
        (tiled,) = stages
        if tiled.tiles == 1 and plan.budget is None:  # its graph is what pass 2 would make again at once
            return replace(plan, retained=1)
        if room is None or not held or plan.peak_bytes > room:
            return plan
        # What is left keeps graphs of tiles; the first of them is the tile in work itself.
        left = room - plan.peak_bytes
        graphs = min(left / (1 - constants.SLACK_FILLED), left + slack) // held
        retained = min(tiled.tiles, 1 + int(graphs))
        kept_graphs = (retained - 1) * held
        filled = min(slack, int(constants.SLACK_FILLED * kept_graphs))
        library = plan.library_bytes - filled
        return replace(plan, retained=retained, retained_bytes=kept_graphs, library_bytes=library)

    def _library(self, stages: list[TiledStage], tile_bytes: int) -> tuple[int, int]:
        """Bytes of compiled kernels (on a GPU of scratch), and of the heap's slack under a budget."""
        if not tile_bytes:
            return 0, 0
        if self.image.device.type != "cpu":
            return constants.GPU_LIBRARIES + max(_scratch_bytes(tiled, self.training) for tiled in stages), 0
        compiled = 0
        for tiled in stages:
            convs = [local.op for local in tiled.stage.locals if local.op.name in ("conv2d", "packed_conv2d")]
            outputs = [op.outputs[0] for op in convs]
            shapes = 1
            for axis in (tiled.rows, tiled.cols):
                blocks = ([axis.block(v, step) for v in outputs] for step in range(axis.steps))
                shapes *= len({tuple(hi - lo for lo, hi in block) for block in blocks})
            compiled += len(outputs) * shapes * (3 if self.training else 1)
        kernels = min(constants.MOST_KERNELS, compiled) * constants.KERNEL_BYTES
        weights = self.stage_bytes * (constants.WEIGHT_COPIES if self.training else 1)
        copies = min(weights, constants.MOST_WEIGHT_COPIES)  # in the layout of the kernels, and made for the gradients
        return kernels, int(_tight_share(stages) * self._activations(tile_bytes)) + copies

    def _activations(self, tile_bytes: int) -> int:
        return max(0, tile_bytes - (self.stage_bytes if self.training else 0))

    def _loosen(self, plan: Plan, stages: list[TiledStage]) -> Plan:
        """Let the heap take what it takes without a budget, or what the budget leaves it."""
        if not plan.library_bytes or self.image.device.type != "cpu":
            return plan
        tiles = max(s.tiles for s in stages)
        loose = (
            constants.LOOSE_SHARE_FEW_TILES
            if tiles - plan.retained <= constants.LOOSE_FEW_TILES
            else constants.LOOSE_SHARE
        )
        more = max(0, int((loose - _tight_share(stages)) * self._activations(plan.tile_bytes)))
        if plan.budget is not None:
            more = max(0, min(more, plan.budget - plan.peak_bytes))
        return replace(plan, library_bytes=plan.library_bytes + more)


def _tight_share(stages: Sequence[TiledStage]) -> float:
    """The heap's slack under a budget, as a share of a tile's activations."""
    return (
        constants.HEAP_SHARE_FEW_TILES if max(s.tiles for s in stages) <= constants.FEW_TILES else constants.HEAP_SHARE
    )


def _away_bytes(staged: StagedProgram, tiled: TiledStage) -> int:
    """A tile's part of the maps that its stage reads and writes elsewhere than on the device."""
    stage, stage_maps, values = tiled.stage, staged.stage_maps(), staged.program.values
    total = sum(_nbytes(values[v].shape, values[v].dtype) for v in (*stage.sources, *stage.stored) if v in stage_maps)
    return total // tiled.tiles


def _block_bytes(tiled: TiledStage) -> int:
    """Bytes of all blocks of a tile in the middle."""
    stage = tiled.stage
    i, j = tiled.rows.steps // 2, tiled.cols.steps // 2
    total = 0
    for local in stage.locals:
        for value in local.op.outputs:
            top, bottom, left, right = tiled.block(value, i, j)
            total += _nbytes(halo_shape(stage, value, bottom - top, right - left), stage.program.values[value].dtype)
    return total


def _scratch_bytes(tiled: TiledStage, training: bool) -> int:
    """Bytes that a convolution of a tile may take besides its tensors on a GPU.

    A library's workspace is as large as the maps in another memory order; a choice between kernels (`choice.py`) makes
    the result once more, and stock what stands before its activation; a weight's gradient is summed in splits.
    """
    stage = tiled.stage

    def block(value: int) -> int:
        spans = [map(partial(axis.block, value), range(axis.steps)) for axis in (tiled.rows, tiled.cols)]
        rows, cols = (max(hi - lo for lo, hi in axis) for axis in spans)
        return _nbytes(halo_shape(stage, value, rows, cols), stage.program.values[value].dtype)

    most = 0
    for local in stage.locals:
        if "conv" in local.op.name or local.op.name == "fused_stem":
            maps = sum(map(block, local.reads)) + 2 * sum(map(block, local.op.outputs))
            weights = (v for v in local.op.inputs if v in stage.vectors and len(stage.program.values[v].shape) == 4)
            sums = sum(4 * math.prod(stage.program.values[v].shape) for v in weights)
            most = max(most, maps + constants.WGRAD_SPLITS * sums * training)
    return most


def stage_sides(staged: StagedProgram, tile: tuple[int, int]) -> list[tuple[int, int]]:
    """The tile of each stage, in pixels of its largest source, for a tile of the image.

    Deeper stages get tiles whose widest block holds about as many values as that of the first stage; strips of whole
    rows stay strips.
    """
    strips = tile[1] == staged.maps.size(staged.program.image)[1]

    def density(stage: Stage) -> float:
        height, width = stage.extent
        values = [*stage.sources, *(v for local in stage.locals for v in local.op.outputs)]
        return max(math.prod(stage.maps.shape(v)) for v in values) / (height * width)

    first, *others = staged.stages
    sides = [tile]
    for stage in others:
        if stage.image in stage.sources:
            sides.append(tile)
            continue
        height, width = stage.extent
        factor = math.sqrt(density(first) / density(stage))
        across = width if strips else max(1, min(width, rounded(tile[1] * factor)))
        down = tile[0] * tile[1] * factor**2 / across if strips else tile[0] * factor
        sides.append((max(1, min(height, rounded(down))), across))
    return sides


def rounded(side: float) -> int:
    """A side that strides divide, where it is large enough."""
    return int(side) // 32 * 32 or int(side) // 8 * 8 or int(side)


def halo_bytes(stage: Stage, tiled: TiledStage) -> tuple[int, int]:
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
