"""The self-test of ``gigamorph doctor``: a small network with what a new PyTorch might break, compared with stock."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.torch_private import NAMES
from . import torch_private
from .accelerate import accelerate
from .capture.gaps import missing_functions
from .capture.substitutes import SUBSTITUTES
from .errors import GigamorphError
from .torch_private import PrivateName, missing_names

_LIMIT = 1e-10  # relative difference in float64


class _Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * 3 * x**2


class _Network(nn.Module):
    """A custom Function, a checkpoint, a hook, BatchNorm in training mode, a branch without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + checkpoint(self.block, x, use_reentrant=False)  # pyright: ignore[reportOperatorIssue]
        if x.requires_grad:
            x.register_hook(lambda grad: grad * 0.5)
        with torch.no_grad():
            scale = x.mean((2, 3), keepdim=True)
        return self.head(_Cubed.apply(x * scale).mean((2, 3)))  # pyright: ignore[reportAttributeAccessIssue]


def self_test() -> str | None:
    """Compare a training step by tiles with stock PyTorch, in float64; return what differs or fails."""
    stock = _Network().double()
    try:
        steps = [_step(copy.deepcopy(stock)), _step(accelerate(stock, tile=16))]
    except (GigamorphError, RuntimeError, AttributeError, ImportError, TypeError) as error:
        return " ".join(str(error).split())
    for name, expected in steps[0].items():
        difference = float((steps[1][name] - expected).norm() / expected.norm().clamp_min(1e-3))
        if not difference < _LIMIT:
            return f"{name} differs by {difference:.0e}"
    return None


def _step(network: nn.Module) -> dict[str, Tensor]:
    """Output, gradients and buffers of a training step on an odd image."""
    image = torch.linspace(-1, 1, 2 * 41 * 35, dtype=torch.float64).sin().view(2, 1, 41, 35).requires_grad_()
    output = network(image)
    output.square().sum().backward()
    grads = {f"the gradient of {name}": value.grad for name, value in network.named_parameters()}
    found = {"the output": output, "the gradient of the image": image.grad, **grads, **dict(network.named_buffers())}
    return {name: value.detach().double() for name, value in found.items() if value is not None}


def missing() -> list[PrivateName]:
    """The private names of PyTorch that gigamorph uses and the installed PyTorch does not have."""
    of_kernels = [PrivateName(path, *texts) for path, texts in NAMES.items() if path not in torch_private.NAMES]
    found = [*missing_names(), *(name for name in of_kernels if name.find_or(None) is None)]
    return [*found, *missing_functions(*SUBSTITUTES)]
