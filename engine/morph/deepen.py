"""Deepening: identity convolutions, antisymmetric pairs and residual blocks that start at zero, after any module.

The identity with BatchNorm is bit-exact in eval mode. The pair is exact over the reals in both modes, up to the
accuracy of the activation. The residual block is bit-exact in both modes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MorphError
from .activation import PAct, activation, paired
from .example import Example
from .step import EditAt, Report
from .surgery import BATCH_NORMS, CONVS, Site, cast_like, follow, module_at, morphed, site, spatial


def deepen(
    model: nn.Module, example: Example, path: str, how: str = "residual", **options: Any
) -> tuple[nn.Module, Report]:
    """Insert a new layer or block after the module at `path`.

    Args:
        model: the network; the morph changes a copy unless ``inplace=True``.
        example: an input batch.
        path: a module that outputs one tensor; it becomes `path.0`.
        how: "residual" (`insert_residual`), "pair" (`insert_pair`) or "identity" (`insert_identity`).
        options: further arguments of that function.

    Raises:
        MorphError: `how` is unknown, or that function raises it.
    """
    inserts: dict[str, Any] = {"residual": insert_residual, "pair": insert_pair, "identity": insert_identity}
    if how not in inserts:
        raise MorphError(f"unknown how={how!r}; choose from {', '.join(inserts)}")
    return inserts[how](model, example, path, **options)


def insert_identity(
    model: nn.Module,
    example: Example,
    path: str,
    kernel: int | tuple[int, ...] = 3,
    *,
    norm: bool = False,
    act: str | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Insert an identity convolution (a linear layer if the channels are on the last axis) after the module at `path`.

    Without BatchNorm it is bit-exact in both modes. A BatchNorm gets running_var = 1 - eps, which makes eval mode
    bit-exact. Train mode normalises by the batch and then differs; the report states by how much. Directly after
    another BatchNorm with scale g and shift b, the new one gets mean b and variance g^2. Train mode is then preserved
    up to eps / variance (about 5e-6), and eval mode up to rounding.

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: an input batch.
        path: a module that outputs one tensor; it becomes `path.0`.
        kernel: odd size, one number or one per image axis.
        norm: add a BatchNorm.
        act: add this activation, as a PAct unless a ReLU follows a ReLU.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: the kernel is even, the output is not one batch of channels, or BatchNorm would get one value per
            channel on the example.
    """
    at = _site(model, example, path, kernel, norm)
    step = IdentityStep(path, at.channels, at.dims, _plain(kernel), norm, act)
    return morphed(model, step, example, inplace=inplace, rounded=norm, train=not norm)


