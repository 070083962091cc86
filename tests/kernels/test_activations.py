"""The slopes that are written out agree with autograd's."""

import pytest
import torch

from gigamorph.kernels.activations import ACTIVATIONS, MASKS, activate_reference, slope_reference


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_slope(act: str) -> None:
    z = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    z.requires_grad_()
    y = activate_reference(z, act)
    (slope,) = torch.autograd.grad(y.sum(), z)
    torch.testing.assert_close(slope_reference(z.detach(), act), slope, rtol=1e-13, atol=1e-13)
    if act in MASKS:
        torch.testing.assert_close(slope_reference(y.detach(), act), slope, rtol=0, atol=0)
