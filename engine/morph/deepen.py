"""More layers after any module: identity convolutions, antisymmetric pairs, residual blocks that start at zero.

What each is exact in: the identity with BatchNorm in eval mode (bit for bit); the pair over the reals, in both modes,
up to the accuracy of the activation; the residual block bit for bit in both modes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MorphError
from .activation import PAct, activation, paired
from .example import Example
from .report import Report
from .step import EditAt
from .surgery import BATCH_NORMS, Site, conv_class, follow, module_at, morphed, placed, site, spatial

HOW = ("residual", "pair", "identity")


def deepen(
    model: nn.Module, example: Example, path: str, how: str = "residual", **options: Any
) -> tuple[nn.Module, Report]:
    """A new layer or block after the module at `path`.

    Args:
        model: the network; a copy is changed unless ``inplace=True``.
        example: an input batch.
        path: a module whose output is one tensor; it becomes `path.0`.
        how: "residual" (`insert_residual`), "pair" (`insert_pair`) or "identity" (`insert_identity`).
        options: of that function.

    Raises:
        MorphError: another `how`, or as of that function.
    """
    if how not in HOW:
        raise MorphError(f"how={how!r} is unknown; take one of {', '.join(HOW)}")
    insert: Any = {"residual": insert_residual, "pair": insert_pair, "identity": insert_identity}[how]
    return insert(model, example, path, **options)


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
    """Put an identity convolution (a linear layer where channels stand last) after the module at `path`.

    Without BatchNorm it is bit-exact in both modes. BatchNorm gets running_var = 1 - eps, which makes eval mode
    bit-exact; train mode, which normalises by the batch, then differs, and the report says by how much. Directly
    after another BatchNorm with scale g and shift b it gets that one's statistics, mean b and variance g^2, which
    keeps train mode too but for eps / variance (about 5e-6), and eval mode up to rounding.

    Args:
        model: the network; a copy is changed unless `inplace`.
        example: an input batch.
        path: a module whose output is one tensor; it becomes `path.0`.
        kernel: odd, one number or one per image axis.
        norm: add a BatchNorm.
        act: add this activation: as it is for a ReLU after a ReLU, as a PAct otherwise.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: an even kernel, an output that is not one batch of channels, or a BatchNorm that would see one
            value per channel on the example.
    """
    at = site(model, path, example)
    _check_kernel(path, spatial(kernel, at.dims, "kernel"))
    if norm:
        _check_norm(path, at)
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
    """Put a real non-linear layer of twice the channels after `path`: phi([x, -x]), then the difference, which is x.

    phi(x) - phi(-x) = x for ReLU, GELU, SiLU, Hardswish, Softplus and LogSigmoid, and a multiple of x for LeakyReLU
    and PReLU. All weights get a gradient from the first step. Exact in eval and train mode.

    Args:
        model: the network; a copy is changed unless `inplace`.
        example: an input batch.
        path: a module whose output is one tensor; it becomes `path.0`.
        act: the activation, see `activation.activation`.
        kernel: of the first of the two layers; odd.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: an activation without that property, an even kernel, or an output that is no batch of channels.
    """
    paired(act)
    at = site(model, path, example)
    _check_kernel(path, spatial(kernel, at.dims, "kernel"))
    step = PairStep(path, at.channels, at.dims, _plain(kernel), act)
    return morphed(model, step, example, inplace=inplace, rounded=paired(act)[1] != 1)


class Residual(nn.Module):
    """x + body(x)."""

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
    """Put a residual block after `path` whose last scale is zero: bit-exact in eval and train mode.

    With BatchNorm: convolution, BatchNorm, activation, convolution, BatchNorm with scale and shift zero. Without:
    convolution, activation, convolution of zeros. At the first step only the zeros get a gradient, at the next all.

    Args:
        model: the network; a copy is changed unless `inplace`.
        example: an input batch.
        path: a module whose output is one tensor; it becomes `path.0`, the block `path.1`.
        act: the activation, see `activation.activation`.
        kernel: odd, one number or one per image axis.
        hidden: channels inside of the block; as many as outside by default.
        norm: with BatchNorm.
        seed: of the random weights.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: an even kernel, an output that is not one batch of channels, or a BatchNorm that would see one
            value per channel on the example.
    """
    activation(act)
    at = site(model, path, example)
    _check_kernel(path, spatial(kernel, at.dims, "kernel"))
    if norm:
        _check_norm(path, at)
    hidden = at.channels if hidden is None else hidden
    if hidden < 1:
        raise MorphError(f"module '{path}': a block of {hidden} hidden channels; give at least 1")
    step = ResidualStep(path, at.channels, at.dims, _plain(kernel), act, hidden, norm, seed)
    return morphed(model, step, example, inplace=inplace)


# -- steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IdentityStep(EditAt, op="identity"):
    """See `insert_identity`; `dims` counts the image axes, 0 where channels are on the last axis."""

    channels: int
    dims: int
    kernel: int | tuple[int, ...]
    norm: bool
    act: str | None

    def edit(self, model: nn.Module) -> list[str]:
        old = module_at(model, self.path)
        conv = layer(self.channels, self.channels, spatial(self.kernel, self.dims, "kernel"), bias=not self.norm)
        with torch.no_grad():
            conv.weight.copy_(dirac(conv.weight))
            if conv.bias is not None:
                conv.bias.zero_()
        added: list[nn.Module] = [placed(conv, model, self.path)]
        if self.norm:
            added.append(placed(_neutral_norm(old, self.channels, self.dims), model, self.path))
        if self.act is not None:
            phi = activation(self.act)
            idempotent = type(old) is type(phi) and isinstance(old, nn.ReLU | nn.ReLU6)
            added.append(phi if idempotent else placed(PAct(phi, self.channels, self.dims), model, self.path))
        follow(model, self.path, *added)
        norm, act = ", BatchNorm" * self.norm, f", {self.act}" if self.act else ""
        return [f"{self.path}: followed by an identity {_name(conv)}{norm}{act}"]


@dataclass(frozen=True)
class PairStep(EditAt, op="pair"):
    """See `insert_pair`."""

    channels: int
    dims: int
    kernel: int | tuple[int, ...]
    act: str

    def edit(self, model: nn.Module) -> list[str]:
        phi, scale = paired(self.act)
        channels = self.channels
        first = layer(channels, 2 * channels, spatial(self.kernel, self.dims, "kernel"))
        second = layer(2 * channels, channels, (1,) * self.dims)
        with torch.no_grad():
            first.weight[:channels] = dirac(first.weight[:channels])
            first.weight[channels:] = -first.weight[:channels]
            eye = dirac(second.weight[:, :channels])
            second.weight.copy_(torch.cat([eye, -eye], 1))
            first.bias.zero_()
            second.bias.zero_()
            second.double().weight.mul_(scale)  # rounded once, when it gets the network's dtype
        follow(model, self.path, *(placed(new, model, self.path) for new in (first, phi, second)))
        what = f"{_name(first)}, {self.act}, {_name(second)}"
        return [f"{self.path}: followed by {what} with phi(x) - phi(-x) = x"]


@dataclass(frozen=True)
class ResidualStep(EditAt, op="residual"):
    """See `insert_residual`."""

    channels: int
    dims: int
    kernel: int | tuple[int, ...]
    act: str
    hidden: int
    norm: bool
    seed: int

    def edit(self, model: nn.Module) -> list[str]:
        size = spatial(self.kernel, self.dims, "kernel")
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            first = layer(self.channels, self.hidden, size, bias=not self.norm)
            last = layer(self.hidden, self.channels, size, bias=not self.norm)
        body: list[nn.Module] = [first, activation(self.act), last]
        zero: nn.Module = last
        if self.norm:
            zero = _batch_norm(self.dims, self.channels)
            body = [first, _batch_norm(self.dims, self.hidden), activation(self.act), last, zero]
        for parameter in zero.parameters():
            nn.init.zeros_(parameter)
        follow(model, self.path, placed(Residual(nn.Sequential(*body)), model, self.path))
        return [f"{self.path}: followed by a residual block of {self.hidden} hidden channels whose last scale is zero"]


# -- layers ------------------------------------------------------------------------------------------------------


def layer(inputs: int, outputs: int, kernel: tuple[int, ...], bias: bool = True) -> Any:
    """A convolution of stride 1 that keeps the size, or a linear layer where there are no image axes."""
    if not kernel:
        return nn.Linear(inputs, outputs, bias)
    return conv_class(len(kernel))(inputs, outputs, kernel, padding=tuple(k // 2 for k in kernel), bias=bias)


def dirac(weight: Tensor) -> Tensor:
    """The identity of the shape of `weight` (out, in, *kernel): 1 at the centre tap of channel i to i, else 0."""
    result = torch.zeros_like(weight)
    centre = tuple(k // 2 for k in weight.shape[2:])
    index = torch.arange(min(weight.shape[:2]), device=weight.device)
    result[(index, index, *centre)] = 1
    return result


def _batch_norm(dims: int, channels: int) -> Any:
    return BATCH_NORMS[max(dims, 1) - 1](channels)


def _neutral_norm(old: nn.Module, channels: int, dims: int) -> nn.Module:
    """A BatchNorm that is the identity in eval mode; after another one, whose output it knows, nearly in train mode."""
    norm = _batch_norm(dims, channels).double()  # rounded once, when it gets the network's dtype
    with torch.no_grad():
        # A subclass may do more than normalise.
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


def _name(layer: nn.Module) -> str:
    return f"{type(layer).__name__}{tuple(layer.weight.shape)}"  # pyright: ignore


def _plain(kernel: int | tuple[int, ...]) -> int | tuple[int, ...]:
    return kernel if isinstance(kernel, int) else tuple(kernel)


def _check_kernel(path: str, kernel: tuple[int, ...]) -> None:
    if any(k % 2 == 0 for k in kernel):
        raise MorphError(f"after module '{path}': a kernel of {kernel} has no centre tap; give odd numbers")


def _check_norm(path: str, at: Site) -> None:
    if at.dims == 0 and at.rank > 2:
        raise MorphError(f"module '{path}' has its channels on the last axis, where BatchNorm cannot be; norm=False")
    if at.values < 2:
        raise MorphError(
            f"after module '{path}' a channel has one value on this example, of which BatchNorm takes no statistics in "
            "train mode; norm=False (--no-norm), or give an example of the size and batch that you train on"
        )
