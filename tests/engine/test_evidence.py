"""Evidence maps against the class activation map computed on the whole image."""

import pytest
import torch
from torch import nn

from gigamorph import GigamorphError, accelerate


class Net(nn.Module):
    def __init__(self, pool: str):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 5, 2, 2), nn.ReLU(), nn.Conv2d(6, 5, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(5, 3)
        self.pool = pool

    def forward(self, x):
        x = self.body(x)
        x = x.mean((2, 3)) if self.pool == "mean" else x.amax((2, 3))
        return self.head(x)


@pytest.mark.parametrize("pool", ["mean", "amax"])
@pytest.mark.parametrize("tile", [16, 33, 500])
def test_equals_the_class_activation_map(pool, tile):
    torch.manual_seed(0)
    net = Net(pool).double()
    x = torch.randn(2, 1, 93, 71, dtype=torch.float64)
    maps = net.body(x).detach()
    share = 1 / maps[0, 0].numel() if pool == "mean" else 1
    expected = (maps * net.head.weight.detach()[2][:, None, None] * share).sum(1)
    got = accelerate(net, tile=tile).evidence(x, 2)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert all(p.grad is None for p in net.parameters())


def test_refuses_outputs_that_are_not_there_and_networks_that_pool_nothing():
    with pytest.raises(GigamorphError, match="output 3 does not exist"):
        accelerate(Net("mean"), tile=16).evidence(torch.zeros(1, 1, 40, 40), 3)
    with pytest.raises(GigamorphError, match="pools nothing"):
        accelerate(Net("mean").body, tile=16).evidence(torch.zeros(1, 1, 40, 40))


@pytest.mark.parametrize("cells", [1, 3, (4, 7)])
@pytest.mark.parametrize("inplace", [False, True])
def test_of_pooling_to_a_grid_and_of_heads_that_write_in_place(cells, inplace):
    """Adaptive pooling whose cells overlap, and a classifier with a hidden layer, as in VGG and MobileNetV3."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 5, 2, 2), nn.ReLU(inplace))
    pooled = 4 * (cells**2 if isinstance(cells, int) else cells[0] * cells[1])
    hidden = nn.Sequential(nn.Linear(pooled, 6), nn.Hardswish(inplace), nn.Dropout(0.5, inplace), nn.Linear(6, 2))
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(cells), nn.Flatten(), nn.ReLU(inplace))
    net = nn.Sequential(body, pool, hidden).double().eval()
    x = torch.randn(2, 1, 47, 35, dtype=torch.float64)
    maps = body(x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(hidden(pool(maps))[:, 1].sum(), maps)
    got = accelerate(net, tile=16).evidence(x, 1)
    torch.testing.assert_close(got, (grad * maps).sum(1).detach(), rtol=1e-10, atol=1e-14)
    assert got.abs().max() > 0


@pytest.mark.parametrize("tile", [16, 32])
def test_evidence_of_volumes_has_slices(tile: int):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 6, (1, 3, 3), (2, 2, 2)), nn.ReLU())
    head = nn.Linear(6, 2)
    network = nn.Sequential(body, nn.AdaptiveAvgPool3d(1), nn.Flatten(), head).double().eval()
    volume = torch.randn(2, 1, 7, 37, 45, dtype=torch.float64)
    found = accelerate(network, tile=tile).evidence(volume, output=1)
    maps = body(volume)
    expected = torch.einsum("c,ncdhw->ndhw", head.weight[1], maps) / maps[0, 0].numel()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.sum((1, 2, 3)) + head.bias[1], network(volume)[:, 1], rtol=1e-12, atol=1e-14)


def test_evidence_of_bags_is_refused():
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
            )

        def forward(self, bags):
            return self.net(bags.flatten(0, 1)).unflatten(0, bags.shape[:2]).amax(1)

    with pytest.raises(GigamorphError, match="6 maps are pooled for 2 rows of outputs"):
        accelerate(Bags(), tile=16).evidence(torch.randn(2, 3, 1, 40, 40))
