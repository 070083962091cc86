"""More layers after any module: identity convolutions, antisymmetric pairs, residual blocks that start at zero.

What each is exact in: the identity with BatchNorm in eval mode (bit for bit); the pair over the reals, in both modes,
up to the accuracy of the activation; the residual block bit for bit in both modes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MorphError
from .activation import PAct, activation, paired
from .surgery import BATCH_NORMS, Site, conv_class, edit, follow, module_at, morphed, placed, site, spatial
from .verify import Example, Report


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
        MorphError: an even kernel, or an output that is not one batch of channels.
    """
    at = site(model, path, example)
    _check_kernel(path, spatial(kernel, at.dims, "kernel"))
    if norm:
        _check_norm(path, at)
    step = {"op": "identity", "path": path, "channels": at.channels, "dims": at.dims}
    step |= {"kernel": _plain(kernel), "norm": norm, "act": act}
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
    step = {"op": "pair", "path": path, "channels": at.channels, "dims": at.dims, "kernel": _plain(kernel), "act": act}
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
        MorphError: an even kernel, or an output that is not one batch of channels.
    """
    activation(act)
    at = site(model, path, example)
    _check_kernel(path, spatial(kernel, at.dims, "kernel"))
    if norm:
        _check_norm(path, at)
    hidden = at.channels if hidden is None else hidden
    if hidden < 1:
        raise MorphError(f"module '{path}': a block of {hidden} hidden channels; give at least 1")
    step = {"op": "residual", "path": path, "channels": at.channels, "dims": at.dims, "kernel": _plain(kernel)}
    step |= {"act": act, "hidden": hidden, "norm": norm, "seed": seed}
    return morphed(model, step, example, inplace=inplace)


# -- edits -------------------------------------------------------------------------------------------------------


@edit("identity")
def _insert_identity(
    model: nn.Module,
    path: str,
    channels: int,
    dims: int,
    kernel: int | list[int],
    norm: bool,
    act: str | None,
) -> list[str]:
    old = module_at(model, path)
    conv = layer(channels, channels, spatial(kernel, dims, "kernel"), bias=not norm)
    with torch.no_grad():
        conv.weight.copy_(dirac(conv.weight))
        if conv.bias is not None:
            conv.bias.zero_()
    added: list[nn.Module] = [placed(conv, model, path)]
    if norm:
        added.append(placed(_neutral_norm(old, channels, dims), model, path))
    if act is not None:
        phi = activation(act)
        idempotent = type(old) is type(phi) and isinstance(old, nn.ReLU | nn.ReLU6)
        added.append(phi if idempotent else placed(PAct(phi, channels, dims), model, path))
    follow(model, path, *added)
    return [f"{path}: followed by an identity {_name(conv)}{', BatchNorm' * norm}{f', {act}' if act else ''}"]


@edit("pair")
def _insert_pair(model: nn.Module, path: str, channels: int, dims: int, kernel: int | list[int], act: str) -> list[str]:
    phi, scale = paired(act)
    first = layer(channels, 2 * channels, spatial(kernel, dims, "kernel"))
    second = layer(2 * channels, channels, (1,) * dims)
    with torch.no_grad():
        first.weight[:channels] = dirac(first.weight[:channels])
        first.weight[channels:] = -first.weight[:channels]
        eye = dirac(second.weight[:, :channels])
        second.weight.copy_(torch.cat([eye, -eye], 1))
        first.bias.zero_()
        second.bias.zero_()
        second.double().weight.mul_(scale)  # rounded once, when it gets the network's dtype
    follow(model, path, placed(first, model, path), placed(phi, model, path), placed(second, model, path))
    return [f"{path}: followed by {_name(first)}, {act}, {_name(second)} with phi(x) - phi(-x) = x"]


@edit("residual")
def _insert_residual(
    model: nn.Module,
    path: str,
    channels: int,
    dims: int,
    kernel: int | list[int],
    act: str,
    hidden: int,
    norm: bool,
    seed: int,
) -> list[str]:
    size = spatial(kernel, dims, "kernel")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        first = layer(channels, hidden, size, bias=not norm)
        last = layer(hidden, channels, size, bias=not norm)
    body: list[nn.Module] = [first, activation(act), last]
    zero: nn.Module = last
    if norm:
        zero = _batch_norm(dims, channels)
        body = [first, _batch_norm(dims, hidden), activation(act), last, zero]
    for parameter in zero.parameters():
        nn.init.zeros_(parameter)
    follow(model, path, placed(Residual(nn.Sequential(*body)), model, path))
    return [f"{path}: followed by a residual block of {hidden} hidden channels whose last scale is zero"]


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


def _plain(kernel: int | tuple[int, ...]) -> int | list[int]:
    return kernel if isinstance(kernel, int) else list(kernel)


def _check_kernel(path: str, kernel: tuple[int, ...]) -> None:
    if any(k % 2 == 0 for k in kernel):
        raise MorphError(f"after module '{path}': a kernel of {kernel} has no centre tap; give odd numbers")


def _check_norm(path: str, at: Site) -> None:
    if at.dims == 0 and at.rank > 2:
        raise MorphError(f"module '{path}' has its channels on the last axis, where BatchNorm cannot be; norm=False")
