"""Rules of ops that read a window around each output: convolution, pooling, nearest upsampling.

Along each axis, output o reads inputs o*stride - padding + dilation*t, t = 0 .. kernel-1. The input window of a block
excludes rows outside the image; `Block.pad` has their number on each side. The op itself adds even padding; uneven
padding (a tile at one border) is added before.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...capture.program import Op, bind
from ..geometry import Gather, Window
from .base import Block, BlockMemory, Env, Local, Maps, Reduction, Refusal, arguments, need_nchw, pair, replay, rule
from .constants import Constants
from .resample import INTERPOLATE, bilinear, nearest, select, weighted
from .volumes import resampled_volume

_LANES = 16  # channels that oneDNN's AVX-512 kernels process at a time


Pair = tuple[int, int]


def _each_window(op: Op, maps: Maps, value: int) -> Local | None:
    """A local op on images that are windows of a larger one, (N * windows, C, h, w); None for a map in NCHW."""
    if len(maps.shape(value)) != 4 or maps.axes[value] != (0, 0) or maps.inputs(op) != [value]:
        return need_nchw(op, maps, value)
    return Local(op, {value: maps.pointwise(value)}, ((0, 0),) * len(op.outputs), replay(op))


def _windows(
    maps: Maps, op: Op, value: int, kernel: Pair, stride: Pair, pad: Pair, dilation: Pair
) -> tuple[Window, Window]:
    sizes = maps.size(value), maps.shape(op.outputs[0])[-2:]
    rows, cols = (Window(*along) for along in zip(*sizes, kernel, stride, pad, dilation, strict=True))
    return rows, cols


def split_padding(pad: tuple[int, int, int, int]) -> tuple[tuple[int, int], list[int]]:
    """Splits (top, bottom, left, right) into the even padding of an op and the rest in the order of `F.pad`."""
    top, bottom, left, right = pad
    rows = top if top == bottom else 0
    cols = left if left == right else 0
    return (rows, cols), [left - cols, right - cols, top - rows, bottom - rows]


@rule("conv2d")
def conv2d(op: Op, maps: Maps) -> Local:
    given = arguments(op, "input weight bias stride padding dilation groups", stride=1, padding=0, dilation=1, groups=1)
    value, weight = given["input"].value, given["weight"].value
    if weight in maps or value not in maps or (given["bias"] is not None and given["bias"].value in maps):
        raise Refusal("'conv2d' cannot use weights that depend on the image")
    kernel = pair(maps.shape(weight)[-2:])
    stride, dilation = pair(given["stride"]), pair(given["dilation"])
    padding = given["padding"]
    if maps.axes[value] != (2, 3) and {0, 1}.isdisjoint(maps.axes[value]) and len(maps.shape(value)) == 4:
        plain = padding in ("same", "valid") or pair(padding) == (0, 0)
        if kernel == stride == (1, 1) and plain:  # one matrix for all pixels, whatever the image axes
            return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), replay(op))
    if (windows := _each_window(op, maps, value)) is not None:
        return windows
    if padding == "same":  # the odd row of an even kernel comes after
        pad = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
    else:
        pad = (0, 0) if padding == "valid" else pair(padding)
    bias, groups = given["bias"], given["groups"]
    sliced = kernel == (1, 1) != stride

    def padded(x: Tensor, block: Block) -> tuple[Tensor, tuple[Any, ...]]:
        """The padded block, and the op's stride, padding, dilation and groups for it."""
        even, uneven = split_padding(block.pad)
        is_sliced = sliced and _exceeds_workspace(x)
        if is_sliced:
            even, uneven = (0, 0), [*block.pad[2:], *block.pad[:2]]
        if any(uneven):
            x = F.pad(x, uneven)
        if is_sliced:
            return x[:, :, :: stride[0], :: stride[1]], ((1, 1), even, dilation, groups)
        return x, (stride, even, dilation, groups)

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x, settings = padded(env[value], block)
        return (F.conv2d(x, env[weight], bind(bias, env), *settings),)

    def unvalued(env: Env, block: Block) -> tuple[Tensor, ...]:
        x, settings = padded(env[value], block)
        return (UnvaluedConv.apply(x, env[weight], bind(bias, env), block.size, *settings),)  # pyright: ignore

    windows = _windows(maps, op, value, kernel, stride, pad, dilation)
    memory = BlockMemory(unvalued=unvalued, spares=True, fresh_grads=frozenset([value]))
    return Local(op, {value: windows}, ((2, 3),), run, fill=0.0, memory=memory)


