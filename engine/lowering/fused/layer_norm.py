"""Layer normalisation over the channels of each pixel, alone or with the linear layer after it as one op.

    y = act(layer_norm(x) w^T + b)

Only x is saved, and the backward computes the rest again: PyTorch saves the normalised map, and for a ConvNeXt block's
first linear layer both input and output of GELU, four times as wide.

The linear layer may act on the channels of a channels-last map, or be a 1x1 convolution after a permute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ....kernels.activations import activate_reference
from ....kernels.conv2d import conv2d_act_grad, conv2d_backward
from ....kernels.layer_norm import layer_norm, layer_norm_backward
from ....kernels.tiles import MOST_NORM_CHANNELS
from ....kernels.windows import ConvGeometry
from ...capture.program import Op
from ..ops import Block, Env, Local
from ..ops.base import arguments, integers
from ..stages import ProgramStage, only_readers
from .conv import DTYPES, ConvSpec, add_to_sums, as_autocast_wants, is_pixelwise, weight_sums


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A layer norm: value numbers, eps, and the dtype of its output, which is not that of x under autocast."""

    x: int
    weight: int | None
    bias: int | None
    eps: float
    dtype: torch.dtype


class FusedLayerNorm(torch.autograd.Function):
    """The layer norm of one block, (N, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec, block: Block):
        ctx.save_for_backward(x, weight)
        ctx.spec, ctx.sum_of = spec, block.sum_of
        return layer_norm(x, weight, bias, spec.eps, spec.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, weight = ctx.saved_tensors
        dx, *sums = layer_norm_backward(grads[0], x, weight, ctx.spec.eps)
        _add_norm_sums(ctx, ctx.needs_input_grad[1:3], sums)
        return dx, None, None, None, None


class FusedNormLinear(torch.autograd.Function):
    """The layer norm of one block, (N, C, H, W), the linear layer after it and its activation."""

    @staticmethod
    def forward(ctx: Any, spec: NormSpec, linear: ConvSpec, block: Block, x: Tensor, *vectors: Tensor | None):
        norm_weight, norm_bias, weight, bias = vectors
        assert weight is not None
        ctx.save_for_backward(x, *vectors)
        ctx.spec, ctx.linear, ctx.sum_of = spec, linear, block.sum_of
        n = layer_norm(x, norm_weight, norm_bias, spec.eps, weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            z = F.linear(n.permute(0, 2, 3, 1), weight, None if bias is None else bias.to(weight.dtype))
        return activate_reference(z, linear.act).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
        dweight, dbias = weight_sums(ctx, ctx.linear, weight, *ctx.needs_input_grad[6:])
        (dy,), act, pixel = grads, ctx.linear.act, ConvGeometry()
        n, filters = layer_norm(x, norm_weight, norm_bias, ctx.spec.eps, weight.dtype), weight[:, :, None, None]
        if act != "none":
            dy = conv2d_act_grad(dy, n, filters, bias, act, pixel)
        dw = None if dweight is None else dweight[:, :, None, None]
        dn, _ = conv2d_backward(dy, n, filters, None, "none", pixel, wants_x=True, dw=dw, dshift=dbias)
        assert dn is not None
        dx, *sums = layer_norm_backward(dn, x, norm_weight, ctx.spec.eps)
        _add_norm_sums(ctx, ctx.needs_input_grad[4:6], sums)
        return None, None, None, dx, *[None] * 4


def _add_norm_sums(ctx: Any, wanted: Sequence[bool], sums: list[Tensor]) -> None:
    add_to_sums(ctx, zip((ctx.spec.weight, ctx.spec.bias), wanted, sums, strict=True))


def fuse_layer_norms(stage: ProgramStage, convs: dict[int, ConvSpec]) -> None:
    """Replace layer norms over channels by kernels, each with the linear layer that is its only reader.

    Args:
        convs: the fused convolutions by output; those that become part of another op are removed.
    """
    readers = only_readers(stage)
    for norm in list(stage.locals):
        spec = _norm_spec(stage, norm)
        if spec is None:
            continue
        chain, last = [norm], readers.get(norm.op.outputs[0])
        if last is not None and _is_to_nchw(last):
            chain, last = [norm, last], readers.get(last.op.outputs[0])
        linear = None if last is None else convs.get(last.op.outputs[0])
        if last is not None and linear is not None and is_pixelwise(stage, linear, chain[-1].op.outputs[0]):
            del convs[last.op.outputs[0]]
            _replace(stage, [*chain, last], spec, linear)
        else:
            norm.run = partial(_run_norm, spec)


def _norm_spec(stage: ProgramStage, local: Local) -> NormSpec | None:
    """The spec of a layer norm over the channels of an (N, H, W, C) map; None for other ops."""
    if local.op.name != "layer_norm":
        return None
    given = arguments(local.op, "input normalized_shape weight bias eps", eps=1e-5)
    value = given["input"].value
    shape = stage.maps.shape(value)
    over_channels = len(shape) == 4 and stage.maps.axes[value] == (1, 2) and len(given["normalized_shape"]) == 1
    if not over_channels or shape[3] > MOST_NORM_CHANNELS or stage.program.values[value].dtype not in DTYPES:
        return None
    weight, bias = (None if given[name] is None else given[name].value for name in ("weight", "bias"))
    return NormSpec(value, weight, bias, given["eps"], stage.program.values[local.op.outputs[0]].dtype)


def _is_to_nchw(local: Local) -> bool:
    """Whether an op is a permute of (N, H, W, C) to (N, C, H, W)."""
    if local.op.name != "permute":
        return False
    return [d % 4 for d in integers(local.op, "dims")] == [0, 3, 1, 2]


def _run_norm(spec: NormSpec, env: Env, block: Block) -> tuple[Tensor, ...]:
    weight, bias = (None if v is None else env[v] for v in (spec.weight, spec.bias))
    y = FusedLayerNorm.apply(env[spec.x].permute(0, 3, 1, 2), weight, bias, spec, block)
    return (y.permute(0, 2, 3, 1),)  # pyright: ignore


def _replace(stage: ProgramStage, chain: list[Local], spec: NormSpec, linear: ConvSpec) -> None:
    """Replace the norm, the permute and the linear layer by the fused op."""
    norm, last = chain[0], chain[-1]
    vectors = (spec.weight, spec.bias, linear.weight, linear.bias)

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        norm_weight, norm_bias, weight, bias = (None if v is None else env[v] for v in vectors)
        assert weight is not None
        weight = as_autocast_wants(weight).flatten(1)
        x = env[spec.x].permute(0, 3, 1, 2)
        y = FusedNormLinear.apply(spec, linear, block, x, norm_weight, norm_bias, weight, bias)
        return (y.permute(0, 2, 3, 1) if linear.channels_last else y,)  # pyright: ignore

    inputs = (spec.x, *(v for v in vectors if v is not None))
    op: Op = replace(last.op, name="fused_norm_linear", inputs=inputs)
    stage.replace(chain, Local(op, {spec.x: norm.reads[spec.x]}, last.axes, run))
