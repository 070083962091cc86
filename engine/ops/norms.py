"""Norms: per pixel with given statistics, or with those of the whole image.

A norm with live statistics is three nodes:

    mean, var = moments of x          reduction, per sample and channel (N, C, 1, 1)
    what the norm makes of them       small: merged over batch or groups, affine part, running statistics
    y = f(x, smalls)                  local, per pixel

Means and variances of parts of equal size merge as mean(mean_i) and mean(var_i) + var(mean_i), in float64. No formula
of a norm's backward appears: gradients of the smalls come back through autograd, and the reduction's adjoint is
dmean/n + 2 (x - mean) dvar/n at each pixel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..trace import Op, Ref
from .base import Block, Env, Local, Maps, Node, Reduction, Refusal, Small, arguments, need_nchw, replay, rule
from .pointwise import on_channels, only_maps


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What statistics are given in."""
    return torch.promote_types(dtype, torch.float32)


def _exact(device: torch.device) -> torch.dtype:
    """What statistics are merged in."""
    return torch.float32 if device.type == "mps" else torch.float64


def moments(op: Op, maps: Maps, value: int) -> tuple[Reduction, int, int]:
    """The reduction to mean and variance, (N, C, 1, 1) each, and their value numbers."""
    need_nchw(op, maps, value)
    n, c = maps.shape(value)[:2]
    dtype = _wide(maps.program.values[value].dtype)
    mean, var = (maps.new_value((n, c, 1, 1), dtype, like=value) for _ in range(2))
    reduction = Reduction(op, value, "moments", math.prod(maps.size(value)), (2, 3), True, outputs=(mean, var))
    return reduction, mean, var


def _number(ref: Any) -> int | None:
    return ref.value if isinstance(ref, Ref) else None


def _update(buffer: Tensor | None, value: Tensor, momentum: float) -> None:
    if buffer is not None:
        buffer.mul_(1 - momentum).add_(value.to(buffer.dtype), alpha=momentum)


@rule("batch_norm")
def batch_norm(op: Op, maps: Maps) -> Local | list[Node]:
    given = arguments(
        op, "input running_mean running_var weight bias training momentum eps", training=False, momentum=0.1, eps=1e-5
    )
    value = given["input"].value
    if given["training"] or given["running_mean"] is None:
        return _live_batch_norm(op, maps, given)
    local = on_channels(op, maps, value)
    plain = local.run

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        (result,) = plain(env, block)
        if env[value].dim() == 4 and 1 in env[value].shape[2:] and result.requires_grad:
            result = _LikeForward.apply(result)
        return (result,)

    local.run = run
    return local


