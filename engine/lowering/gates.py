"""Folds a factor for each channel of a map, as in squeeze-and-excite, into the weights of the next convolution:

    conv(x * s, w) = conv(x, w * s),   s a factor for each input channel

The product and its gradient are then never stored; the gradient of s follows from that of w * s, once per step. This
applies if a single convolution reads the product and all images share the factors, which excludes gates of a batch.
"""

from __future__ import annotations

import torch

from ..capture.program import Ref
from .conv_chains import Gated, channel_scale
from .ops import Local, VectorOp
from .ops.base import arguments
from .stages import Stage, private_maps, readers_of, vector_inputs


def fold_gates(stage: Stage) -> None:
    """Multiply gates into the convolutions that read their products."""
    readers, private = readers_of(stage), private_maps(stage)
    dropped: set[int] = set()
    for gate in stage.locals:
        product = gate.op.outputs[0]
        found = readers.get(product, [])
        if product not in private or len(found) != 1 or found[0].op.name != "conv2d" or len(gate.reads) != 1:
            continue
        (value,) = gate.reads
        scale = channel_scale(stage, gate, value, channels_last=False)
        if scale is not None and _fold(stage, found[0], value, scale):
            dropped.add(id(gate))
    stage.locals = [local for local in stage.locals if id(local) not in dropped]
    stage.vectors = vector_inputs(stage)


def _fold(stage: Stage, conv: Local, value: int, scale: int) -> bool:
    values = stage.program.values
    own = arguments(conv.op, "input weight bias stride padding dilation groups", dilation=1, groups=1)
    weight = own["weight"].value
    wide = torch.promote_types(values[weight].dtype, values[scale].dtype)
    # Under autocast the product may have another dtype; the convolution must return the same dtype for the map.
    if wide != values[weight].dtype or values[value].dtype != values[conv.op.outputs[0]].dtype:
        return False
    made = len(values)
    values.append(values[weight])
    gated = Gated(weight, scale, values[weight].shape[0], own["groups"])
    stage.prelude.append(VectorOp(gated, (weight, scale), (made,)))
    stage.change_arguments(conv, input=Ref(value), weight=Ref(made))
    return True
