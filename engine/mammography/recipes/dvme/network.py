"""DVME: embeddings of several extractors, fused by self-attention (Truong et al., 2021, appendices C and E).

    e_i -> W_i e_i + b_i            project each embedding to p values, no activation
    x = concat(...)                 (N, n p)
    x = attention(tokens of x)      no residual, no position embedding, no MLP
    y = W_2 dropout(relu(W_1 layer_norm(x)))

The published listing uses n p tokens of one value each ("scalar"): 3,677,706 parameters for the embeddings 2048, 2048
and 1536 and five classes, as in the paper's table G1 (3.6 M). The paper's text and figures describe n tokens of p
values ("block"): 4,726,789.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....errors import GigamorphError
from ..weights import build_pretrained


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
    return Extractor(build_pretrained(model, 2, channels, weights), blocks)


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


TOKENS = ("scalar", "block", "none")


class SelfAttention(nn.Module):
    """Tokens (N, T, dim) -> (N, T, dim): softmax(q k^T / sqrt(dim / heads)) v and a linear layer, as in timm's ViT."""

    def __init__(self, dim: int, heads: int = 1) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise GigamorphError(
                f"tokens of {dim} value{'s' * (dim > 1)} cannot be split among {heads} heads; set heads = 1"
            )
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._parts(x)
        # Fused attention never stores the matrix of 1536 x 1536 weights per example.
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention (N, heads, T, T); each row sums to 1."""
        q, k, _ = self._parts(x)
        return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class DVMEHead(nn.Module):
    """Embeddings, a list of (N, dims[i]) -> logits (N, classes).

    Args:
        dims: sizes of the embeddings in order.
        classes: number of outputs.
        p: size to which each embedding is projected.
        hidden: width of the classifier's hidden layer.
        dropout: before the last layer.
        tokens: "scalar", "block", or "none" for no attention (the paper's ablation).
        heads: number of attention heads.
    """

    def __init__(
        self,
        dims: Sequence[int],
        classes: int,
        *,
        p: int = 512,
        hidden: int = 512,
        dropout: float = 0.2,
        tokens: str = "scalar",
        heads: int = 1,
    ) -> None:
        super().__init__()
        if tokens not in TOKENS:
            raise GigamorphError(f"unknown tokens {tokens!r}; use one of {', '.join(TOKENS)}")
        if not dims:
            raise GigamorphError("a DVME head needs at least one embedding")
        self.tokens, self.p = tokens, p
        self.project = nn.ModuleList(nn.Linear(dim, p) for dim in dims)
        width = p * len(dims)
        self.attention = None if tokens == "none" else SelfAttention(1 if tokens == "scalar" else p, heads)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes)
        )

    def forward(self, embeddings: Sequence[Tensor]) -> Tensor:
        x = self._project(embeddings)
        if self.attention is not None:
            x = self.attention(self._as_tokens(x)).flatten(1)
        return self.classifier(self.norm(x))

    @torch.no_grad()
    def attention_map(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Return how much each extractor (row) attends to each (column), averaged over images and heads: (n, n).

        Rows sum to 1. Scalar tokens of one extractor are averaged as rows and summed as columns.
        """
        if self.attention is None:
            raise GigamorphError('a head with tokens = "none" has no attention to show')
        x, count = self._as_tokens(self._project(embeddings)), len(self.project)
        total = torch.zeros(count, count, dtype=torch.float64)
        for image in x:  # one at a time: the matrix of scalar tokens is large
            weights = self.attention.weights(image[None]).mean((0, 1))
            blocks = weights.unflatten(0, (count, -1)).unflatten(2, (count, -1))
            total += blocks.sum(3).mean(1).double().cpu()
        return total / len(x)

    def _project(self, embeddings: Sequence[Tensor]) -> Tensor:
        return torch.cat([layer(e) for layer, e in zip(self.project, embeddings, strict=True)], 1)

    def _as_tokens(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-1) if self.tokens == "scalar" else x.unflatten(1, (len(self.project), self.p))
