"""Changes of the image channels: RGB to grey, grey to RGB, more planes; child(y) = parent(A y + b) at each pixel.

The matrix and the offset are folded into the convolutions that read the image. The bias cannot absorb the offset: zero
padding comes *after* the offset, so the bias would be wrong at the borders (by 7 % for ImageNet's means). Instead the
offset is the weight of an extra input channel of ones, which gets the same padding as the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MorphError
from .running import eval_mode, failures
from .step import EditAll, Report
from .surgery import CONVS, morphed, plain, replace

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
KRAFT_THIRDS = (0.5, 0.25, 0.25)  # sum 1, and products with a weight are exact

Matrix = Sequence[Sequence[float]]


def to_grey(
    model: nn.Module,
    example: Tensor,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    grey_mean: float = 0.0,
    grey_std: float = 1.0,
    paths: Sequence[str] | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Convert a network for normalised RGB images to grey images; exact at the borders too.

    With a grey image g = y * grey_std + grey_mean, child(y) = parent((g - mean) / std), where all channels are g. The
    morph adds a channel of ones unless every mean equals grey_mean.

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: a grey batch (N, 1, ...), input of the child.
        mean, std: normalisation of the parent, one number per channel.
        grey_mean, grey_std: normalisation of the child.
        paths: the convolutions that read the image; by default a run finds them.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: see `mix_inputs`.
    """
    if len(mean) != len(std) or not all(std):
        raise MorphError(f"mean {tuple(mean)} and std {tuple(std)} must have the same length, and no std may be zero")
    matrix = [[grey_std / s] for s in std]
    offset = [(grey_mean - m) / s for m, s in zip(mean, std, strict=True)]
    return mix_inputs(model, example, matrix, offset, paths=paths, inplace=inplace)


