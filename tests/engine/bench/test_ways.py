"""Ways of stock PyTorch: folded norms and checkpointed blocks compute what the network computes, with its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from exactness import randomize
from torch import Tensor, nn

from gigamorph import UnsupportedError
from gigamorph.engine.bench.ways import checkpointed, fold_norms
from gigamorph.engine.models.resnet import resnet18


class Twice(nn.Module):
    """A convolution and a norm that fold, a norm that runs twice, and a convolution without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4)
        self.other, self.shared = nn.Conv2d(4, 4, 3, groups=2, dilation=2, bias=False), nn.BatchNorm2d(4, affine=False)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.last(self.shared(self.shared(self.other(x))))


def step(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    out = network(x)
    out.square().mean().backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in network.named_buffers()} | {"out": out.detach()}


def assert_same(stock: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert stock.keys() == found.keys()
    for name, expected in stock.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("make", [Twice, lambda: resnet18(in_channels=1)])
def test_folded_norms(make) -> None:
    network = randomize(make()).double().eval()
    x = torch.randn(1, 1, 64, 48, dtype=torch.float64)
    folded = fold_norms(copy.deepcopy(network), 1)
    norms = [name for name, one in folded.named_modules() if type(one).__name__ == "FoldedBatchNorm2d"]
    assert len(norms) == (1 if isinstance(network, Twice) else 20)
    assert_same(step(network, x), step(folded, x))


def test_norms_in_training_mode_are_not_folded() -> None:
    with pytest.raises(UnsupportedError, match="no norm after a convolution"):
        fold_norms(Twice().train(), 1)


def test_checkpointed_blocks_update_running_statistics_once() -> None:
    network = randomize(resnet18(in_channels=1)).double().train()
    x = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    found = step(checkpointed(copy.deepcopy(network)), x)
    assert_same(step(network, x), found)
    assert found["layer1.0.bn1.num_batches_tracked"] == 1
