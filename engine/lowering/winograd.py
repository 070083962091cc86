"""3 x 3 convolutions in training on the CPU by Winograd's filtering (kernels/winograd.py), where that is faster.

    y = conv(x, w) + b        dx = conv(dy, w rotated by 180 degrees, channels and filters exchanged)

PyTorch computes the gradients of weights. In inference, onednn.py calls the same kernel.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import winograd
from ..module.first_order import ends_here
from .conv_chains import ConvChain
from .onednn import allowed, for_winograd, gains_by_winograd
from .ops import Block, Env, Local
from .ops.base import Run
from .ops.window import split_padding
from .stages import Packing, ProgramStage

_ONE = (1, 1)


def winograd_in_training(stage: ProgramStage) -> None:
    """Replace the convolutions of a stage that are faster with the kernel, if it is available."""
    for local in stage.locals:
        if local.op.name == "conv2d" and stage.program.values[local.op.outputs[0]].dtype == torch.float32:
            chain = ConvChain.of(local)
            if gains_by_winograd(stage, chain):
                _replace(stage, local, chain)


def _replace(stage: ProgramStage, local: Local, chain: ConvChain) -> None:
    value, weight, bias = chain.x, chain.weight, chain.bias
    packed, rotated = (stage.maps.new_value(like=weight) for _ in range(2))
    for number, for_input in ((packed, False), (rotated, True)):
        stage.packings.append(Packing(weight, number, functools.partial(_pack, for_input), reads_weight=True))

    def run(own: Run, valued: bool, env: Env, block: Block) -> tuple[Tensor, ...]:
        x = env[value]
        if not for_winograd(env[packed]) or x.numel() == 0:
            return own(env, block)
        given = x, env[weight], None if bias is None else env[bias], env[packed], env[rotated]
        return (_Convolution.apply(*given, block.pad, valued),)  # pyright: ignore

    unvalued = local.memory.unvalued
    assert unvalued is not None
    local.fill = None  # it adds its own padding
    local.run = functools.partial(run, local.run, True)
    local.memory = replace(local.memory, unvalued=functools.partial(run, unvalued, False))


def _pack(for_input: bool, weight: Tensor) -> Tensor:
    """The weight in the kernel's format; unchanged if the kernel must not be used."""
    usable = type(weight) is Tensor and weight.dtype == torch.float32 and weight.numel() and allowed()
    return winograd.pack(weight, for_input) if usable else weight


class _Convolution(torch.autograd.Function):
    """`F.conv2d(F.pad(x, pad), weight, bias)`; unvalued, a tensor of its shape of which only the backward is needed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        rotated: Tensor,
        pad: winograd.Padding,
        valued: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, rotated)
        ctx.pad, ctx.bias_sizes = pad, None if bias is None else list(bias.shape)
        top, bottom, left, right = pad
        if not valued:
            shape = x.shape[0], weight.shape[0], x.shape[2] + top + bottom - 2, x.shape[3] + left + right - 2
            return x.new_empty(()).expand(shape)
        y = winograd.conv3x3(x, packed, weight.shape[0], bias, pad=pad)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias) if y is None else y

    @staticmethod
    @ends_here
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rotated = ctx.saved_tensors
        dy = grads[0].contiguous(memory_format=torch.channels_last)
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        top, bottom, left, right = ctx.pad
        dx = dw = db = None
        if of_x:  # without the rows of the padding, whose gradient is not needed
            dx = winograd.conv3x3(dy, rotated, x.shape[1], pad=(2 - top, 2 - bottom, 2 - left, 2 - right))
        by_stock = [of_x and dx is None, of_weight, of_bias]
        if any(by_stock):
            even, uneven = split_padding(ctx.pad)
            padded = F.pad(x, uneven) if any(uneven) else x
            settings = _ONE, even, _ONE, False, (0, 0), 1
            found, dw, db = torch.ops.aten.convolution_backward(dy, padded, weight, ctx.bias_sizes, *settings, by_stock)
            if found is not None:
                dx = found.narrow(2, top - even[0], x.shape[2]).narrow(3, left - even[1], x.shape[3])
        return dx, dw, db, None, None, None, None
