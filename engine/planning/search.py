"""Which choice of stored maps and which tile fit a budget: the fastest that does."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..capture import trace
from ..capture.trace import Op, Program, refs
from ..errors import BudgetError, UnsupportedError
from ..lowering.ops import VectorOp
from ..lowering.rewrites import prepare
from ..lowering.sorting import sort
from ..lowering.stages import StagedProgram
from ..tiling.memory import available_bytes, format_bytes
from ..tiling.spatial import SpatialShard
from ..tiling.spatial_program import split_network
from . import constants
from .estimate import Estimate, Known, rounded
from .plan import Choice, Plan
from .strategy import Strategy, every_strategy, stored_peak, strategies, value_bytes


@dataclass(frozen=True)
class Request:
    """What a step has to keep to.

    Attributes:
        budget: bytes; None for what is free.
        available: bytes that are free, of which a share is taken; None asks the device.
        tile: (height, width) of a tile of the image; None for the preferred one if it fits, else the largest that does.
        training: whether there is a backward.
        halos: where the halos may be kept between the passes: "device", "host", "disk" or "auto".
        image_grad: whether the image wants a gradient.
        count_tile: count a given tile's own bytes too; without that, time is saved where only the schedule matters.
        fallback: what happens to ops that cannot be computed by tiles, see `sort`.
    """

    budget: int | None
    tile: tuple[int, int] | None
    training: bool
    halos: str = "auto"
    image_grad: bool = False
    count_tile: bool = True
    fallback: str | None = None
    available: int | None = None

    def limit(self, device: torch.device) -> int:
        """Bytes that the step may take."""
        if self.budget is not None:
            return self.budget
        return int(constants.FREE_SHARE * (available_bytes(device) if self.available is None else self.available))

    def room(self, device: torch.device) -> int | None:
        """Bytes that graphs of tiles may fill: the budget, or without one what is free on a GPU that nothing shares.

        Not where a tile is given: small tiles are faster replayed than retained.
        """
        return self.limit(device) if self.budget is None and self.tile is None and device.type != "cpu" else self.budget

    def halo_places(self, device: torch.device) -> list[str]:
        """Where the halos may be kept, the fastest first."""
        if self.halos != "auto":
            return [self.halos]
        return ["device", "disk"] if device.type == "cpu" else ["device", "host", "disk"]


class _Options:
    """The choices of stored maps of one program, each with the plan that fits it.

    Args:
        request: what they have to keep to.
        device: where the step runs.
        shard: this process's part of the image, if it is split.
        agree: a choice has to fit in all processes, which are asked at the same time.
    """

    def __init__(self, request: Request, device: torch.device, shard: SpatialShard | None, agree: bool):
        self.request, self.device, self.shard, self.agree = request, device, shard, agree
        self.tried: list[Choice] = []
        self.options: list[tuple[StagedProgram, int]] = []  # with the bytes that it keeps elsewhere
        self._known = Known()
        self._ready: set[int] = set()

    def add(self, strategy: Strategy) -> bool:
        """Take a choice in, if it can be had at all."""
        staged, stored, request = strategy.staged, strategy.stored_bytes, self.request
        if self.shard is not None:
            if staged.place != "device":
                return False  # all processes would need the same disk
            staged = split_network(staged, self.shard)
            stored = stored_peak(staged, request.training, staged.wanted(request.image_grad))
        if staged.place == "disk" and strategy.away_bytes > _free_disk():
            return False
        self.tried.append(Choice(strategy.name, strategy.cost, stored))
        self.options.append((staged, strategy.away_bytes))
        return True

    def fit(self, number: int, coarse: bool) -> Plan | None:
        """The plan of a choice; None if nothing fits."""
        staged, away = self.options[number]
        _prepare_once(staged, self._ready, self.request)
        plan = fitting(staged, self.request, self._known, coarse, self._records())
        if self.shard is not None and self.agree and not self.shard.all_agree(plan is not None, self.device):
            plan = None
        return plan and replace(plan, choice=number, maps=staged.place, away_bytes=away)

    def _records(self) -> int:
        """Bytes of Python objects that recording and planning leave in the process, if that shares the budget."""
        values = len(self.options[0][0].program.values) if self.device.type == "cpu" else 0
        return values * (constants.VALUE_BYTES + constants.CHOICE_BYTES * len(self.options))

    def slower(self) -> Plan | None:
        """The plan of the fastest choice but the first that fits; with small tiles where nothing else helps."""
        count = len(self.options)
        found = _first(partial(self.fit, coarse=True), 1, count)
        return found or _first(partial(self.fit, coarse=False), max(0, count - constants.SMALL_TILES), count)

    def refusal(self) -> BudgetError:
        """That nothing fits, with the least that is needed."""
        if self.shard is not None and self.agree:
            return BudgetError("the shards of some processes do not fit their budget; give a larger one")
        frugal = sorted(range(len(self.options)), key=lambda number: self.tried[number].bytes)
        programs = [self.options[number][0] for number in frugal[: constants.SMALL_TILES]]
        for staged in programs:
            _prepare_once(staged, self._ready, self.request)
        return _too_little(programs, self.request, self._known, self._records())


def arrange(
    program: Program,
    request: Request,
    shard: SpatialShard | None = None,
    agree: bool = False,
) -> tuple[StagedProgram, Plan]:
    """The steps of a program and the plan for them: the fastest choice of stored maps that fits the budget.

    A budget is used to the full: tiles whose graph still fits are not recomputed in pass 2. Without one, what is free
    is the limit; it is used to the full on a GPU, and on the CPU for an image of one tile only.

    Args:
        shard: this process's part of the image, if that is split: the plan is that of this process.
        agree: take a choice that fits in all processes; given by all of them at the same time.

    Raises:
        BudgetError: if nothing fits.
    """
    _refuse_hopeless(program, request)
    maps, nodes = sort(program, request.fallback)
    options = _Options(request, program.values[0].device, shard, agree)
    found: Plan | None = None
    for strategy in strategies(maps, nodes, request.training, request.image_grad):
        if options.add(strategy) and len(options.options) == 1:
            found = options.fit(0, coarse=True)
        if found is not None:
            break
    found = found or options.slower()
    if found is None:
        raise options.refusal()
    return options.options[found.choice][0], replace(found, choices=tuple(options.tried))


def _refuse_hopeless(program: Program, request: Request) -> None:
    """Refuse at once what does not even hold the parameters, before all choices of stored maps are thought about."""
    device = program.values[program.image].device
    named = {v.name: v for v in program.values if v.name is not None}
    own = sum(value_bytes(value) * (1 + (request.training and value.trainable)) for value in named.values())
    if request.budget is not None and request.budget < own:
        what = "parameters and their gradients alone need" if request.training else "the parameters alone need"
        limit = format_bytes(request.limit(device))
        raise BudgetError(f"no tile fits: {what} {format_bytes(own)}, the budget is {limit}; give a larger budget")


def arrange_each(program: Program, request: Request, budgets: Sequence[int]) -> list[Plan | None]:
    """The plans that `arrange` would make for several budgets, in the time that one takes; None where nothing fits."""
    maps, nodes = sort(program, request.fallback)
    options = _Options(request, program.values[0].device, None, agree=False)
    for strategy in strategies(maps, nodes, request.training, request.image_grad):
        options.add(strategy)
    plans: list[Plan | None] = []
    for budget in budgets:
        options.request = replace(request, budget=budget)
        found = options.fit(0, coarse=True) or options.slower()
        plans.append(found and replace(found, choices=tuple(options.tried)))
    return plans


def _prepare_once(staged: StagedProgram, ready: set[int], request: Request) -> None:
    """`prepare`, where that was not done yet; choices that differ in the place of maps alone share their steps."""
    if id(staged.steps) not in ready:
        prepare(staged, request.training, request.image_grad)
        ready.add(id(staged.steps))


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
    programs: Sequence[Program], request: Request, image_grads: Sequence[bool]
) -> list[tuple[StagedProgram, Plan]]:
    """As `arrange`, for images of several sizes that go through the steps side by side: the fastest choice that fits.

    All have the same choice of stored maps. Those of all images are there at the same time, tiles one after the other.

    Raises:
        UnsupportedError: if the sizes lead the network through different steps, or it keeps something of each image.
    """
    arranged = [sort(program, request.fallback) for program in programs]
    for op in _writes_of_images(programs[0]):
        raise UnsupportedError(
            f"{trace.place(op.module, op.line)}: '{op.name}' writes what it has of an image to a buffer{_APART}"
        )
    largest = max(range(len(programs)), key=lambda n: math.prod(programs[n].values[programs[n].image].shape))
    every = [every_strategy(*pair, request.training, grad) for pair, grad in zip(arranged, image_grads, strict=True)]
    known: list[dict[str, Strategy]] = [{} for _ in every]
    made: list[tuple[list[StagedProgram], list[Plan]]] = []
    ready: set[int] = set()
    options = [s.name for s in strategies(*arranged[largest], request.training, image_grads[largest])]

    def fit(number: int) -> Plan | None:
        found = [_named(options[number], *pair) for pair in zip(every, known, strict=True)]
        staged_programs = [one.staged for one in found if one is not None]
        for staged, grad in zip(staged_programs, image_grads, strict=False):
            _prepare_once(staged, ready, replace(request, image_grad=grad))
        if len(staged_programs) < len(programs) or len({_steps(staged) for staged in staged_programs}) > 1:
            raise UnsupportedError("images of these sizes go through the network by different steps" + _APART)
        stored = [one.stored_bytes for one in found if one is not None]
        plans = _choose_together(staged_programs, stored, request, image_grads)
        if plans is not None:
            made.append((staged_programs, plans))
        return None if plans is None else plans[0]

    if fit(0) is None and _first(fit, 1, len(options)) is None:
        limit = format_bytes(request.limit(programs[0].values[0].device))
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


def _steps(staged: StagedProgram) -> str:
    """What two networks must have in common to be computed side by side."""
    marks = [(type(step).__name__, isinstance(step, VectorOp) and step.share is not None) for step in staged.steps]
    return repr((marks, staged.segments))


def _choose_together(
    staged_programs: Sequence[StagedProgram], stored: Sequence[int], request: Request, image_grads: Sequence[bool]
) -> list[Plan] | None:
    """A plan for each image, in what the stored maps and halos of the others leave of the budget."""
    device = staged_programs[0].program.values[0].device
    limit = request.limit(device)
    for place in request.halo_places(device):
        resident, plans = list(stored), {}
        for n in sorted(range(len(staged_programs)), key=lambda n: stored[n]):
            left = limit - (sum(resident) - resident[n])
            own = replace(request, budget=left, halos=place, image_grad=image_grads[n])
            chosen = fitting(staged_programs[n], own)
            if chosen is None:
                break
            resident[n] = chosen.stored_bytes + (chosen.halo_bytes if place == "device" else 0)
            plans[n] = replace(
                chosen,
                budget=request.budget,
                maps=staged_programs[n].place,
                replay_bytes=0,  # what one image has captured would have to be let go for the next one
                retained=0,  # the graphs of all images would be there at the same time
                retained_bytes=0,
                retained_tiles=(),
            )
        else:
            return [plans[n] for n in range(len(staged_programs))]
    return None


def _too_little(staged_programs: Sequence[StagedProgram], request: Request, known: Known, records: int) -> BudgetError:
    """The refusal of a budget, with the least that one of these choices of stored maps needs."""
    image, tile = staged_programs[0].program.image, request.tile
    device, (height, width) = staged_programs[0].program.values[image].device, staged_programs[0].maps.size(image)
    place, least = request.halo_places(device)[-1], None
    for staged in staged_programs:
        estimate = Estimate(staged, request.training, request.image_grad, known, records)
        sides = _sides(staged, tile)
        found = min((estimate.plan(side, place, None, count_tile=False) for side in sides), key=lambda p: p.peak_bytes)
        if least is None or found.peak_bytes < least.peak_bytes:
            made = [estimate.plan(side, place, request.budget, exact=False) for side in reversed(sides)]
            found = min(made, key=lambda plan: plan.peak_bytes)
            found = estimate.plan(found.tile, place, request.budget)
            least = found if least is None or found.peak_bytes < least.peak_bytes else least
    assert least is not None
    what = "no tile fits" if tile is None else f"a tile of {tile[0]} x {tile[1]} does not fit"
    return BudgetError(
        f"{what}: an image of {height} x {width} needs at least {format_bytes(least.peak_bytes)} "
        f"(tile {least.tile[0]} x {least.tile[1]}, halos {least.halos}), the budget is "
        f"{format_bytes(request.limit(device))}; give a larger budget or a smaller batch"
    )


def fitting(
    staged: StagedProgram,
    request: Request,
    known: Known | None = None,
    coarse: bool | None = None,
    records: int = 0,
) -> Plan | None:
    """The plan of a choice of stored maps; None if no tile fits.

    Args:
        known: what was found for other choices of this program.
        coarse: where there are several stages, try only the largest tiles (or only the others), for small ones cost
            more time than another choice of stored maps.
        records: bytes that recording and planning leave in the process.
    """
    device = staged.program.values[staged.program.image].device
    estimate = Estimate(staged, request.training, request.image_grad, known, records)
    limit = request.limit(device)
    sides = _sides(staged, request.tile)
    if len(staged.stages) > 1 and len(sides) > constants.COARSE and coarse is not None:
        sides = sides[: constants.COARSE] if coarse else sides[constants.COARSE :]
    for place in request.halo_places(device):
        for side in sides:
            plan = estimate.plan(side, place, request.budget, count_tile=False)
            if plan.peak_bytes <= limit and (request.count_tile or request.tile is None):
                room = request.room(device)
                plan = estimate.plan(side, place, request.budget, limit=limit, exact=False, room=room)
                if plan.peak_bytes <= constants.NEARLY * limit:
                    plan = estimate.plan(side, place, request.budget, limit=limit, room=room)
            if plan.peak_bytes <= limit:
                return plan
    return None


def _sides(staged: StagedProgram, tile: tuple[int, int] | None) -> list[tuple[int, int]]:
    """Tiles worth trying, largest first.

    Stages of a few layers gain less from large tiles than one of all layers. On the CPU they get strips of whole rows
    where these are not too low: a strip lies in one piece in a stored map.
    """
    if tile is not None:
        return [tile]
    height, width = staged.maps.size(staged.program.image)
    kind = staged.program.values[staged.program.image].device.type
    preferred = constants.PREFERRED.get(kind, 1024)
    stripes = len(staged.stages) > 1 and kind == "cpu"
    if stripes:
        preferred = constants.PREFERRED_STRIP
    longest = max(height, width)
    sides = [side for side in constants.SIDES if side <= preferred and side < longest]
    if longest <= preferred:
        sides.insert(0, longest)
    tiles = [(min(side, height), min(side, width)) for side in sides]
    if stripes:
        tiles = [_strip(h * w, height, width) or (h, w) for h, w in tiles]
    return list(dict.fromkeys(tiles)) or [(height, width)]


def _strip(pixels: int, height: int, width: int) -> tuple[int, int] | None:
    """About so many pixels as a strip of whole rows, if it is not too low."""
    rows = pixels // width
    return (min(rounded(rows), height), width) if rows >= constants.LEAST_ROWS else None