def insert_pair(
    model: nn.Module,
    example: Example,
    path: str,
    act: str = "GELU",
    kernel: int | tuple[int, ...] = 1,
    *,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Insert a non-linear layer of twice the channels after `path`: phi([x, -x]), then the difference, which equals x.

    phi(x) - phi(-x) is x for ReLU, GELU, SiLU, Hardswish, Softplus and LogSigmoid, and a multiple of x for LeakyReLU
    and PReLU. All weights get a gradient from the first step. The morph is exact in eval and train mode.

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: an input batch.
        path: a module that outputs one tensor; it becomes `path.0`.
        act: the activation, see `activation.activation`.
        kernel: odd kernel size of the first of the two layers.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: the activation lacks that property, the kernel is even, or the output is not a batch of channels.
    """
    paired(act)
    at = _site(model, example, path, kernel)
    step = PairStep(path, at.channels, at.dims, _plain(kernel), act)
    return morphed(model, step, example, inplace=inplace, rounded=paired(act)[1] != 1)


class Residual(nn.Module):
    """Residual block x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def insert_residual(
    model: nn.Module,
    example: Example,
    path: str,
    act: str = "ReLU",
    kernel: int | tuple[int, ...] = 3,
    *,
    hidden: int | None = None,
    norm: bool = True,
    seed: int = 0,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Insert a residual block with a last scale of zero after `path`; bit-exact in eval and train mode.

    With BatchNorm the block is convolution, BatchNorm, activation, convolution, and BatchNorm with scale and shift
    zero. Without BatchNorm it is convolution, activation, and a convolution of zeros. In the first step only the zeros
    get a gradient, from the second step on all weights do.

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: an input batch.
        path: a module that outputs one tensor; it becomes `path.0`, the block `path.1`.
        act: the activation, see `activation.activation`.
        kernel: odd size, one number or one per image axis.
        hidden: channels inside the block; by default as many as outside.
        norm: use BatchNorm.
        seed: seed of the random weights.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: the kernel is even, the output is not one batch of channels, or BatchNorm would get one value per
            channel on the example.
    """
    activation(act)
    at = _site(model, example, path, kernel, norm)
    hidden = at.channels if hidden is None else hidden
    if hidden < 1:
        raise MorphError(f"after module '{path}': hidden must be at least 1, not {hidden}")
    step = ResidualStep(path, at.channels, at.dims, _plain(kernel), act, hidden, norm, seed)
    return morphed(model, step, example, inplace=inplace)


# -- steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Insertion(EditAt):
    """An insertion; `dims` is the number of image axes, 0 if the channels are on the last axis."""

    channels: int
    dims: int
    kernel: int | tuple[int, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """Size of the kernel along each image axis."""
        return spatial(self.kernel, self.dims, "kernel")


@dataclass(frozen=True)
class IdentityStep(_Insertion, op="identity"):
    """Step of `insert_identity`."""

    norm: bool
    act: str | None

    def edit(self, model: nn.Module) -> list[str]:
        old = module_at(model, self.path)
        conv = layer(self.channels, self.channels, self.size, bias=not self.norm)
        with torch.no_grad():
            conv.weight.copy_(dirac(conv.weight))
            if conv.bias is not None:
                conv.bias.zero_()
        added: list[nn.Module] = [cast_like(conv, model, self.path)]
        if self.norm:
            added.append(cast_like(_neutral_norm(old, self.channels, self.dims), model, self.path))
        if self.act is not None:
            phi = activation(self.act)
            idempotent = type(old) is type(phi) and isinstance(old, nn.ReLU | nn.ReLU6)
            added.append(phi if idempotent else cast_like(PAct(phi, self.channels, self.dims), model, self.path))
        follow(model, self.path, *added)
        norm, act = ", BatchNorm" * self.norm, f", {self.act}" if self.act else ""
        return [f"{self.path}: followed by an identity {layer_name(conv)}{norm}{act}"]


@dataclass(frozen=True)
class PairStep(_Insertion, op="pair"):
    """Step of `insert_pair`."""

    act: str

    def edit(self, model: nn.Module) -> list[str]:
        phi, scale = paired(self.act)
        channels = self.channels
        first = layer(channels, 2 * channels, self.size)
        second = layer(2 * channels, channels, (1,) * self.dims)
        with torch.no_grad():
            first.weight[:channels] = dirac(first.weight[:channels])
            first.weight[channels:] = -first.weight[:channels]
            eye = dirac(second.weight[:, :channels])
            second.weight.copy_(torch.cat([eye, -eye], 1))
            first.bias.zero_()
            second.bias.zero_()
            second.double().weight.mul_(scale)  # so that the cast to the network's dtype is the only rounding
        follow(model, self.path, *(cast_like(new, model, self.path) for new in (first, phi, second)))
        what = f"{layer_name(first)}, {self.act}, {layer_name(second)}"
        return [f"{self.path}: followed by {what} with phi(x) - phi(-x) = x"]


@dataclass(frozen=True)
class ResidualStep(_Insertion, op="residual"):
    """Step of `insert_residual`."""

    act: str
    hidden: int
    norm: bool
    seed: int

    def edit(self, model: nn.Module) -> list[str]:
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            first = layer(self.channels, self.hidden, self.size, bias=not self.norm)
            last = layer(self.hidden, self.channels, self.size, bias=not self.norm)
        body: list[nn.Module] = [first, activation(self.act), last]
        zero: nn.Module = last
        if self.norm:
            zero = _batch_norm(self.dims, self.channels)
            body = [first, _batch_norm(self.dims, self.hidden), activation(self.act), last, zero]
        for parameter in zero.parameters():
            nn.init.zeros_(parameter)
        follow(model, self.path, cast_like(Residual(nn.Sequential(*body)), model, self.path))
        return [f"{self.path}: followed by a residual block of {self.hidden} hidden channels with a last scale of zero"]


# -- layers ------------------------------------------------------------------------------------------------------


def layer(inputs: int, outputs: int, kernel: tuple[int, ...], bias: bool = True) -> Any:
    """Build a convolution of stride 1 that preserves the size, or a linear layer if there are no image axes."""
    if not kernel:
        return nn.Linear(inputs, outputs, bias)
    kind: Any = CONVS[len(kernel) - 1]
    return kind(inputs, outputs, kernel, padding=tuple(k // 2 for k in kernel), bias=bias)


def dirac(weight: Tensor) -> Tensor:
    """Return the identity in the shape of `weight` (out, in, *kernel): 1 at the centre tap from i to i, 0 elsewhere."""
    result = torch.zeros_like(weight)
    centre = tuple(k // 2 for k in weight.shape[2:])
    index = torch.arange(min(weight.shape[:2]), device=weight.device)
    result[(index, index, *centre)] = 1
    return result


def _batch_norm(dims: int, channels: int) -> Any:
    return BATCH_NORMS[max(dims, 1) - 1](channels)


def _neutral_norm(old: nn.Module, channels: int, dims: int) -> nn.Module:
    """Build a BatchNorm that is the identity in eval mode, and nearly in train mode if it follows a BatchNorm."""
    norm = _batch_norm(dims, channels).double()  # so that the cast to the network's dtype is the only rounding
    with torch.no_grad():
        # Subclasses are excluded, because they may do more than normalise.
        if isinstance(old, BATCH_NORMS) and type(old) in BATCH_NORMS and old.affine:
            norm = norm.to(old.weight.device)
            square = old.weight.double() ** 2
            norm.running_mean.copy_(old.bias)
            norm.running_var.copy_(square)
            norm.weight.copy_((square + norm.eps).sqrt())
            norm.bias.copy_(old.bias)
        else:
            norm.running_var.fill_(1 - norm.eps)
    return norm


def layer_name(layer: nn.Module) -> str:
    """Return class and shape of the weight, for a report."""
    weight = getattr(layer, "weight", None)
    return type(layer).__name__ + (str(tuple(weight.shape)) if isinstance(weight, Tensor) else "")


def _plain(kernel: int | tuple[int, ...]) -> int | tuple[int, ...]:
    return kernel if isinstance(kernel, int) else tuple(kernel)


def _site(model: nn.Module, example: Example, path: str, kernel: int | tuple[int, ...], norm: bool = False) -> Site:
    """Return the site of an insertion, which an odd kernel and, with `norm`, a BatchNorm must fit."""
    at = site(model, path, example)
    size = spatial(kernel, at.dims, "kernel")
    if any(k % 2 == 0 for k in size):
        raise MorphError(f"after module '{path}': kernel {size} must be odd, so that it has a centre tap")
    if norm and at.dims == 0 and at.rank > 2:
        raise MorphError(
            f"module '{path}' has its channels on the last axis, so BatchNorm cannot follow; use norm=False"
        )
    if norm and at.values < 2:
        raise MorphError(
            f"after module '{path}' each channel has one value on this example, too few for BatchNorm in train mode; "
            "use norm=False (--no-norm), or an example of the size and batch of your training"
        )
    return at
