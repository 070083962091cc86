"""The plan: which tile fits a memory budget, and how many bytes a step will take.

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
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..capture import trace
from ..capture.trace import Op, Program, capture, refs
from ..cuda_graphs import buffers
from ..cuda_graphs.replay import FEWEST_TILES, buffer_bytes
from ..errors import BudgetError, GigamorphError, UnsupportedError
from ..lowering.ops import VectorOp
from ..lowering.rewrites import prepare
from ..lowering.stages import Stage, StagedProgram, sort
from ..module.arguments import HALO_PLACES, check_choice, check_network, is_whole, tile_sides
from ..tiling.memory import available_bytes, format_bytes, parse_bytes
from ..tiling.scan import Autocast, cast_dtype
from ..tiling.spatial import SpatialShard, split_network
from ..tiling.stage import TiledStage
from .simulate import halo_shape, stock_peak, tile_peak
from .strategy import PLACES, Strategy, every_strategy, stored_peak, strategies

# Sides that are tried, largest first: powers of two and their halves in between.
_SIDES = sorted({2**n for n in range(5, 15)} | {3 * 2**n for n in range(4, 13)}, reverse=True)
# Larger tiles than these gain no speed: a core's cache on the CPU, the width of the machine on a GPU.
_PREFERRED = {"cpu": 512, "cuda": 4096}
# The same for stages of a few layers on the CPU, as the square root of a strip's pixels; and a strip's rows at least.
_PREFERRED_STRIP, _LEAST_ROWS = 384, 16
# On the CPU oneDNN keeps a compiled kernel per operation and shape, at most 1024 of them, and the C library's heap
# keeps freed blocks: a multiple of the activations of the tile in work, which grows while tiles go by, and some copies
# of the weights. Under a budget free pages are given back (`memory_limit.py`), and the smaller share is enough; without
# one, or where the budget has room, the larger. Retained tiles fill a part of the slack. All of it is fitted to the
# resident memory of ResNet-18 and -50 over three steps (benchmarks/results/memory_cpu.json).
_KERNEL_BYTES, _MOST_KERNELS = 90_000, 1024
_HEAP_SHARE, _HEAP_SHARE_FEW_TILES, _FEW_TILES = 1.0, 0.35, 4
_LOOSE_SHARE, _LOOSE_SHARE_FEW_TILES, _LOOSE_FEW_TILES = 2.5, 1.1, 8
_WEIGHT_COPIES, _MOST_WEIGHT_COPIES = 2, 78_000_000
_SLACK_FILLED = 0.25
# How many sides, from the largest on, are tried before another choice of stored maps is.
_COARSE = 3
# How many choices of stored maps, from the one that needs least on, are tried with smaller tiles.
_SMALL_TILES = 3
# Of maps elsewhere, the parts that are here at a time: a tile's own, the next one's, and gradients of one of them.
_AWAY_TILES = 3
# Stages whose tile is counted: the heaviest ones by their blocks.
_COUNTED = 2
# Static tensors of a tile's replay lie in chunks, and those at the end of the image are larger than in the middle.
_ARENA_SHARE = 2
# Share of the free memory that is taken where no budget is given.
_FREE_SHARE = 0.8


@dataclass(frozen=True)
class Choice:
    """One choice of stored maps: its name, its work in forwards of stock PyTorch, its bytes of whole maps."""

    name: str
    forwards: float
    bytes: int


@dataclass(frozen=True)
class Plan:
    """How one step of an image size will be computed, and what it takes. All sizes in bytes.

    Attributes:
        image: (N, C, H, W).
        tile: (height, width) of a tile in image pixels.
        tiles: (rows, columns) of tiles.
        training: whether the step has a backward.
        halos: where the halos are kept: "device", "host" or "disk".
        retained: tiles whose graph is kept from pass 1, so that they are not recomputed.
        parameter_bytes: parameters, gradients, and the stage's copies and sums of them.
        halo_bytes: halos kept between the passes, wherever they are.
        strip_bytes: halos of the strips in work and their gradients, on the device.
        tile_bytes: peak of one tile.
        retained_bytes: graphs of retained tiles.
        stored_bytes: maps that exist whole, their gradients, and the ops after them.
        library_bytes: compiled kernels and the heap's slack on the CPU; 0 elsewhere.
        sides: the tile of each stage, in pixels of its largest source.
        maps: where maps that stages alone read are stored: "device", "host" or "disk".
        away_bytes: what they take there, if that is not the device.
        choices: which maps may be stored whole (`strategy.py`): those that did not fit, the one taken, and in the
            result of `plan` those that need still less.
        choice: which of them is taken.
        replay_bytes: what replayed tiles take besides (`replay.py`); 0 if tiles are computed op by op.
        budget: the budget, or None.
        stock_bytes: the same step in stock PyTorch, or None where it was not asked for.
    """

    image: tuple[int, int, int, int]
    tile: tuple[int, int]
    tiles: tuple[int, int]
    training: bool
    halos: str
    retained: int
    parameter_bytes: int
    halo_bytes: int
    strip_bytes: int
    tile_bytes: int
    retained_bytes: int
    stored_bytes: int
    library_bytes: int
    sides: tuple[tuple[int, int], ...]
    maps: str = "device"
    away_bytes: int = 0
    choices: tuple[Choice, ...] = ()
    choice: int = 0
    replay_bytes: int = 0
    budget: int | None = None
    stock_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """Predicted peak on the device; the image itself and what other code holds are not included."""
        resident = self.halo_bytes if self.halos == "device" else 0
        return (
            self.parameter_bytes
            + resident
            + self.strip_bytes
            + self.tile_bytes
            + self.retained_bytes
            + self.stored_bytes
            + self.library_bytes
            + self.replay_bytes
        )

    @property
    def replayed(self) -> bool:
        """Whether tiles that are alike are captured once and replayed."""
        return self.replay_bytes > 0

    @property
    def fits(self) -> bool:
        """Whether the predicted peak keeps to the budget."""
        return self.budget is None or self.peak_bytes <= self.budget

    def __str__(self) -> str:
        n, c, height, width = self.image
        lines = [
            ("image", f"{n} x {c} x {height} x {width} ({n * height * width / 1e6:.1f} Mpx)"),
            ("step", "training, two passes" if self.training else "inference, one pass"),
            ("tile", f"{self.tile[0]} x {self.tile[1]}, {self.tiles[0]} x {self.tiles[1]} of them"),
            ("parameters", format_bytes(self.parameter_bytes)),
            ("halos", f"{format_bytes(self.halo_bytes)} {PLACES[self.halos]}" if self.training else "none kept"),
            ("strips in work", format_bytes(self.strip_bytes)),
            ("one tile", format_bytes(self.tile_bytes)),
        ]
        if self.retained > 1:
            lines.append(("retained tiles", f"{format_bytes(self.retained_bytes)} ({self.retained} not recomputed)"))
        if self.stored_bytes:
            lines.append(("whole maps", format_bytes(self.stored_bytes)))
        if self.away_bytes:
            lines.append(("whole maps", f"{format_bytes(self.away_bytes)} {PLACES[self.maps]}"))
        if self.library_bytes:
            lines.append(("libraries", f"{format_bytes(self.library_bytes)} (compiled kernels, heap)"))
        if len(self.sides) > 1:
            lines.append(("stages", str(len(self.sides))))
        if self.replay_bytes:
            lines.append(("replayed tiles", format_bytes(self.replay_bytes)))
        lines.append(("predicted peak", format_bytes(self.peak_bytes)))
        if self.budget is not None:
            lines.append(("budget", f"{format_bytes(self.budget)} ({'fits' if self.fits else 'does not fit'})"))
        if self.stock_bytes is not None:
            ratio = self.stock_bytes / self.peak_bytes
            lines.append(("stock PyTorch", f"{format_bytes(self.stock_bytes)} ({ratio:.1f} times this)"))
        text = "\n".join(f"{name:<15} {text}" for name, text in lines)
        if len(self.choices) < 2:
            return text
        rows = (
            f"{'>' if n == self.choice else ' '} {made.forwards:5.1f}  {format_bytes(made.bytes):>9}  {made.name}"
            for n, made in enumerate(self.choices)
        )
        return "\n".join([text, "", "  work in forwards, bytes of whole maps, and which maps are stored", *rows])


def _nbytes(shape: Any, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


Peaks = dict[Any, tuple[int, int]]  # by stage and tile, see `tile_peak`


class _Estimate:
    """The parts of a plan that do not depend on the tile, and plans for tiles."""

    def __init__(self, network: StagedProgram, training: bool, image_grad: bool, peaks: Peaks | None = None):
        self.network, self.training = network, training
        self.peaks = {} if peaks is None else peaks
        values, image = network.program.values, network.program.image
        self.image = values[image]
        self.wanted = network.wanted(image_grad)
        autocast = Autocast.current(self.image.device)
        vectors: dict[int, int] = {}
        copies = self.stage_bytes = 0
        for stage in network.stages:
            own = {v: _nbytes(values[v].shape, cast_dtype(stage, v, values[v].dtype, autocast)) for v in stage.vectors}
            vectors.update(own)
            kernels = (own[v] for v in own if len(values[v].shape) == 4 and max(values[v].shape[2:]) > 1)
            copies, self.stage_bytes = max(copies, sum(kernels)), max(self.stage_bytes, sum(own.values()))
        named = {v.name: _nbytes(v.shape, v.dtype) for v in values if v.name is not None}
        made = sum(_nbytes(values[v].shape, values[v].dtype) for v in vectors if values[v].name is None)
        # parameters; made vectors (folded weights); copies of a stage's kernels in the maps' memory order; sums of
        # gradients
        self.gradient_bytes = sum(vectors.values())
        self.parameter_bytes = sum(named.values()) + made + copies + (self.gradient_bytes if training else 0)
        self.stored_bytes = stored_peak(network, training, self.wanted)
        if image_grad:
            self.stored_bytes += _nbytes(self.image.shape, self.image.dtype)

    def plan(
        self, tile: tuple[int, int], halos: str, budget: int | None, count_tile: bool = True, limit: int = 0
    ) -> Plan:
        """The plan for a tile; without `count_tile` a lower bound that leaves the tile's own bytes out.

        Args:
            limit: tiles are replayed where that keeps the peak below it.
        """
        graphs = self.network.stages
        sides = stage_sides(self.network, tile)
        stages = [TiledStage(stage, side) for stage, side in zip(graphs, sides, strict=True)]
        kept, strip = 0, 0
        for tiled in stages:
            entering, heaviest = halo_bytes(tiled.stage, tiled)
            kept, strip = kept + entering, max(strip, heaviest if tiled.rows.steps > 1 else 0)
        peak = held = 0
        if count_tile:
            for tiled in sorted(stages, key=_block_bytes)[-_COUNTED:]:
                own, held = self._tile_peak(tiled)
                peak = max(peak, own)
        # In pass 2 two strips' gradients are in work, and one strip's halos where they are not on the device.
        strips = strip * ((2 if halos == "device" else 3) if self.training else 2)
        if self.network.place != "device":
            strips += _AWAY_TILES * max(_away_bytes(self.network, tiled) for tiled in stages)
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
        retained = self._loosen(self._retain(plan, stages, held, slack), stages)
        if (
            count_tile
            and self.network.place == "device"
            and buffers.executor(self.image.device)
            and stages[0].tiles - retained.retained >= FEWEST_TILES
        ):
            buffered = max(buffer_bytes(tiled, self.training) for tiled in stages if tiled.tiles >= FEWEST_TILES)
            arena = -(-_ARENA_SHARE * buffered // buffers.CHUNK_BYTES) * buffers.CHUNK_BYTES
            copies = self.gradient_bytes * (2 if self.training else 1)  # of vectors, and the sums of their gradients
            replayed = replace(plan, replay_bytes=peak + arena + copies if buffered else 0)
            if replayed.peak_bytes <= limit:
                return self._retain(replayed, stages, held, slack)
        return retained

    def _tile_peak(self, tiled: TiledStage) -> tuple[int, int]:
        """`tile_peak`, once for stages of several choices that do the same."""
        stage = tiled.stage
        made = (v for local in stage.locals for v in (*local.op.outputs, *local.reads))
        key = (tiled.tile, *stage.sources, -1, *stage.results, -1, *made)
        if key not in self.peaks:
            self.peaks[key] = tile_peak(stage, tiled, self.training, self.wanted)
        return self.peaks[key]

    def _retain(self, plan: Plan, stages: list[TiledStage], held: int, slack: int) -> Plan:
        """Retain tiles with what a plan leaves of its budget; each holds `held` bytes, its part of the heap's slack."""
        budget = plan.budget
        if budget is None or not held or plan.peak_bytes > budget or len(stages) > 1:
            return plan
        (tiled,) = stages
        # What is left of the budget keeps graphs of tiles; the first of them is the tile in work itself.
        left = budget - plan.peak_bytes
        graphs = min(left / (1 - _SLACK_FILLED), left + slack) // held
        retained = min(tiled.tiles, 1 + int(graphs))
        kept_graphs = (retained - 1) * held
        filled = min(slack, int(_SLACK_FILLED * kept_graphs))
        library = plan.library_bytes - filled
        return replace(plan, retained=retained, retained_bytes=kept_graphs, library_bytes=library)

    def _library(self, stages: list[TiledStage], tile_bytes: int) -> tuple[int, int]:
        """Bytes of compiled kernels, and of the heap's slack under a budget."""
        if self.image.device.type != "cpu" or not tile_bytes:
            return 0, 0
        compiled = 0
        for tiled in stages:
            outputs = [local.op.outputs[0] for local in tiled.stage.locals if local.op.name == "conv2d"]
            shapes = 1
            for axis in (tiled.rows, tiled.cols):
                blocks = ([axis.block(v, step) for v in outputs] for step in range(axis.steps))
                shapes *= len({tuple(hi - lo for lo, hi in block) for block in blocks})
            compiled += len(outputs) * shapes * (3 if self.training else 1)
        kernels = min(_MOST_KERNELS, compiled) * _KERNEL_BYTES
        weights = self.stage_bytes * (_WEIGHT_COPIES if self.training else 1)
        copies = min(weights, _MOST_WEIGHT_COPIES)  # in the layout of the kernels, and made for the gradients
        return kernels, int(_tight_share(stages) * self._activations(tile_bytes)) + copies

    def _activations(self, tile_bytes: int) -> int:
        return max(0, tile_bytes - (self.stage_bytes if self.training else 0))

    def _loosen(self, plan: Plan, stages: list[TiledStage]) -> Plan:
        """Let the heap take what it takes without a budget, or what the budget leaves it."""
        if not plan.library_bytes:
            return plan
        tiles = max(s.tiles for s in stages)
        loose = _LOOSE_SHARE_FEW_TILES if tiles - plan.retained <= _LOOSE_FEW_TILES else _LOOSE_SHARE
        more = max(0, int((loose - _tight_share(stages)) * self._activations(plan.tile_bytes)))
        if plan.budget is not None:
            more = max(0, min(more, plan.budget - plan.peak_bytes))
        return replace(plan, library_bytes=plan.library_bytes + more)


