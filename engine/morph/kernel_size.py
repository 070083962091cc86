"""Larger kernels: zero taps around the old ones, and more padding, so that every old tap reads the same pixel.

An output reads position o * stride - padding + dilation * tap. With t new taps before the first one and dilation * t
more padding, each old tap reads the same position, for every padding mode, stride and dilation. The new taps are zero.
Growth by an even number is symmetric. Growth by an odd number needs uneven padding, from padding="same" or a padding
layer. The morph is exact over the reals on the stored weights, in eval and train mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MorphError
from .example import Example
from .step import EditAll, Report
from .surgery import CONVS, TRANSPOSED, morphed, plain, replace, spatial

Taps = list[tuple[int, int]]  # number of zeros before and after the old taps, per image axis

_PADS = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def grow_kernel(
    model: nn.Module,
    example: Example,
    paths: str | Sequence[str],
    kernel: int | Sequence[int],
    *,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Enlarge the kernels of the convolutions at `paths` to `kernel`.

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: an input batch.
        paths: one or several convolutions or transposed convolutions.
        kernel: the new size, one number or one per image axis, at least the old size on each axis.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: a module is not a plain convolution, the kernel is smaller, a transposed convolution grows by an odd
            number, or the padding mode cannot pad that much on the example's size.
    """
    names = (paths,) if isinstance(paths, str) else tuple(paths)
    step = KernelStep(names, tuple(kernel) if isinstance(kernel, Sequence) else kernel)
    return morphed(model, step, example, inplace=inplace)


def pad_kernel(weight: Tensor, taps: Taps) -> Tensor:
    """Pad a weight (..., *kernel) with zeros before and after the taps of each image axis."""
    return F.pad(weight, [n for pair in reversed(taps) for n in pair])


def numeric_padding(conv: Any) -> list[tuple[int, int]]:
    """Return the padding before and after each image axis as numbers, also for "valid" and "same"."""
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in conv.padding]


@dataclass(frozen=True)
class KernelStep(EditAll, op="kernel"):
    """Step of `grow_kernel`."""

    kernel: int | tuple[int, ...]

    def edit(self, model: nn.Module) -> list[str]:
        return [_grow_one(model, path, self.kernel) for path in self.paths]


def _grow_one(model: nn.Module, path: str, kernel: int | tuple[int, ...]) -> str:
    conv = plain(model, path, *CONVS, *TRANSPOSED)
    old = tuple(conv.kernel_size)
    new = spatial(kernel, len(old), "kernel")
    growth = [b - a for a, b in zip(old, new, strict=True)]
    if min(growth) < 0:
        raise MorphError(f"module '{path}': kernel {old} cannot shrink to {new}; give a larger size")
    if not any(growth):
        raise MorphError(f"module '{path}' already has kernel {old}; give a larger size")
    if isinstance(conv, TRANSPOSED) and any(g % 2 for g in growth):
        raise MorphError(
            f"module '{path}': a transposed convolution must grow by an even number, not from {old} to {new}"
        )
    line = f"{path}: kernel {' x '.join(map(str, old))} -> {' x '.join(map(str, new))}"
    taps: Taps = [(g // 2, g - g // 2) for g in growth]
    steps = conv.dilation
    if conv.padding == "same":
        # PyTorch pads the smaller half of d (k - 1) in front; the old taps must move by the growth of that half.
        moved = [d * (n - 1) // 2 - d * (k - 1) // 2 for d, k, n in zip(steps, old, new, strict=True)]
        if all(m % d == 0 for m, d in zip(moved, steps, strict=True)):
            _resize(conv, [(m // d, g - m // d) for m, d, g in zip(moved, steps, growth, strict=True)], new, "same")
            return line
    ends = [(p + d * t, q + d * u) for (p, q), d, (t, u) in zip(numeric_padding(conv), steps, taps, strict=True)]
    if all(p == q for p, q in ends):
        _resize(conv, taps, new, tuple(p for p, _ in ends))
        return line
    pad = _PADS[conv.padding_mode][len(old) - 1]([n for end in reversed(ends) for n in end])
    replace(model, path, nn.Sequential(pad, conv))
    _resize(conv, taps, new, (0,) * len(old))
    return line


def _resize(conv: Any, taps: Taps, kernel: tuple[int, ...], padding: Any) -> None:
    with torch.no_grad():
        weight = pad_kernel(conv.weight, taps)
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    set_padding(conv, kernel, padding)


def set_padding(conv: Any, kernel: tuple[int, ...], padding: Any) -> None:
    """Set kernel size and padding, and the attribute that the constructor derives from them for padding modes."""
    conv.kernel_size, conv.padding = kernel, padding
    if isinstance(conv, CONVS):
        amounts = numeric_padding(conv)
        conv._reversed_padding_repeated_twice = [n for pair in reversed(amounts) for n in pair]
