"""Attention of a tile is counted as the CPU computes it: in blocks of keys, without the scores of all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import plan
from gigamorph.engine.planning.meta_attention import AttentionOfTheCPU

SHAPE = (1, 2, 40, 8)


class Attention(nn.Module):
    """Positions of a map that ask all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (1, -1)).transpose(1, 2) for t in self.stem(x).flatten(2).mT.chunk(3, 2))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1)


def test_scores_are_not_counted() -> None:
    """Of 16 x 64 queries and 4096 keys in float32."""
    assert plan(Attention(), (256, 256), tile=(64, 256)).tile_bytes < 0.25 * 4 * 16 * 64 * 4096


@pytest.mark.parametrize("mask", [None, torch.float32, torch.bool])
@pytest.mark.parametrize("learned", [False, True])
def test_the_op_is_that_of_the_cpu(mask: torch.dtype | None, learned: bool) -> None:
    """By what autograd calls it; a mask that learns has no kernel with blocks."""
    if mask is not None:
        bias = torch.zeros(40, 40, dtype=mask).requires_grad_(learned and mask.is_floating_point)
    else:
        bias = None
    here = torch.zeros(SHAPE, requires_grad=True)
    away = torch.zeros(SHAPE, device="meta", requires_grad=True)
    expected = F.scaled_dot_product_attention(here, here, here, bias)
    with AttentionOfTheCPU():
        found = F.scaled_dot_product_attention(away, away, away, None if bias is None else _on_meta(bias))
    assert found.shape == expected.shape and found.is_meta
    if mask != torch.bool:  # counted with all scores: too much rather than too little
        assert ("Flash" in type(found.grad_fn).__name__) == ("Flash" in type(expected.grad_fn).__name__)
    assert ("Flash" in type(expected.grad_fn).__name__) == (not (learned and mask is torch.float32))


def _on_meta(bias: Tensor) -> Tensor:
    return bias.detach().to("meta").requires_grad_(bias.requires_grad)