def _tight_share(stages: Sequence[TiledStage]) -> float:
    """The heap's slack under a budget, as a share of a tile's activations."""
    return _HEAP_SHARE_FEW_TILES if max(s.tiles for s in stages) <= _FEW_TILES else _HEAP_SHARE


def _away_bytes(network: StagedProgram, tiled: TiledStage) -> int:
    """A tile's part of the maps that its stage reads and writes elsewhere than on the device."""
    stage, stage_maps, values = tiled.stage, network.stage_maps(), network.program.values
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


def stage_sides(network: StagedProgram, tile: tuple[int, int]) -> list[tuple[int, int]]:
    """The tile of each stage, in pixels of its largest source, for a tile of the image.

    Deeper stages get tiles whose widest block holds about as many values as that of the first stage; strips of whole
    rows stay strips.
    """
    strips = tile[1] == network.maps.size(network.program.image)[1]

    def density(stage: Stage) -> float:
        height, width = stage.extent
        values = [*stage.sources, *(v for local in stage.locals for v in local.op.outputs)]
        return max(math.prod(stage.maps.shape(v)) for v in values) / (height * width)

    first, *others = network.stages
    sides = [tile]
    for stage in others:
        if stage.image in stage.sources:
            sides.append(tile)
            continue
        height, width = stage.extent
        factor = math.sqrt(density(first) / density(stage))
        across = width if strips else max(1, min(width, _round(tile[1] * factor)))
        down = tile[0] * tile[1] * factor**2 / across if strips else tile[0] * factor
        sides.append((max(1, min(height, _round(down))), across))
    return sides


