"""Max-pooling by the kernels: no indices are stored, the backward finds them again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ....kernels.pool import max_pool2d, max_pool2d_backward
from ....kernels.windows import ConvGeometry
from ..ops import Block, Env
from ..ops.base import arguments, pair
from ..stages import ProgramStage


@dataclass(slots=True)
class PoolSpec:
    """A max-pooling; `input_act` is the activation whose slope is applied to the gradient of x (masks.py)."""

    x: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    input_act: str = "none"


class MaxPool(torch.autograd.Function):
    """Max-pooling of one block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: PoolSpec, padding: tuple[int, int, int, int]):
        ctx.save_for_backward(x)
        ctx.window, ctx.spec = (spec.kernel, ConvGeometry.of(spec.stride, padding, spec.dilation)), spec
        return max_pool2d(x, *ctx.window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        (x,) = ctx.saved_tensors
        return max_pool2d_backward(grads[0], x, *ctx.window, ctx.spec.input_act), None, None


def take_pools(stage: ProgramStage) -> dict[int, PoolSpec]:
    """Replace max-poolings by kernels; returns the poolings by output."""
    found: dict[int, PoolSpec] = {}
    for local in stage.locals:
        if local.op.name.startswith("max_pool2d"):
            given = arguments(local.op, "input kernel_size stride padding dilation", stride=None, dilation=1)
            kernel = pair(given["kernel_size"])
            stride = pair(given["stride"]) if given["stride"] else kernel
            spec = PoolSpec(given["input"].value, kernel, stride, pair(given["dilation"]))
            found[local.op.outputs[0]] = spec
            local.run, local.fill = partial(_run, spec), None
    return found


def _run(spec: PoolSpec, env: Env, block: Block) -> tuple[Tensor, ...]:
    return (MaxPool.apply(env[spec.x], spec, block.pad),)  # pyright: ignore
