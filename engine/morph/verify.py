"""The numeric check of a morph: parent and child against each other, with the parent's own rounding as the measure.

Both networks are copied and run on the same random inputs in float64 and float32, in eval mode, in train mode (live
batch statistics, dropout off) and in eval mode again, which shows the running statistics that the train step left.
The float32 difference of a correct morph is as large as the parent's own rounding noise, its distance to itself in
float64, because only the order of the sums is new; no morph may promise bit equality.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..errors import MorphError
from .running import Example, as_inputs, failures, output_tensors
from .step import Step

FLOAT64_LIMIT = 1e-10  # relative; correct morphs stay below 1e-12
NOISE_RATIO = 8.0  # float32: times the parent's own rounding noise
NOISE_FLOOR = 4 * 2.0**-24  # four unit roundoffs of float32; no network's noise counts as less
FLOAT64_ROUNDOFF = 2.0**-29  # unit roundoff of float64 over that of float32
TRAIN_BATCH = 4  # batch statistics of fewer values would magnify rounding


@dataclass(frozen=True)
class Difference:
    """Largest relative differences of all outputs, child against parent; nan if the networks give nan or inf.

    Each is the maximum norm of the difference over the maximum norm of the parent's output. `noise` is the parent's
    float32 output against its own float64 output, at least 4 * 2^-24. `train` covers live statistics and those left.
    """

    float64_eval: float
    float64_train: float
    float32_eval: float
    float32_train: float
    noise_eval: float
    noise_train: float

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
        return _worst(self.float32_eval / self.noise_eval, self.float32_train / self.noise_train)

    @property
    def float64_ratio(self) -> float:
        """float64 difference over the parent's own noise scaled to float64's roundoff, the worse of the two modes.

        A few units say that the difference is rounding, magnified by the network itself: where BatchNorm in train
        mode has a handful of values per channel, correct morphs differ by 1e-12 and more.
        """
        ratios = self.float64_eval / self.noise_eval, self.float64_train / self.noise_train
        return _worst(*ratios) / FLOAT64_ROUNDOFF

    def __str__(self) -> str:
        return (
            f"float64 {self.float64_eval:.1e} (train mode {self.float64_train:.1e}), "
            f"float32 {self.float32_eval:.1e} (train mode {self.float32_train:.1e}); "
            f"{self.float64_ratio:.1f} and {self.noise_ratio:.1f} times the parent's own rounding noise, "
            f"which is {self.noise_eval:.1e} in float32 (train mode {self.noise_train:.1e})"
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
) -> Difference:
    """Differences of two networks in float64 and float32, in eval and train mode; both stay untouched.

    Args:
        parent: the network before.
        child: the network after.
        example: the parent's input or tuple of inputs (N, ...). Floating-point inputs are replaced by random ones of
            that shape and device, with a batch of at least 4 in train mode.
        child_example: the child's inputs where they differ from the parent's (another size or channels); then both
            are taken as they are, and a network with BatchNorm needs a batch of at least 2.
        outputs: makes of the child's result what shall equal the parent's result; default: the result.
        seed: of the random inputs.

    Raises:
        MorphError: the results have other structures or shapes, or a network cannot be run.
    """
    return _check(parent, child, example, child_example, outputs, seed)[0]


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
) -> Report:
    """The report of a morph, after `require_equal`."""
    if certificate is not None and certificate.violations:
        raise MorphError(f"{step.op}: {certificate}; the original is unchanged, report this")
    difference, flops = _check(parent, child, example, child_example, outputs, seed)
    _require(difference, train)
    parameters = (count_parameters(parent), count_parameters(child))
    return Report(step, difference, parameters, flops, changes or [], certificate)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


@contextmanager
def full_precision() -> Iterator[None]:
    """TF32, autocast and the like off: a Dirac convolution in TF32 rounds its input to 10 bits."""
    backends: Any = torch.backends
    settings = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for s, old in zip(settings, before, strict=True):
            s.fp32_precision = old


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


def duplicate(model: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy; what a hook has computed (the old `nn.utils.weight_norm`) is copied too, without its graph.

    Args:
        model: any network.
        shared: id of a tensor -> what the copy has in its place.
    """
    memo: dict[int, Any] = dict(shared or {})
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(model, memo)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model.to(dtype)` that also casts tensors held as plain attributes; in place."""
    model.to(dtype)
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(module, key, value.to(dtype))
    return model


# --------------------------------------------------------------------------------------------------------------------

_Runs = dict[str, list[Tensor]]  # "float32 eval" -> outputs in float64


def _check(
    parent: nn.Module,
    child: nn.Module,
    example: Example,
    child_example: Example | None,
    outputs: Callable[[Any], Any] | None,
    seed: int,
) -> tuple[Difference, tuple[int, int]]:
    parent_inputs = as_inputs(example)
    if child_example is None:
        parent_inputs, train_inputs = (
            _random_like(parent_inputs, seed, 1),
            _random_like(parent_inputs, seed, TRAIN_BATCH),
        )
        child_inputs, child_train = parent_inputs, train_inputs
    else:
        train_inputs = parent_inputs
        child_inputs = child_train = as_inputs(child_example)
    want, shape, flops_before = _run(parent, parent_inputs, train_inputs, None, "the parent")
    have, child_shape, flops_after = _run(child, child_inputs, child_train, outputs, "the child")
    if shape != child_shape:
        raise MorphError(f"the child returns {child_shape}, the parent {shape}; the original is unchanged")
    found: dict[str, float] = {}
    for mode in ("eval", "train"):
        for dtype in ("float64", "float32"):
            found[f"{dtype}_{mode}"] = distance(want[f"{dtype} {mode}"], have[f"{dtype} {mode}"])
        noise = distance(want[f"float64 {mode}"], want[f"float32 {mode}"])
        found[f"noise_{mode}"] = max(noise, NOISE_FLOOR) if math.isfinite(noise) else noise
    return Difference(**found), (flops_before, flops_after)


def _require(difference: Difference, train: bool = True) -> Difference:
    float64 = difference.float64 if train else difference.float64_eval
    float32 = difference.float32 if train else difference.float32_eval
    ratio = difference.noise_ratio if train else difference.float32_eval / difference.noise_eval
    float64_ratio = (
        difference.float64_ratio if train else difference.float64_eval / difference.noise_eval / FLOAT64_ROUNDOFF
    )
    if not float64 <= FLOAT64_LIMIT:
        if float64_ratio <= NOISE_RATIO:
            raise MorphError(
                f"the parent magnifies rounding so much on this example that nothing can be told: float64 differs by "
                f"{float64:.1e} (limit {FLOAT64_LIMIT:.0e}), which is its own noise; give a larger image or batch; the "
                "original is unchanged"
            )
        raise MorphError(
            f"the child's function differs from its parent's by {float64:.1e} in float64 "
            f"(limit {FLOAT64_LIMIT:.0e}); the original is unchanged, report this"
        )
    if not ratio <= NOISE_RATIO:
        raise MorphError(
            f"the child differs from its parent by {float32:.1e} in float32, {ratio:.1f} "
            f"times the parent's own rounding noise (limit {NOISE_RATIO:.0f}); the original is unchanged"
        )
    return difference


def _worst(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


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


def _random_like(inputs: tuple[Tensor, ...], seed: int, least_batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(x: Tensor) -> Tensor:
        repeats = -(-least_batch // max(x.shape[0], 1)) if x.ndim else 1
        if not x.is_floating_point():
            return torch.cat([x] * repeats) if repeats > 1 else x
        shape = (x.shape[0] * repeats, *x.shape[1:]) if x.ndim else ()
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(x.device)

    return tuple(draw(x) for x in inputs)


def _run(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    train_inputs: tuple[Tensor, ...],
    outputs: Callable[[Any], Any] | None,
    who: str,
) -> tuple[_Runs, list[tuple[int, ...]], int]:
    """Outputs by dtype and mode, the shapes of the eval outputs, and the FLOPs of one eval forward."""
    runs: _Runs = {}
    shapes: list[tuple[int, ...]] = []
    counter = FlopCounterMode(display=False)
    devices = sorted({x.device.index or 0 for x in inputs if x.is_cuda})
    for dtype in (torch.float64, torch.float32):
        work = _converted(model, dtype)
        short = str(dtype).removeprefix("torch.")

        def call(
            given: tuple[Tensor, ...], training: bool, work: nn.Module = work, dtype: torch.dtype = dtype
        ) -> list[Tensor]:
            torch.manual_seed(0)
            work.train(training)
            given = tuple(x.to(dtype) if x.is_floating_point() else x.clone() for x in given)
            with failures(f"{who} cannot be run in {'train' if training else 'eval'} mode"):
                result = work(*given)
            result = outputs(result) if outputs else result
            return [t.detach().double() for t in output_tensors(result)]

        with torch.no_grad(), torch.random.fork_rng(devices), full_precision():
            # As it will be run: modes switch PyTorch's fast paths off, which read a layer's weights past its modules.
            runs[f"{short} eval"] = call(inputs, False)
            shapes = [tuple(t.shape) for t in runs[f"{short} eval"]]
            with NoDropout():
                runs[f"{short} train"] = call(train_inputs, True)
                with counter if dtype == torch.float32 else nullcontext():
                    runs[f"{short} train"] += call(inputs, False)  # with the statistics that the train step left
        del work, call
    return runs, shapes, counter.get_total_flops()


def _converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype, made in one step."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        value = p.detach().to(dtype if p.is_floating_point() else p.dtype, copy=True)
        memo[id(p)] = nn.Parameter(value, p.requires_grad)
    return cast(duplicate(model, memo), dtype)