def _round(side: float) -> int:
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


def arrange(
    program: Program,
    budget: int | None,
    tile: tuple[int, int] | None,
    training: bool,
    halos: str,
    image_grad: bool = False,
    count_tile: bool = True,
    fallback: str | None = None,
    compare: bool = False,
    shard: SpatialShard | None = None,
    agree: bool = False,
) -> tuple[StagedProgram, Plan]:
    """The steps of a program and the plan for them: the fastest choice of stored maps that fits the budget.

    Args as for `choose` and `sort`; `compare` lists in the plan the choices that are slower and need less, too.
    With `shard` they are those of one process's bands; `agree` takes a choice that fits in all processes, and is given
    by all of them at the same time.
    """
    maps, nodes = sort(program, fallback)
    tried: list[Choice] = []
    found: Plan | None = None
    options: list[tuple[StagedProgram, int]] = []
    peaks: Peaks = {}
    ready: set[int] = set()
    device = program.values[0].device
    for strategy in strategies(maps, nodes, training, image_grad):
        network, stored = strategy.network, strategy.stored_bytes
        if shard is not None:
            if network.place != "device":
                continue  # all processes would need the same disk
            network = split_network(network, shard)
            stored = stored_peak(network, training, network.wanted(image_grad))
        if network.place == "disk" and strategy.away_bytes > _free_disk():
            continue
        tried.append(Choice(strategy.name, strategy.cost, stored))
        options.append((network, strategy.away_bytes))

        def fit(number: int, coarse: bool) -> Plan | None:
            network, away = options[number]
            _prepare_once(network, ready, training, image_grad)
            plan = fitting(network, budget, tile, training, halos, image_grad, count_tile, peaks, coarse)
            if shard is not None and agree and not shard.all_agree(plan is not None, device):
                plan = None
            return plan and replace(plan, choice=number, maps=network.place, away_bytes=away)

        if len(options) == 1 and (plan := fit(0, coarse=True)) is not None:
            found = plan
        if found is not None and not compare:
            break
    if found is None:
        found = _first(partial(fit, coarse=True), 1, len(options))
    if found is None:  # small tiles, where nothing else helps
        found = _first(partial(fit, coarse=False), max(0, len(options) - _SMALL_TILES), len(options))
    if found is None and shard is not None and agree:
        raise BudgetError("the bands of some processes do not fit their budget; give a larger one")
    if found is None:
        frugal = sorted(range(len(options)), key=lambda number: tried[number].bytes)[:_SMALL_TILES]
        networks = [options[number][0] for number in frugal]
        for network in networks:
            _prepare_once(network, ready, training, image_grad)
        raise _too_little(networks, budget, tile, training, halos, image_grad)
    assert found is not None
    return options[found.choice][0], replace(found, choices=tuple(tried))


