"""Frozen extractors: networks without their classifier, with self-supervised weights from local files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ....errors import GigamorphError
from ....models import build_model
from ..weights import load_pretrained


class Extractor(nn.Module):
    """(N, C, H, W) -> (N, dim).

    Args:
        network: any network.
        blocks: 0: the input of its last linear layer, the classifier, which is removed. n: the normalised class tokens
            of the last n blocks of a timm vision transformer, concatenated.
    """

    def __init__(self, network: nn.Module, blocks: int = 0) -> None:
        super().__init__()
        self.network, self.blocks = network, blocks
        if blocks and not hasattr(network, "forward_intermediates"):
            raise GigamorphError(f"{type(network).__name__} has no blocks with class tokens; set blocks = 0")
        last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        if not blocks and not last:
            raise GigamorphError(f"{type(network).__name__} has no linear layer as its classifier")
        # A timm transformer that is built for tokens still has its classifier.
        if last and (not blocks or last[-1] == "head"):
            _replace(network, last[-1], nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        if not self.blocks:
            return self.network(x)
        found = self.network.forward_intermediates(  # pyright: ignore[reportCallIssue]
            x, indices=self.blocks, norm=True, return_prefix_tokens=True, intermediates_only=True
        )
        return torch.cat([tokens[:, 0] for _, tokens in found], 1)


def make_extractor(model: str, channels: int, weights: str | Path | None = None, blocks: int = 0) -> Extractor:
    """Build an extractor from a network's name, see `create_model`; `load_pretrained` describes the weights file."""
    extractor = Extractor(build_model(model, 2, channels), blocks)
    if weights is not None:
        load_pretrained(extractor.network, weights)
    return extractor


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)


class Fused(nn.Module):
    """Extractors and a head on the list of their embeddings, as one network on images."""

    def __init__(self, extractors: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.extractors, self.head = nn.ModuleList(extractors), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head([extractor(x) for extractor in self.extractors])
