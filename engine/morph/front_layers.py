"""Layers of a front: downsamplers, folded convolutions, stages, and a residual branch that starts at zero.

All are exact at the borders too: the mean of a stage never reads the padding, and a folded convolution pads r times as
much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activation import PAct, activation
from .copying import channels_last


class Resize(nn.Module):
    """Bilinear resize (N, C, rH, rW) -> (N, C, H, W), optionally antialiased."""

    def __init__(self, r: int, antialias: bool) -> None:
        super().__init__()
        self.r, self.antialias = r, antialias

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2] // self.r, x.shape[-1] // self.r)
        return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=self.antialias)

    def extra_repr(self) -> str:
        return f"r={self.r}, antialias={self.antialias}"


class ResidualFront(nn.Module):
    """down(x) + gamma * branch(x), with one gamma per channel that starts at zero."""

    def __init__(self, down: nn.Module, branch: nn.Module, channels: int, like: Tensor) -> None:
        super().__init__()
        self.down, self.branch = down, branch
        self.gamma = nn.Parameter(torch.zeros(channels, 1, 1, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + self.gamma * self.branch(x)


def downsampler(name: str, r: int) -> nn.Module:
    """Build the layer that shrinks by r: the mean of each r x r cell ("area"), "bilinear" or "antialias"."""
    if name == "area" or (name == "bilinear" and r == 2):  # the same function
        return nn.AvgPool2d(r)
    return Resize(r, antialias=name == "antialias")


def cell_weights(downsample: str, r: int) -> Tensor:
    """Return the weights of a cell's r pixels along one axis, in float64."""
    cell = torch.full((r,), 1 / r, dtype=torch.float64)
    if downsample == "bilinear":  # without antialiasing it reads the one or two middle pixels
        cell.zero_()
        cell[(r - 1) // 2] += 0.5
        cell[r // 2] += 0.5
    return cell


def folded(conv: nn.Conv2d, r: int, downsample: str) -> nn.Conv2d:
    """Build one convolution that equals `conv` after the downsampler; a dilated kernel becomes dense, with zeros."""
    weight = conv.weight.detach()
    kernel = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    dense = weight.new_zeros(*weight.shape[:2], *kernel, dtype=torch.float64)
    dense[:, :, :: conv.dilation[0], :: conv.dilation[1]] = weight.double()
    # In float64 until the end, so that each weight is rounded only once, and not at all for r = 2^j.
    cell = cell_weights(downsample, r)
    cells = torch.outer(cell, cell).reshape(1, 1, r, r).to(dense.device)
    large = torch.kron(dense, cells)
    padding, ahead = [0, 0], [0, 0]
    for axis in (0, 1):
        if conv.padding == "same":  # an even kernel pads one more at the end; zero taps at the front make it symmetric
            total = kernel[axis] - 1
            padding[axis] = (total - total // 2) * r
            ahead[axis] = (total % 2) * r
        elif conv.padding != "valid":
            padding[axis] = int(conv.padding[axis]) * r
    large = F.pad(large, (ahead[1], 0, ahead[0], 0))
    new = _new_conv(
        weight,
        conv.in_channels,
        conv.out_channels,
        tuple(large.shape[2:]),
        (conv.stride[0] * r, conv.stride[1] * r),
        tuple(padding),
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
    new.weight = nn.Parameter(large.to(weight.dtype), requires_grad=conv.weight.requires_grad)
    new.bias = conv.bias
    new.training = conv.training
    return new


def prime_factors(r: int) -> list[int]:
    """Return the prime factors of r in ascending order."""
    factors, p = [], 2
    while r > 1:
        while r % p == 0:
            factors.append(p)
            r //= p
        p += 1
    return factors


@dataclass(frozen=True)
class Filters:
    """Configuration of a front's convolutions: each has `filters`, but the last stage has `out`."""

    channels: int  # image channels
    filters: int
    out: int
    act: str | None
    norm: bool
    generator: torch.Generator  # for the random filters


def stages(r: int, downsample: str, spec: Filters, like: Tensor) -> nn.Sequential:
    """Build a strided convolution for each prime factor of r; the first channels carry the shrunk image."""
    layers, width, factors = nn.Sequential(), spec.channels, prime_factors(r)
    for number, factor in enumerate(factors):
        out = spec.out if number == len(factors) - 1 else spec.filters
        conv = _stage(width, out, factor, like, spec.generator)
        _set_cell(conv, spec.channels, cell_weights(downsample, factor))
        layers.append(conv)
        if spec.act is not None:
            pact = PAct(activation(spec.act), out)
            with torch.no_grad():
                pact.a[spec.channels :] = 1  # the extra filters change nothing yet, so they can be non-linear at once
            layers.append(pact.to(like.device, like.dtype))
        width = out
    return layers


def residual(r: int, downsample: str, spec: Filters, like: Tensor) -> ResidualFront:
    """Build the downsampler plus gamma = 0 times a branch of random strided convolutions."""
    layers, width = nn.Sequential(), spec.channels
    for factor in prime_factors(r):
        layers.append(_stage(width, spec.filters, factor, like, spec.generator))
        if spec.norm:
            layers.append(nn.BatchNorm2d(spec.filters, dtype=like.dtype, device=like.device))
        if spec.act is not None:
            layers.append(activation(spec.act).to(like.device, like.dtype))
        width = spec.filters
    end = _new_conv(like, width, spec.channels, 1)
    _randomize(end, spec.generator)
    return ResidualFront(downsampler(downsample, r), layers.append(end), spec.channels, like)


def add_zero_columns(conv: nn.Conv2d, count: int) -> None:
    """Extend a convolution by `count` input channels with weight zero."""
    weight = conv.weight.detach()
    zeros = weight.new_zeros(weight.shape[0], count, *weight.shape[2:])
    wider = torch.cat([weight, zeros], 1).contiguous(memory_format=channels_last(weight) or torch.contiguous_format)
    conv.weight = nn.Parameter(wider, requires_grad=conv.weight.requires_grad)
    conv.in_channels += count


def _new_conv(like: Tensor, *args: Any, **kwargs: Any) -> nn.Conv2d:
    """Allocate a Conv2d without initial values, so that the global random generator does not advance."""
    return nn.utils.skip_init(nn.Conv2d, *args, dtype=like.dtype, device=like.device, **kwargs)  # pyright: ignore


def _stage(inputs: int, out: int, factor: int, like: Tensor, generator: torch.Generator) -> nn.Conv2d:
    """Build a convolution that shrinks by a prime: 3x3/2 for two, otherwise kernel size equals stride."""
    conv = _new_conv(like, inputs, out, 3, 2, 1) if factor == 2 else _new_conv(like, inputs, out, factor, factor)
    _randomize(conv, generator)
    return conv


def _randomize(conv: nn.Conv2d, generator: torch.Generator) -> None:
    """Apply He initialisation with the given generator."""
    weight = conv.weight
    std = (2 / weight[0].numel()) ** 0.5
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * std)
        assert conv.bias is not None
        conv.bias.zero_()


def _set_cell(conv: nn.Conv2d, channels: int, cell: Tensor) -> None:
    """Set the first `channels` filters so that each shrinks one channel and reads nothing else."""
    with torch.no_grad():
        conv.weight[:channels] = 0
        offset = conv.kernel_size[0] - len(cell)  # the taps [1:, 1:] of 3x3/2 with padding 1 never read the padding
        for c in range(channels):
            conv.weight[c, c, offset:, offset:] = torch.outer(cell, cell).to(conv.weight)
