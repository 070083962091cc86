"""Two convolutions as one op for inference, the second with a 1x1 filter, without storing the map between them:

y = act2(conv1x1(act1(conv(x, w1) + b1), w2) + b2 + residual)
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ....kernels.choice import run_fastest
from ....kernels.conv2d import conv2d_forward
from ....kernels.conv_conv1x1 import conv_conv1x1, conv_conv1x1_fits
from ....kernels.windows import ConvGeometry
from ..ops import Block, Env, Local
from ..stages import Stage, only_readers
from .conv import ConvSpec, as_autocast_wants


def fuse_pairs(stage: Stage, convs: dict[int, ConvSpec]) -> None:
    """Join fused convolutions with the 1x1 convolution that is their only reader."""
    readers = only_readers(stage)
    makers = {local.op.outputs[0]: local for local in stage.locals}
    joined: set[int] = set()
    for local in list(stage.locals):
        output = local.op.outputs[0]
        second = convs.get(output)
        first = None if second is None else convs.get(second.x)
        if second is None or first is None or second.x in joined:
            continue
        if second.x in readers and _fits(stage, first, second):
            _join(stage, makers[second.x], local, first, second)
            joined.add(output)


def _fits(stage: Stage, first: ConvSpec, second: ConvSpec) -> bool:
    values = stage.program.values
    window, pixel = values[first.weight].shape, values[second.weight].shape
    return (
        tuple(pixel[2:]) == (1, 1)
        and len(window) == 4
        and window[2] * window[3] > 1
        and second.stride == (1, 1)
        and first.stride in ((1, 1), (2, 2))
        and first.dilation == (1, 1)
        and first.groups == second.groups == 1
        and first.residual is None
        and second.residual != first.x  # an op reads each map through a single window
        and None not in (first.bias, second.bias)
    )


def _join(stage: Stage, maker: Local, local: Local, first: ConvSpec, second: ConvSpec) -> None:
    reads = dict(maker.reads)
    if second.residual is not None:
        reads[second.residual] = local.reads[second.residual]

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x, w1, w2 = as_autocast_wants(env[first.x]), env[first.weight], env[second.weight]
        b1, b2 = (env[v] for v in (first.bias, second.bias) if v is not None)
        residual = None if second.residual is None else env[second.residual].to(x.dtype)
        geometry = first.geometry(block.pad)

        def separate() -> Tensor:
            h, _ = conv2d_forward(x, w1, b1, None, geometry, first.act, False, (0, 0))
            return conv2d_forward(h, w2, b2, residual, ConvGeometry(), second.act, False, (0, 0))[0]

        def together() -> Tensor:
            return conv_conv1x1(x, w1, b1, w2, b2, residual, geometry, first.act, second.act)

        if not conv_conv1x1_fits(x, w1, w2, residual, geometry):
            return (separate(),)
        settings = (*w1.shape, *w2.shape, *geometry.form, residual is None)
        return (run_fastest("conv_conv1x1", x, settings, together, separate),)

    inputs = tuple(dict.fromkeys((*maker.op.inputs, *(v for v in local.op.inputs if v != second.x))))
    op = replace(local.op, name="fused_conv2d", inputs=inputs)
    stage.replace([maker, local], Local(op, reads, local.axes, run))