def _prepare_once(network: StagedProgram, ready: set[int], training: bool, image_grad: bool) -> None:
    """`prepare`, where that was not done yet; choices that differ in the place of maps alone share their steps."""
    if id(network.steps) not in ready:
        prepare(network, training, image_grad)
        ready.add(id(network.steps))


def _first(fit: Callable[[int], Plan | None], first: int, end: int) -> Plan | None:
    """The plan of the first choice that fits; each needs less than the one before it."""
    found: Plan | None = None
    while first < end:
        middle = (first + end) // 2
        plan = fit(middle)
        if plan is None:
            first = middle + 1
        else:
            found, end = plan, middle
    return found


def _free_disk() -> int:
    """Bytes that temporary files may take."""
    return shutil.disk_usage(tempfile.gettempdir()).free


_APART = (
    ", so that they cannot share the statistics of a BatchNorm; give images of one size, or "
    'accelerate(..., batch_norm="frozen")'
)


def arrange_together(
    programs: Sequence[Program],
    budget: int | None,
    tile: tuple[int, int] | None,
    training: bool,
    halos: str,
    image_grads: Sequence[bool],
    count_tile: bool = True,
    fallback: str | None = None,
) -> list[tuple[StagedProgram, Plan]]:
    """As `arrange`, for images of several sizes that go through the steps side by side: the fastest choice that fits.

    All have the same choice of stored maps. Those of all images are there at the same time, tiles one after the other.

    Raises:
        UnsupportedError: if the sizes lead the network through different steps, or it keeps something of each image.
    """
    arranged = [sort(program, fallback) for program in programs]
    for op in _writes_of_images(programs[0]):
        raise UnsupportedError(
            f"{trace.place(op.module, op.line)}: '{op.name}' writes what it has of an image to a buffer{_APART}"
        )
    largest = max(range(len(programs)), key=lambda n: math.prod(programs[n].values[programs[n].image].shape))
    every = [every_strategy(*pair, training, grad) for pair, grad in zip(arranged, image_grads, strict=True)]
    known: list[dict[str, Strategy]] = [{} for _ in every]
    made: list[tuple[list[StagedProgram], list[Plan]]] = []
    ready: set[int] = set()
    options = [s.name for s in strategies(*arranged[largest], training, image_grads[largest])]

    def fit(number: int) -> Plan | None:
        found = [_named(options[number], *pair) for pair in zip(every, known, strict=True)]
        networks = [one.network for one in found if one is not None]
        for network, grad in zip(networks, image_grads, strict=False):
            _prepare_once(network, ready, training, grad)
        if len(networks) < len(programs) or len({_steps(network) for network in networks}) > 1:
            raise UnsupportedError("images of these sizes go through the network by different steps" + _APART)
        stored = [one.stored_bytes for one in found if one is not None]
        plans = _choose_together(networks, stored, budget, tile, training, halos, image_grads, count_tile)
        if plans is not None:
            made.append((networks, plans))
        return None if plans is None else plans[0]

    if fit(0) is None and _first(fit, 1, len(options)) is None:
        limit = format_bytes(_limit(budget, programs[0].values[0].device))
        raise BudgetError(
            f"no tile fits: {len(programs)} images of several sizes share the statistics of a BatchNorm and are there "
            f"at the same time, the budget is {limit}; give a larger budget or fewer images"
        )
    return list(zip(*made[-1], strict=True))


