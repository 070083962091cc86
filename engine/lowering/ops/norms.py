"""Rules of norms: per pixel with given statistics, or with the statistics of the whole image.

A norm in training mode becomes three nodes:

    mean, var = moments of x          reduction, per sample and channel (N, C, 1, 1)
    merged statistics                 vector op: merged over batch or groups, affine part, running statistics
    y = f(x, vectors)                 local, per pixel

Means and variances of parts of equal size merge as mean(mean_i) and mean(var_i) + var(mean_i), in float64; images of
several sizes, and processes, contribute theirs with their number of pixels. Autograd derives the backward of a norm
from the gradients of the vectors; the adjoint of the reduction is dmean/n + 2 (x - mean) dvar/n at each pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...capture.gradient_fixes import memory_format
from ...capture.program import Op, Ref
from ...parallel.processes import Moments, merged
from .base import (
    Block,
    Env,
    Flat,
    Local,
    Maps,
    Node,
    Reduction,
    Refusal,
    Run,
    VectorOp,
    arguments,
    batch_norm_arguments,
    part_of,
    replay,
    rule,
)
from .pointwise import on_channels, only_maps
from .promote import mapped, promoted, vector
from .reductions import exact, moments, wide


def _number(ref: Any) -> int | None:
    return ref.value if isinstance(ref, Ref) else None


def _running(
    op: Op,
    numbers: Sequence[int | None],
    momentum: float | Ref,
    statistics: Callable[[Env], tuple[Tensor, Tensor]],
    inputs: tuple[int, ...],
) -> list[VectorOp]:
    """The vector ops that update running statistics; later calls of the norm and later steps read the new values.

    Args:
        numbers: the running mean and variance; None for those that the norm does not track.
        statistics: returns mean and unbiased variance of this call.
        inputs: the values that `statistics` reads.
    """
    after = dict(zip(op.mutated, op.outputs[len(op.outputs) - len(op.mutated) :], strict=True))
    tracked = [number for number in numbers if number is not None]
    if not tracked:
        return []

    def run(env: Env) -> tuple[Tensor, ...]:
        share = env[momentum.value] if isinstance(momentum, Ref) else momentum
        with torch.no_grad():
            new = dict(zip(numbers, statistics(env), strict=True))
            if isinstance(share, Tensor):
                return tuple(env[v] * (1 - share) + (new[v] * share).to(env[v].dtype) for v in tracked)
            return tuple((env[v] * (1 - share)).add_(new[v], alpha=share) for v in tracked)

    counted = (momentum.value,) if isinstance(momentum, Ref) else ()
    return [VectorOp(run, (*inputs, *tracked, *counted), tuple(after[v] for v in tracked))]


def _need_channels(op: Op, maps: Maps, value: int) -> None:
    """Refuse maps whose samples or channels are not dimensions 0 and 1."""
    if {0, 1} & set(maps.axes[value]):
        raise Refusal(f"'{op.name}' has an image axis as batch or channel dimension")
    only_maps(op, maps, value)


@rule("batch_norm")
def batch_norm(op: Op, maps: Maps) -> Local | list[Node]:
    given = batch_norm_arguments(op)
    value = given["input"].value
    if given["training"] or given["running_mean"] is None:
        return _live_batch_norm(op, maps, given)
    return on_channels(op, maps, value)


def _live_batch_norm(op: Op, maps: Maps, given: dict[str, Any]) -> list[Node]:
    value, momentum, eps = given["input"].value, given["momentum"], given["eps"]
    values = maps.program.values
    taking, read, moments_of = _take_moments(op, maps, value)
    channels, dtype = values[value].shape[1], wide(values[value].dtype)
    own = exact(values[value].device)
    total_mean, total_var = (maps.new_value((channels,), dtype, like=value) for _ in range(2))
    running = tuple(_number(given[name]) for name in ("running_mean", "running_var"))
    pixels, group = math.prod(values[value].shape) // channels, op.group
    correction = maps.new_value((), own, like=value)  # n / (n - 1), n pixels of all images

    def run(env: Env) -> tuple[Tensor, ...]:
        means, variances = moments_of(env)
        if group is not None or means.shape[1] > 1:
            return merge([share(env)])
        # A number on the host: a GPU kernel receives it as a launch argument.
        return means.squeeze(1), variances.squeeze(1), torch.full((), pixels / max(1, pixels - 1), dtype=own)

    def share(env: Env) -> Moments:
        means, variances = (t.to(own) for t in moments_of(env))
        return means.mean(1), variances.mean(1) + means.var(1, correction=0), means.new_full((), pixels)

    def merge(shares: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        middle, spread, count = merged(shares, group)
        return middle.to(dtype), spread.to(dtype), count / (count - 1).clamp(min=1)

    def statistics(env: Env) -> tuple[Tensor, Tensor]:
        return env[total_mean], env[total_var] * env[correction]

    outputs = (total_mean, total_var, correction)
    finalize = VectorOp(run, read, outputs, share, merge)
    updates = _running(op, running, momentum, statistics, outputs)
    weight, bias = _number(given["weight"]), _number(given["bias"])

    def normalize(env: Env, _block: Block) -> tuple[Tensor, ...]:
        w, b = (None if v is None else env[v] for v in (weight, bias))
        return (NormalizeFunction.apply(env[value], env[total_mean], env[total_var], w, b, eps),)  # pyright: ignore

    taken = (value, total_mean, total_var, *(v for v in (weight, bias) if v is not None))
    if value not in maps:
        return [finalize, *updates, VectorOp(lambda env: normalize(env, Block((0, 1), (0, 1))), taken, op.outputs[:1])]
    parts = {"mean": Ref(total_mean), "var": Ref(total_var), "weight": given["weight"], "bias": given["bias"]}
    settings = {"eps": eps, "group": group}
    local = _pixelwise(op, maps, value, "live_batch_norm", taken, normalize, {**parts, **settings})
    return [*taking, finalize, *updates, local]


def norm_of_vector(op: Op, maps: Maps) -> list[Node] | None:
    """BatchNorm in training mode of a vector: like that of a map, it is over all images and processes."""
    if op.name != "batch_norm" or op.autocast is not None:
        return None
    given = batch_norm_arguments(op)
    if not given["training"] and given["running_mean"] is not None:
        return None
    return _live_batch_norm(op, maps, given)


def _take_moments(
    op: Op, maps: Maps, value: int
) -> tuple[list[Node], tuple[int, ...], Callable[[Env], tuple[Tensor, Tensor]]]:
    """Moments of each channel: the nodes that compute them, the values to read, and a function of these values.

    The function returns means and variances, (C, parts of equal size).
    """
    if value not in maps:
        dims = [d for d in range(len(maps.shape(value))) if d != 1]

        def of_vector(env: Env) -> tuple[Tensor, Tensor]:
            var, mean = torch.var_mean(env[value].to(wide(env[value].dtype)), dims, correction=0)
            return mean[:, None], var[:, None]

        return [], (value,), of_vector
    rows = _rows(op, maps, value)
    if rows is None:
        _need_channels(op, maps, value)
    reduction, mean, var = moments(op, maps, value if rows is None else rows.op.outputs[0])
    channel = 1 if rows is None else 3

    def of_map(env: Env) -> tuple[Tensor, Tensor]:
        return env[mean].movedim(channel, 0).flatten(1), env[var].movedim(channel, 0).flatten(1)

    return [*([] if rows is None else [rows]), reduction], (mean, var), of_map


def _rows(op: Op, maps: Maps, value: int) -> Local | None:
    """Separates the samples of rows (N*H*W, C), as in BatchNorm1d, or windows (N*H*W, C, h, w): (N, H*W, 1, C, ...).

    Returns None for other values.
    """
    if value not in maps.flat or maps.axes[value] != (0, 0) or len(maps.shape(value)) < 2:
        return None
    flat, tracked = maps.flat[value], maps.shape(value)[1:]
    shape = flat.ahead, flat.height * flat.width, flat.behind, *tracked
    made = maps.new_map((1, 1), shape, like=value, flat=Flat(flat.height, flat.width))

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (env[value].reshape(flat.ahead, -1, flat.behind, *tracked),)

    return Local(part_of(op, "rows", (value,), (made,)), {value: maps.pointwise(value)}, ((1, 1),), run)


def _pixelwise(
    op: Op, maps: Maps, value: int, name: str, inputs: tuple[int, ...], run: Run, kwargs: dict[str, Any]
) -> Local:
    made = replace(part_of(op, name, inputs, op.outputs[:1]), kwargs=kwargs)
    return Local(made, {value: maps.pointwise(value)}, (maps.axes[value],), run)


class NormalizeFunction(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias by PyTorch's kernels, with gradients for all tensor inputs.

    With S0 = sum dy and S1 = sum dy xhat, which the kernel returns as the gradients of bias and weight,
    dmean = -weight i S0 and dvar = -weight i^2 S1 / 2, i = 1/sqrt(var + eps).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        w, b = (None if t is None else t.to(mean.dtype) for t in (weight, bias))
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps, ctx.bias_dtype = eps, None if bias is None else bias.dtype
        return F.batch_norm(_dense(x), mean, var, w, b, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, mean, var, weight = ctx.saved_tensors
        x = _dense(x)
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        dy = grads[0].contiguous(memory_format=memory_format(x))
        inverse = torch.rsqrt(var + ctx.eps)
        dx, dweight, dbias = (
            torch.ops.aten.native_batch_norm_backward(  # the CPU kernel reads the variance, the GPU kernel the inverse
                dy, x, scale, mean, var, mean, inverse, False, ctx.eps, [ctx.needs_input_grad[0], True, True]
            )
        )
        dmean = -scale * inverse * dbias
        dvar = -scale * inverse.square() * dweight / 2
        weight_grad = None if weight is None else dweight.to(weight.dtype)
        bias_grad = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
        return dx, dmean, dvar, weight_grad, bias_grad, None


def _dense(x: Tensor) -> Tensor:
    """The map; on the CPU a dense copy of a window of a stored map.

    PyTorch's kernels are several times faster on dense memory, and round equally at every tile position.
    """
    if x.device.type != "cpu" or x.is_contiguous(memory_format=memory_format(x)):
        return x
    return x.clone()


@rule("group_norm")
def group_norm(op: Op, maps: Maps) -> list[Node]:
    given = arguments(op, "input num_groups weight bias eps", eps=1e-5)
    return _grouped(op, maps, given, given["num_groups"])


@rule("instance_norm")
def instance_norm(op: Op, maps: Maps) -> Local | list[Node]:
    names = "input running_mean running_var weight bias use_input_stats momentum eps"
    given = arguments(op, names, use_input_stats=True, momentum=0.1, eps=1e-5)
    value = given["input"].value
    if not given["use_input_stats"]:
        return on_channels(op, maps, value)
    return _grouped(op, maps, given, maps.shape(value)[1])


_NAMES = {"layer_norm": "input normalized_shape weight bias eps", "rms_norm": "input normalized_shape weight eps"}


@rule("layer_norm", "rms_norm")
def layer_norm(op: Op, maps: Maps) -> Local | list[Node]:
    given = arguments(op, _NAMES[op.name], eps=1e-5 if op.name == "layer_norm" else None)
    value = given["input"].value
    rank = len(maps.shape(value))
    normalized = tuple(range(rank - len(tuple(given["normalized_shape"])), rank))
    only_maps(op, maps, value)
    if not set(normalized) & set(maps.axes[value]):
        return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), replay(op))
    if not set(maps.axes[value]) <= set(normalized):
        raise Refusal(f"'{op.name}' cannot normalise along one image axis alone; normalise over both")
    return _image_norm(op, maps, given, normalized)


def _image_norm(op: Op, maps: Maps, given: dict[str, Any], normalized: tuple[int, ...]) -> list[Node]:
    """A norm of each sample over the image and the dimensions after it; weight and bias vary with the position."""
    value = given["input"].value
    values = maps.program.values
    dtype, out = wide(values[value].dtype), values[op.outputs[0]].dtype
    own = exact(values[value].device)
    eps = torch.finfo(values[value].dtype).eps if given["eps"] is None else given["eps"]
    shape = [1 if d in normalized else size for d, size in enumerate(maps.shape(value))]
    count = math.prod(maps.shape(value)[d] for d in normalized)
    centred = op.name == "layer_norm"
    made = tuple(maps.new_value(shape, dtype, like=value) for _ in range(4 if centred else 1))
    statistics: list[Node]
    if centred:
        reduction, mean, var = moments(op, maps, value)

        def affine(env: Env) -> tuple[Tensor, ...]:
            means, variances = env[mean].to(own), env[var].to(own)
            middle = means.mean(normalized, keepdim=True)
            spread = variances.mean(normalized, keepdim=True) + (means - middle).square().mean(normalized, keepdim=True)
            factor = torch.rsqrt(_over(count, spread, dtype) + eps)
            return _affine(middle, factor, torch.zeros_like(factor), dtype)

        statistics = [reduction, VectorOp(affine, (mean, var), made)]
    else:
        square, squares = mapped(op, maps, "square", (value,), lambda x: x.to(dtype).pow(2), dtype)
        total = maps.new_value(shape, dtype, like=value)
        reduction = Reduction(op, squares, "sum", count, normalized, True, outputs=(total,))
        statistics = [square, reduction, vector((total,), made[0], lambda t: torch.rsqrt(t + eps))]

    op, vectors = promoted(op, maps, maps.axes[value], len(maps.shape(value)))
    given = arguments(op, _NAMES[op.name])
    factors = [given[name].value for name in ("weight", "bias") if given.get(name) is not None]
    weighted = given["weight"] is not None

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        elements, vectors = list(rest[: len(factors)]), rest[len(factors) :]
        y = ScaleShift.apply(x, *vectors, dtype) if centred else x * vectors[0]
        if weighted:
            y = y * elements.pop(0)
        for element in elements:
            y = y + element
        return y.to(out)

    local, _ = mapped(op, maps, op.name, (value, *factors), run, out, made, op.outputs[0])
    return [*statistics, *vectors, local]


def _affine(mean: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The vectors of `ScaleShift`; the offset uses the rounded scale, so that x = mean gives exactly the shift."""
    scale = scale.to(dtype)
    return mean.to(dtype), scale, shift.to(dtype), (shift - mean * scale).detach().to(dtype)


