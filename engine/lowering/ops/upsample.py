"""Rules of ops whose inputs spread over several outputs: transposed convolution, `F.fold` and pixel shuffle."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ...capture.program import Op, bind
from ..geometry import Gather, TransposedWindow
from .base import Block, Env, Local, Maps, Refusal, arguments, need_nchw, pair, rule


def _outer(access: TransposedWindow, lo: int, hi: int) -> tuple[int, int, int]:
    """Offsets of the outputs [lo, hi) in the result of the input window without padding.

    Returns:
        The rows of zeros to add before and after the window, and the first row of the outputs in the result.
    """
    start, end = access.span(lo, hi)
    first = min(start, (lo + access.pad) // access.stride)  # its own outputs begin at or before `lo`
    last = max(end, -((access.reach - hi + 1 - access.pad) // access.stride) + 1)  # its outputs end at or after hi-1
    return start - first, last - end, lo + access.pad - first * access.stride


def cropped(
    rows: TransposedWindow, cols: TransposedWindow, block: Block, x: Tensor, function: Callable[[Tensor], Tensor]
) -> tuple[Tensor]:
    """The outputs of a block, of a function without padding of the block's inputs."""
    (above, below, top), (before, after, left) = _outer(rows, *block.rows), _outer(cols, *block.cols)
    amounts, (height, width) = [before, after, above, below], block.size
    y = function(F.pad(x, amounts) if any(amounts) else x)
    return (y[..., top : top + height, left : left + width],)


@rule("conv_transpose2d")
def conv_transpose2d(op: Op, maps: Maps) -> Local:
    names = "input weight bias stride padding output_padding groups dilation"
    given = arguments(op, names, stride=1, padding=0, groups=1, dilation=1)
    value, weight = given["input"].value, given["weight"].value
    if weight in maps or value not in maps or (given["bias"] is not None and given["bias"].value in maps):
        raise Refusal("'conv_transpose2d' cannot use weights that depend on the image")
    need_nchw(op, maps, value)
    size, out = maps.size(value), maps.shape(op.outputs[0])[-2:]
    kernel = pair(maps.shape(weight)[-2:])
    stride, padding, dilation = (pair(given[name]) for name in ("stride", "padding", "dilation"))
    rows, cols = (TransposedWindow(size[i], out[i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    bias, groups = given["bias"], given["groups"]

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        rest = env[weight], bind(bias, env), stride, 0, 0, groups, dilation
        return cropped(rows, cols, block, env[value], lambda x: F.conv_transpose2d(x, *rest))

    return Local(op, {value: (rows, cols)}, ((2, 3),), run)


@rule("fold")
def fold(op: Op, maps: Maps) -> Local:
    """The inverse of `F.unfold`: columns of a flattened map become windows of a map, summed where they overlap."""
    given = arguments(op, "input output_size kernel_size dilation padding stride", dilation=1, padding=0, stride=1)
    value, out = given["input"].value, pair(given["output_size"])
    kernel, dilation, padding, stride = (pair(given[n]) for n in ("kernel_size", "dilation", "padding", "stride"))
    grid = tuple((out[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    if maps.axes[value] != (2, 2) or maps.merged(value) or maps.size(value) != grid:
        raise Refusal("'fold' needs columns that are the positions of the image in row-major order")
    rows, cols = (TransposedWindow(grid[i], out[i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1))

    def folded(x: Tensor) -> Tensor:
        size = [s * (n - 1) + d * (k - 1) + 1 for s, n, d, k in zip(stride, x.shape[2:], dilation, kernel, strict=True)]
        return F.fold(x.flatten(2), tuple(size), kernel, dilation, 0, stride)

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        (start, end), (first, last) = rows.span(*block.rows), cols.span(*block.cols)
        return cropped(rows, cols, block, env[value].unflatten(2, (end - start, last - first)), folded)

    return Local(op, {value: (rows, cols)}, ((2, 3),), run)


@rule("pixel_shuffle")
def pixel_shuffle(op: Op, maps: Maps) -> Local:
    given = arguments(op, "input upscale_factor")
    value, r = given["input"].value, given["upscale_factor"]
    need_nchw(op, maps, value)
    rows, cols = (Gather(n, n * r, tuple(o // r for o in range(n * r))) for n in maps.size(value))

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        top, left = block.rows[0] % r, block.cols[0] % r
        height, width = block.size
        return (F.pixel_shuffle(env[value], r)[:, :, top : top + height, left : left + width],)

    return Local(op, {value: (rows, cols)}, ((2, 3),), run)
