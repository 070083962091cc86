"""Rules of ops on volumes (N, C, D, H, W): a tile contains the whole depth, which is not an image axis.

Height and width follow the rules of images; along the depth, each block is computed as PyTorch computes the whole map.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...capture.program import Op, bind
from ..geometry import Gather, TransposedWindow, Window
from .base import Axes, Block, Env, Local, Maps, Node, Reduction, Refusal, Whole, arguments, part_of, rule
from .constants import Constants
from .resample import INTERPOLATE, blended, select
from .upsample import cropped

Triple = tuple[int, int, int]


def _triple(value: Any) -> Triple:
    """One number or three, as (depth, height, width)."""
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * 3 if len(value) == 1 else value  # pyright: ignore[reportReturnType]


def _need_volume(op: Op, maps: Maps, value: int, *axes: Axes) -> None:
    if len(maps.shape(value)) != 5 or maps.axes.get(value) not in (axes or ((3, 4),)) or maps.inputs(op) != [value]:
        raise Refusal(f"'{op.name}' needs a volume (N, C, D, H, W), and weights that do not depend on the image")


class _Windows:
    """The windows of an op along the three axes."""

    def __init__(self, op: Op, maps: Maps, value: int, kernel: Triple, stride: Triple, pad: Triple, dilation: Triple):
        sizes = maps.shape(value)[2:], maps.shape(op.outputs[0])[2:]
        every = (Window(*along) for along in zip(*sizes, kernel, stride, pad, dilation, strict=True))
        self.of_axis: dict[int, Window] = dict(zip((2, 3, 4), every, strict=True))
        self.axes = maps.axes[value]
        self.reads = {value: (self.of_axis[self.axes[0]], self.of_axis[self.axes[1]])}

    def padded(self, x: Tensor, block: Block, fill: float, most: Triple) -> tuple[Tensor, Triple]:
        """The padded input of a block, and the even padding, at most `most`, that is left to the op."""
        pads = {axis: window.padding(0, window.size_out) for axis, window in self.of_axis.items()}
        pads |= {self.axes[0]: block.pad[:2], self.axes[1]: block.pad[2:]}
        own = {axis: low if low == high <= most[axis - 2] else 0 for axis, (low, high) in pads.items()}
        amounts = [amount - own[axis] for axis in (4, 3, 2) for amount in pads[axis]]
        return F.pad(x, amounts, value=fill) if any(amounts) else x, (own[2], own[3], own[4])


@rule("conv3d")
def conv3d(op: Op, maps: Maps) -> Local:
    given = arguments(op, "input weight bias stride padding dilation groups", stride=1, padding=0, dilation=1, groups=1)
    value, weight, bias, groups = given["input"].value, given["weight"].value, given["bias"], given["groups"]
    _need_volume(op, maps, value, (2, 3), (2, 4), (3, 4))  # another axis in place of the depth, as in lambda layers
    kernel: Triple = tuple(maps.shape(weight)[-3:])  # pyright: ignore[reportAssignmentType]
    stride, dilation, pad = _triple(given["stride"]), _triple(given["dilation"]), given["padding"]
    if pad == "same":  # the odd row of an even kernel comes after
        pad = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    windows = _Windows(op, maps, value, kernel, stride, (0, 0, 0) if pad == "valid" else _triple(pad), dilation)

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x, even = windows.padded(env[value], block, 0.0, kernel)
        return (F.conv3d(x, env[weight], bind(bias, env), stride, even, dilation, groups),)

    return Local(op, windows.reads, (maps.axes[value],), run, fill=0.0)


@rule("max_pool3d", "max_pool3d_with_indices")
def max_pool3d(op: Op, maps: Maps) -> Local:
    given = arguments(op, "input kernel_size stride padding dilation", padding=0, dilation=1)
    value = given["input"].value
    _need_volume(op, maps, value)
    if len(op.outputs) > 1:
        raise Refusal(f"'{op.name}' with return_indices has no rule")
    kernel, stride = _triple(given["kernel_size"]), _triple(given["stride"] or given["kernel_size"])
    dilation = _triple(given["dilation"])
    windows = _Windows(op, maps, value, kernel, stride, _triple(given["padding"]), dilation)

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        most = kernel[0] // 2, kernel[1] // 2, kernel[2] // 2
        x, even = windows.padded(env[value], block, -math.inf, most)
        return (F.max_pool3d(x, kernel, stride, even, dilation),)

    return Local(op, windows.reads, ((3, 4),), run, fill=-math.inf)


@rule("avg_pool3d")
def avg_pool3d(op: Op, maps: Maps) -> Local:
    names = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
    given = arguments(op, names, padding=0, count_include_pad=True)
    value = given["input"].value
    _need_volume(op, maps, value)
    kernel, stride = _triple(given["kernel_size"]), _triple(given["stride"] or given["kernel_size"])
    include, divisor = given["count_include_pad"], given["divisor_override"]
    windows = _Windows(op, maps, value, kernel, stride, _triple(given["padding"]), (1, 1, 1))
    constants = Constants()

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x, _ = windows.padded(env[value], block, 0.0, (0, 0, 0))
        total = F.avg_pool3d(x, kernel, stride, divisor_override=divisor or 1)
        if divisor is not None:
            return (total,)
        spans = (0, total.shape[2]), block.rows, block.cols
        high, tall, wide = (
            constants.numbers(windows.of_axis[axis].counts(*span, include), x, x.dtype)
            for axis, span in zip((2, 3, 4), spans, strict=True)
        )
        return (total / (high[:, None, None] * tall[:, None] * wide),)

    return Local(op, windows.reads, ((3, 4),), run, fill=0.0)


@rule("adaptive_avg_pool3d", "adaptive_max_pool3d", "adaptive_max_pool3d_with_indices")
def adaptive_pool3d(op: Op, maps: Maps) -> Local | Reduction | Whole | list[Node]:
    value = op.inputs[0]
    _need_volume(op, maps, value)
    depth, *grid = maps.shape(op.outputs[0])[2:]
    if "avg" not in op.name or grid not in ([1, 1], list(maps.size(value))):
        return Whole(op)
    if (depth, *grid) == (1, 1, 1):
        return Reduction(op, value, "sum", math.prod(maps.shape(value)[2:]), (2, 3, 4), True)
    few = op.outputs[0]
    if grid == [1, 1]:
        few = maps.new_map((3, 4), (*maps.shape(value)[:2], depth, *maps.size(value)), like=op.outputs[0])

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (F.adaptive_avg_pool3d(env[value], (depth, None, None)),)

    local = Local(part_of(op, "depth", (value,), (few,)), {value: maps.pointwise(value)}, ((3, 4),), run)
    if few == op.outputs[0]:
        return local
    mean = replace(op, inputs=(few,), args=(), kwargs={})
    return [local, Reduction(mean, few, "sum", math.prod(maps.size(value)), (3, 4), True)]


@rule("conv_transpose3d")
def conv_transpose3d(op: Op, maps: Maps) -> Local:
    names = "input weight bias stride padding output_padding groups dilation"
    given = arguments(op, names, stride=1, padding=0, output_padding=0, groups=1, dilation=1)
    value, weight, bias = given["input"].value, given["weight"].value, given["bias"]
    _need_volume(op, maps, value)
    size, out, kernel = maps.shape(value)[2:], maps.shape(op.outputs[0])[2:], maps.shape(weight)[-3:]
    stride, padding, dilation = (_triple(given[name]) for name in ("stride", "padding", "dilation"))
    rows, cols = (TransposedWindow(size[i], out[i], kernel[i], stride[i], padding[i], dilation[i]) for i in (1, 2))
    along = (padding[0], 0, 0), (_triple(given["output_padding"])[0], 0, 0)

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        rest = env[weight], bind(bias, env), stride, *along, given["groups"], dilation
        return cropped(rows, cols, block, env[value], lambda x: F.conv_transpose3d(x, *rest))

    return Local(op, {value: (rows, cols)}, ((3, 4),), run)


def resampled_volume(op: Op, maps: Maps, value: int) -> Local:
    """`F.interpolate` of a volume with mode "trilinear" or "nearest"."""
    _need_volume(op, maps, value)
    given = arguments(op, INTERPOLATE, mode="nearest")
    mode, out = given["mode"], maps.shape(op.outputs[0])[2:]
    if mode not in ("trilinear", "nearest", "nearest-exact"):
        raise Refusal(f"'{op.name}' does not support mode='{mode}' for a volume; use 'trilinear' or 'nearest'")
    kwargs = {name: given[name] for name in ("mode", "align_corners", "recompute_scale_factor")}
    scale = given["scale_factor"]
    factors = None if scale is None else scale if isinstance(scale, (tuple, list)) else (scale,) * 3

    def along_depth(x: Tensor) -> Tensor:
        size: dict[str, Any] = {"size": (out[0], *x.shape[3:])}
        return F.interpolate(x, **kwargs, **(size if factors is None else {"scale_factor": (factors[0], 1.0, 1.0)}))

    if mode == "trilinear":
        of_plane = {"mode": "bilinear", "size": given["size"] and out[1:], "scale_factor": factors and factors[1:]}
        plane = replace(op, args=(), kwargs={k: v for k, v in given.items() if k != "input"} | of_plane)
        return blended(op, plane, maps, value, along_depth)

    def sources(axis: int) -> Gather:
        length, info = maps.size(value)[axis], maps.program.values[value]
        line = torch.arange(length, dtype=info.dtype if info.dtype == torch.float64 else torch.float32)
        shape, size = [1, 1, 1], [1, 1, 1]
        shape[axis + 1], size[axis + 1] = length, out[axis + 1]
        wanted: dict[str, Any] = (
            {"size": size}
            if factors is None
            else {"scale_factor": [factors[axis + 1] if d == axis + 1 else 1.0 for d in range(3)]}
        )
        found = F.interpolate(line.view(1, 1, *shape), **kwargs, **wanted)
        return Gather(length, out[axis + 1], tuple(found.flatten().long().tolist()))

    rows, cols, constants = sources(0), sources(1), Constants()

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x = along_depth(env[value])
        for dim, access, span in ((3, rows, block.rows), (4, cols, block.cols)):
            start = access.span(*span)[0]
            x = select(x, dim, constants.numbers([source - start for source in access.sources[slice(*span)]], x))
        return (x,)

    return Local(op, {value: (rows, cols)}, ((3, 4),), run)