def to_rgb(
    model: nn.Module,
    example: Tensor,
    *,
    weights: Sequence[float] = KRAFT_THIRDS,
    paths: Sequence[str] | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Convert a network for grey images to RGB: child(y) = parent(sum of weights * channels).

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: an RGB batch, input of the child.
        weights: weights of the three channels; the default is exact in stored numbers.
        paths: the convolutions that read the image; by default a run finds them.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: see `mix_inputs`.
    """
    return mix_inputs(model, example, [list(weights)], paths=paths, inplace=inplace)


def add_planes(
    model: nn.Module, example: Tensor, planes: int, *, paths: Sequence[str] | None = None, inplace: bool = False
) -> tuple[nn.Module, Report]:
    """Add image planes (a prior examination, a mask) to the input; their weights start at zero.

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: an input of the child, the old channels first.
        planes: number of new planes.
        paths: the convolutions that read the image; by default a run finds them.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: see `mix_inputs`.
    """
    old = example.shape[1] - planes
    if planes < 1 or old < 1:
        raise MorphError(
            f"the example has {example.shape[1]} channels, too few for {planes} new planes; give old and new channels"
        )
    matrix = [[float(i == j) for j in range(old + planes)] for i in range(old)]
    return mix_inputs(model, example, matrix, paths=paths, inplace=inplace)


def mix_inputs(
    model: nn.Module,
    example: Tensor,
    matrix: Matrix,
    offset: Sequence[float] | None = None,
    *,
    paths: Sequence[str] | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Mix the input channels: child(y) = parent(matrix @ y + offset) at each pixel.

    The morph is exact in eval and train mode for any padding.

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: a batch of the child, (N, columns of the matrix, ...).
        matrix: one row per channel of the parent, one column per channel of the child.
        offset: one number per channel of the parent; an offset adds an input channel of ones.
        paths: the convolutions that read the image; by default a run finds them.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: another module than plain convolutions reads the image, or sizes do not fit.
    """
    rows = tuple(tuple(float(v) for v in row) for row in matrix)
    shift = tuple(float(v) for v in offset) if offset is not None else (0.0,) * len(rows)
    if len({len(row) for row in rows}) != 1 or len(shift) != len(rows) or example.shape[1] != len(rows[0]):
        raise MorphError(
            f"matrix {len(rows)} x {len(rows[0]) if rows else 0}, offset {len(shift)} and an example of "
            f"{example.shape[1]} channels do not fit; the matrix has a column per channel of the example"
        )
    if paths is None:
        paths = image_convs(model, example.new_zeros(example.shape[0], len(rows), *example.shape[2:]))
    step = InputsStep(tuple(paths), rows, shift)
    mix = Mix(rows, shift, example.ndim - 2)
    return morphed(
        model,
        step,
        example,
        inplace=inplace,
        rounded=not _exact(rows, shift),
        view=lambda parent, child: (nn.Sequential(mix, parent), child),
    )


def mixed_weight(weight: Tensor, matrix: Matrix, offset: Sequence[float] | None = None, groups: int = 1) -> Tensor:
    """Fold the matrix into a weight (out, in / groups, *kernel), with one rounding.

    The result is (out, columns of the matrix [+ 1 for the ones], *kernel).
    """
    columns = torch.tensor(matrix, dtype=torch.float64)
    if offset is not None:
        columns = torch.cat([columns, torch.tensor(offset, dtype=torch.float64)[:, None]], 1)
    outputs, inputs = weight.shape[:2]
    if len(columns) != inputs * groups:
        raise MorphError(f"the weight reads {inputs * groups} channels, but the matrix has {len(columns)} rows")
    columns = columns.to(weight.device).reshape(groups, inputs, -1)
    parts = weight.double().reshape(groups, outputs // groups, inputs, -1)
    mixed = torch.einsum("goik,gic->gock", parts, columns)
    return mixed.reshape(outputs, -1, *weight.shape[2:]).to(weight.dtype).contiguous()


def image_convs(model: nn.Module, image: Tensor) -> list[str]:
    """Return the paths of the convolutions that read the image directly.

    Raises:
        MorphError: there is none, or the model cannot be run on the image.
    """
    found: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0] is image and isinstance(module, CONVS) and id(module) in names:
            found.append(names[id(module)])

    like = next((p for p in model.parameters() if p.is_floating_point()), image)
    image = image.to(like)
    hook = nn.modules.module.register_module_forward_pre_hook(look)
    with hook, eval_mode(model), torch.no_grad(), failures(f"the model cannot be run on {tuple(image.shape)}"):
        model(image)
    if not found:
        raise MorphError("no convolution reads the image directly; name those that read only the image in paths=")
    return list(dict.fromkeys(found))


class OnesChannel(nn.Module):
    """Layer that appends a channel of ones."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, [0, 0] * (x.ndim - 2) + [0, 1], value=1.0)


class Mix(nn.Module):
    """Layer that computes matrix @ y + offset at each pixel."""

    def __init__(self, matrix: Matrix, offset: Sequence[float], dims: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.tensor(matrix, dtype=torch.float64))
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float64).reshape(-1, *[1] * dims))

    def forward(self, y: Tensor) -> Tensor:
        matrix: Any = self.matrix
        return torch.einsum("cj,nj...->nc...", matrix.to(y), y) + self.offset.to(y)  # pyright: ignore


def _exact(matrix: Matrix, offset: Sequence[float]) -> bool:
    """Return whether the new weights are old weights times powers of two, and therefore not rounded."""
    powers = all(v == 0 or abs(math.frexp(v)[0]) == 0.5 for row in matrix for v in row)
    return powers and not any(offset) and all(sum(v != 0 for v in column) <= 1 for column in zip(*matrix, strict=True))


@dataclass(frozen=True)
class InputsStep(EditAll, op="inputs"):
    """Step of `mix_inputs`."""

    matrix: tuple[tuple[float, ...], ...]
    offset: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Image channels of the child."""
        return len(self.matrix[0])

    def edit(self, model: nn.Module) -> list[str]:
        return [self._mix(model, path) for path in self.paths]

    def _mix(self, model: nn.Module, path: str) -> str:
        shift = self.offset if any(self.offset) else None
        conv = plain(model, path, *CONVS)
        before = conv.in_channels
        if before != len(self.matrix):
            raise MorphError(f"module '{path}' reads {before} channels, but the matrix has {len(self.matrix)} rows")
        with torch.no_grad():
            weight = mixed_weight(conv.weight, self.matrix, shift, conv.groups)
        conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        conv.in_channels, conv.groups = weight.shape[1], 1
        if shift:
            replace(model, path, nn.Sequential(OnesChannel(), conv))
        return f"{path}: {before} -> {weight.shape[1]} channels{', one of them ones' * bool(shift)}"
