"""Larger kernels: new taps of zero around the old ones, and as much more padding, so that every old tap stays put.

An output reads position o * stride - padding + dilation * tap. With t taps put before the first one and dilation * t
added to the padding, each old tap reads what it read, for every padding mode, stride and dilation; the new ones count
for nothing. Growth by an even number is symmetric. By an odd number the padding is uneven, which padding="same" may
do by itself and a padding layer does otherwise. Exact over the reals on the stored weights, in eval and train mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MorphError
from .surgery import CONVS, TRANSPOSED, edit, morphed, plain, replace, spatial
from .verify import Example, Report

Taps = list[tuple[int, int]]  # per image axis: zeros before and behind the old taps

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
    """Give the convolutions at `paths` a kernel of size `kernel`.

    Args:
        model: the network; a copy is changed unless `inplace`.
        example: an input batch.
        paths: one or several convolutions or transposed convolutions.
        kernel: the new size, one number or one per image axis, nowhere smaller than the old one.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: no plain convolution, a smaller kernel, a transposed convolution grown by an odd number, or a
            padding mode that cannot pad so much on the example's size.
    """
    names = [paths] if isinstance(paths, str) else list(paths)
    step = {"op": "kernel", "paths": names, "kernel": kernel if isinstance(kernel, int) else list(kernel)}
    return morphed(model, step, example, inplace=inplace)


def pad_kernel(weight: Tensor, taps: Taps) -> Tensor:
    """(..., *kernel) with zeros before and behind the taps of each image axis."""
    return F.pad(weight, [n for pair in reversed(taps) for n in pair])


def grow_kernel_state(
    state: Mapping[str, Tensor], paths: str | Sequence[str], kernel: int | Sequence[int]
) -> dict[str, Tensor]:
    """The same for the weights of a state_dict alone, by an even number of taps, all other tensors as they are.

    The network that loads it needs `padding + dilation * (kernel - old) / 2` in these convolutions.
    """
    result = dict(state)
    for path in [paths] if isinstance(paths, str) else paths:
        name = f"{path}.weight"
        if name not in state:
            raise MorphError(f"the weights hold no '{name}'")
        old = tuple(state[name].shape[2:])
        new = spatial(kernel, len(old), "kernel")
        growth = _growth(path, old, new)
        if any(g % 2 for g in growth):
            raise MorphError(f"'{name}': from {old} to {new} is no even growth, which needs the network as well")
        result[name] = pad_kernel(state[name], [(g // 2, g // 2) for g in growth])
    return result


def numeric_padding(conv: Any) -> list[tuple[int, int]]:
    """Padding before and behind each image axis, whatever way the convolution states it."""
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in conv.padding]


def _growth(path: str, old: Sequence[int], new: Sequence[int]) -> list[int]:
    growth = [b - a for a, b in zip(old, new, strict=True)]
    if min(growth) < 0:
        raise MorphError(f"module '{path}': kernel {tuple(old)} cannot shrink to {tuple(new)}; give a larger one")
    return growth


@edit("kernel")
def _grow_kernel(model: nn.Module, paths: list[str], kernel: int | list[int]) -> list[str]:
    changes = []
    for path in paths:
        conv = plain(model, path, *CONVS, *TRANSPOSED)
        old = tuple(conv.kernel_size)
        new = spatial(kernel, len(old), "kernel")
        growth = _growth(path, old, new)
        if not any(growth):
            raise MorphError(f"module '{path}' has a kernel of {old} already")
        if isinstance(conv, TRANSPOSED) and any(g % 2 for g in growth):
            raise MorphError(f"module '{path}': a transposed convolution grows by an even number, not {old} to {new}")
        taps: Taps = [(g // 2, g - g // 2) for g in growth]
        steps = conv.dilation
        if conv.padding == "same":
            # torch pads the smaller half of d (k - 1) in front; the old taps must move by as much as that half grows.
            moved = [d * (n - 1) // 2 - d * (k - 1) // 2 for d, k, n in zip(steps, old, new, strict=True)]
            if all(m % d == 0 for m, d in zip(moved, steps, strict=True)):
                taps = [(m // d, g - m // d) for m, d, g in zip(moved, steps, growth, strict=True)]
                _resize(conv, taps, new, conv.padding)
                changes.append(_line(path, old, new))
                continue
        ends = [(p + d * t, q + d * u) for (p, q), d, (t, u) in zip(numeric_padding(conv), steps, taps, strict=True)]
        if all(p == q for p, q in ends):
            _resize(conv, taps, new, tuple(p for p, _ in ends))
        else:
            pad = _PADS[conv.padding_mode][len(old) - 1]([n for end in reversed(ends) for n in end])
            replace(model, path, nn.Sequential(pad, conv))
            _resize(conv, taps, new, (0,) * len(old))
        changes.append(_line(path, old, new))
    return changes


def _line(path: str, old: Sequence[int], new: Sequence[int]) -> str:
    return f"{path}: kernel {' x '.join(map(str, old))} -> {' x '.join(map(str, new))}"


def _resize(conv: Any, taps: Taps, kernel: tuple[int, ...], padding: Any) -> None:
    with torch.no_grad():
        weight = pad_kernel(conv.weight, taps)
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    set_padding(conv, kernel, padding)


def set_padding(conv: Any, kernel: tuple[int, ...], padding: Any) -> None:
    """Set kernel size and padding, and what the constructor derives from them for the modes other than zeros."""
    conv.kernel_size, conv.padding = kernel, padding
    if isinstance(conv, CONVS):
        amounts = numeric_padding(conv)
        conv._reversed_padding_repeated_twice = [n for pair in reversed(amounts) for n in pair]
