"""Bilinear resampling: each output blends two neighbouring inputs along each axis."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import Gather
from ..trace import Op
from .base import Block, Env, Local, Maps, arguments

INTERPOLATE = "input size scale_factor mode align_corners recompute_scale_factor antialias"


def positions(op: Op, size_in: int, size_out: int, axis: int) -> Tensor:
    """Where every output of an interpolation lies among the inputs of an axis, read off PyTorch itself (float64)."""
    given = arguments(op, INTERPOLATE, mode="nearest")
    ramp = torch.arange(size_in, dtype=torch.float64).reshape(1, 1, -1, 1)
    scale = given["scale_factor"]
    kwargs: dict[str, object] = {"mode": given["mode"], "align_corners": given["align_corners"]}
    if given["size"] is not None:
        kwargs["size"] = (size_out, 1)
    else:
        factors = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
        kwargs |= {"scale_factor": (factors[axis], 1.0), "recompute_scale_factor": given["recompute_scale_factor"]}
    return F.interpolate(ramp, **kwargs).flatten()  # pyright: ignore[reportArgumentType]


def _behind(op: Op, size_in: int, size_out: int, axis: int) -> Tensor:
    """Which outputs of an interpolation lie behind the middle of the last input of an axis."""
    given = arguments(op, INTERPOLATE)
    if given["align_corners"]:
        return torch.zeros(size_out, dtype=torch.bool)
    scale, factor = size_in / size_out, given["scale_factor"]
    if factor is not None and not given["recompute_scale_factor"]:
        scale = 1 / (factor[axis] if isinstance(factor, (tuple, list)) else factor)
    return (torch.arange(size_out, dtype=torch.float64) + 0.5) * scale - 0.5 > size_in - 1


class _Blend:
    """One axis: the two inputs of every output, and the weight of the second."""

    def __init__(self, op: Op, size_in: int, size_out: int, axis: int):
        places = positions(op, size_in, size_out, axis).clamp(0, size_in - 1)
        lower = places.floor().cummax(0).values
        weights = (places - lower).clamp(min=0)
        # Behind the last input PyTorch blends it with itself; a weight of zero would make an infinite one NaN.
        self.weights: list[float] = torch.where(_behind(op, size_in, size_out, axis), 0.5, weights).tolist()
        first = tuple(int(i) for i in lower.tolist())
        self.access = Gather(size_in, size_out, first, tuple(min(i + 1, size_in - 1) for i in first))

    def __call__(self, x: Tensor, dim: int, span: tuple[int, int]) -> Tensor:
        start, these = self.access.span(*span)[0], slice(*span)
        assert self.access.last is not None
        lower, upper = (
            torch.tensor([i - start for i in row[these]], device=x.device)
            for row in (self.access.sources, self.access.last)
        )
        weight = torch.tensor(self.weights[these], device=x.device, dtype=x.dtype)
        weight = weight.reshape([-1 if d == dim else 1 for d in range(x.dim())])
        return x.index_select(dim, lower) * (1 - weight) + x.index_select(dim, upper) * weight


def bilinear(op: Op, maps: Maps, value: int) -> Local:
    """`F.interpolate(mode="bilinear")` of a map (N, C, H, W)."""
    size, out = maps.size(value), maps.shape(op.outputs[0])[2:]
    rows, cols = (_Blend(op, size[axis], out[axis], axis) for axis in (0, 1))

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x = env[value]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return (rows(cols(wide, 3, block.cols), 2, block.rows).to(x.dtype),)

    return Local(op, {value: (rows.access, cols.access)}, ((2, 3),), run)