def _writes_of_images(program: Program) -> Iterator[Op]:
    """The ops, but for norms, that make what a call leaves in buffers and attributes of what they have of the image."""
    seen = {program.image, *program.inputs, *program.vectors}
    makers: dict[int, Op] = {}
    for op in program.ops:
        if seen.intersection(op.inputs):
            # Running statistics are those of all images.
            made = op.outputs[:1] if op.name in ("batch_norm", "instance_norm") else op.outputs
            seen.update(made)
            makers.update(dict.fromkeys(made, op))
    left = set(program.results()) - set(refs(program.output))
    yield from (makers[v] for v in sorted(left & seen) if v in makers)


def _named(name: str, every: Iterator[Strategy], known: dict[str, Strategy]) -> Strategy | None:
    """The strategy of a name; those that come before it get `known` on the way."""
    for strategy in every if name not in known else ():
        known[strategy.name] = strategy
        if strategy.name == name:
            break
    return known.get(name)


def _steps(network: StagedProgram) -> str:
    """What two networks must have in common to be computed side by side."""
    marks = [(type(step).__name__, isinstance(step, VectorOp) and step.share is not None) for step in network.steps]
    return repr((marks, network.segments))


def _choose_together(
    networks: Sequence[StagedProgram],
    stored: Sequence[int],
    budget: int | None,
    tile: tuple[int, int] | None,
    training: bool,
    halos: str,
    image_grads: Sequence[bool],
    count_tile: bool,
) -> list[Plan] | None:
    """A plan for each image, in what the stored maps and halos of the others leave of the budget."""
    device = networks[0].program.values[0].device
    limit = _limit(budget, device)
    for place in _places(halos, device):
        resident, plans = list(stored), {}
        for n in sorted(range(len(networks)), key=lambda n: stored[n]):
            left = limit - (sum(resident) - resident[n])
            chosen = fitting(networks[n], left, tile, training, place, image_grads[n], count_tile)
            if chosen is None:
                break
            resident[n] = chosen.stored_bytes + (chosen.halo_bytes if place == "device" else 0)
            # What one image has captured would have to be let go for the next one.
            plans[n] = replace(chosen, budget=budget, replay_bytes=0, maps=networks[n].place)
        else:
            return [plans[n] for n in range(len(networks))]
    return None


