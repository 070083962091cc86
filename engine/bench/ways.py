"""What an expert does to stock PyTorch to save time and memory: folded norms, checkpoints of blocks, torch.compile.

Names of parameters and their gradients stay those of the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import UnsupportedError
from ..torch_private import BatchNorm

_SIDES = (64, 224)  # of the image that shows which norm follows which convolution


def fold_norms(network: nn.Module, channels: int) -> nn.Module:
    """Fold each frozen BatchNorm into the convolution before it; both keep their parameters, which get gradients.

    The map between them is then neither computed nor stored.

    Args:
        network: in evaluation mode, or with frozen norms.
        channels: of its image.

    Raises:
        UnsupportedError: no norm follows a convolution.
    """
    pairs = _pairs(network, channels)
    if not pairs:
        raise UnsupportedError(f"{type(network).__name__} has no norm after a convolution to fold")
    for conv, norm in pairs:
        conv.__class__, norm.__class__ = _FoldedConv2d, _folded_norm(type(norm))
        vars(conv)["folded"] = [norm]  # not a child: names of parameters stay
    return network


class _FoldedConv2d(nn.Conv2d):
    folded: list[Any]

    def forward(self, input: Tensor) -> Tensor:
        norm = self.folded[0]
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale if norm.bias is None else norm.bias - norm.running_mean * scale
        shift = shift if self.bias is None else shift + self.bias * scale
        weight = self.weight * scale.reshape(-1, 1, 1, 1)
        return F.conv2d(input, weight, shift, self.stride, self.padding, self.dilation, self.groups)  # pyright: ignore


def _folded_norm(kind: type) -> type:
    """A class of norms that do nothing, apart from the activation that timm's norms contain."""

    def forward(self: Any, x: Tensor) -> Tensor:
        for name in ("drop", "act"):
            x = getattr(self, name, nn.Identity())(x)
        return x

    return type(f"Folded{kind.__name__}", (kind,), {"forward": forward})


def _pairs(network: nn.Module, channels: int) -> list[tuple[Any, Any]]:
    """Convolutions and the norms that read their outputs, if both run once."""
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: list[tuple[Any, Any]] = []
    runs: dict[nn.Module, int] = {}

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        outputs[id(output)] = module, output  # the output is kept, so that its id stays unique
        runs[module] = runs.get(module, 0) + 1

    def before(module: nn.Module, args: Any) -> None:
        runs[module] = runs.get(module, 0) + 1
        found = outputs.get(id(args[0]))
        if found is not None:
            pairs.append((found[0], module))

    handles = []
    for module in network.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            handles.append(module.register_forward_hook(after))
        elif isinstance(module, BatchNorm) and not module.training and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(before))
    like = next(network.parameters())
    try:
        for side in _SIDES:
            with suppress(RuntimeError, AssertionError, ValueError), torch.no_grad():
                network(torch.zeros(1, channels, side, side, dtype=like.dtype, device=like.device))
                break
            for found in (outputs, pairs, runs):  # the side is too small, or the network has one size
                found.clear()
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in pairs if runs[pair[0]] == runs[pair[1]] == 1]


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the outermost modules named as blocks or bottlenecks, as in ResNets, ConvNeXts and most of timm."""
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if "Block" in type(child).__name__ or "Bottleneck" in type(child).__name__:
                found.append(child)
            else:
                search(child)

    search(network)
    return found


def checkpointed(network: nn.Module) -> nn.Module:
    """Checkpoint a network's blocks, so that only their inputs are stored; for a VGG the parts between poolings.

    The second forward of a block leaves running statistics alone.

    Raises:
        UnsupportedError: it has neither.
    """
    found = blocks(network)
    features = getattr(network, "features", None)
    if not found and isinstance(features, nn.Sequential):
        for name, part in list(_between_pools(features)):
            features.add_module(name, part)
            found.append(part)
    if not found:
        raise UnsupportedError(f"{type(network).__name__} has no blocks to checkpoint")
    for block in found:
        contexts = partial(_contexts, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    return network


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), _kept_statistics(block)


@contextmanager
def _kept_statistics(block: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:  # PyTorch ends a second forward early by an exception
        for buffer, value in before:
            buffer.copy_(value)


def _between_pools(features: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """Replace the layers up to each pooling by one module with the first layer's name; the others become identities."""
    parts: list[tuple[str, nn.Module]] = []
    names: list[str] = []
    layers: list[nn.Module] = []
    for name, layer in list(features.named_children()):
        names.append(name)
        layers.append(layer)
        if isinstance(layer, nn.MaxPool2d):
            parts.append((names[0], nn.Sequential(*layers)))
            for other in names[1:]:
                features.add_module(other, nn.Identity())
            names, layers = [], []
    return parts
