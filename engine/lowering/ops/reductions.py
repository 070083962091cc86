"""Rules of reductions: per pixel over channels; over the image, its rows or its columns as sums, maxima or moments.

All other reductions combine these three with a local op before and a vector op after:

    norm (p = 2)   x^2  -> sum -> root              norm (p = 1)   |x| -> sum
    amin           -x   -> max -> -                 norm (p = inf) |x| -> max
    var, std       moments -> merged over further dimensions, corrected -> root
    logsumexp      max;  exp(x - max) -> sum -> log, + max
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...capture.program import Op
from .base import (
    Local,
    Maps,
    Node,
    Reduction,
    Refusal,
    VectorOp,
    Whole,
    arguments,
    axes_after,
    dimensions,
    replay,
    rule,
)
from .grids import Grid, is_read, strip_grid
from .pointwise import elementwise
from .promote import mapped, resident, vector

Function = Callable[[Tensor], Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics are returned."""
    return torch.promote_types(dtype, torch.float32)


def exact(device: torch.device) -> torch.dtype:
    """The dtype in which statistics are merged."""
    return torch.float32 if device.type == "mps" else torch.float64


def moments(
    op: Op, maps: Maps, value: int, dims: tuple[int, ...] = (), grid: Grid | None = None
) -> tuple[Reduction, int, int]:
    """The reduction to mean and variance over the image, whose axes have size one then, and their value numbers.

    Args:
        dims: reduces over these dimensions, in float64 for maps of any dtype.
        grid: reduces over the image axes that are among `dims`.
    """
    info, pixels = maps.program.values[value], math.prod(maps.size(value))
    axes = dims or tuple(dict.fromkeys(maps.axes[value]))
    if grid is not None:
        axes = tuple(d for d in dict.fromkeys(maps.axes[value]) if d in dims)
    precise = bool(dims) and grid is None
    shape = [1 if d in axes else size for d, size in enumerate(maps.shape(value))]
    count = math.prod(maps.shape(value)[d] for d in axes)
    if not math.prod(maps.shape(value)):
        raise Refusal("cannot compute statistics of no images; skip the layer for an empty batch")
    dtype = exact(info.device) if precise else wide(info.dtype)
    mean, var = (maps.new_value(shape, dtype, like=value) for _ in range(2))
    options = {"precise": precise, "grid": grid, "per_pixel": count // pixels if grid is None else 1}
    return Reduction(op, value, "moments", count, axes, True, outputs=(mean, var), **options), mean, var


_NAMES = {
    **dict.fromkeys(("norm", "vector_norm"), "input p dim keepdim"),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), "input dim unbiased keepdim"),
}
_OVER_DIMS = """
    mean sum amax amin max min var std norm vector_norm logsumexp prod var_mean std_mean argmax argmin any all
    count_nonzero nansum nanmean
""".split()


@rule(*_OVER_DIMS)
def reduction(op: Op, maps: Maps) -> Local | list[Node]:
    """Over channels: per pixel. Over both image axes: see the module's docstring. Otherwise on the whole map."""
    if op.name in ("max", "min") and len(op.inputs) == 2:
        return elementwise(op, maps)
    value = op.inputs[0]
    given = _arguments(op)
    rank, axes = len(maps.shape(value)), maps.axes[value]
    dims = dimensions(given["dim"], rank)
    hit = set(dims) & set(axes)
    if not hit:
        out = axes_after(axes, dims, given["keepdim"])
        return Local(op, {value: maps.pointwise(value)}, (out,) * len(op.outputs), replay(op))
    dtype = maps.program.values[value].dtype
    form = _FORMS.get(op.name)
    if form is None or dtype.is_complex or any(is_read(maps, v) for v in op.outputs[1:] if op.name in ("max", "min")):
        return [Whole(op)]
    return form(ReductionCall(op, maps, value, dims, given)) or [Whole(op)]


def _arguments(op: Op) -> dict[str, Any]:
    """The arguments of a reduction; `dim` None for all, `keepdim` a bool."""
    names = _NAMES.get(op.name, "input dim keepdim")
    args = op.args
    if op.func is torch.linalg.norm or op.name == "vector_norm":
        given = arguments(op, names.replace(" p ", " ord "), keepdim=False)
        given["p"] = given["ord"]
    elif op.name in ("var", "std", "var_mean", "std_mean") and len(args) > 1 and isinstance(args[1], bool):
        given = {"dim": None, "unbiased": args[1], "keepdim": False, **op.kwargs}  # var(x, unbiased)
    else:
        given = arguments(op, names, keepdim=False)
    given["dim"] = given.get("axis", given["dim"])
    given["keepdim"] = bool(given.get("keepdims", given["keepdim"]))
    return given


