"""Convolution, residual sum and activation as one op of the stage, run by `gigamorph.kernels`.

    y = act(conv(x, w) + b + residual)

Stock PyTorch keeps the convolution's output and the activation's; here y alone is kept (and what SiLU, GELU and
hard-swish are applied to). In the backward the slope of the activation is applied

- by whoever reads y (masks.py), where every reader can;
- else in one pass over the gradient: the result is the residual's gradient, and what dx and dw are made of;
- as the kernel of dw loads it, where dw alone is wanted.

Gradients of weights are added to float32 buffers in place, tile after tile. A linear layer on the channels of a
channels-last map is a convolution with a filter of one pixel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ....kernels.activations import MASKS
from ....kernels.conv2d import conv2d_backward, conv2d_forward, conv2d_moments
from ....kernels.dtypes import sum_dtype
from ....kernels.windows import ConvGeometry
from ...capture.trace import Op, Ref
from ..geometry import Window
from ..ops import Block, Env, Local, VectorOp
from ..ops.base import arguments
from ..stages import Stage, private_maps, readers_of, vector_inputs

_ACTIVATIONS = {"relu": "relu", "relu6": "relu6", "silu": "silu", "hardswish": "hardswish", "gelu": "gelu"}
DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(slots=True)
class ConvSpec:
    """A fused convolution: value numbers and settings, without padding (that depends on the tile).

    Attributes:
        act: the activation.
        channels_last: whether x, y and residual have shape (N, H, W, C) and the weight (K, C): a linear layer.
        masked: whether all readers of the output apply the activation's slope to its gradient.
        input_act: the activation whose slope is applied to the gradient of x, because x is masked.
        y: the output, once it is known what is fused.
    """

    x: int
    weight: int
    bias: int | None
    residual: int | None
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    channels_last: bool = False
    act: str = "none"
    masked: bool = False
    input_act: str = "none"
    y: int = -1

    def geometry(self, padding: Sequence[int]) -> ConvGeometry:
        """Where the filter lies, with the padding of a block."""
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
        ctx.spec, ctx.geometry, ctx.sum_of = spec, geometry, block.sum_of
        if not valued:
            size = block.rows[1] - block.rows[0], block.cols[1] - block.cols[0]
            ctx.save_for_backward(x, weight, None)
            return x.new_empty(()).expand(x.shape[0], weight.shape[0], *size)
        keep_z = needs and spec.act != "none" and spec.act not in MASKS
        z = None
        if block.shares is not None and not spec.channels_last:  # nothing is fused after a map that is reduced
            y, *moments = conv2d_moments(x, weight, bias, geometry, block.margin)
            block.shares[spec.y] = tuple(part[:, :, None, None] for part in moments)
        else:
            y, z = conv2d_forward(x, weight, None, bias, residual, geometry, spec.act, keep_z, block.margin)
        y = y[:, :, block.margin[0] :, block.margin[1] :]
        if needs:
            ctx.save_for_backward(x, weight, None if spec.act == "none" or spec.masked else (z if keep_z else y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        (dy,) = grads
        x, weight, gate = ctx.saved_tensors
        spec = ctx.spec
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        dw, dbias = weight_sums(ctx, spec, weight, wants_weight, wants_bias)
        dx, dresidual = conv2d_backward(
            dy,
            x,
            weight,
            gate,
            spec.act,
            ctx.geometry,
            wants_x=wants_x,
            wants_residual=wants_residual,
            dw=dw,
            dshift=dbias,
            input_act=spec.input_act,
        )
        return dx, None, None, dresidual, None, None, None


def weight_sums(
    ctx: Any, spec: ConvSpec, weight: Tensor, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The buffers of all tiles that gradients of weight (in its shape) and bias are added to; None if none is wanted.

    The kernels add to the bias's only beside the weight's: where that is not wanted, it is lost.
    """
    if not wants_weight and not wants_bias:
        return None, None
    wide = sum_dtype(weight.dtype)
    dw = ctx.sum_of(spec.weight, wide) if wants_weight else torch.zeros_like(weight, dtype=wide)
    return dw.reshape(weight.shape), ctx.sum_of(spec.bias, wide) if wants_bias else None


