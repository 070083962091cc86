"""The numeric check of a morph: parent and child against each other, with the parent's own rounding as the measure.

Both networks are run on the same random inputs in float64 and float32, in eval mode and in train mode (live batch
statistics, dropout off), and then in float64 in eval mode on a second size, or again on the same inputs where that runs
other ops; this shows the running statistics that the train step left. They are run as views that share the parameters
and cast them one at a time, so that no copy of a network is made for it.
The float32 difference of a correct morph is as large as the parent's own rounding noise, its distance to itself in
float64, because only the order of the sums is new; no morph may promise bit equality.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import MorphError
from .example import Example, Inputs, as_inputs
from .network_runs import NetworkRuns, distance
from .other_sizes import Others, other_inputs
from .report import FLOAT64_ROUNDOFF, Certificate, Difference, Report, worst
from .step import Step
from .tensors import named_tensors

FLOAT64_LIMIT = 1e-10  # relative; correct morphs stay below 1e-12
NOISE_RATIO = 8.0  # float32: times the parent's own rounding noise
HALF_LIMIT = NOISE_RATIO * 4 * 2.0**-8  # in half precision, as coarse as bfloat16
NOISE_FLOOR = 4 * 2.0**-24  # four unit roundoffs of float32; no network's noise counts as less


class OtherFunction(MorphError):
    """The child computes something else than its parent."""


def compare(
    parent: nn.Module,
    child: nn.Module,
    example: Example,
    child_example: Example | None = None,
    *,
    outputs: Callable[[Any], Any] | None = None,
    seed: int = 0,
    train: bool = True,
) -> Difference:
    """Differences of two networks in float64 and float32, in eval and train mode; both stay untouched.

    Train mode is not compared where the parent cannot be run in it on the example (if it wants targets then).

    Args:
        parent: the network before.
        child: the network after.
        example: the parent's inputs, see `as_inputs`. Floating-point tensors are replaced by random ones of that shape
            and device, in train mode with a batch of up to 4 if statistics are taken of few values; by the example's
            own values if the parent fails on random ones or returns nan or inf.
        child_example: the child's inputs where they differ from the parent's (another size or channels); then both
            are taken as they are, and a network with BatchNorm needs a batch of at least 2.
        outputs: makes of the child's result what shall equal the parent's result; default: the result.
        seed: of the random inputs.
        train: whether to compare train mode.

    Raises:
        MorphError: the results have other structures or shapes, or a network cannot be run.
    """
    return _check(parent, child, example, child_example, outputs, seed, train).difference


def require_equal(
    parent: nn.Module,
    child: nn.Module,
    example: Example,
    child_example: Example | None = None,
    *,
    outputs: Callable[[Any], Any] | None = None,
    seed: int = 0,
    train: bool = True,
) -> Difference:
    """`compare`, and a MorphError if float64 differs by more than 1e-10 or float32 by more than 8 times the noise.

    `train=False` requires it of eval mode only, for morphs that are exact there alone.
    """
    return _require(compare(parent, child, example, child_example, outputs=outputs, seed=seed), train)


def verified_report(
    step: Step,
    parent: nn.Module,
    child: nn.Module,
    example: Example,
    child_example: Example | None = None,
    *,
    changes: list[str] | None = None,
    certificate: Certificate | None = None,
    outputs: Callable[[Any], Any] | None = None,
    seed: int = 0,
    train: bool = True,
    compare_train: bool = True,
    others: Others | None = None,
) -> Report:
    """The report of a morph, after `require_equal`; `compare_train=False` runs no train mode at all.

    Eval mode is compared on the `others` too, by default those that parent and child give: a second size, and one for
    each way that a forward takes by size.
    """
    if certificate is not None and certificate.violations:
        _refuse_not_finite(parent)
        raise MorphError(f"{step.op}: {certificate}; the original is unchanged, report this")
    if others is None and child_example is None:
        others = other_inputs(parent, as_inputs(example)) | other_inputs(child, as_inputs(example))
    found = _check(parent, child, example, child_example, outputs, seed, compare_train, others)
    if math.isnan(found.difference.float64):
        _refuse_not_finite(parent)
    _require(found.difference, train)
    parameters = (count_parameters(parent), count_parameters(child))
    lines = [*(changes or []), *([f"train mode was not compared: {found.untrained}"] if found.untrained else [])]
    return Report(step, found.difference, parameters, found.flops, lines, certificate, found.sizes)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


@dataclass
class _Found:
    """What a comparison found: `flops` of parent and child, why train mode was not compared, and which other inputs
    were.
    """

    difference: Difference
    flops: tuple[int, int]
    untrained: str
    sizes: tuple[str, ...]


def _check(
    parent: nn.Module,
    child: nn.Module,
    example: Example,
    child_example: Example | None,
    outputs: Callable[[Any], Any] | None,
    seed: int,
    train: bool,
    others: Others | None = None,
) -> _Found:
    theirs = None if child_example is None else as_inputs(child_example)
    pair = _Pair(parent, child, as_inputs(example), theirs, outputs, seed, train)
    own, other = pair.run()
    if other.untrained:
        raise MorphError(f"{other.untrained}; the parent can, on the same batch")
    if own.shapes != other.shapes:
        raise MorphError(f"the child returns {other.shapes}, the parent {own.shapes}; the original is unchanged")
    found: dict[str, float | None] = dict.fromkeys(("float64_train", "float32_train", "noise_train"))
    for mode in ("eval", "train") if train and not own.untrained else ("eval",):
        for dtype in ("float64", "float32"):
            found[f"{dtype}_{mode}"] = distance(own.runs[f"{dtype} {mode}"], other.runs[f"{dtype} {mode}"])
        noise = distance(own.runs[f"float64 {mode}"], own.runs[f"float32 {mode}"])
        found[f"noise_{mode}"] = max(noise, NOISE_FLOOR) if math.isfinite(noise) else noise
    difference = Difference(**found)  # pyright: ignore[reportArgumentType]
    left = pair.stateful and difference.float64_train is not None  # statistics by the train step
    sizes: list[str] = []
    try:
        if others and difference.float64 <= FLOAT64_LIMIT:
            sizes = _compare_others(own, other, [(x, torch.float64) for x in others.all], seed)
            read = others.alike and others.second and _described(others.second, torch.float64) in sizes
            left = left and not read
            sizes += _compare_others(own, other, [(others.example, dtype) for dtype in others.halves], seed)
    except OtherFunction:
        if not (left and distance(own.after(), other.after()) > FLOAT64_LIMIT):
            raise
    if left:
        off = worst(distance(own.after(), other.after()), difference.float64_train)
        difference = replace(difference, float64_train=off)
    return _Found(difference, (own.flops, other.flops), own.untrained, tuple(sizes))


def _compare_others(
    own: NetworkRuns, other: NetworkRuns, cases: list[tuple[Inputs, torch.dtype]], seed: int
) -> list[str]:
    """Compare eval mode on other inputs; what was compared.

    Raises:
        MorphError: the child's function differs on one, or it cannot be run on what the parent takes.
    """
    compared = []
    for inputs, dtype in cases:
        drawn, where = inputs.random(seed), _described(inputs, dtype)
        try:
            want = own.again(drawn, dtype)
        except MorphError:
            continue  # the parent takes no such input
        try:
            have = other.again(drawn, dtype)
        except MorphError as error:
            raise OtherFunction(f"on {where} {error}; the parent can, the original is unchanged") from error
        if [t.shape for t in want] != [t.shape for t in have]:
            raise OtherFunction(f"on {where} the child's results have other shapes; the original is unchanged")
        off = distance(want, have)
        if off <= FLOAT64_LIMIT or math.isnan(off):
            compared += [] if math.isnan(off) else [where]
            continue
        limit = HALF_LIMIT
        if dtype == torch.float64:
            noise = max(distance(want, own.again(drawn, torch.float32)), NOISE_FLOOR)
            limit = NOISE_RATIO * noise * FLOAT64_ROUNDOFF
        if not off <= limit:
            raise OtherFunction(
                f"on {where} the child's function differs from its parent's by {off:.1e}, though not on the example: "
                "the forward goes by the size of its input there; the original is unchanged"
            )
        compared.append(where)
    return compared


def _described(inputs: Inputs, dtype: torch.dtype) -> str:
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in inputs.shapes)
    return shapes if dtype == torch.float64 else f"{shapes} in {str(dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class _Pair:
    """A parent and its child, and on what they are run; without inputs of the child's own both take the parent's."""

    parent: nn.Module
    child: nn.Module
    given: Inputs
    theirs: Inputs | None
    outputs: Callable[[Any], Any] | None
    seed: int
    train: bool

    @property
    def stateful(self) -> bool:
        return any(True for net in (self.parent, self.child) for _ in net.buffers())

    def run(self) -> tuple[NetworkRuns, NetworkRuns]:
        """Runs of parent and child."""
        given = self.given
        if self.theirs is not None:
            own = NetworkRuns(self.parent, "the parent", None)
            own.run(given, given if self.train else None)
        else:
            own, given = self._run_parent()
        other = NetworkRuns(self.child, "the child", self.outputs)
        trained_on = None if own.untrained or not self.train else self.theirs or own.trained_on
        other.run(self.theirs or given, trained_on)
        return own, other

    def _run_parent(self) -> tuple[NetworkRuns, Inputs]:
        """Its runs on random numbers, or where these are nothing that it takes, on the example's own; and those."""
        refused: MorphError | None = None
        tried: list[tuple[NetworkRuns, Inputs]] = []
        for draw in (self.given.random, self.given.own):
            network, inputs = NetworkRuns(self.parent, "the parent", None), draw(self.seed)
            try:
                network.run(inputs, draw if self.train else None, self.seed)
            except MorphError as error:
                refused = refused or error
                continue
            tried.append((network, inputs))
            if network.finite():
                return tried[-1]
        if not tried:
            assert refused is not None
            raise refused
        return tried[0]


