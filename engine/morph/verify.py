"""The numeric check of a morph: parent and child against each other, with the parent's own rounding as the measure.

Both networks are run on the same random inputs in float64 and float32, in eval mode, in train mode (live batch
statistics, dropout off) and in eval mode again, which shows the running statistics that the train step left. They are
run as views that share the parameters and cast them one at a time, so that no copy of a network is made for it.
The float32 difference of a correct morph is as large as the parent's own rounding noise, its distance to itself in
float64, because only the order of the sums is new; no morph may promise bit equality.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..errors import MorphError
from .copying import seen_in
from .example import Example, Inputs, as_inputs
from .precision import full_precision, in_dtype
from .running import failures, output_tensors
from .step import Step

FLOAT64_LIMIT = 1e-10  # relative; correct morphs stay below 1e-12
NOISE_RATIO = 8.0  # float32: times the parent's own rounding noise
NOISE_FLOOR = 4 * 2.0**-24  # four unit roundoffs of float32; no network's noise counts as less
FLOAT64_ROUNDOFF = 2.0**-29  # unit roundoff of float64 over that of float32
STATISTICS = 64  # values of which a batch statistic is taken at least: fewer would magnify rounding
TRAIN_BATCH = 4  # at most so many images for that


@dataclass(frozen=True)
class Difference:
    """Largest relative differences of all outputs, child against parent; nan if the networks give nan or inf.

    Each is the maximum norm of the difference over the maximum norm of the parent's output. `noise` is the parent's
    float32 output against its own float64 output, at least 4 * 2^-24. `train` covers live statistics and those left;
    it is None where train mode was not compared.
    """

    float64_eval: float
    float64_train: float | None
    float32_eval: float
    float32_train: float | None
    noise_eval: float
    noise_train: float | None

    @property
    def float64(self) -> float:
        """The worse of the two modes."""
        return _worst(self.float64_eval, self.float64_train)

    @property
    def float32(self) -> float:
        """The worse of the two modes."""
        return _worst(self.float32_eval, self.float32_train)

    @property
    def noise_ratio(self) -> float:
        """float32 difference over the parent's own noise, the worse of the two modes."""
        return _worst(self.float32_eval / self.noise_eval, _ratio(self.float32_train, self.noise_train))

    @property
    def float64_ratio(self) -> float:
        """float64 difference over the parent's own noise scaled to float64's roundoff, the worse of the two modes.

        A few units say that the difference is rounding, magnified by the network itself: where BatchNorm in train
        mode has a handful of values per channel, correct morphs differ by 1e-12 and more.
        """
        ratios = self.float64_eval / self.noise_eval, _ratio(self.float64_train, self.noise_train)
        return _worst(*ratios) / FLOAT64_ROUNDOFF

    def in_eval(self) -> Difference:
        """Of eval mode alone."""
        return replace(self, float64_train=None, float32_train=None, noise_train=None)

    def __str__(self) -> str:
        def train(value: float | None) -> str:
            return f" (train mode {value:.1e})" if value is not None else ""

        return (
            f"float64 {self.float64_eval:.1e}{train(self.float64_train)}, "
            f"float32 {self.float32_eval:.1e}{train(self.float32_train)}; "
            f"{self.float64_ratio:.1f} and {self.noise_ratio:.1f} times the parent's own rounding noise, "
            f"which is {self.noise_eval:.1e} in float32{train(self.noise_train)}"
        )


@dataclass(frozen=True)
class Certificate:
    """Exact check of `S E = I` on the stored numbers: how many weights were summed up, and how many sums were off."""

    entries: int = 0
    violations: int = 0

    def __add__(self, other: Certificate) -> Certificate:
        return Certificate(self.entries + other.entries, self.violations + other.violations)

    def __str__(self) -> str:
        return f"{self.violations} of {self.entries} weights violate S E = I"


