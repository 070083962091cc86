"""Convolution, activation and 3x3/2 max-pooling of the image as one op, without storing the two largest maps.

    y = maxpool(act(conv(x, w) + b))

One line of convolution outputs between two tiles is computed twice. Its halo, and everything between x and y, is not
stored: one byte for each element of y (`spots`) records for the backward where its gradient goes. The op has no
gradient of the image: if one is needed, the ops are not fused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ....kernels.dtypes import sum_dtype
from ....kernels.stem import stem, stem_gradients
from ....kernels.stem_reference import ACTIVATIONS
from ..geometry import Chain, Window
from ..ops import Block, Env, Local
from ..stages import ProgramStage, only_readers
from .conv import ConvSpec
from .pool import PoolSpec

_MOST_FILTERS = 128


class FusedStem(torch.autograd.Function):
    """The stem of one block; `padding` of the convolution and `pool_padding` are (top, bottom, left, right)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ConvSpec,
        padding: list[int],
        pool_padding: list[int],
        block: Block,
        keep: bool,
    ):
        ctx.spec, ctx.sum_of = spec, block.sum_of
        ctx.settings = (spec.geometry(padding), pool_padding, spec.act)
        y, spots = stem(x, weight, bias, *ctx.settings, keep)
        if keep:
            ctx.save_for_backward(spots, x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        spots, x, weight, bias = ctx.saved_tensors
        dw, dbias = stem_gradients(grads[0], spots, x, weight, bias, *ctx.settings)
        wide = sum_dtype(weight.dtype)
        if ctx.needs_input_grad[1]:
            ctx.sum_of(ctx.spec.weight, wide, dw)
        if ctx.needs_input_grad[2]:
            ctx.sum_of(ctx.spec.bias, wide, dbias)
        return (None,) * 8


def fuse_stem(stage: ProgramStage, convs: dict[int, ConvSpec], pools: dict[int, PoolSpec]) -> None:
    """Fuse the convolution of the image with the pooling after it, if there is one."""
    readers = only_readers(stage)
    for conv in stage.locals:
        middle = conv.op.outputs[0]
        spec, pooling = convs.get(middle), readers.get(middle)
        if spec is None or pooling is None:
            continue
        pool = pools.get(pooling.op.outputs[0])
        if pool is not None and _fits(stage, spec, pool, pooling):
            del convs[middle], pools[pooling.op.outputs[0]]
            _join(stage, conv, pooling, spec)
            return


def _fits(stage: ProgramStage, spec: ConvSpec, pool: PoolSpec, pooling: Local) -> bool:
    filters = stage.program.values[spec.weight].shape[0]
    return (
        spec.x == stage.image
        and spec.residual is None
        and spec.act in ACTIVATIONS
        and spec.groups == 1
        and spec.dilation == pool.dilation == (1, 1)
        and filters <= _MOST_FILTERS
        and (pool.kernel, pool.stride) == ((3, 3), (2, 2))
        and all(isinstance(a, Window) and a.padding(a.size_out - 1, a.size_out)[1] <= 1 for a in pooling.reads[pool.x])
    )


def _join(stage: ProgramStage, conv: Local, pooling: Local, spec: ConvSpec) -> None:
    middle = conv.op.outputs[0]
    first, second = conv.reads[spec.x], pooling.reads[middle]
    rows, cols = (Chain(a, b) for a, b in zip(first, second, strict=True))  # pyright: ignore[reportArgumentType]

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        weight, bias = env[spec.weight], None if spec.bias is None else env[spec.bias]
        padding: list[int] = []
        pool_padding: list[int] = []
        for chain, span in ((rows, block.rows), (cols, block.cols)):
            pool_padding += chain.second.padding(*span)
            padding += chain.first.padding(*chain.second.span(*span))
        keep = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
        return (FusedStem.apply(env[spec.x], weight, bias, spec, padding, pool_padding, block, keep),)  # pyright: ignore

    op = replace(conv.op, name="fused_stem", outputs=pooling.op.outputs)
    stage.replace([conv, pooling], Local(op, {spec.x: (rows, cols)}, pooling.axes, run))
