"""Plans for images of several sizes that run the steps together, with one choice of stored maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..capture import program as trace
from ..capture.program import Op, Program
from ..errors import BudgetError, UnsupportedError
from ..lowering.nodes import sort
from ..lowering.ops import VectorOp
from ..lowering.stages import StagedProgram
from ..tiling.memory import format_bytes
from .estimate import Estimator
from .plan import Plan
from .request import Request
from .search import first_that_fits, fitting, prepare_once
from .strategy import Strategy, every_strategy, strategies

_APART = (
    ", so that they cannot share the statistics of a BatchNorm; give images of one size, or "
    'accelerate(..., batch_norm="frozen")'
)


def arrange_together(
    programs: Sequence[Program], request: Request, image_grads: Sequence[bool]
) -> list[tuple[StagedProgram, Plan]]:
    """Like `arrange`, for images of several sizes that run the steps together: the fastest choice that fits.

    All sizes have the same choice of stored maps. The stored maps of all images are resident at the same time; tiles
    are computed one after the other.

    Raises:
        UnsupportedError: if the network runs different steps for the sizes, or writes to a buffer per image.
        BudgetError: if no choice fits the budget.
    """
    arranged = [sort(program, request.fallback) for program in programs]
    for op in _writes_of_images(programs[0]):
        raise UnsupportedError(
            f"{trace.location(op.module, op.line)}: '{op.name}' writes a value of each image to a buffer{_APART}"
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
            prepare_once(staged, ready, replace(request, image_grad=grad))
        if len(staged_programs) < len(programs) or len({_steps(staged) for staged in staged_programs}) > 1:
            raise UnsupportedError("the network runs different steps for images of these sizes" + _APART)
        stored = [one.stored_bytes for one in found if one is not None]
        plans = _choose_together(staged_programs, stored, request, image_grads)
        if plans is not None:
            made.append((staged_programs, plans))
        return None if plans is None else plans[0]

    if fit(0) is None and first_that_fits(fit, 1, len(options)) is None:
        limit = format_bytes(request.limit(programs[0].values[0].device))
        raise BudgetError(
            f"no tile fits: {len(programs)} images of several sizes share the statistics of a BatchNorm and must be in "
            f"memory together, the budget is {limit}; give a larger budget or fewer images"
        )
    return list(zip(*made[-1], strict=True))


def _writes_of_images(program: Program) -> Iterator[Op]:
    """The ops, except norms, whose results depend on the image and are written to buffers or attributes."""
    seen = {program.image, *program.inputs, *program.vectors}
    makers: dict[int, Op] = {}
    for op in program.ops:
        if seen.intersection(op.inputs):
            # Running statistics are computed from all images.
            made = op.outputs[:1] if op.name in ("batch_norm", "instance_norm") else op.outputs
            seen.update(made)
            makers.update(dict.fromkeys(made, op))
    left = set(program.results()) - set(program.handed_out())
    yield from (makers[v] for v in sorted(left & seen) if v in makers)


def _named(name: str, every: Iterator[Strategy], known: dict[str, Strategy]) -> Strategy | None:
    """The strategy with this name; `known` caches the strategies that come before it."""
    for strategy in every if name not in known else ():
        known[strategy.name] = strategy
        if strategy.name == name:
            break
    return known.get(name)


def _steps(staged: StagedProgram) -> str:
    """A description of the steps, which must be equal for networks that run together."""
    marks = [(type(step).__name__, isinstance(step, VectorOp) and step.share is not None) for step in staged.steps]
    return repr((marks, staged.segments))


def _choose_together(
    staged_programs: Sequence[StagedProgram], stored: Sequence[int], request: Request, image_grads: Sequence[bool]
) -> list[Plan] | None:
    """A plan for each image, in the part of the budget that the stored maps and halos of the others leave."""
    device = staged_programs[0].program.values[0].device
    limit = request.limit(device)
    for place in request.halo_places(device):
        resident, plans = list(stored), {}
        for n in sorted(range(len(staged_programs)), key=lambda n: stored[n]):
            left = limit - (sum(resident) - resident[n])
            own = replace(request, budget=left, halos=place, image_grad=image_grads[n])
            chosen = fitting(Estimator(staged_programs[n], request.training, image_grads[n]), own)
            if chosen is None:
                break
            resident[n] = chosen.stored_bytes + (chosen.halo_bytes if place == "device" else 0)
            plans[n] = replace(
                chosen,
                budget=request.budget,
                maps=staged_programs[n].place,
                replay_bytes=0,  # graphs of one image would have to be freed for the next
                capture_bytes=0,
                retained=0,  # the graphs of all images would be resident together
                retained_bytes=0,
                at_peak=None,
                retained_tiles=(),
            )
        else:
            return [plans[n] for n in range(len(staged_programs))]
    return None
