"""Who applies the slope of an activation.

The slope of ReLU is 0 or 1 and is read off the output y. Where every op that reads y can multiply its gradient of y by
it as it writes that gradient, the sum that comes back needs nothing more ("masked"): the kernels that made y then load
one map instead of two. This holds across tiles too, since gradients of halos come from the same readers.

At the end of a residual block not every reader can: the next sum hands its own gradient on. There a convolution of one
pixel that reads y first gathers: it gives y again to the other readers, so that their gradients come to it, and the
kernel of its data gradient adds them and applies the slope. Nothing else is done with maps of that size. Where the sum
stands in a later stage, as with live norms, y is stored, and what comes back for that is added in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ....kernels.activations import MASKS, slope_reference
from ..ops import Local
from ..ops.base import Gather
from ..stages import Stage, private_maps, readers_of
from .conv import ConvSpec, is_pixelwise
from .normalize import NormalizeSpec
from .pool import PoolSpec


def pass_masks(
    stage: Stage, convs: dict[int, ConvSpec], pools: dict[int, PoolSpec], norms: dict[int, NormalizeSpec]
) -> None:
    """Let the readers of a fused op's output apply its slope wherever all of them can."""
    readers, private = readers_of(stage), private_maps(stage)
    stored = set(stage.stored) - {r.value for r in stage.reductions}
    made = [value for local in stage.locals for value in local.op.outputs if value in private | stored]
    # The slope of a norm without a sum is found in what its own backward reads.
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
    stage: Stage, local: Local, value: int, convs: dict[int, ConvSpec], pools: dict[int, PoolSpec]
) -> ConvSpec | PoolSpec | None:
    """The op that can apply a slope to its gradient of `value`: not one that adds `value` as a summand."""
    conv = convs.get(local.op.outputs[0])
    if conv is not None:
        return conv if conv.x == value and conv.residual != value and _reads_as_it_is(stage, conv) else None
    return pools.get(local.op.outputs[0])


def _gather(
    stage: Stage,
    value: int,
    readers: list[Local],
    convs: dict[int, ConvSpec],
    makers: Mapping[int, ConvSpec | NormalizeSpec],
    stored: set[int],
) -> bool:
    """Let one reader of a map take the gradients of all, if there are several and one can; it becomes the first.

    Of a map that is stored the stages that read it are one more.
    """
    able = [local for local in readers if _can_gather(stage, convs.get(local.op.outputs[0]), value)]
    if len(readers) + (value in stored) < 2 or not able:
        return False
    first, before = able[0], readers[0]
    if first is not before:  # what it reads besides is there from the beginning
        others = [local for local in stage.locals if local is not first]
        place = next(n for n, local in enumerate(others) if local is before)
        stage.locals = [*others[:place], first, *others[place:]]
    spec, maker = convs[first.op.outputs[0]], makers.get(value)
    slope = None
    if maker is not None and maker.act in MASKS:
        maker.masked, spec.input_act = True, maker.act
        slope = partial(slope_reference, act=maker.act)
    spec.gathers, first.gathers = True, Gather(value, slope)
    return True


def _can_gather(stage: Stage, spec: ConvSpec | None, value: int) -> bool:
    if spec is None or spec.channels_last:
        return False
    return is_pixelwise(stage, spec, value) and _reads_as_it_is(stage, spec)


def _reads_as_it_is(stage: Stage, conv: ConvSpec) -> bool:
    """Whether a convolution does not round its input first, as autocast makes it: what it has is the map then."""
    values = stage.program.values
    return values[conv.x].dtype == values[conv.y].dtype