def _refuse_not_finite(parent: nn.Module) -> None:
    """Say which weights are no numbers, where that is why a check failed."""
    for name, tensor in named_tensors(parent).items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise MorphError(f"'{name}' of the network holds NaN or infinite numbers, so that nothing can be told")


def _require(difference: Difference, train: bool = True) -> Difference:
    d = difference if train else difference.in_eval()
    if math.isnan(d.float64):
        raise MorphError(
            "nothing can be told: the networks return nan or inf, on random inputs and on the example's own values; "
            "give an example of values that they take; the original is unchanged"
        )
    if not d.float64 <= FLOAT64_LIMIT:
        if d.float64_ratio <= NOISE_RATIO:
            raise MorphError(
                f"the parent magnifies rounding so much on this example that nothing can be told: float64 differs by "
                f"{d.float64:.1e} (limit {FLOAT64_LIMIT:.0e}), which is its own noise; give a larger image or batch; "
                "the original is unchanged"
            )
        raise OtherFunction(
            f"the child's function differs from its parent's by {d.float64:.1e} in float64 "
            f"(limit {FLOAT64_LIMIT:.0e}); the original is unchanged, report this"
        )
    if not d.noise_ratio <= NOISE_RATIO:
        raise MorphError(
            f"the child differs from its parent by {d.float32:.1e} in float32, {d.noise_ratio:.1f} "
            f"times the parent's own rounding noise (limit {NOISE_RATIO:.0f}); the original is unchanged"
        )
    return difference
