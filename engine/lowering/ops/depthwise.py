"""Depthwise convolutions in float64 on the CPU, as sums of shifted maps.

    y[n, c, i, j] = bias[c] + sum over a, b of w[c, 0, a, b] x[n, c, i s + a d, j s + b d]

PyTorch has no such kernel: it convolves channel after channel, which takes some microseconds each even on small tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_LARGEST = 32 * 32  # pixels; on larger maps the work per channel outweighs the overhead per channel

Pair = tuple[int, int]


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """`F.conv2d`, computed as sums of shifted maps where that is faster.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, k, l) for `groups` equal to C.
        stride, padding, dilation: of rows and columns.
    """
    depthwise = groups == x.shape[1] == weight.shape[0] > 1 and x.device.type == "cpu" and x.dim() == 4
    if not (depthwise and x.dtype == weight.dtype == torch.float64 and x.shape[2] * x.shape[3] <= _LARGEST):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if padding != (0, 0):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    y: Tensor = _Shifted.apply(x, weight, stride, dilation)  # pyright: ignore
    return y if bias is None else y + bias.reshape(-1, 1, 1)


def _taps(x: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> Iterator[tuple[int, int, Tensor]]:
    """For each kernel position (a, b), the pixels that its weight multiplies: a view (N, C, height, width)."""
    height, width = (
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    )
    for a in range(kernel[0]):
        for b in range(kernel[1]):
            rows = slice(a * dilation[0], a * dilation[0] + (height - 1) * stride[0] + 1, stride[0])
            cols = slice(b * dilation[1], b * dilation[1] + (width - 1) * stride[1] + 1, stride[1])
            yield a, b, x[:, :, rows, cols]


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, dilation: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = (weight.shape[2], weight.shape[3]), stride, dilation
        y: Tensor | None = None
        for a, b, part in _taps(x, *ctx.geometry):
            w = weight[:, 0, a, b, None, None]
            y = part * w if y is None else y.addcmul_(part, w)
        assert y is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if dx is not None:
            for a, b, part in _taps(dx, *ctx.geometry):
                part.addcmul_(dy, weight[:, 0, a, b, None, None])
        if dw is not None:
            for a, b, part in _taps(x, *ctx.geometry):
                dw[:, 0, a, b] = (dy * part).sum((0, 2, 3))
        return dx, dw, None, None