class ReductionCall:
    """Builds the nodes of a reduction over the image (and maybe further dimensions)."""

    def __init__(self, op: Op, maps: Maps, value: int, dims: tuple[int, ...], given: dict[str, Any]):
        self.op, self.maps, self.value, self.dims, self.given = op, maps, value, tuple(sorted(set(dims))), given
        self.keepdim: bool = given["keepdim"]
        self.shape = maps.shape(value)
        self.output = op.outputs[0]
        self.dtype = maps.program.values[self.output].dtype
        self.grid = strip_grid(maps, value, set(dims))

    @property
    def first(self) -> bool:
        """Whether the gradient of a maximum goes to the first of equal elements: where the op returns an index."""
        return len(self.op.outputs) > 1 and self.op.name in ("max", "min")

    def mapped(
        self, name: str, function: Callable[..., Tensor], dtype: torch.dtype, *vectors: int
    ) -> tuple[Local, int]:
        return mapped(self.op, self.maps, name, (self.value,), function, dtype, vectors)

    def keepdim_result(self, value: int) -> tuple[list[Node], int]:
        """A result with its reduced dimensions of size one, as local ops read it."""
        return ([], value) if self.grid is None else resident(self.maps, value, self.maps.axes[self.value])

    def reduce(
        self, value: int, kind: str, output: int, count: int = 1, keepdim: bool | None = None, nan_counts: bool = False
    ) -> Reduction:
        keepdim = self.keepdim if keepdim is None else keepdim
        options = {"nan_counts": nan_counts, "grid": self.grid}
        return Reduction(self.op, value, kind, count, self.dims, keepdim, self.first, (output,), **options)

    def of(self, name: str, function: Function, kind: str, behind: Function, nan_counts: bool = False) -> list[Node]:
        """The nodes of `behind(reduction(function(x)))`."""
        own = wide(self.maps.program.values[self.value].dtype)
        local, made = self.mapped(name, lambda x: function(x.to(own)), own)
        total, dtype = self.maps.new_value(dtype=own, like=self.output), self.dtype
        last = vector((total,), self.output, lambda t: behind(t).to(dtype))
        return [local, self.reduce(made, kind, total, nan_counts=nan_counts), last]


def _sum(call: ReductionCall) -> list[Node]:
    """Sums and means, in `dtype` if the call has one; of bool and integers in float64."""
    asked, dtype = call.given.get("dtype"), call.maps.program.values[call.value].dtype
    own = asked or dtype
    if not own.is_floating_point:
        own = torch.float64
    count = math.prod(call.shape[d] for d in call.dims) if call.op.name == "mean" else 1
    if own == dtype:
        return [call.reduce(call.value, "sum", call.output, count)]
    local, made = call.mapped("cast", lambda x: x.to(own), own)
    return [local, call.reduce(made, "sum", call.output, count)]


def _finds_maxima(call: ReductionCall) -> bool:
    """Whether maxima can be computed by tile: the first of equal elements is known if the image axes are the last."""
    maps, axes = call.maps, tuple(axis - len(call.shape) for axis in call.maps.axes[call.value])
    if call.first and call.grid is None and (axes not in ((-2, -1), (-1, -1)) or maps.merged(call.value)):
        return False
    if call.first and len(call.shape) != (3 if axes == (-1, -1) else 4):
        return False
    return maps.program.values[call.value].dtype.is_floating_point


def _extreme(call: ReductionCall) -> list[Node] | None:
    if not _finds_maxima(call):
        return None
    nan_counts = call.op.name in ("max", "min")
    if "max" in call.op.name:
        return [call.reduce(call.value, "max", call.output, nan_counts=nan_counts)]
    return call.of("negative", torch.neg, "max", torch.neg, nan_counts=nan_counts)


def root(x: Tensor) -> Tensor:
    """The square root; its gradient at zero is zero, as for norms and standard deviations."""
    zero = x == 0
    return torch.where(zero, 0, torch.where(zero, 1, x).sqrt())