def add_to_sums(ctx: Any, sums: Iterable[tuple[int | None, bool, Tensor]]) -> None:
    """Add a tile's gradients of values to those of the other tiles.

    Args:
        sums: number of the value, whether its gradient is wanted, and what this tile gives of it.
    """
    for value, wanted, total in sums:
        if wanted:
            ctx.sum_of(value, total.dtype).add_(total)


def _depths(stage: Stage) -> dict[int, int]:
    """Ops on the longest way from the image to each map."""
    depths = dict.fromkeys(stage.sources, 0)
    for local in stage.locals:
        depth = 1 + max(depths.get(v, 0) for v in local.reads)
        depths.update(dict.fromkeys(local.op.outputs, depth))
    return depths


def as_autocast_wants(x: Tensor) -> Tensor:
    """What stock convolutions make of their input under autocast; kernels are not told of it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.dtype == torch.float32 else x


def fuse_convolutions(stage: Stage) -> dict[int, ConvSpec]:
    """Replace convolutions and the sums and activations after them; the fused ones by their output."""
    readers, private, depths = readers_of(stage), private_maps(stage), _depths(stage)
    values = stage.program.values
    fused: dict[int, ConvSpec] = {}
    taken: set[int] = set()  # outputs of ops that are part of a fused one, or read by its sum
    # The deepest convolution of a sum takes it: what it waits for is there by then.
    convs = [local for local in stage.locals if local.op.name == "conv2d" or _is_pixel_linear(stage, local)]
    for conv in sorted(convs, key=lambda c: -depths[c.op.outputs[0]]):
        own = arguments(conv.op, "input weight bias stride padding dilation groups", dilation=1, groups=1)
        output = conv.op.outputs[0]
        if values[output].dtype not in DTYPES:
            continue
        height, width = conv.reads[own["input"].value]
        assert isinstance(height, Window) and isinstance(width, Window)
        spec = ConvSpec(
            own["input"].value,
            own["weight"].value,
            None if own["bias"] is None else own["bias"].value,
            None,
            (height.stride, width.stride),
            (height.dilation, width.dilation),
            own["groups"],
            channels_last=conv.op.name == "linear",
        )
        chain = [conv]

        def follower(chain: list[Local] = chain) -> Local | None:
            """What alone reads the chain's output; dropout that drops nothing is passed over."""
            while True:
                found = readers.get(chain[-1].op.outputs[0], [])
                if len(found) != 1 or chain[-1].op.outputs[0] not in private or found[0].op.outputs[0] in taken:
                    return None
                if found[0].op.name != "dropout" or found[0].random:
                    return found[0]
                chain.append(found[0])

        if (next_op := follower()) is not None:
            scale = _channel_scale(stage, next_op, chain[-1].op.outputs[0], spec.channels_last)
            if scale is not None:
                _fold_scale(stage, spec, scale)
                chain.append(next_op)
                next_op = follower()
        if next_op is not None:
            spec.residual = other_summand(stage, next_op, chain[-1].op.outputs[0])
            if spec.residual is not None:
                chain.append(next_op)
                next_op = follower()
        if next_op is not None and (act := activation_of(next_op.op)) is not None:
            spec.act = act
            chain.append(next_op)
        taken.update(local.op.outputs[0] for local in chain)
        spec.y = chain[-1].op.outputs[0]
        fused[spec.y] = spec
        _replace(stage, chain, spec)
    stage.vectors = vector_inputs(stage)
    return fused


def is_pixelwise(stage: Stage, spec: ConvSpec, value: int) -> bool:
    """Whether a convolution of a map is a linear layer on the channels of each pixel, and nothing is added to it."""
    shape = stage.program.values[spec.weight].shape
    pixel = spec.channels_last or (tuple(shape[2:]) == (1, 1) and spec.stride == (1, 1) and spec.groups == 1)
    return pixel and spec.x == value and spec.residual is None and stage.maps.size(spec.y) == stage.maps.size(value)


def _is_pixel_linear(stage: Stage, local: Local) -> bool:
    return local.op.name == "linear" and all(
        len(stage.maps.shape(v)) == 4 and stage.maps.axes[v] == (1, 2) for v in (*local.reads, *local.op.outputs)
    )