def choose(
    network: StagedProgram,
    budget: int | None,
    tile: tuple[int, int] | None,
    training: bool,
    halos: str,
    image_grad: bool = False,
    count_tile: bool = True,
) -> Plan:
    """The plan for a network: the preferred tile if it fits the budget, else the largest that does.

    A budget is used to the full: tiles whose graph still fits are not recomputed in pass 2. Without a budget what is
    free is the limit, and nothing is retained.

    Args:
        count_tile: count a given tile's own bytes too; False saves the time where only the schedule matters.

    Raises:
        BudgetError: if no tile fits.
    """
    plan = fitting(network, budget, tile, training, halos, image_grad, count_tile)
    if plan is not None:
        return plan
    raise _too_little([network], budget, tile, training, halos, image_grad)


def _too_little(
    networks: Sequence[StagedProgram],
    budget: int | None,
    tile: tuple[int, int] | None,
    training: bool,
    halos: str,
    image_grad: bool,
) -> BudgetError:
    """The refusal of a budget, with the least that one of these choices of stored maps needs."""
    image = networks[0].program.image
    device, (height, width) = networks[0].program.values[image].device, networks[0].maps.size(image)
    place, least = _places(halos, device)[-1], None
    for network in networks:
        estimate = _Estimate(network, training, image_grad)
        for side in reversed(_sides(network, tile)):
            if least is None or estimate.plan(side, place, None, count_tile=False).peak_bytes < least.peak_bytes:
                found = estimate.plan(side, place, budget)
                least = found if least is None or found.peak_bytes < least.peak_bytes else least
    assert least is not None
    what = "no tile fits" if tile is None else f"a tile of {tile[0]} x {tile[1]} does not fit"
    return BudgetError(
        f"{what}: an image of {height} x {width} needs at least {format_bytes(least.peak_bytes)} "
        f"(tile {least.tile[0]} x {least.tile[1]}, halos {least.halos}), the budget is "
        f"{format_bytes(_limit(budget, device))}; give a larger budget or a smaller batch"
    )


