"""Decides which op applies the slope of an activation in the backward.

The slope of ReLU is 0 or 1 and follows from the output y. If every op that reads y can multiply its gradient of y by
the slope when it writes that gradient, the sum of the gradients is complete ("masked"). The kernels that made y then
load one map instead of two. This also holds across tiles, because gradients of halos come from the same readers.

At the end of a residual block not every reader can: the next sum passes its own gradient on. There a 1x1 convolution
that reads y first gathers: it returns y again for the other readers, so that it receives their gradients. The kernel of
its data gradient adds them and applies the slope, without another pass over maps of that size. If the sum is in a later
stage, as with norms in training mode, y is stored, and its gradient from that stage is added in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ....kernels.activations import MASKS, slope_reference
from ..ops import Local
from ..ops.base import GradientSum
from ..stages import ProgramStage, private_maps, readers_of
from .conv import ConvSpec, is_pixelwise
from .normalize import NormalizeSpec
from .pool import PoolSpec


def pass_masks(
    stage: ProgramStage, convs: dict[int, ConvSpec], pools: dict[int, PoolSpec], norms: dict[int, NormalizeSpec]
) -> None:
    """Let the readers of a fused op's output apply its slope if all of them can."""
    readers, private = readers_of(stage), private_maps(stage)
    stored = set(stage.stored) - {r.value for r in stage.reductions}
    made = [value for local in stage.locals for value in local.op.outputs if value in private | stored]
    # The backward of a norm without a sum reads enough to compute its slope.
    makers = {**convs, **{y: norm for y, norm in norms.items() if norm.residual is not None}}
    gathered = {value for value in made if _gather(stage, value, readers.get(value, []), convs, makers, stored)}
    for output, spec in convs.items():
        if spec.act not in MASKS or output not in private or output in gathered:
            continue
        maskers = [_masker(stage, local, output, convs, pools) for local in readers.get(output, [])]
        able = [masker for masker in maskers if masker is not None]
        if able and len(able) == len(maskers):
            spec.masked = True
            for masker in able:
                masker.input_act = spec.act


def _masker(
    stage: ProgramStage, local: Local, value: int, convs: dict[int, ConvSpec], pools: dict[int, PoolSpec]
) -> ConvSpec | PoolSpec | None:
    """The op of a reader if it can apply a slope to its gradient of `value`; ops that add `value` cannot."""
    conv = convs.get(local.op.outputs[0])
    if conv is not None:
        return conv if conv.x == value and conv.residual != value and _reads_unrounded(stage, conv) else None
    return pools.get(local.op.outputs[0])


def _gather(
    stage: ProgramStage,
    value: int,
    readers: list[Local],
    convs: dict[int, ConvSpec],
    makers: Mapping[int, ConvSpec | NormalizeSpec],
    stored: set[int],
) -> bool:
    """Let one reader of a map collect the gradients of all, if there are several and one can; it becomes the first.

    For a stored map, the stages that read it count as one more reader.
    """
    able = [local for local in readers if _can_gather(stage, convs.get(local.op.outputs[0]), value)]
    if len(readers) + (value in stored) < 2 or not able:
        return False
    first, before = able[0], readers[0]
    if first is not before:  # its other inputs exist from the beginning
        others = [local for local in stage.locals if local is not first]
        position = next(n for n, local in enumerate(others) if local is before)
        stage.locals = [*others[:position], first, *others[position:]]
    spec, maker = convs[first.op.outputs[0]], makers.get(value)
    slope = None
    if maker is not None and maker.act in MASKS:
        maker.masked, spec.input_act = True, maker.act
        slope = partial(slope_reference, act=maker.act)
    spec.gathers, first.gathers = True, GradientSum(value, slope)
    return True


def _can_gather(stage: ProgramStage, spec: ConvSpec | None, value: int) -> bool:
    if spec is None or spec.channels_last:
        return False
    return is_pixelwise(stage, spec, value) and _reads_unrounded(stage, spec)


def _reads_unrounded(stage: ProgramStage, conv: ConvSpec) -> bool:
    """Whether a convolution reads the map itself: under autocast it may round its input first."""
    values = stage.program.values
    return values[conv.x].dtype == values[conv.y].dtype
