"""Fused stem, from stored pixels to the first map of a network, one pass over memory:

    v = clamp(pixel * gain[c] + offset[c], low, high)          windowing and normalisation
    z = conv(v, w) * scale + shift                             v is rounded to the dtype of w first
    y = maxpool(act(z)), 3 x 3 with stride 2, or act(z)

Pixels are uint8, uint16, or floating point, in any memory order, so a decoded image is read as it is. The convolution
is padded with zeros after normalisation, the pooling with minus infinity, both only where the image ends: `padding` and
`pool_padding` say how much of either the window lacks.

Nothing but y is stored. At one gigapixel a stock ResNet keeps 34 GB of this stage's intermediates in bfloat16; here the
backward computes them again from the pixels, which costs less time than reading them back would.

As a matrix product: rows are pixels of y, columns filters, depth is taps x channels (49 or 147). For pooling, a program
walks down a strip of conv lines and keeps the running maximum; every conv line is shared by the two rows of y that
need it, while of the columns every second is computed twice (1.5 times the arithmetic, none of the traffic).
Activations never decrease, so they are applied to the maximum.

Backward: each pixel of y sends its gradient to the first position, row by row, that holds the maximum, as PyTorch does.
With g the gradient of y there, times the activation's slope,

    G = sum of g^T patches,   dw = scale * G,   dshift = sum of g,   dscale = sum over taps of w * G

so neither the scale nor any division enters the sums. They are split over programs and added in order: two runs agree
bit by bit. The image's gradient, which only saliency maps ask for, is left to `stem_reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .choice import run_fastest
from .dtypes import sum_dtype
from .stem_kernels import stem_backward, stem_forward
from .stem_reference import Stem, stem_gradients_reference, stem_reference
from .windows import ConvGeometry, empty_map, nhwc


def _given(x, weight, scale, shift, gain, offset, low, high, geometry, pool_padding, act) -> Stem:
    """The arguments of the registered ops as one."""
    return Stem(x, weight, scale, shift, gain, offset, low, high, ConvGeometry(*geometry), pool_padding, act)


@torch.library.custom_op("gigamorph::stem", mutates_args=())
def stem(
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
) -> Tensor:
    """y of a `Stem`. Differentiable in weight, scale and shift."""
    given = _given(x, weight, scale, shift, gain, offset, low, high, geometry, pool_padding, act)

    def ours() -> Tensor:
        y = empty_map(*given.shape, like=weight)
        stem_forward(given, y)
        return y

    return run_fastest("stem", x, given.settings, ours, lambda: nhwc(stem_reference(given)))


@stem.register_fake
def _(*arguments) -> Tensor:
    given = _given(*arguments)
    return empty_map(*given.shape, like=given.weight)


@torch.library.custom_op("gigamorph::stem_gradients", mutates_args=())
def stem_gradients(
    dy: Tensor,
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
        stem_backward(given, dy, dweight, dscale=dscale, dshift=dshift)
        return dweight, dscale, dshift

    return run_fastest("stem_gradients", x, given.settings, ours, lambda: stem_gradients_reference(given, dy))


def _buffers(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide, filters = sum_dtype(weight.dtype), weight.shape[0]
    dweight = torch.empty(weight.shape, dtype=wide, device=weight.device)
    return dweight, dweight.new_empty(filters), dweight.new_empty(filters)


@stem_gradients.register_fake
def _(dy, x, weight, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return _buffers(weight)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.arguments = inputs[6:]


def _differentiate(ctx, dy):
    x, weight, scale, shift, *window = ctx.saved_tensors
    inputs = (x, weight, scale, shift, *window, *ctx.arguments)
    grads: list[Tensor | None] = [None] * len(inputs)
    if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4:6]):
        raise ValueError("stem: pixels and their normalisation get no gradient here; use stem_reference for theirs")
    if any(ctx.needs_input_grad[1:4]):
        dweight, dscale, dshift = stem_gradients(dy, *inputs)
        for i, (leaf, grad) in enumerate(((weight, dweight), (scale, dscale), (shift, dshift)), 1):
            grads[i] = grad.to(leaf.dtype) if ctx.needs_input_grad[i] else None
    return tuple(grads)


stem.register_autograd(_differentiate, setup_context=_save)