class Root(torch.autograd.Function):
    """A standard deviation in `dtype`. Its gradient is zero at zero, and overflows where `dtype` does."""

    @staticmethod
    def forward(ctx: Any, variance: Tensor, dtype: torch.dtype):
        result = variance.sqrt().to(dtype)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (result,) = ctx.saved_tensors
        return torch.where(result == 0, 0, grads[0] / (result * 2)), None


def squared(x: Tensor) -> Tensor:
    """The square; its gradient has no factor 2 x, which overflows before x does."""
    return x * x


def _norm(call: ReductionCall) -> list[Node] | None:
    p = call.given["p"]
    if call.op.func is torch.linalg.norm and p is not None and call.given["dim"] is not None:
        return None  # a matrix norm
    if call.given.get("dtype") is not None or call.given.get("out") is not None:
        return None
    if p in (2, None, "fro"):
        return call.of("square", squared, "sum", root)
    if p == 1:
        return call.of("absolute", torch.abs, "sum", lambda t: t)
    if p == math.inf:
        return call.of("absolute", torch.abs, "max", lambda t: t, nan_counts=True)
    return None


def _spread(call: ReductionCall) -> list[Node]:
    """Variance and standard deviation, also together with the mean, computed from moments."""
    correction = call.given.get("correction")
    if correction is None:
        correction = 0 if call.given.get("unbiased") is False else 1
    taken, mean, var = moments(call.op, call.maps, call.value, call.dims, call.grid)
    count = math.prod(call.shape[d] for d in call.dims)
    factor = count / (count - correction) if count > correction else math.inf
    rest, own = tuple(d for d in call.dims if d not in taken.dims), exact(call.maps.program.values[call.value].device)
    squeezed = () if call.keepdim else call.dims
    dtype, op = call.dtype, call.op

    def finish(means: Tensor, variances: Tensor) -> tuple[Tensor, ...]:
        if rest:
            means, variances = means.to(own), variances.to(own)
            variances = variances.mean(rest, keepdim=True) + means.var(rest, correction=0, keepdim=True)
            means = means.mean(rest, keepdim=True)
        spread = variances * factor
        if op.name.startswith("std"):
            spread = Root.apply(spread, dtype)
        means = torch.where(spread.isnan(), torch.nan, means)  # PyTorch returns NaN for an infinite mean
        return tuple(t.squeeze(squeezed).to(dtype) for t in (spread, means)[: len(op.outputs)])

    return [taken, VectorOp(lambda env: finish(env[mean], env[var]), (mean, var), op.outputs)]


def finite(top: Tensor) -> Tensor:
    """The maximum that logsumexp subtracts: zero where it is infinite."""
    return torch.where(top.isinf(), 0, top).detach()


def shifted_exp(call: ReductionCall, shift: Function) -> tuple[list[Node], int, int, int]:
    """Nodes and values of exp(x - shift(max)), of the maximum and of the sum of the exponentials.

    Reduced dimensions of the maximum and the sum have size one.
    """
    own = wide(call.maps.program.values[call.value].dtype)
    sizes = [1 if d in call.dims else n for d, n in enumerate(call.shape)]
    top, total = (call.maps.new_value(sizes, own, like=call.value) for _ in range(2))

    def shifted(x: Tensor, most: Tensor) -> Tensor:
        return torch.exp(x.to(own) - shift(most))

    found, top_value = call.keepdim_result(top)
    local, made = call.mapped("shifted_exp", shifted, own, top_value)
    first = call.reduce(call.value, "max", top, keepdim=True)
    return [first, *found, local, call.reduce(made, "sum", total, keepdim=True)], made, top, total


def _logsumexp(call: ReductionCall) -> list[Node]:
    nodes, _, top, total = shifted_exp(call, finite)
    squeezed, dtype = () if call.keepdim else call.dims, call.dtype

    def finish(most: Tensor, sums: Tensor) -> Tensor:
        return (sums.log() + finite(most)).squeeze(squeezed).to(dtype)

    return [*nodes, vector((top, total), call.output, finish)]


_FORMS: dict[str, Callable[[ReductionCall], list[Node] | None]] = {
    **dict.fromkeys(("sum", "mean"), _sum),
    **dict.fromkeys(("amax", "max", "amin", "min"), _extreme),
    **dict.fromkeys(("norm", "vector_norm"), _norm),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _spread),
    "logsumexp": _logsumexp,
}
