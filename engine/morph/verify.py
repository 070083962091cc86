"""Numeric check of a morph: compare parent and child, relative to the parent's own rounding noise.

Both networks run on the same random inputs in float64 and float32, in eval mode and in train mode (batch statistics,
dropout off). Then they run in float64 in eval mode on a second size, or on the same inputs if the second size runs
other ops. This last run shows the running statistics after the train step. The networks run as views that share the
parameters and cast them one at a time, so the check makes no copy of a network.
The float32 difference of a correct morph is about the parent's rounding noise, its own distance between float32 and
float64, because only the order of the sums changes. No morph may promise bit equality.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from ..errors import MorphError
from .copying import named_tensors
from .example import Example, Inputs, as_inputs
from .other_sizes import Others, other_inputs
from .running import NetworkRuns, distance
from .step import FLOAT64_ROUNDOFF, Certificate, Difference, Report, Step, worst

FLOAT64_LIMIT = 1e-10  # relative; correct morphs stay below 1e-12
NOISE_RATIO = 8.0  # limit of the float32 difference over the parent's own rounding noise
HALF_LIMIT = NOISE_RATIO * 4 * 2.0**-8  # limit in half precision, for the roundoff of bfloat16
NOISE_FLOOR = 4 * 2.0**-24  # minimum noise of any network: four unit roundoffs of float32


class OtherFunction(MorphError):
    """Error: the child computes another function than its parent."""


class OtherShapes(MorphError):
    """Error: the child returns other shapes than its parent."""


def compare(parent: nn.Module, child: nn.Module, example: Example) -> Difference:
    """Compare two networks in float64 and float32, in eval and train mode; neither is changed.

    Train mode is not compared if the parent cannot run in train mode on the example, e.g. because it needs targets.

    Args:
        parent: the network before the morph.
        child: the network after the morph.
        example: the inputs, see `as_inputs`. Random tensors of the same shape and device replace floating-point ones,
            in train mode with a batch of up to 4 if statistics have few values. If the parent fails on random values or
            returns nan or inf, the example's own values are used.

    Raises:
        MorphError: the results have different structures or shapes, or a network cannot be run.
    """
    return _check(parent, child, example)[0]


def require_equal(parent: nn.Module, child: nn.Module, example: Example) -> Difference:
    """Compare two networks; raise MorphError if float64 differs by over 1e-10 or float32 by over 8 times the noise."""
    return _require(compare(parent, child, example))


def verified_report(
    step: Step,
    parent: nn.Module,
    child: nn.Module,
    example: Example,
    *,
    changes: list[str] | None = None,
    certificate: Certificate | None = None,
    seed: int = 0,
    train: bool = True,
    compare_train: bool = True,
    others: Others | None = None,
) -> Report:
    """Check a morph like `require_equal`, and return its report.

    `compare_train=False` skips train mode; `train=False` compares it, but sets no limit to the difference.

    Eval mode is also compared on `others`. By default these are the inputs that parent and child determine: a second
    size, and one input for each branch of a forward by size.
    """
    if certificate is not None and certificate.violations:
        _refuse_not_finite(parent)
        raise MorphError(f"{step.op}: {certificate}; the original is unchanged, report this")
    if others is None:
        others = other_inputs(parent, as_inputs(example)) | other_inputs(child, as_inputs(example))
    difference, own, other, sizes = _check(parent, child, example, seed, compare_train, others)
    if math.isnan(difference.float64):
        _refuse_not_finite(parent)
    _require(difference, train)
    parameters = (count_parameters(parent), count_parameters(child))
    lines = [*(changes or []), *([f"train mode was not compared: {own.untrained}"] if own.untrained else [])]
    return Report(step, difference, parameters, (own.flops, other.flops), lines, certificate, sizes)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def _check(
    parent: nn.Module,
    child: nn.Module,
    example: Example,
    seed: int = 0,
    train: bool = True,
    others: Others | None = None,
) -> tuple[Difference, NetworkRuns, NetworkRuns, tuple[str, ...]]:
    """Return the difference, the runs of parent and child, and descriptions of the other inputs."""
    own = _run_parent(parent, as_inputs(example), seed, train)
    other = NetworkRuns(child, "the child")
    other.run(own.inputs, own.trained_on)
    if other.untrained:
        raise MorphError(f"{other.untrained}, but the parent can on the same batch; the original is unchanged")
    if own.shapes != other.shapes:
        raise OtherShapes(f"the child returns {other.shapes}, the parent {own.shapes}; the original is unchanged")
    found: dict[str, float | None] = dict.fromkeys(("float64_train", "float32_train", "noise_train"))
    for mode in ("eval", "train") if train and not own.untrained else ("eval",):
        for dtype in ("float64", "float32"):
            found[f"{dtype}_{mode}"] = distance(own.runs[f"{dtype} {mode}"], other.runs[f"{dtype} {mode}"])
        noise = distance(own.runs[f"float64 {mode}"], own.runs[f"float32 {mode}"])
        found[f"noise_{mode}"] = max(noise, NOISE_FLOOR) if math.isfinite(noise) else noise
    difference = Difference(**found)  # pyright: ignore[reportArgumentType]
    stateful = any(True for net in (parent, child) for _ in net.buffers())
    left = stateful and difference.float64_train is not None  # running statistics still to be compared
    sizes: list[str] = []
    try:
        if others and difference.float64 <= FLOAT64_LIMIT:
            sizes = _compare_others(own, other, [(x, torch.float64) for x in others.all], seed)
            read = others.alike and others.second and _described(others.second, torch.float64) in sizes
            left = left and not read
            sizes += _compare_others(own, other, [(others.example, dtype) for dtype in others.halves], seed)
    except OtherFunction:
        if not (left and _distance_after_training(own, other) > FLOAT64_LIMIT):
            raise
    if left:
        off = worst(_distance_after_training(own, other), difference.float64_train)
        difference = replace(difference, float64_train=off)
    return difference, own, other, tuple(sizes)


def _distance_after_training(own: NetworkRuns, other: NetworkRuns) -> float:
    """Compare eval mode on the same inputs, with the running statistics after train mode."""
    return distance(*(network.run_eval(own.inputs, torch.float64) for network in (own, other)))


def _compare_others(
    own: NetworkRuns, other: NetworkRuns, cases: list[tuple[Inputs, torch.dtype]], seed: int
) -> list[str]:
    """Compare eval mode on other inputs, and return descriptions of those that were compared.

    Raises:
        MorphError: the child differs on one of them, or cannot run on an input that the parent accepts.
    """
    compared = []
    for inputs, dtype in cases:
        drawn, where = inputs.random(seed), _described(inputs, dtype)
        try:
            want = own.run_eval(drawn, dtype)
        except MorphError:
            continue  # the parent does not accept this input
        try:
            have = other.run_eval(drawn, dtype)
        except MorphError as error:
            raise OtherFunction(f"on {where} {error}, but the parent can; the original is unchanged") from error
        if [t.shape for t in want] != [t.shape for t in have]:
            raise OtherFunction(f"on {where} the child returns other shapes; the original is unchanged")
        off = distance(want, have)
        if off <= FLOAT64_LIMIT or math.isnan(off):
            compared += [] if math.isnan(off) else [where]
            continue
        limit = HALF_LIMIT
        if dtype == torch.float64:
            noise = max(distance(want, own.run_eval(drawn, torch.float32)), NOISE_FLOOR)
            limit = NOISE_RATIO * noise * FLOAT64_ROUNDOFF
        if not off <= limit:
            raise OtherFunction(
                f"on {where} the child's function differs from its parent's by {off:.1e}, but not on the example: the "
                "forward branches by the size of its input; the original is unchanged"
            )
        compared.append(where)
    return compared


def _described(inputs: Inputs, dtype: torch.dtype) -> str:
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in inputs.shapes)
    return shapes if dtype == torch.float64 else f"{shapes} in {str(dtype).removeprefix('torch.')}"


def _run_parent(parent: nn.Module, given: Inputs, seed: int, train: bool) -> NetworkRuns:
    """Run the parent on random values, or on the example's if it refuses these or returns nan or inf."""
    refused: MorphError | None = None
    tried: list[NetworkRuns] = []
    for draw in (given.random, given.own):
        network = NetworkRuns(parent, "the parent")
        try:
            network.run(draw(seed), draw if train else None, seed)
        except MorphError as error:
            refused = refused or error
            continue
        if network.finite():
            return network
        tried.append(network)
    if not tried:
        assert refused is not None
        raise refused
    return tried[0]


def _refuse_not_finite(parent: nn.Module) -> None:
    """Raise an error that names a weight with NaN or infinite numbers, if there is one."""
    for name, tensor in named_tensors(parent).items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise MorphError(f"'{name}' of the network contains NaN or infinite numbers; give weights that are finite")


def _require(difference: Difference, train: bool = True) -> Difference:
    d = difference if train else difference.in_eval()
    if math.isnan(d.float64):
        raise MorphError(
            "outputs cannot be compared: the networks return nan or inf on random inputs and on the example's values; "
            "give an example with valid values; the original is unchanged"
        )
    if not d.float64 <= FLOAT64_LIMIT:
        if d.float64_ratio <= NOISE_RATIO:
            raise MorphError(
                f"the parent magnifies rounding too much on this example for a comparison: float64 differs by "
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
