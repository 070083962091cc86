"""Networks that take bags of images (B, V, C, H, W): the views of an exam, the slices of a volume, many instances."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gigamorph import accelerate
from gigamorph.engine.errors import GigamorphError


class Bags(nn.Module):
    """Pools the features of a bag's images by attention; cases override `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.end = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.attention, self.head = nn.Linear(6, 1), nn.Linear(6, 2)
        self.double()

    def pooled(self, f: Tensor) -> Tensor:
        return self.head((f * self.attention(f).softmax(1)).sum(1))

    def features(self, x: Tensor) -> Tensor:
        return self.end(self.stem(x))

    def forward(self, x: Tensor) -> Any:
        b, v, c, h, w = x.shape
        return self.pooled(self.features(x.reshape(b * v, c, h, w)).view(b, v, -1))


class ViewsFirst(Bags):
    def forward(self, x: Tensor) -> Any:
        f = self.features(x.transpose(0, 1).flatten(0, 1))
        return self.pooled(f.view(x.shape[1], x.shape[0], -1).transpose(0, 1))


class OneByOne(Bags):
    def forward(self, x: Tensor) -> Any:
        right = [self.features(view.flip(-1)) for view in x[:, 1:].unbind(1)]
        return self.pooled(torch.stack([self.features(x[:, 0]), *right], 1))


class OverViews(Bags):
    """Maps of one view meet those of the others, as in a temporal shift, in a mean and in a maximum over views."""

    def forward(self, x: Tensor) -> Any:
        x = x * (x.mean((-2, -1), keepdim=True) + 1)
        y = self.stem(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        y = torch.cat([y[:, 1:], y[:, :1]], 1) + y.mean(1, keepdim=True) + y.amax(1, keepdim=True)
        return self.pooled(self.end(y.flatten(0, 1)).unflatten(0, x.shape[:2])), y


class WithMasks(Bags):
    """A mask for each image and a weight for each bag, by keyword."""

    def forward(self, bag: Tensor, *, mask: Tensor, weight: Tensor) -> Any:
        x = (bag * mask).flatten(0, 1)
        return {"y": self.pooled(self.features(x).view(*bag.shape[:2], -1)) * weight, "masked": x.view(bag.shape)}


class Writes(Bags):
    """Writes to what it is given, and keeps it."""

    def forward(self, x: Tensor) -> Any:
        x[:, 0] *= 2
        x.clamp_(-1, 1)
        self.last = x
        return super().forward(x)


NETWORKS = (Bags, ViewsFirst, OneByOne, OverViews, WithMasks, Writes)


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, dict):
        return list(result.values())
    return list(result) if isinstance(result, tuple) else [result]


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(NETWORKS),
    bags=st.integers(1, 3),
    views=st.integers(2, 4),
    size=st.tuples(st.integers(30, 50), st.integers(30, 50)),
    tile=st.sampled_from((8, 16, (12, 20))),
    training=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_bags_are_exact(kind, bags, views, size, tile, training, seed):
    torch.manual_seed(seed)
    stock, found = kind().train(training), []
    x = torch.randn(bags, views, 2, *size, dtype=torch.float64)
    further = {}
    if kind is WithMasks:
        further = {"mask": torch.rand(bags, views, 1, *size).double(), "weight": torch.rand(bags, 1).double()}
    for net in (stock, accelerate(copy.deepcopy(stock), tile=tile, batch_norm=None)):
        given, left = x.clone().requires_grad_(kind is not Writes), []
        for _ in range(2):
            results = tensors(net(given, **further))
            torch.stack([r.sin().mean() for r in results]).sum().backward()
            left += [r.detach() for r in results]
        left += [given.detach(), *net.buffers(), *(p.grad for p in net.parameters())]
        left += [net.last] if kind is Writes else [given.grad]
        with torch.no_grad():
            left += tensors(net(given, **further))
        found.append(left)
    close(found[1], found[0])


def test_a_bag_that_is_returned_and_kept_lies_on_the_memory_of_what_was_given():
    class Returns(Writes):
        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            return x

    net = accelerate(Returns().eval(), tile=16)
    x = torch.randn(2, 3, 2, 40, 33, dtype=torch.float64)
    for grad in (False, True):
        given = x.clone().requires_grad_(grad) * 1
        result = net(given)
        assert result.shape == given.shape
        assert result.data_ptr() == net.last.data_ptr() == given.data_ptr()
        assert result.requires_grad == net.last.requires_grad == grad


def test_bags_of_one_batch_of_images_are_told_apart():
    stock = Bags().eval()
    net = accelerate(copy.deepcopy(stock), tile=16)
    for shape in ((2, 3), (3, 2), (6, 1), (1, 6), (2, 3)):
        x = torch.randn(*shape, 2, 40, 33, dtype=torch.float64)
        close(net(x), stock(x))


def test_the_image_is_what_has_four_axes_where_there_is_one():
    class Both(Bags):
        def forward(self, priors: Tensor, x: Tensor) -> Tensor:
            return self.head(self.features(x + priors.mean(1)))

    stock = Both().eval()
    net = accelerate(copy.deepcopy(stock), tile=16)
    priors, x = (torch.randn(*shape, 2, 40, 33, dtype=torch.float64) for shape in ((3, 5), (3,)))
    close(net(priors, x), stock(priors, x))


def test_bags_are_computed_by_tiles_and_planned():
    net, events = accelerate(Bags(), tile=16), []
    net.on_tile = events.append
    net(torch.randn(2, 3, 2, 64, 64, dtype=torch.float64)).sum().backward()
    assert len(events) >= 32
    plan = net.plan_for((2, 3, 2, 64, 64))
    assert plan.image == (6, 2, 64, 64)
    assert plan.tiles == (4, 4)


def test_bags_that_are_no_view_of_their_images_are_refused():
    net = accelerate(Bags(), tile=16)
    with pytest.raises(GigamorphError, match=r"\(2, 3, 2, 40, 33\).*x\.contiguous\(\)"):
        net(torch.randn(3, 2, 2, 40, 33, dtype=torch.float64).transpose(0, 1))
