"""Who applies the slope of an activation.

The slope of ReLU is 0 or 1 and is read off the output y. Where every op that reads y can multiply its gradient of y by
it as it writes that gradient, the sum that comes back needs nothing more ("masked"): the kernels that made y then load
one map instead of two. This holds across tiles too, since gradients of halos come from the same readers.
"""

from __future__ import annotations

from ....kernels.activations import MASKS
from ..ops import Local
from ..stages import Stage, private_maps, readers_of
from .conv import ConvSpec
from .pool import PoolSpec


def pass_masks(stage: Stage, convs: dict[int, ConvSpec], pools: dict[int, PoolSpec]) -> None:
    """Let the readers of a fused convolution's output apply its slope wherever all of them can."""
    readers, private = readers_of(stage), private_maps(stage)
    for output, spec in convs.items():
        if spec.act not in MASKS or output not in private:
            continue
        maskers = [_masker(local, output, convs, pools) for local in readers.get(output, [])]
        able = [masker for masker in maskers if masker is not None]
        if able and len(able) == len(maskers):
            spec.masked = True
            for masker in able:
                masker.input_act = spec.act


def _masker(
    local: Local, value: int, convs: dict[int, ConvSpec], pools: dict[int, PoolSpec]
) -> ConvSpec | PoolSpec | None:
    """The op that can apply a slope to its gradient of `value`: not one that adds `value` as a summand."""
    conv = convs.get(local.op.outputs[0])
    if conv is not None:
        return conv if conv.x == value and conv.residual != value else None
    return pools.get(local.op.outputs[0])