class _LikeForward(torch.autograd.Function):
    """Identity whose gradient has the memory order of its input.

    PyTorch's batch_norm on the CPU computes a wrong gradient for a map one pixel wide if the gradient that comes in is
    ordered channels-last and the map is not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor):
        ctx.order = memory_format(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return grads[0].contiguous(memory_format=ctx.order)


def memory_format(x: Tensor) -> torch.memory_format:
    """The order of a map in memory."""
    nchw = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if nchw else torch.channels_last


def _live_batch_norm(op: Op, maps: Maps, given: dict[str, Any]) -> list[Node]:
    value, momentum, eps = given["input"].value, given["momentum"], given["eps"]
    only_maps(op, maps, value)
    reduction, mean, var = moments(op, maps, value)
    values = maps.program.values
    channels, dtype = values[value].shape[1], values[mean].dtype
    exact = _exact(values[value].device)
    total_mean, total_var = (maps.new_value((channels,), dtype, like=value) for _ in range(2))
    running = tuple(_number(given[name]) for name in ("running_mean", "running_var"))
    pixels = values[value].shape[0] * reduction.count

    def merge(env: Env) -> tuple[Tensor, ...]:
        means, variances = (env[v].to(exact).flatten(1) for v in (mean, var))
        return means.mean(0).to(dtype), (variances.mean(0) + means.var(0, correction=0)).to(dtype)

    def keep(env: Env) -> None:
        with torch.no_grad():
            for number, moment, factor in zip(
                running, (total_mean, total_var), (1.0, pixels / max(pixels - 1, 1)), strict=True
            ):
                _update(None if number is None else env[number], env[moment] * factor, momentum)

    inputs = (mean, var, *(v for v in running if v is not None))
    finalize = Small(merge, inputs, (total_mean, total_var), keep if running != (None, None) else None)
    weight, bias = _number(given["weight"]), _number(given["bias"])

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        w, b = (None if v is None else env[v] for v in (weight, bias))
        return (Normalize.apply(env[value], env[total_mean], env[total_var], w, b, eps),)  # pyright: ignore

    taken = (value, total_mean, total_var, *(v for v in (weight, bias) if v is not None))
    return [reduction, finalize, _pixelwise(op, maps, value, "normalize", taken, run)]


def _pixelwise(op: Op, maps: Maps, value: int, name: str, inputs: tuple[int, ...], run: Any) -> Local:
    made = Op(op.func, name, (), {}, inputs, op.outputs[:1], (), op.module)
    return Local(made, {value: maps.pointwise(value)}, (maps.axes[value],), run)


class Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias with gradients for all of them, PyTorch's kernels both ways.

    With S0 = sum dy and S1 = sum dy xhat, which the kernel gives as the gradients of bias and weight,
    dmean = -weight i S0 and dvar = -weight i^2 S1 / 2, i = 1/sqrt(var + eps).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ):
        w, b = (None if t is None else t.to(mean.dtype) for t in (weight, bias))
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, w, b, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, mean, var, weight = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        # The kernel's result is wrong for gradients in another memory order than x, where x is one pixel wide.
        dy = grads[0].contiguous(memory_format=memory_format(x))
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, scale, mean, var, None, None, False, ctx.eps, [ctx.needs_input_grad[0], True, True]
        )
        inverse = torch.rsqrt(var + ctx.eps)
        dmean = -scale * inverse * dbias
        dvar = -scale * inverse.square() * dweight / 2
        if weight is None:
            return dx, dmean, dvar, None, None, None
        return dx, dmean, dvar, dweight.to(weight.dtype), dbias.to(weight.dtype), None


@rule("group_norm")
def group_norm(op: Op, maps: Maps) -> list[Node]:
    given = arguments(op, "input num_groups weight bias eps", eps=1e-5)
    return _grouped(op, maps, given, given["num_groups"])


@rule("instance_norm")
def instance_norm(op: Op, maps: Maps) -> Local | list[Node]:
    given = arguments(
        op, "input running_mean running_var weight bias use_input_stats momentum eps",
        use_input_stats=True, momentum=0.1, eps=1e-5,
    )  # fmt: skip
    value = given["input"].value
    if not given["use_input_stats"]:
        return on_channels(op, maps, value)
    return _grouped(op, maps, given, maps.shape(value)[1])


@rule("layer_norm", "rms_norm")
def layer_norm(op: Op, maps: Maps) -> Local | list[Node]:
    given = arguments(op, "input normalized_shape weight bias eps", eps=1e-5)
    value = given["input"].value
    rank = len(maps.shape(value))
    normalized = range(rank - len(tuple(given["normalized_shape"])), rank)
    if not set(normalized) & set(maps.axes[value]):
        only_maps(op, maps, value)
        return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), replay(op))
    if op.name == "rms_norm" or given["weight"] is not None or given["bias"] is not None:
        raise Refusal(
            f"'{op.name}' over the image axes has a weight for each position of the image; "
            "normalise over the channels, or take GroupNorm"
        )
    groups = 1 if 1 in normalized else maps.shape(value)[1]
    return _grouped(op, maps, given, groups)


def _grouped(op: Op, maps: Maps, given: dict[str, Any], groups: int) -> list[Node]:
    """Statistics of each sample over groups of neighbouring channels and the image."""
    value, eps = given["input"].value, given["eps"]
    only_maps(op, maps, value)
    reduction, mean, var = moments(op, maps, value)
    values = maps.program.values
    n, c = values[value].shape[:2]
    dtype, out = values[mean].dtype, values[op.outputs[0]].dtype
    exact = _exact(values[value].device)
    scale, shift = (maps.new_value((n, c, 1, 1), dtype, like=value) for _ in range(2))
    weight, bias = _number(given["weight"]), _number(given["bias"])
    running = [_number(given.get(name)) for name in ("running_mean", "running_var")]

    def affine(env: Env) -> tuple[Tensor, ...]:
        means, variances = (env[v].to(exact).reshape(n, groups, -1) for v in (mean, var))
        middle = means.mean(2, keepdim=True)
        spread = variances.mean(2, keepdim=True) + means.var(2, correction=0, keepdim=True)
        factor = torch.rsqrt(spread + eps).expand(n, groups, c // groups).reshape(n, c, 1, 1)
        middle = middle.expand(n, groups, c // groups).reshape(n, c, 1, 1)
        if weight is not None:
            factor = factor * env[weight].to(exact).reshape(1, c, 1, 1)
        offset = -middle * factor
        if bias is not None:
            offset = offset + env[bias].to(exact).reshape(1, c, 1, 1)
        return factor.to(dtype), offset.to(dtype)

    def keep(env: Env) -> None:
        unbiased = reduction.count / max(reduction.count - 1, 1)
        with torch.no_grad():
            for number, moment, factor in zip(running, (mean, var), (1.0, unbiased), strict=True):
                if number is not None:
                    _update(env[number], env[moment].flatten(1).mean(0) * factor, given["momentum"])

    inputs = (mean, var, *(v for v in (weight, bias, *running) if v is not None))
    finalize = Small(affine, inputs, (scale, shift), keep if any(v is not None for v in running) else None)

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (ScaleShift.apply(env[value], env[scale], env[shift], out),)  # pyright: ignore

    return [reduction, finalize, _pixelwise(op, maps, value, "scale_shift", (value, scale, shift), run)]


class ScaleShift(torch.autograd.Function):
    """x * scale + shift with smalls of shape (N, C, 1, 1), in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype):
        ctx.save_for_backward(x, scale)
        return torch.addcmul(shift, x, scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (dy,) = grads
        x, scale = ctx.saved_tensors
        dx = (dy * scale).to(x.dtype) if ctx.needs_input_grad[0] else None
        dscale = (dy * x).sum((2, 3), keepdim=True, dtype=scale.dtype)
        return dx, dscale, dy.sum((2, 3), keepdim=True, dtype=scale.dtype), None