def _exceeds_workspace(x: Tensor) -> bool:
    """Whether a strided 1 x 1 convolution of this map must be a slice and a convolution without strides.

    For an NHWC map with fewer channels than its kernels process at a time, oneDNN 3.12 writes the gradient of the
    weights beyond its workspace, which corrupts other tensors or ends the process (uxlfoundation/oneDNN#6035).
    """
    return x.device.type != "cuda" and x.dtype == torch.float32 and x.shape[1] < _LANES


class UnvaluedConv(torch.autograd.Function):
    """A convolution of which only the backward is needed: the output has the right shape and no values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int], *settings: Any):
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.bias_sizes = settings, None if bias is None else list(bias.shape)
        return x.new_empty(()).expand(x.shape[0], weight.shape[0], *size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        dy = grads[0].to(x.dtype)
        wanted = [*ctx.needs_input_grad[:2], ctx.bias_sizes is not None and ctx.needs_input_grad[2]]
        result = torch.ops.aten.convolution_backward(
            dy, x, weight.to(x.dtype), ctx.bias_sizes, stride, padding, dilation, False, (0, 0), groups, wanted
        )
        return *result, None, None, None, None, None


@rule("max_pool2d", "max_pool2d_with_indices")
def max_pool2d(op: Op, maps: Maps) -> Local | Reduction:
    given = arguments(op, "input kernel_size stride padding dilation", padding=0, dilation=1)
    value = given["input"].value
    if (windows := _each_window(op, maps, value)) is not None:
        return windows
    indexed = len(op.outputs) > 1
    kernel, stride = pair(given["kernel_size"]), pair(given["stride"] or given["kernel_size"])
    pad, dilation = pair(given["padding"]), pair(given["dilation"])
    if kernel == maps.size(value) != (1, 1) and pad == (0, 0) and dilation == (1, 1) and not indexed:
        return Reduction(op, value, "max", 1, (2, 3), True, first_only=True)

    rows, cols = _windows(maps, op, value, kernel, stride, pad, dilation)
    width = maps.size(value)[1]

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x = env[value]
        even, uneven = split_padding(block.pad)
        if even[0] > kernel[0] // 2 or even[1] > kernel[1] // 2:
            even, uneven = (0, 0), [block.pad[2], block.pad[3], block.pad[0], block.pad[1]]
        if any(uneven):
            x = F.pad(x, uneven, value=-math.inf)
        if not indexed:
            return (F.max_pool2d(x, kernel, stride, even, dilation),)
        y, indices = F.max_pool2d(x, kernel, stride, even, dilation, return_indices=True)
        row = indices // x.shape[3] + (rows.span(*block.rows)[0] - uneven[2])
        col = indices % x.shape[3] + (cols.span(*block.cols)[0] - uneven[0])
        if uneven[2] or uneven[0]:  # the index of a window of -inf must be in the map, not in the padding
            row = torch.where(row < 0, row % dilation[0], row)
            col = torch.where(col < 0, col % dilation[1], col)
        return y, row * width + col

    if not indexed:
        return Local(op, {value: (rows, cols)}, ((2, 3),), run, fill=-math.inf)
    if kernel == stride and pad == (0, 0) and dilation == (1, 1):
        maps.pool_indices[op.outputs[1]] = kernel, maps.size(value)
    return Local(replace(op, name="indexed_max_pool2d"), {value: (rows, cols)}, ((2, 3),) * 2, run)


@rule("max_unpool2d")
def max_unpool2d(op: Op, maps: Maps) -> Local:
    """Writes each value to the index that a max-pooling without overlaps found; all other elements are zero."""
    given = arguments(op, "input indices kernel_size stride padding output_size", padding=0)
    value, index = given["input"].value, given["indices"].value
    known = maps.pool_indices.get(index)
    expected = pair(given["kernel_size"]), tuple(maps.shape(op.outputs[0])[-2:])
    if known is None or known != expected or value not in maps:
        raise Refusal(
            "'max_unpool2d' needs the indices of a max-pooling without overlaps of a map of the output's size"
        )
    need_nchw(op, maps, value)
    kernel, size = known
    few = maps.size(value)
    rows, cols = (
        Gather(few[i], size[i], tuple(min(o // kernel[i], few[i] - 1) for o in range(size[i]))) for i in (0, 1)
    )

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x, indices = env[value], env[index]
        (top, bottom), (left, right) = block.rows, block.cols
        row, col = indices // size[1] - top, indices % size[1] - left
        count = (bottom - top) * (right - left)  # one more element for indices outside
        inside = (row >= 0) & (row < bottom - top) & (col >= 0) & (col < right - left)
        indices = torch.where(inside, row * (right - left) + col, count).flatten(2)
        y = x.new_zeros(*x.shape[:2], count + 1).scatter(2, indices, x.flatten(2))
        return (y[:, :, :count].unflatten(2, (bottom - top, right - left)),)

    return Local(op, {value: (rows, cols), index: (rows, cols)}, ((2, 3),), run)


@rule("avg_pool2d")
def avg_pool2d(op: Op, maps: Maps) -> Local | Reduction:
    names = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
    given = arguments(op, names, padding=0, count_include_pad=True)
    value = given["input"].value
    if (windows := _each_window(op, maps, value)) is not None:
        return windows
    kernel, stride = pair(given["kernel_size"]), pair(given["stride"] or given["kernel_size"])
    pad, include, divisor = pair(given["padding"]), given["count_include_pad"], given["divisor_override"]
    if kernel == maps.size(value) != (1, 1) and pad == (0, 0):
        return Reduction(op, value, "sum", divisor or math.prod(kernel), (2, 3), True)
    height, width = _windows(maps, op, value, kernel, stride, pad, (1, 1))
    constants = Constants()

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x = env[value]
        if divisor is None:
            rows, cols = height.counts(*block.rows, include), width.counts(*block.cols, include)
            plain = set(rows) == {kernel[0]} and set(cols) == {kernel[1]}
        else:
            plain, rows, cols = True, [], []
        top, bottom, left, right = block.pad
        if any(block.pad):
            x = F.pad(x, [left, right, top, bottom])
        if plain:
            return (F.avg_pool2d(x, kernel, stride, divisor_override=divisor),)
        high, wide = (constants.numbers(counts, x, x.dtype) for counts in (rows, cols))
        counts = high[:, None] * wide
        return (F.avg_pool2d(x, kernel, stride, divisor_override=1) / counts,)

    return Local(op, {value: (height, width)}, ((2, 3),), run, fill=0.0)


@rule("interpolate", "upsample", "upsample_nearest")
def interpolate(op: Op, maps: Maps) -> Local | Reduction:
    value = op.inputs[0]
    if len(maps.shape(value)) == 5:
        return resampled_volume(op, maps, value)
    need_nchw(op, maps, value)
    given = arguments(op, INTERPOLATE, mode="nearest")
    mode = given["mode"]
    if mode == "bilinear" and not given["antialias"]:
        return bilinear(op, maps, value)
    if mode == "area" and tuple(maps.shape(op.outputs[0])[2:]) == (1, 1):
        return Reduction(op, value, "sum", math.prod(maps.size(value)), (2, 3), True)
    if mode in ("bilinear", "bicubic", "area"):
        return weighted(op, maps, value)
    if mode not in ("nearest", "nearest-exact"):
        raise Refusal(
            f"'{op.name}' does not support mode='{mode}' for a map; use 'nearest', 'bilinear', 'bicubic' or 'area'"
        )
    rows, cols = (nearest(op, maps, value, axis) for axis in (0, 1))
    constants = Constants()

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x = env[value]
        x = _repeat(x, 2, rows, block.rows, constants)
        return (_repeat(x, 3, cols, block.cols, constants),)

    return Local(op, {value: (rows, cols)}, ((2, 3),), run)


def _repeat(x: Tensor, dim: int, access: Gather, span: tuple[int, int], constants: Constants) -> Tensor:
    """The input rows, each repeated as often as the outputs of `span` read it."""
    start, end = access.span(*span)
    indices = [source - start for source in access.sources[slice(*span)]]
    if indices == list(range(end - start)):
        return x
    return select(x, dim, constants.numbers(indices, x))
