"""Ops that are affine in each channel, equally for all images, and their coefficients:

    y = (x - mean) * rstd * factor + offset

Mean and rstd are constants for autograd; gradients of the statistics flow through factor and offset. With c(.) for a
constant of the same value,

    BatchNorm           factor = weight * rstd / c(rstd),   offset = bias - weight * c(rstd) * (mean - c(mean))
    GroupNorm and InstanceNorm of one image, weight and rstd in `scale`, rstd = 1:
                        factor = scale,                     offset = shift - c(scale) * (mean - c(mean))
    each of them if its op computes the gradients of the statistics
                        factor = weight,                    offset = bias
    a gate or scale of channels (squeeze-and-excite of one image), mean = 0, rstd = 1:
                        factor = gate,                      offset = 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..conv_chains import channel_scale
from ..ops import Env, Local
from ..ops.base import batch_norm_arguments
from ..stages import ProgramStage

Numbers = tuple[Tensor, Tensor, Tensor, Tensor]  # mean, rstd, factor, offset, each (C,)


@dataclass(frozen=True)
class ChannelAffine:
    """The vectors of an affine op, and the function that computes its coefficients from them.

    Attributes:
        make: returns mean, rstd, factor and offset.
        whole: as in `VectorOp`.
        together: with `whole`, the number of neighbouring channels that share statistics.
    """

    inputs: tuple[int, ...]
    make: Callable[[Env], Numbers]
    whole: Callable[[Env], Numbers] | None = None
    together: int = 0


def affine_of(stage: ProgramStage, local: Local) -> ChannelAffine | None:
    """The coefficients of an op that reads a single map; None if it is not affine in each channel."""
    if len(local.reads) != 1:
        return None
    (value,) = local.reads
    shape = stage.maps.shape(value)
    if len(shape) != 4 or stage.maps.axes[value] != (2, 3):
        return None
    if local.op.name in ("live_batch_norm", "batch_norm"):
        return _of_batch_norm(local)
    if local.op.name == "scale_shift" and shape[0] == 1:
        return _of_scale_shift(local)
    scale = channel_scale(stage, local, value, channels_last=False)
    return None if scale is None else _of_gate(scale)


def _of_batch_norm(norm: Local) -> ChannelAffine:
    if norm.op.name == "live_batch_norm":
        given: dict[str, Any] = norm.op.kwargs
        names = "mean", "var"
    else:
        given, names = batch_norm_arguments(norm.op), ("running_mean", "running_var")
    mean, var = (given[name].value for name in names)
    weight, bias = (None if given[name] is None else given[name].value for name in ("weight", "bias"))
    eps: float = given["eps"]

    def make(env: Env) -> Numbers:
        middle, rstd = env[mean], torch.rsqrt(env[var] + eps)
        fixed = rstd.detach()
        factor, offset = rstd / fixed, -fixed * (middle - middle.detach())
        if weight is not None:
            factor, offset = factor * env[weight].to(factor.dtype), offset * env[weight].to(offset.dtype)
        if bias is not None:
            offset = offset + env[bias].to(offset.dtype)
        return middle.detach(), fixed, factor, offset

    def whole(env: Env) -> Numbers:
        return _constant(env, env[mean], torch.rsqrt(env[var].detach() + eps), weight, bias)

    # With statistics of several processes, a tile never contains all data.
    alone = norm.op.name == "live_batch_norm" and given["group"] is None
    inputs = tuple(v for v in (mean, var, weight, bias) if v is not None)
    return ChannelAffine(inputs, make, whole, 1) if alone else ChannelAffine(inputs, make)


def _constant(env: Env, mean: Tensor, rstd: Tensor, weight: int | None, bias: int | None) -> Numbers:
    """The coefficients of a norm with constant statistics."""
    factor = torch.ones_like(rstd) if weight is None else env[weight].to(rstd.dtype)
    offset = torch.zeros_like(rstd) if bias is None else env[bias].to(rstd.dtype)
    return mean.detach(), rstd, factor, offset


def _of_scale_shift(norm: Local) -> ChannelAffine:
    _, *vectors = norm.op.inputs

    def make(env: Env) -> Numbers:
        mean, scale, shift, _ = (env[v].flatten() for v in vectors)
        fixed = mean.detach()
        return fixed, torch.ones_like(fixed), scale, shift - scale.detach() * (mean - fixed)

    rstd, weight, bias = (None if (ref := norm.op.kwargs[n]) is None else ref.value for n in ("rstd", "weight", "bias"))
    assert rstd is not None

    def whole(env: Env) -> Numbers:
        return _constant(env, env[vectors[0]].flatten(), env[rstd].flatten(), weight, bias)

    others = (v for v in (rstd, weight, bias) if v is not None)
    return ChannelAffine((*vectors, *others), make, whole, norm.op.kwargs["together"])


def _of_gate(scale: int) -> ChannelAffine:
    def make(env: Env) -> Numbers:
        gate = env[scale].flatten()
        gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
        return torch.zeros_like(gate), torch.ones_like(gate), gate, torch.zeros_like(gate)

    return ChannelAffine((scale,), make)