@dataclass(frozen=True)
class Report:
    """What a morph did and how exactly; `step` repeats it on a fresh network."""

    step: Step
    difference: Difference
    parameters: tuple[int, int]  # before, after
    flops: tuple[int, int]  # before, after: multiplications and additions of one eval forward on the example
    changes: list[str] = field(default_factory=list)  # one line for each space, layer, ... that is new or grew
    certificate: Certificate | None = None

    @property
    def transform(self) -> str:
        """Name of the morph."""
        return self.step.op

    def __str__(self) -> str:
        (p0, p1), (f0, f1) = self.parameters, self.flops
        lines = [
            f"{self.transform}: parameters {p0:,} -> {p1:,}, FLOPs {f0:,} -> {f1:,}",
            f"difference: {self.difference}",
        ]
        if self.certificate is not None:
            lines.append(f"certificate: {self.certificate}")
        return "\n".join([*lines, *(f"  {line}" for line in self.changes)])


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
) -> Report:
    """The report of a morph, after `require_equal`; `compare_train=False` runs no train mode at all."""
    if certificate is not None and certificate.violations:
        raise MorphError(f"{step.op}: {certificate}; the original is unchanged, report this")
    found = _check(parent, child, example, child_example, outputs, seed, compare_train)
    _require(found.difference, train)
    parameters = (count_parameters(parent), count_parameters(child))
    lines = [*(changes or []), *([f"train mode was not compared: {found.untrained}"] if found.untrained else [])]
    return Report(step, found.difference, parameters, found.flops, lines, certificate)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


class NoDropout(TorchFunctionMode):
    """Dropout of any kind passes its input through: masks of copies are drawn apart, so paths are not preserved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        if name == "bernoulli_":  # stochastic depth draws its mask thus; p has been divided out by its caller
            return args[0].fill_(1)
        return func(*args, **kwargs)


# --------------------------------------------------------------------------------------------------------------------

_Runs = dict[str, list[Tensor]]  # "float32 eval" -> outputs in float64


@dataclass
class _Found:
    """What a comparison found: `flops` of parent and child, and why train mode was not compared."""

    difference: Difference
    flops: tuple[int, int]
    untrained: str


def _check(
    parent: nn.Module,
    child: nn.Module,
    example: Example,
    child_example: Example | None,
    outputs: Callable[[Any], Any] | None,
    seed: int,
    train: bool,
) -> _Found:
    given = as_inputs(example)
    theirs = None if child_example is None else as_inputs(child_example)
    stateful = any(True for net in (parent, child) for _ in net.buffers())
    if theirs is not None:
        own = _Network(parent, "the parent", None, stateful)
        own.run(given, given if train else None)
    else:
        own, given = _run_parent(parent, given, seed, train, stateful)
    other = _Network(child, "the child", outputs, stateful)
    other.run(theirs or given, None if own.untrained or not train else theirs or own.trained_on)
    if other.untrained and train and not own.untrained:
        raise MorphError(other.untrained)
    if own.shapes != other.shapes:
        raise MorphError(f"the child returns {other.shapes}, the parent {own.shapes}; the original is unchanged")
    found: dict[str, float | None] = dict.fromkeys(("float64_train", "float32_train", "noise_train"))
    for mode in ("eval", "train") if train and not own.untrained else ("eval",):
        for dtype in ("float64", "float32"):
            found[f"{dtype}_{mode}"] = distance(own.runs[f"{dtype} {mode}"], other.runs[f"{dtype} {mode}"])
        if mode == "train" and stateful:
            found["float64_train"] = _worst(
                distance(own.runs["float64 after"], other.runs["float64 after"]), found["float64_train"]
            )
        noise = distance(own.runs[f"float64 {mode}"], own.runs[f"float32 {mode}"])
        found[f"noise_{mode}"] = max(noise, NOISE_FLOOR) if math.isfinite(noise) else noise
    return _Found(Difference(**found), (own.flops, other.flops), own.untrained)  # pyright: ignore[reportArgumentType]


def _run_parent(parent: nn.Module, example: Inputs, seed: int, train: bool, stateful: bool) -> tuple[_Network, Inputs]:
    """Its runs on random numbers, or where these are nothing that it takes, on the example's own; and those inputs."""
    refused: MorphError | None = None
    tried: list[tuple[_Network, Inputs]] = []
    for draw in (example.random, example.own):
        network, inputs = _Network(parent, "the parent", None, stateful), draw(seed)
        try:
            network.run(inputs, draw if train else None, seed)
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


