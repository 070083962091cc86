"""Fused stem: convolution, activation and max-pooling of the image in one pass over memory.

    z = conv(x, w) + shift                                     x is rounded to the dtype of w first
    y = maxpool(act(z))                                        3 x 3 with stride 2

Pixels have any memory order. The convolution is padded with zeros, the pooling with minus infinity, both only where
the image ends: `padding` and `pool_padding` are their amounts around the window.

Only y is stored and, for gradients, one byte for each element of y:

    spot = 3 * row + column of the first maximum of its window in row-major order, as PyTorch chooses; 255 if the slope
           of act is zero, so that no gradient passes

At one gigapixel, PyTorch saves 34 GB of intermediates of this stage of a ResNet in bfloat16; the bytes are 4 GB.

As a matrix product: rows are pixels of y, columns filters, depth is taps x channels (49 or 147). A program processes a
strip of conv lines from top to bottom and updates the running maximum. The two rows of y that need a conv line share
it, but every second column is computed twice (1.5 times the arithmetic, no additional traffic). Activations are
monotonic, so they are applied to the maximum.

Backward: monotonic activations after a maximum have the slopes 0 and 1 here, so with

    dz = sum of dy over the windows whose spot is this output of the convolution (four windows at most)
    dw = sum of dz^T patches,   dshift = sum of dz

no division enters the sums. They are split over programs and added in a fixed order: two runs agree bit by bit. The
image's gradient, which only saliency maps need, is not computed: without it the engine does not fuse these layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .choice import run_fastest
from .dtypes import sum_dtype
from .stem_kernels import stem_backward, stem_forward
from .stem_reference import Stem, stem_gradients_reference, stem_reference, stem_spots_reference
from .windows import ConvGeometry, empty_map, nhwc


def _given(x, weight, shift, geometry, pool_padding, act) -> Stem:
    """The arguments of the registered ops as a `Stem`."""
    return Stem(x, weight, shift, ConvGeometry(*geometry), pool_padding, act)


@torch.library.custom_op("gigamorph::stem", mutates_args=())
def stem(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    geometry: Sequence[int],
    pool_padding: Sequence[int],
    act: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y, and its spots for `stem_gradients` (empty unless `keep`)."""
    given = _given(x, weight, shift, geometry, pool_padding, act)

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


@stem.register_fake
def _(*arguments) -> tuple[Tensor, Tensor]:
    return _outputs(_given(*arguments[:-1]), arguments[-1])


@torch.library.custom_op("gigamorph::stem_gradients", mutates_args=())
def stem_gradients(
    dy: Tensor,
    spots: Tensor,
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    geometry: Sequence[int],
    pool_padding: Sequence[int],
    act: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and shift, in float32 or float64; see `stem_backward`."""
    given = _given(x, weight, shift, geometry, pool_padding, act)
    dy = dy.contiguous(memory_format=torch.channels_last)

    def ours() -> tuple[Tensor, Tensor]:
        dweight, dshift = (t.zero_() for t in _buffers(weight))
        stem_backward(given, dy, spots, dweight, dshift)
        return dweight, dshift

    return run_fastest("stem_gradients", x, given.settings, ours, lambda: stem_gradients_reference(given, dy, spots))


def _buffers(weight: Tensor) -> tuple[Tensor, Tensor]:
    dweight = torch.empty(weight.shape, dtype=sum_dtype(weight.dtype), device=weight.device)
    return dweight, dweight.new_empty(weight.shape[0])


@stem_gradients.register_fake
def _(dy, spots, x, weight, *rest) -> tuple[Tensor, Tensor]:
    return _buffers(weight)
