"""Convolution, residual sum and activation as one op of the stage, run by `gigamorph.kernels`.

    y = act(conv(x, w) + b + residual)

PyTorch saves the outputs of the convolution and of the activation; this op saves only y (and the input of SiLU, GELU
and hard-swish). In the backward, the slope of the activation is applied

- by the readers of y (masks.py), if every reader can;
- else in one pass over the gradient: the result is the residual's gradient and the input of the kernels of dx and dw;
- by the kernel of dw when it loads the gradient, if only dw is needed.

Gradients of weights are added to float32 buffers in place, tile after tile. A linear layer on the channels of a
channels-last map is a convolution with a 1x1 filter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ....kernels.activations import MASKS
from ....kernels.conv2d import conv2d_backward, conv2d_forward, conv2d_moments
from ....kernels.dtypes import sum_dtype
from ....kernels.pointwise import act_grad
from ....kernels.windows import ConvGeometry, placed
from ..conv_chains import ACTIVATIONS, ConvChain, find_chains, fused_op
from ..ops import Block, Env, Local
from ..ops.base import BlockMemory, Rect
from ..stages import ProgramStage

DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(slots=True)
class ConvSpec(ConvChain):
    """A convolution by the kernels.

    Attributes:
        masked: whether all readers of the output apply the activation's slope to its gradient.
        input_act: the activation whose slope is applied to the gradient of x, because x is masked.
        gathers: whether the slope is applied to the sum of all gradients of x: see `Gather`.
    """

    masked: bool = False
    input_act: str = "none"
    gathers: bool = False

    def geometry(self, padding: Sequence[int]) -> ConvGeometry:
        """The convolution's geometry with the padding of a block."""
        return ConvGeometry.of(self.stride, padding, self.dilation, self.groups)


class FusedConv(torch.autograd.Function):
    """The fused convolution of one block; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        spec: ConvSpec,
        block: Block,
        valued: bool = True,
    ):
        needs = any(ctx.needs_input_grad)
        geometry = spec.geometry(block.pad)
        ctx.spec, ctx.geometry, ctx.sum_of, ctx.parts = spec, geometry, block.sum_of, block.parts
        if not valued:
            ctx.save_for_backward(x, weight, None)
            return FusedConv._with_input(ctx, x.new_empty(()).expand(x.shape[0], weight.shape[0], *block.size), x)
        keep_z = needs and spec.act != "none" and spec.act not in MASKS
        z = None
        if block.shares is not None and not spec.channels_last:  # nothing is fused after a reduced map
            y, *moments = conv2d_moments(x, weight, bias, geometry, block.margin)
            block.shares[spec.y] = tuple(part[:, :, None, None] for part in moments)
        else:
            y, z = conv2d_forward(x, weight, bias, residual, geometry, spec.act, keep_z, block.margin)
        y = y[:, :, block.margin[0] :, block.margin[1] :]
        if needs:
            ctx.save_for_backward(x, weight, None if spec.act == "none" or spec.masked else (z if keep_z else y))
        return FusedConv._with_input(ctx, y, x)

    @staticmethod
    def _with_input(ctx: Any, y: Tensor, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """y; if this op gathers gradients, also x for its later readers."""
        if not ctx.spec.gathers:
            return y
        ctx.set_materialize_grads(False)
        again = x.narrow(0, 0, x.shape[0])
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(again)
        return y, again

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):
        dy, others = grads[0], grads[1] if ctx.spec.gathers else None
        x, weight, gate = ctx.saved_tensors
        spec = ctx.spec
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        others, at = _gathered(others, ctx.parts, x)
        if dy is None:
            assert others is not None
            others = placed(others, at, x.shape[2:])
            # A copy, because another branch may have the same tensor.
            dx = others.clone() if spec.input_act == "none" else act_grad(others, x, spec.input_act)
            return dx, None, None, None, None, None, None
        dw, dbias = weight_sums(ctx, spec, weight, wants_weight, wants_bias)
        wanted = {"wants_x": wants_x, "wants_residual": wants_residual, "dw": dw, "dshift": dbias}
        more = {"addend": others, "addend_at": at, "input_act": spec.input_act}
        dx, dresidual = conv2d_backward(dy, x, weight, gate, spec.act, ctx.geometry, **wanted, **more)
        return dx, None, None, dresidual, None, None, None


def _gathered(
    others: Tensor | None, parts: list[tuple[Rect, Tensor]] | None, x: Tensor
) -> tuple[Tensor | None, tuple[int, int]]:
    """The sum of the gradients of x from other readers, or of a part of x that begins at a row and column."""
    if not parts:
        return others, (0, 0)
    (top, _, left, _), given = parts.pop()
    if others is None and not parts:
        return given, (top, left)
    total = placed(given, (top, left), x.shape[2:])  # a new map: a part is smaller than the block
    for (top, bottom, left, right), part in parts:
        total[:, :, top:bottom, left:right] += part
    parts.clear()
    return (total if others is None else total.add_(others)), (0, 0)


def weight_sums(
    ctx: Any, spec: ConvSpec, weight: Tensor, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The buffers that sum the gradients of weight (in its shape) and bias over tiles; None if neither is wanted.

    The kernels add to the bias's buffer only together with the weight's, so an unwanted weight gradient is discarded.
    """
    if not wants_weight and not wants_bias:
        return None, None
    wide = sum_dtype(weight.dtype)
    dw = ctx.sum_of(spec.weight, wide) if wants_weight else torch.zeros_like(weight, dtype=wide)
    return dw.reshape(weight.shape), ctx.sum_of(spec.bias, wide) if wants_bias else None