def _channel_scale(stage: Stage, local: Local, value: int, channels_last: bool) -> int | None:
    """The vector that multiplies `value` channel by channel (a layer scale), if the op is that product."""
    operands = [arg.value for arg in local.op.args if isinstance(arg, Ref)]
    if local.op.name.strip("_") not in ("mul", "imul", "rmul") or len(operands) != 2 or value not in operands:
        return None
    scale = operands[1] if operands[0] == value else operands[0]
    if scale == value or scale in stage.maps:
        return None
    values = stage.program.values
    shape = list(values[scale].shape)
    channels = values[value].shape[3 if channels_last else 1]
    wanted = [channels] if channels_last else [channels, 1, 1]
    same_dtype = values[scale].dtype == values[value].dtype == values[local.op.outputs[0]].dtype
    return (
        scale
        if same_dtype and len(shape) <= 4 and [1] * (4 - len(shape)) + shape == [1] * (4 - len(wanted)) + wanted
        else None
    )


def _fold_scale(stage: Stage, spec: ConvSpec, scale: int) -> None:
    """Multiply weight and bias by a layer scale, once per step and by ordinary autograd."""
    values = stage.program.values
    weight, bias = spec.weight, spec.bias
    made = range(len(values), len(values) + (1 if bias is None else 2))
    values.extend(values[v] for v in (weight, bias) if v is not None)

    def fold(env: Env) -> tuple[Tensor, ...]:
        s, w = env[scale].reshape(-1), env[weight]
        scaled = w * s.reshape(-1, *[1] * (w.dim() - 1))
        return (scaled,) if bias is None else (scaled, env[bias] * s)

    stage.prelude.append(VectorOp(fold, tuple(v for v in (weight, bias, scale) if v is not None), tuple(made)))
    spec.weight, spec.bias = made[0], None if bias is None else made[1]


def other_summand(stage: Stage, local: Local, value: int) -> int | None:
    """The map that is added to `value`, of the same shape and dtype, if the op is that sum."""
    op, values = local.op, stage.program.values
    operands = [arg.value for arg in op.args if isinstance(arg, Ref)]
    if op.name.strip("_") not in ("add", "iadd") or len(operands) != 2 or op.kwargs or value not in operands:
        return None
    other = operands[1] if operands[0] == value else operands[0]
    alike = all(values[other].shape == values[v].shape for v in (value, op.outputs[0]))
    same_dtype = values[other].dtype == values[value].dtype == values[op.outputs[0]].dtype
    return other if other != value and other in stage.maps and alike and same_dtype else None


def activation_of(op: Op) -> str | None:
    name = op.name.removesuffix("_")
    if name == "gelu" and op.kwargs.get("approximate", "none") != "none":
        return None
    return _ACTIVATIONS.get(name) if name == "gelu" or not set(op.kwargs) - {"inplace"} else None


def _replace(stage: Stage, chain: list[Local], spec: ConvSpec) -> None:
    """Put one op at the place of the last of a chain."""
    first, last = chain[0], chain[-1]
    reads = dict(first.reads)
    if spec.residual is not None:
        reads[spec.residual] = stage.maps.pointwise(spec.residual)
    inputs = [spec.x, spec.weight, *(v for v in (spec.bias, spec.residual) if v is not None)]
    op = replace(first.op, name="fused_conv2d", args=(), kwargs={}, inputs=tuple(inputs), outputs=last.op.outputs)

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
        y = FusedConv.apply(x, weight, bias, residual, spec, block, valued)
        return (y.permute(0, 2, 3, 1) if spec.channels_last else y,)  # pyright: ignore

    linear = spec.act == "none" and spec.residual is None
    unvalued = partial(run, valued=False) if linear else None
    local = Local(op, reads, last.axes, run, leaves_room=True, unvalued=unvalued)
    stage.locals[next(i for i, other in enumerate(stage.locals) if other is last)] = local
    dropped = {id(other) for other in chain[:-1]}
    stage.locals = [other for other in stage.locals if id(other) not in dropped]