def _over(count: int, spread: Tensor, dtype: torch.dtype) -> Tensor:
    """A variance that is infinite where PyTorch's sum of squares overflows."""
    return (spread * count).to(dtype).to(spread.dtype) / count


def _grouped(op: Op, maps: Maps, given: dict[str, Any], groups: int) -> list[Node]:
    """A norm of each sample over groups of neighbouring channels and all dimensions after them."""
    value, eps = given["input"].value, given["eps"]
    _need_channels(op, maps, value)
    reduction, mean, var = moments(op, maps, value)
    values = maps.program.values
    n, c = values[value].shape[:2]
    ones = (1,) * (len(values[value].shape) - 2)
    dtype, out = values[mean].dtype, values[op.outputs[0]].dtype
    own = exact(values[value].device)
    *made, inverse = (maps.new_value((n, c, *ones), dtype, like=value) for _ in range(5))
    weight, bias = _number(given["weight"]), _number(given["bias"])
    running = [_number(given.get(name)) for name in ("running_mean", "running_var")]

    def affine(env: Env) -> tuple[Tensor, ...]:
        means, variances = (env[v].to(own).reshape(n, groups, -1) for v in (mean, var))
        middle = means.mean(2, keepdim=True)
        spread = variances.mean(2, keepdim=True) + means.var(2, correction=0, keepdim=True)
        if op.name == "group_norm":
            spread = _over(reduction.count * c // groups, spread, dtype)
        elif eps == 0:  # instance_norm calls PyTorch's batch_norm, which scales a constant channel by zero
            spread = spread.masked_fill(spread == 0, math.inf)
        factor = rstd = torch.rsqrt(spread + eps).expand(n, groups, c // groups).reshape(n, c, *ones)
        middle = middle.expand(n, groups, c // groups).reshape(n, c, *ones)
        if weight is not None:
            factor = factor * env[weight].to(own).reshape(1, c, *ones)
        shift = torch.zeros_like(factor) if bias is None else env[bias].to(own).reshape(1, c, *ones).expand_as(factor)
        return *_affine(middle, factor, shift, dtype), rstd.detach().to(dtype)

    def statistics(env: Env) -> tuple[Tensor, Tensor]:
        unbiased = reduction.count / max(reduction.count - 1, 1)
        means, variances = (env[v].flatten(1).mean(0) for v in (mean, var))
        return means, variances * unbiased

    updates = _running(op, running, given.get("momentum", 0.1), statistics, (mean, var))
    finalize = VectorOp(affine, (mean, var, *(v for v in (weight, bias) if v is not None)), (*made, inverse))

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (ScaleShift.apply(env[value], *(env[v] for v in made), out),)  # pyright: ignore

    parts = {"rstd": Ref(inverse), "weight": given["weight"], "bias": given["bias"], "together": c // groups}
    local = _pixelwise(op, maps, value, "scale_shift", (value, *made), run, parts)
    return [reduction, finalize, *updates, local]


class ScaleShift(torch.autograd.Function):
    """(x - mean) * scale + shift in `dtype`, with vectors of size one in every dimension that they are broadcast along.

    It is computed as x * scale + offset, offset = shift - mean * scale. The gradient of the scale is a sum of
    (x - mean) dy: the difference of sums of x dy and of dy would be rounding error where the mean is large.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, offset: Tensor, dtype: torch.dtype):
        ctx.save_for_backward(x, mean, scale)
        return torch.addcmul(offset, x, scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (dy,) = grads
        x, mean, scale = ctx.saved_tensors
        dx = (dy * scale).to(x.dtype) if ctx.needs_input_grad[0] else None
        dshift = _sum_like(dy, scale)
        return dx, -scale * dshift, _sum_like((x - mean).mul_(dy), scale), dshift, None, None


def _sum_like(x: Tensor, vector: Tensor) -> Tensor:
    """The sum over the dimensions in which the vector has size one."""
    dims = [d for d, size in enumerate(vector.shape) if size == 1]
    return x.sum(dims, keepdim=True, dtype=vector.dtype)