def add_to_sums(ctx: Any, sums: Iterable[tuple[int | None, bool, Tensor]]) -> None:
    """Add a tile's gradients of values to those of the other tiles.

    Args:
        sums: number of the value, whether its gradient is wanted, and this tile's part of it.
    """
    for value, wanted, total in sums:
        if wanted:
            ctx.sum_of(value, total.dtype, total)


def as_autocast_wants(x: Tensor) -> Tensor:
    """The input cast as autocast does for PyTorch's convolutions; kernels do not see autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.dtype == torch.float32 else x


def fuse_convolutions(stage: ProgramStage) -> dict[int, ConvSpec]:
    """Replace convolutions and the sums and activations after them by kernels; returns them by output."""
    fused: dict[int, ConvSpec] = {}
    for chain in find_chains(stage, DTYPES, frozenset(ACTIVATIONS.values())):
        spec = ConvSpec(*(getattr(chain, f.name) for f in fields(chain)))
        fused[spec.y] = spec
        _replace(stage, spec)
    return fused


def is_pixelwise(stage: ProgramStage, spec: ConvSpec, value: int) -> bool:
    """Whether a convolution of a map is a linear layer on the channels of each pixel without a residual sum."""
    shape = stage.program.values[spec.weight].shape
    pixel = spec.channels_last or (tuple(shape[2:]) == (1, 1) and spec.stride == (1, 1) and spec.groups == 1)
    return pixel and spec.x == value and spec.residual is None and stage.maps.size(spec.y) == stage.maps.size(value)


def _replace(stage: ProgramStage, spec: ConvSpec) -> None:
    def run(env: Env, block: Block, valued: bool = True) -> tuple[Tensor, ...]:
        x, weight = env[spec.x], env[spec.weight]
        bias = None if spec.bias is None else env[spec.bias]
        residual = None if spec.residual is None else env[spec.residual]
        x = as_autocast_wants(x)
        if residual is not None:
            residual = residual.to(x.dtype)
        if spec.channels_last:
            x, residual = (None if t is None else t.permute(0, 3, 1, 2) for t in (x, residual))
            weight = weight[:, :, None, None]
        if spec.gathers:
            return FusedConv.apply(x, weight, bias, residual, spec, block, valued)  # pyright: ignore
        y = FusedConv.apply(x, weight, bias, residual, spec, block, valued)
        return (y.permute(0, 2, 3, 1) if spec.channels_last else y,)  # pyright: ignore

    linear = spec.act == "none" and spec.residual is None
    unvalued = partial(run, valued=False) if linear else None
    op, axes = fused_op(spec, "fused_conv2d"), spec.members[-1].axes
    memory = BlockMemory(leaves_room=True, unvalued=unvalued, spares=True)
    if spec.residual != spec.x:
        reused = frozenset([spec.residual]) - {None}
        memory = replace(memory, fresh_grads=frozenset([spec.x]), reused_grads=reused)
    stage.replace(spec.members, Local(op, spec.reads(stage), axes, run, memory=memory))
