"""Activations for growth: PAct, which starts as the identity, and pairs whose difference is the identity.

An activation is named as torch.nn prints it, "GELU" or "LeakyReLU(negative_slope=0.2)", so that a recipe can store it
as text.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MorphError
from .example import Example
from .step import EditAt, Report
from .surgery import cast_like, follow, morphed, site

# All are continuous and elementwise: a random or discontinuous one (RReLU, Threshold, Hardshrink) has no useful slope
# in `a`.
ACTIVATIONS = {
    name: getattr(nn, name)
    for name in (
        "CELU ELU GELU Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 SELU SiLU Sigmoid "
        "Softplus Softshrink Softsign Tanh Tanhshrink"
    ).split()
}
PAIRS = "ReLU, LeakyReLU, PReLU, GELU, SiLU, Hardswish, Softplus or LogSigmoid"
SOFTPLUS_THRESHOLD = 40.0  # e^-40 is below float64's roundoff; PyTorch's 20 puts softplus(x) - softplus(-x) off by 2e-9


def activation(text: str) -> nn.Module:
    """Build the activation that torch.nn prints as `text`; it is never in place.

    Raises:
        MorphError: `text` does not name a continuous elementwise activation of torch.nn.
    """
    options: dict[str, Any] = {}
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Call):
            if call.args:
                raise ValueError
            options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
            call = call.func
        options.pop("inplace", None)  # PAct and pairs also need the value before the activation
        return ACTIVATIONS[call.id if isinstance(call, ast.Name) else ""](**options)
    except (SyntaxError, ValueError, KeyError, TypeError, RecursionError, MemoryError):
        names = ", ".join(ACTIVATIONS)
        raise MorphError(f"{text!r} is not an activation like 'GELU' or 'ELU(alpha=0.5)'; known: {names}") from None


class PAct(nn.Module):
    """x + a (phi(x) - x) with one learnt `a` per channel (P-activation of NetMorph).

    It is the identity at a = 0 and phi at a = 1. At a = 0 it equals the identity bit for bit wherever phi(x) is finite,
    and its gradient in a, phi(x) - x, is not zero.

    Args:
        phi: any activation that is not in place.
        channels: number of coefficients; 1 broadcasts over any number of channels.
        dims: image axes after the channel axis; with 0 the channels are on the last axis.
    """

    def __init__(self, phi: nn.Module, channels: int = 1, dims: int = 2) -> None:
        super().__init__()
        self.phi = phi
        self.a = nn.Parameter(torch.zeros(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.phi(x).to(x.dtype), self.a.to(x.dtype))  # autocast may change either dtype


def pair_scale(phi: nn.Module) -> float | None:
    """Return s with s (phi(x) - phi(-x)) = x for all x, or None if no s exists.

    s exists if phi(x) = x g(x) with g(x) + g(-x) constant (ReLU, GELU, SiLU, Hardswish, LeakyReLU), and for softplus
    and log sigmoid. It does not exist for Tanh, Mish, ELU and similar activations.
    """
    slope = None
    if isinstance(phi, nn.LeakyReLU):
        slope = phi.negative_slope
    if isinstance(phi, nn.PReLU) and phi.num_parameters == 1:  # both members of a pair need the same slope
        slope = torch.tensor(phi.init, dtype=phi.weight.dtype, device="cpu").item()
    if slope is not None:
        return 1 / (1 + slope) if slope > -1 else None
    return 1.0 if isinstance(phi, nn.ReLU | nn.GELU | nn.SiLU | nn.Hardswish | nn.Softplus | nn.LogSigmoid) else None


def paired(text: str) -> tuple[nn.Module, float]:
    """Build the activation `text` for a pair, and return it with its scale.

    Softplus gets a threshold of at least 40, because PyTorch's default cuts off a tail of 2e-9.

    Raises:
        MorphError: phi(x) - phi(-x) is not a multiple of x.
    """
    phi = activation(text)
    scale = pair_scale(phi)
    if scale is None:
        raise MorphError(f"{text}(x) - {text}(-x) is not a multiple of x; use {PAIRS}, or a PAct")
    if isinstance(phi, nn.Softplus):
        phi.threshold = max(phi.threshold, SOFTPLUS_THRESHOLD)
    return phi, scale


def insert_activation(
    model: nn.Module, example: Example, path: str, act: str = "GELU", *, inplace: bool = False
) -> tuple[nn.Module, Report]:
    """Insert a PAct of `act` after the module at `path`; bit-exact in eval and train mode.

    The coefficients get a gradient from the first training step.

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: an input batch.
        path: a module that outputs one tensor; it becomes `path.0`, the PAct `path.1`.
        act: the activation, see `activation`.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: see `surgery.site` and `activation`.
    """
    at = site(model, path, example)
    step = ActivationStep(path, act, at.channels, at.dims)
    return morphed(model, step, example, inplace=inplace)


@dataclass(frozen=True)
class ActivationStep(EditAt, op="activation"):
    """Step of `insert_activation`; `dims` is the number of image axes, 0 if the channels are on the last axis."""

    act: str
    channels: int
    dims: int

    def edit(self, model: nn.Module) -> list[str]:
        follow(model, self.path, cast_like(PAct(activation(self.act), self.channels, self.dims), model, self.path))
        return [f"{self.path}: followed by PAct({self.act}) on {self.channels} channels, a = 0"]
