"""Searches for the fastest choice of stored maps and tile size that fits a budget."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from ..capture.program import Program
from ..cuda_graphs import buffers
from ..errors import BudgetError
from ..lowering.folding import folded_ops
from ..lowering.nodes import sort
from ..lowering.ops.tiles import embed_tiles
from ..lowering.rewrites import prepare
from ..lowering.stages import StagedProgram
from ..tiling.memory import format_bytes, format_enough
from ..tiling.spatial import SpatialShard
from ..tiling.spatial_program import split_network
from . import constants
from .candidate_tiles import sides_worth_trying
from .estimate import Estimator
from .interstage import value_bytes
from .lifetimes import stored_peak
from .lower_bound import held_bytes, refuse_hopeless
from .plan import Choice, Plan
from .request import Request
from .simulate import stock_peak
from .strategy import Strategy, strategies
from .tile_peaks import Known


class PlanSearch:
    """The choices of stored maps of one program, made when needed, and the plans for any budgets.

    Args:
        program: the recorded program.
        request: the constraints of the step, except its budget.
        shard: this process's part of the image, if it is split; the plans are for this process.
        agree: whether a choice must fit in all processes, which then search together.
    """

    def __init__(self, program: Program, request: Request, shard: SpatialShard | None = None, agree: bool = False):
        self.request, self.shard, self.agree = request, shard, agree
        self.device = program.values[program.image].device
        self._maps, self._nodes = sort(program, request.fallback)
        self._later: Iterator[Strategy] | None = None
        self._known = Known()
        self._ready: set[int] = set()
        self._estimates: dict[int, Estimator] = {}  # by the identity of the staged program
        self._values = 0  # number of the program's values after rewriting the first choice
        self.tried: list[Choice] = []
        self.options: list[tuple[StagedProgram, Strategy]] = []

    def plan(self, budget: int | None) -> Plan:
        """The plan of the fastest choice that fits a budget.

        A budget is used fully: tiles whose graph still fits are not recomputed in pass 2. Without a budget, the free
        memory is the limit, and graphs are retained up to `Request.room`.

        Raises:
            BudgetError: if nothing fits.
        """
        request = self.request = replace(self.request, budget=budget)
        captures = self.device.type != "cpu" or buffers.executor(self.device) is not None
        # Predicting stock's peak takes time; in six networks it was 0.7 to 1.8 times all values.
        possible = self.shard is None and request.in_memory
        ample = budget is None or (possible and sum(map(value_bytes, self._maps.program.values)) <= 3 * budget)
        if request.training and request.tile is None and not captures and ample:
            with contextlib.suppress(RuntimeError):  # an op that needs values: no limit
                self.request = replace(request, stock=_in_process(self.stock_bytes))
        whole = self._may_be_untiled()
        if not whole:
            refuse_hopeless(self._maps, self._nodes, request, shared=self.shard is not None)
        self._later = self._later or iter(strategies(self._maps, self._nodes, request.training, request.image_grad))
        while not self.options and (strategy := next(self._later, None)):
            self.add(strategy)
        if self.options and whole:  # its tiles need not be counted
            staged, strategy = self.options[0]
            sides = sides_worth_trying(staged, None, request.training)
            plan = self._estimate(0).plan(sides[0], request.halo_places(self.device)[0], None, count_tile=False)
            peak = _in_process(self.folded_bytes or self.stock_bytes)
            return replace(plan, budget=budget, maps=staged.place, away_bytes=strategy.away_bytes, untiled_bytes=peak)
        found = self.fit(0, coarse=True) if self.options else None
        if found is None:
            for strategy in self._later:
                self.add(strategy)
            found = self.slower()
            if found is None:
                raise self.refusal()
            if found.op_by_op and found.choice + 1 < len(self.options):
                found = self.captured(found.choice + 1) or found
        return replace(found, choices=tuple(self.tried))

    def _may_be_untiled(self) -> bool:
        """Whether a step runs PyTorch's own ops on the whole image: on the CPU, with ample memory or budget.

        Tiles are NHWC. So they are faster than larger images in NCHW.
        """
        request, program = self.request, self._maps.program
        if request.stock is None or self.shard is not None or not request.in_memory:
            return False
        small = self.stock_bytes - held_bytes(self._maps, training=True) <= constants.WHOLE_BYTES
        largest = max((value_bytes(value) for value in program.values if value.name is not None), default=0)
        need = request.stock if request.budget is None else constants.ROOMY * request.stock + largest
        by_pixel = program.values[program.image].order == (0, 2, 3, 1)
        if need > (request.room(self.device) or 0) or not (small or by_pixel):
            return False
        special = any(op.group is not None or op.func is embed_tiles for op in program.ops)
        return not (special or program.assigned or program.stands_in)

    def plan_or_none(self, budget: int) -> Plan | None:
        """The plan for a budget; None if nothing fits."""
        with contextlib.suppress(BudgetError):
            return self.plan(budget)
        return None

    @cached_property
    def stock_bytes(self) -> int:
        """The tensors of the same step in stock PyTorch, with the parameters."""
        return self._stock_bytes(folds=False)

    @cached_property
    def folded_bytes(self) -> int | None:
        """The same with frozen norms folded into convolutions; None if there are none, and in inference."""
        folds = self.request.training and any(fold is not None for _, fold in folded_ops(self._maps.program))
        return self._stock_bytes(folds) if folds else None

    def _stock_bytes(self, folds: bool) -> int:
        return held_bytes(self._maps, training=False) + stock_peak(self._maps.program, self.request.training, folds)

    def add(self, strategy: Strategy, place: int | None = None) -> bool:
        """Add a choice, by default as the last one, if it is possible; returns whether it is."""
        staged, stored, request = strategy.staged, strategy.stored_bytes, self.request
        if self.shard is not None:
            if staged.place != "device":
                return False  # all processes would need the same disk
            staged = split_network(staged, self.shard)
            stored = stored_peak(staged, request.training, staged.wanted(request.image_grad))
        if staged.place == "disk" and strategy.away_bytes > shutil.disk_usage(tempfile.gettempdir()).free:
            return False
        place = len(self.options) if place is None else place
        self.tried.insert(place, Choice(strategy.name, strategy.cost, stored))
        self.options.insert(place, (staged, strategy))
        return True

    def fit(self, number: int, coarse: bool) -> Plan | None:
        """The plan of a choice; None if nothing fits."""
        staged, strategy = self.options[number]
        plan = fitting(self._estimate(number), self.request, coarse)
        if self.shard is not None and self.agree and not self.shard.all_agree(plan is not None, self.device):
            plan = None
        return plan and replace(plan, choice=number, maps=staged.place, away_bytes=strategy.away_bytes)

    def _estimate(self, number: int) -> Estimator:
        """The estimate of a choice, whose stages are prepared first."""
        staged, request = self.options[number][0], self.request
        if id(staged) not in self._estimates:
            prepare_once(staged, self._ready, request)
            self._values = self._values or len(staged.program.values)
            self._estimates[id(staged)] = Estimator(
                staged, request.training, request.image_grad, self._known, alone=self.shard is None
            )
        estimate = self._estimates[id(staged)]
        estimate.records = self._records()
        return estimate

    def _records(self) -> int:
        """Bytes of Python objects of recording and planning; 0 on a GPU, where they do not count."""
        if self.device.type != "cpu":
            return 0
        return self._values * (constants.VALUE_BYTES + constants.CHOICE_BYTES * len(self.options))

    def slower(self) -> Plan | None:
        """The plan of the fastest later choice that fits; small tiles are the last resort."""
        count = self._useful()
        found = self._fastest(lambda number: self.fit(number, coarse=True), 1, count)
        small = max(0, count - constants.SMALL_TILES)
        return found or self._fastest(lambda number: self.fit(number, coarse=False), small, count)

    def captured(self, first: int) -> Plan | None:
        """The plan of the fastest choice, from `first` on, whose step a GPU captures as a whole within the budget.

        Its recomputation costs less than launching each op of each tile from the host.
        """

        def fit(number: int) -> Plan | None:
            plan = self.fit(number, coarse=True)
            return plan if plan is not None and plan.capture_bytes else None

        return first_that_fits(fit, first, self._useful())

    def _first_possible(self, first: int, end: int) -> int:
        """The first choice whose memory without any tile is within the limit, by bisection."""
        limit, counted = self.request.limit(self.device), self.request.count_tile or self.request.tile is None
        return first + bisect_left(range(first, end), True, key=lambda n: self._estimate(n).floor(counted) <= limit)

    def _fastest(self, fit: Callable[[int], Plan | None], first: int, end: int) -> Plan | None:
        """The plan of the first choice that fits, also among those between it and the one before.

        The first ones that might fit are tried in order: if their tiles differ, not every later one needs less.
        """
        start = first if self.shard is not None else self._first_possible(first, end)
        later = min(start + constants.IN_ORDER, end)
        found = next((plan for n in range(start, later) if (plan := fit(n))), None) or first_that_fits(fit, later, end)
        if found is None or found.choice <= first:
            return found
        place = number = found.choice
        for strategy in self.options[number][1].before():
            place += self.add(strategy, place)
        return first_that_fits(fit, number, place) or replace(found, choice=place)

    def _useful(self) -> int:
        """The number of choices without the last ones, if these store less but need more memory than earlier ones.

        Stages that each start at the image fold weights separately. If the image is split, all choices are tried,
        because its processes exchange results for each.
        """
        count = len(self.options)
        if self.shard is None:
            while count > 1 and self._estimate(count - 1).floor() >= self._estimate(count - 2).floor():
                count -= 1
        return count

    def refusal(self) -> BudgetError:
        """The error if nothing fits, with the minimum number of bytes."""
        if self.shard is not None and self.agree:
            return self._shared_refusal(self.shard)
        frugal = range(self._useful())[-constants.SMALL_TILES :]  # each later one needs less
        return _too_little([self._estimate(number) for number in frugal], self.request)

    def _shared_refusal(self, shard: SpatialShard) -> BudgetError:
        """Like `refusal`, for the process that needs the most; all processes must call it."""
        last = range(len(self.options))[-constants.SMALL_TILES :]
        needed = [_least([self._estimate(number)], self.request).peak_bytes for number in last]
        least = int(shard.gather(torch.tensor(needed, device=self.device)).amax(0).min())
        height, width = self.options[0][0].maps.size(self.options[0][0].program.image)
        return BudgetError(
            f"no tile fits in all {shard.count} processes that share an image of {height} x {width}: one of them needs "
            f"at least {format_enough(least)}, the budget of this one is "
            f"{format_bytes(self.request.limit(self.device))}; give each a larger budget, or a smaller batch",
            least,
        )


def _in_process(stock_bytes: int) -> int:
    """The peak of a process for the tensors of a step on the whole image."""
    return int(constants.STOCK_SHARE * stock_bytes) + constants.STOCK_BYTES


def arrange(
    program: Program, request: Request, shard: SpatialShard | None = None, agree: bool = False
) -> tuple[StagedProgram, Plan]:
    """The staged program and its plan; see `PlanSearch`."""
    search = PlanSearch(program, request, shard, agree)
    plan = search.plan(request.budget)
    return search.options[plan.choice][0], plan


def prepare_once(staged: StagedProgram, ready: set[int], request: Request) -> None:
    """Call `prepare` once; choices that differ only in the storage of maps share their steps."""
    if id(staged.steps) not in ready:
        prepare(staged, request.training, request.image_grad)
        ready.add(id(staged.steps))


def first_that_fits(fit: Callable[[int], Plan | None], first: int, end: int) -> Plan | None:
    """The plan of the first choice that fits, by bisection; each choice needs less memory than the one before."""
    found: Plan | None = None
    while first < end:
        middle = (first + end) // 2
        plan = fit(middle)
        if plan is None:
            first = middle + 1
        else:
            found, end = plan, middle
    return found


def _too_little(estimates: Sequence[Estimator], request: Request) -> BudgetError:
    """The error for a budget that is too small, with the minimum over these choices of stored maps."""
    staged, least = estimates[0].staged, _least(estimates, request)
    image, tile = staged.program.image, request.tile
    height, width = staged.maps.size(image)
    what = "no tile fits" if tile is None else f"a tile of {tile[0]} x {tile[1]} does not fit"
    return BudgetError(
        f"{what}: an image of {height} x {width} needs at least {format_enough(least.peak_bytes)} "
        f"(tile {least.tile[0]} x {least.tile[1]}, halos {least.halos}), the budget is "
        f"{format_bytes(request.limit(staged.program.values[image].device))}; give a larger budget or a smaller batch",
        least.peak_bytes,
    )


def _least(estimates: Sequence[Estimator], request: Request) -> Plan:
    """The plan with the smallest peak among these choices of stored maps."""
    place, least = request.halo_places(estimates[0].image.device)[-1], None
    for estimate in estimates:
        sides = sides_worth_trying(estimate.staged, request.tile, request.training)
        if least is not None and estimate.floor() >= least.peak_bytes:
            continue
        found = min((estimate.plan(side, place, None, count_tile=False) for side in sides), key=lambda p: p.peak_bytes)
        if least is None or found.peak_bytes < least.peak_bytes:
            made = [estimate.plan(side, place, request.budget, exact=False) for side in reversed(sides)]
            made.sort(key=lambda plan: plan.peak_bytes)
            # Scaled estimates depend on the tiles simulated before, so the smallest ones are simulated themselves.
            exact = [estimate.plan(one.tile, place, request.budget) for one in made[: constants.LEAST_SIDES]]
            found = min(exact, key=lambda plan: plan.peak_bytes)
            least = found if least is None or found.peak_bytes < least.peak_bytes else least
    assert least is not None
    return least


def fitting(estimate: Estimator, request: Request, coarse: bool | None = None) -> Plan | None:
    """The plan of a choice of stored maps; None if no tile fits.

    Args:
        coarse: if there are other choices, whether to try only the largest tiles (True) or only the others (False);
            small tiles are slower than another choice of stored maps. None tries all.
    """
    staged, device = estimate.staged, estimate.image.device
    limit, counted = request.limit(device), request.count_tile or request.tile is None
    if estimate.floor(counted) > limit:
        return None
    sides = sides_worth_trying(staged, request.tile, request.training)
    packed = any(stage.packings for stage in staged.stages)
    others = len(staged.stages) > 1 or (device.type == "cpu" if request.training else packed)
    if others and len(sides) > constants.COARSE and coarse is not None:
        sides = sides[: constants.COARSE] if coarse else sides[constants.COARSE :]
    for place in request.halo_places(device):
        found, after = None, 0
        for side in sides:
            plan = estimate.plan(side, place, request.budget, count_tile=False)
            if plan.peak_bytes <= limit and counted:
                room = request.room(device)
                plan = estimate.plan(side, place, request.budget, limit=limit, exact=False, room=room)
                if plan.peak_bytes <= constants.NEARLY * limit:
                    plan = estimate.plan(side, place, request.budget, limit=limit, room=room)
            if plan.peak_bytes <= limit and not plan.op_by_op:
                return plan  # on a GPU smaller captured tiles are faster than running op by op
            after += found is not None
            found = found or (plan if plan.peak_bytes <= limit else None)
            if after == constants.CAPTURED_SIDES:
                break
        if found is not None:
            return found
    return None
