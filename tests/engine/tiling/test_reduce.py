"""What is taken from maps, and the way back of its gradients."""

from __future__ import annotations

import pytest
import torch

from gigamorph.engine.tiling.reduce import WideSum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(2, 3), (1,), (0, 2, 3)])
def test_a_sum_of_16_bits(dtype: torch.dtype, dims: tuple[int, ...]) -> None:
    """Sum and gradient are autograd's, bit for bit; the gradient is no map in memory."""
    g = torch.Generator().manual_seed(0)
    block = torch.randn(2, 3, 5, 7, generator=g).to(dtype).requires_grad_()
    found, expected = WideSum.apply(block, dims), block.sum(dims, keepdim=True, dtype=torch.float32)
    assert torch.equal(found, expected) and found.dtype == torch.float32
    weights = torch.randn(expected.shape, generator=g)
    seen: list[int] = []
    block.register_hook(lambda grad: seen.append(grad.untyped_storage().nbytes()))
    (own,) = torch.autograd.grad(found, block, weights)
    (autograds,) = torch.autograd.grad(expected, block, weights)
    assert torch.equal(own, autograds) and own.dtype == dtype
    assert seen[0] == weights.numel() * dtype.itemsize