def fitting(
    network: StagedProgram,
    budget: int | None,
    tile: tuple[int, int] | None,
    training: bool,
    halos: str,
    image_grad: bool = False,
    count_tile: bool = True,
    peaks: Peaks | None = None,
    coarse: bool | None = None,
) -> Plan | None:
    """As `choose`; None if no tile fits.

    Args:
        peaks: what was found for other choices of stored maps of this program.
        coarse: where there are several stages, try only the largest tiles (or only the others), for small ones cost
            more time than another choice of stored maps.
    """
    estimate = _Estimate(network, training, image_grad, peaks)
    device = estimate.image.device
    limit = _limit(budget, device)
    sides = _sides(network, tile)
    if len(network.stages) > 1 and len(sides) > _COARSE and coarse is not None:
        sides = sides[:_COARSE] if coarse else sides[_COARSE:]
    for place in _places(halos, device):
        for side in sides:
            plan = estimate.plan(side, place, budget, count_tile=False)
            if plan.peak_bytes <= limit and (count_tile or tile is None):
                plan = estimate.plan(side, place, budget, limit=limit)
            if plan.peak_bytes <= limit:
                return plan
    return None


def _limit(budget: int | None, device: torch.device) -> int:
    return int(_FREE_SHARE * available_bytes(device)) if budget is None else budget