class _Network:
    """One of the two networks, and what it returned.

    Attributes:
        runs: outputs by dtype and mode.
        shapes: of the eval outputs.
        flops: of one eval forward.
        trained_on: the inputs of train mode.
        untrained: why it could not be run in train mode.
    """

    def __init__(self, model: nn.Module, who: str, outputs: Callable[[Any], Any] | None, stateful: bool) -> None:
        self.model, self.who, self.outputs, self.stateful = model, who, outputs, stateful
        self.runs: _Runs = {}
        self.shapes: list[tuple[int, ...]] = []
        self.flops = 0
        self.trained_on: Inputs | None = None
        self.untrained = ""

    def run(self, inputs: Inputs, train: Inputs | Callable[[int, int], Inputs] | None, seed: int = 0) -> None:
        """All runs; `train` gives the inputs of train mode, from the seed and a batch, None: no such runs."""
        counter, norms = FlopCounterMode(display=False), _Norms()
        devices = sorted({x.device.index or 0 for x in inputs.tensors if x.is_cuda})
        with torch.no_grad(), torch.random.fork_rng(devices), full_precision():
            for dtype in (torch.float32, torch.float64):
                short = str(dtype).removeprefix("torch.")
                work = seen_in(self.model, dtype)
                # As it will be run: function modes switch PyTorch's fast paths off, which read weights past modules.
                fast = has_fast_path(self.model)
                with nullcontext() if fast or self.flops else counter, norms:
                    self.runs[f"{short} eval"] = self._call(work, inputs, dtype, False)
                self.shapes = [tuple(t.shape) for t in self.runs[f"{short} eval"]]
                if fast and not self.flops:  # whose fused ops are not counted
                    with NoDropout(), counter:
                        self._call(work, inputs, dtype, False)
                self.flops = counter.get_total_flops()
                if callable(train):
                    batch = min(TRAIN_BATCH, -(-STATISTICS // max(norms.fewest, 1))) if norms.fewest else 1
                    train = train(seed, batch)
                if train is not None and not self.untrained:
                    self._train(work, inputs, train, dtype, short)

    def _train(self, work: nn.Module, inputs: Inputs, train: Inputs, dtype: torch.dtype, short: str) -> None:
        self.trained_on = train
        with NoDropout():
            try:
                self.runs[f"{short} train"] = self._call(work, train, dtype, True)
            except MorphError as error:
                self.untrained = str(error)
                return
            if self.stateful and dtype == torch.float64:  # with the statistics that the train step left
                self.runs["float64 after"] = self._call(work, inputs, dtype, False)

    def _call(self, work: nn.Module, inputs: Inputs, dtype: torch.dtype, training: bool) -> list[Tensor]:
        torch.manual_seed(0)
        work.train(training)
        given = inputs.to(dtype)
        with failures(f"{self.who} cannot be run in {'train' if training else 'eval'} mode"), in_dtype(dtype):
            result = inputs.call(work, given)
            result = self.outputs(result) if self.outputs else result
        return [t.detach().double() for t in output_tensors(result)]

    def finite(self) -> bool:
        """Whether all outputs are."""
        return all(bool(t.isfinite().all()) for tensors in self.runs.values() for t in tensors)


class _Norms(TorchDispatchMode):
    """Of how few values per channel and image a norm over the batch takes its statistics; 0: there is no such norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fewest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in str(func) and args and isinstance(args[0], Tensor) and args[0].ndim > 1:
            values = math.prod(args[0].shape[2:])
            self.fewest = min(self.fewest or values, values)
        return func(*args, **(kwargs or {}))


def has_fast_path(model: nn.Module) -> bool:
    """Whether PyTorch may compute modules of it in eval mode by one fused op that reads the weights of their parts."""
    return any(isinstance(m, nn.TransformerEncoderLayer | nn.MultiheadAttention) for m in model.modules())


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
        raise MorphError(
            f"the child's function differs from its parent's by {d.float64:.1e} in float64 "
            f"(limit {FLOAT64_LIMIT:.0e}); the original is unchanged, report this"
        )
    if not d.noise_ratio <= NOISE_RATIO:
        raise MorphError(
            f"the child differs from its parent by {d.float32:.1e} in float32, {d.noise_ratio:.1f} "
            f"times the parent's own rounding noise (limit {NOISE_RATIO:.0f}); the original is unchanged"
        )
    return difference


def _worst(a: float, b: float | None) -> float:
    if b is None:
        return a
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def distance(want: list[Tensor], have: list[Tensor]) -> float:
    """Largest relative difference of a list of tensors in the maximum norm; nan if anything is not finite."""
    worst = 0.0
    for a, b in zip(want, have, strict=True):
        if not a.numel():
            continue
        difference, scale = (a - b).abs().max().item(), a.abs().max().item()
        if not math.isfinite(difference) or not math.isfinite(scale):
            return math.nan
        if difference:
            worst = max(worst, difference / scale if scale else math.inf)
    return worst
