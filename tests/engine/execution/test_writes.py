"""What a call writes at its end: together, but for tensors that share memory; not to arguments that do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.errors import UnsupportedError
from gigamorph.engine.execution import forward


@pytest.mark.parametrize("case", ["apart", "one is another's value", "one is part of another"])
def test_in_few_launches(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    a, b, c, d = (torch.full((4,), float(n)) for n in range(4))
    pairs = {
        "apart": [(a, b), (c, d)],
        "one is another's value": [(a, b), (b, c)],
        "one is part of another": [(a, b), (a[:2], c[:2])],
    }[case]
    groups: list[int] = []
    copy_all = forward.copy_all

    def noted(part: list[tuple[Tensor, Tensor]]) -> None:
        groups.append(len(part))
        copy_all(part)

    monkeypatch.setattr(forward, "copy_all", noted)
    forward._write(pairs)
    assert groups == ([2] if case == "apart" else [1, 1])
    expected = {"apart": [1.0, 3.0], "one is another's value": [1.0, 2.0], "one is part of another": [2.0, 2.0]}[case]
    assert [float(target[0]) for target, _ in pairs] == expected


class Centred(nn.Module):
    """Writes to its first argument, and reads its second."""

    def forward(self, current: Tensor, before: Tensor) -> Tensor:
        return F.avg_pool2d(current.sub_(0.5), 2).mean((2, 3)) + F.avg_pool2d(before, 2).square().mean((2, 3))


def test_arguments_that_share_memory() -> None:
    """What was written to one was missing in the other, in silence; two parts of one batch are apart."""
    batch = torch.rand(2, 1, 21, 17, dtype=torch.float64)
    tiled = accelerate(Centred(), tile=8)
    for before in (batch, batch[:1].detach(), batch.permute(1, 0, 2, 3)):
        with pytest.raises(UnsupportedError, match=r"writes to an argument of shape \[1, 1, 21, 17\] that shares"):
            tiled(batch[:1], before)
    found = [net(twin[:1], twin[1:]) for net, twin in ((Centred(), batch.clone()), (tiled, batch))]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


class Shrinking(nn.Module):
    """A convolution that halves its weight in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1).double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.conv.weight.mul_(0.5)
        return self.conv(x).square().mean((2, 3))


@pytest.mark.parametrize("tile", [9, 64])
def test_two_forwards_that_write_a_weight_have_the_gradients_of_their_weights(tile: int) -> None:
    """PyTorch refuses this backward, because the second forward overwrites what the first one saved."""
    torch.manual_seed(0)
    net, image = Shrinking(), torch.randn(1, 1, 21, 24, dtype=torch.float64)
    bias, weight = net.conv.bias.detach(), net.conv.weight.detach().clone()
    both = [(weight * factor).requires_grad_() for factor in (0.5, 0.25)]
    sum(torch.conv2d(image, one, bias, padding=1).square().mean((2, 3)).sum() for one in both).backward()
    fast = accelerate(net, tile=tile)
    (fast(image) + fast(image)).sum().backward()
    torch.testing.assert_close(net.conv.weight.grad, both[0].grad + both[1].grad, rtol=1e-12, atol=1e-12)