def _places(halos: str, device: torch.device) -> list[str]:
    if halos != "auto":
        return [halos]
    return ["device", "disk"] if device.type == "cpu" else ["device", "host", "disk"]


def _sides(network: StagedProgram, tile: tuple[int, int] | None) -> list[tuple[int, int]]:
    """Tiles worth trying, largest first.

    Stages of a few layers gain less from large tiles than one of all layers. On the CPU they get strips of whole rows
    where these are not too low: a strip lies in one piece in a stored map.
    """
    if tile is not None:
        return [tile]
    height, width = network.maps.size(network.program.image)
    kind = network.program.values[network.program.image].device.type
    preferred = _PREFERRED.get(kind, 1024)
    stripes = len(network.stages) > 1 and kind == "cpu"
    if stripes:
        preferred = _PREFERRED_STRIP
    longest = max(height, width)
    sides = [side for side in _SIDES if side <= preferred and side < longest]
    if longest <= preferred:
        sides.insert(0, longest)
    tiles = [(min(side, height), min(side, width)) for side in sides]
    if stripes:
        tiles = [_strip(h * w, height, width) or (h, w) for h, w in tiles]
    return list(dict.fromkeys(tiles)) or [(height, width)]


def _strip(pixels: int, height: int, width: int) -> tuple[int, int] | None:
    """About so many pixels as a strip of whole rows, if it is not too low."""
    rows = pixels // width
    return (min(_round(rows), height), width) if rows >= _LEAST_ROWS else None


def plan(
    model: nn.Module,
    image_size: tuple[int, ...],
    budget: int | str | None = None,
    *,
    tile: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    training: bool = True,
    halos: str = "auto",
) -> Plan:
    """How a step on images of this size would be computed, and how much it takes; nothing is allocated or computed.

    Args:
        model: the network, in the mode it will run in (freeze BatchNorm before, or put it in evaluation mode).
        image_size: (H, W), (C, H, W) or (N, C, H, W); without them N is 1 and C what the first layer takes.
        budget: bytes (``"4GiB"``); None takes what is free.
        tile: side or (height, width); None chooses.
        dtype: dtype of the image; None takes that of the parameters.
        device: device the step would run on.
        training: with a backward, or inference.
        halos: "device", "host", "disk" or "auto".

    Raises:
        UnsupportedError: if the network cannot be computed exactly.
        BudgetError: if no tile fits the budget.
    """
    check_network(model)
    check_choice("halos", halos, HALO_PLACES)
    shape = _full_shape(model, image_size)
    network = model.__dict__.get("_network", model)
    if dtype is None:
        floating = [p.dtype for p in network.parameters() if p.is_floating_point()]
        dtype = floating[0] if floating else torch.float32
    assert dtype is not None
    device = torch.device(device)
    with torch.set_grad_enabled(training):
        program = capture(network, shape, dtype, device)
    side = tile_sides(tile)
    limit = None if budget is None else parse_bytes(budget)
    _, chosen = arrange(program, limit, side, training, halos, compare=True)
    held = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    stock = held + stock_peak(network, shape, dtype, device, training)
    return replace(chosen, stock_bytes=stock)


def _full_shape(model: nn.Module, given: Sequence[int]) -> tuple[int, int, int, int]:
    size = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if len(size) == 2:
        first = next((p for p in model.parameters() if p.dim() == 4), None)
        size = (3 if first is None else first.shape[1], *size)
    if len(size) == 3:
        size = (1, *size)
    if len(size) != 4 or not all(is_whole(side) and side >= 1 for side in size):
        raise GigamorphError(f"image_size={given!r} is not (H, W), (C, H, W) or (N, C, H, W)")
    return tuple(int(side) for side in size)  # pyright: ignore[reportReturnType]
