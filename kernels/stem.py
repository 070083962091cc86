"""Fused stem, from stored pixels to the first map of a network in one pass over memory:

    v = clamp(pixel * gain[c] + offset[c], low, high)          windowing and normalisation
    z = conv(v, w) * scale + shift                             v is rounded to the dtype of w first
    y = maxpool(act(z)), 3 x 3 with stride 2, or act(z)

Pixels are uint8, uint16, or floating point, in any memory order, so a decoded image is read without conversion. The
convolution is padded with zeros after normalisation, the pooling with minus infinity, both only where the image ends:
`padding` and `pool_padding` are their amounts around the window.

Only y is stored and, for gradients, one byte for each element of y:

    spot = 3 * row + column of the first maximum of its window in row-major order, as PyTorch chooses (0 without
           pooling); 255 if the slope of act is zero, so that no gradient passes

At one gigapixel, PyTorch saves 34 GB of intermediates of this stage of a ResNet in bfloat16; the bytes are 4 GB.

As a matrix product: rows are pixels of y, columns filters, depth is taps x channels (49 or 147). For pooling, a program
processes a strip of conv lines from top to bottom and updates the running maximum. The two rows of y that need a conv
line share it, but every second column is computed twice (1.5 times the arithmetic, no additional traffic). Activations
are monotonic, so they are applied to the maximum.

Backward: monotonic activations after a maximum have the slopes 0 and 1 here, so with

    dz = sum of dy over the windows whose spot is this output of the convolution (four windows at most)
    G = sum of dz^T patches,   dw = scale * G,   dshift = sum of dz,   dscale = sum over taps of w * G

neither the scale nor any division enters the sums. They are split over programs and added in a fixed order: two runs
agree bit by bit. The image's gradient, which only saliency maps need, is computed by `stem_reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .choice import run_fastest
from .dtypes import sum_dtype
from .stem_kernels import stem_backward, stem_forward
from .stem_reference import Stem, stem_gradients_reference, stem_reference, stem_spots_reference
from .windows import ConvGeometry, empty_map, nhwc


def _given(x, weight, scale, shift, gain, offset, low, high, geometry, pool_padding, act) -> Stem:
    """The arguments of the registered ops as a `Stem`."""
    return Stem(x, weight, scale, shift, gain, offset, low, high, ConvGeometry(*geometry), pool_padding, act)


def stem(x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, *rest: Any) -> Tensor:
    """y of a `Stem` with these arguments. Differentiable in weight, scale and shift."""
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, scale, shift))
    return stem_and_spots(x, weight, scale, shift, *rest, keep)[0]


@torch.library.custom_op("gigamorph::stem", mutates_args=())
def stem_and_spots(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    low: float,
    high: float,
    geometry: Sequence[int],
    pool_padding: Sequence[int] | None,
    act: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y, and its spots for `stem_gradients` (empty unless `keep`)."""
    given = _given(x, weight, scale, shift, gain, offset, low, high, geometry, pool_padding, act)

    def ours() -> tuple[Tensor, Tensor]:
        y, spots = _outputs(given, keep)
        stem_forward(given, y, spots if keep else None)
        return y, spots

    def stock() -> tuple[Tensor, Tensor]:
        y, spots = stem_spots_reference(given) if keep else (stem_reference(given), _outputs(given, keep)[1])
        return nhwc(y), spots

    return run_fastest("stem", x, (*given.settings, keep), ours, stock)


def _outputs(given: Stem, keep: bool) -> tuple[Tensor, Tensor]:
    y, spots = empty_map(*given.shape, like=given.weight), given.x.new_empty(0, dtype=torch.uint8)
    return y, torch.empty_like(y, dtype=torch.uint8) if keep else spots


@stem_and_spots.register_fake
def _(*arguments) -> tuple[Tensor, Tensor]:
    return _outputs(_given(*arguments[:-1]), arguments[-1])


@torch.library.custom_op("gigamorph::stem_gradients", mutates_args=())
def stem_gradients(
    dy: Tensor,
    spots: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    low: float,
    high: float,
    geometry: Sequence[int],
    pool_padding: Sequence[int] | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, scale and shift, in float32 or float64; see `stem_backward`."""
    given = _given(x, weight, scale, shift, gain, offset, low, high, geometry, pool_padding, act)
    dy = dy.contiguous(memory_format=torch.channels_last)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        dweight, dscale, dshift = (t.zero_() for t in _buffers(weight))
        stem_backward(given, dy, spots, dweight, dscale=dscale, dshift=dshift)
        return dweight, dscale, dshift

    return run_fastest("stem_gradients", x, given.settings, ours, lambda: stem_gradients_reference(given, dy, spots))


def _buffers(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide, filters = sum_dtype(weight.dtype), weight.shape[0]
    dweight = torch.empty(weight.shape, dtype=wide, device=weight.device)
    return dweight, dweight.new_empty(filters), dweight.new_empty(filters)


@stem_gradients.register_fake
def _(dy, spots, x, weight, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return _buffers(weight)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.mark_non_differentiable(output[1])
    *ctx.arguments, ctx.keep = inputs[6:]


def _differentiate(ctx, dy, _):
    *tensors, spots = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 12
    if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4:6]):
        raise ValueError("stem: pixels and their normalisation have no gradient; use stem_reference for it")
    if any(ctx.needs_input_grad[1:4]):
        if not ctx.keep:
            raise ValueError("stem: the forward stored no spots; pass keep=True if gradients are needed")
        sums = stem_gradients(dy, spots, *tensors, *ctx.arguments)
        for i, (leaf, grad) in enumerate(zip(tensors[1:4], sums, strict=True), 1):
            grads[i] = grad.to(leaf.dtype) if ctx.needs_input_grad[i] else None
    return tuple(grads)


stem_and_spots.register_autograd(_differentiate, setup_context=_save)
