"""Networks that take bags of images (B, V, C, H, W): the views of an exam, the slices of a volume, many instances."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gigamorph import accelerate
from gigamorph.engine.errors import GigamorphError, UnsupportedError


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


@settings(max_examples=16, deadline=None)
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


def test_a_bag_that_is_kept_and_returned_is_the_one_that_was_given():
    class Returns(Bags):
        def forward(self, x: Tensor) -> Any:
            self.last, same = x, getattr(self, "last", None) is x
            return super().forward(x), x, x.is_leaf, same

    x = torch.randn(2, 3, 2, 40, 33, dtype=torch.float64)
    for net in (Returns(), accelerate(Returns(), tile=16)):
        for bag in (x, x.clone().requires_grad_(), x.clone().requires_grad_() * 1):
            for again in (False, True):
                y, kept, is_leaf, same = net(bag)
                assert net.last is bag and kept is bag and is_leaf == bag.is_leaf and same == again
            if bag.requires_grad:
                assert torch.autograd.grad(y.sum(), net.last)[0].abs().sum() > 0


def test_bags_of_one_batch_of_images_are_told_apart():
    stock = Bags().eval()
    net = accelerate(copy.deepcopy(stock), tile=16)
    for shape in ((2, 3), (3, 2), (6, 1), (1, 6), (2, 3)):
        x = torch.randn(*shape, 2, 40, 33, dtype=torch.float64)
        close(net(x), stock(x))


@pytest.mark.parametrize(
    ("bag", "image", "tiles"),
    [
        ((2, 3, 2, 64, 64), (2, 2, 64, 64), 16),
        ((2, 3, 2, 64, 64), (2, 3, 5, 2), 16),
        ((2, 2, 2, 8, 9), (2, 2, 64, 64), 16),
    ],
    ids=["of one size", "marks of each image", "an image larger than those of the bag"],
)
def test_the_largest_says_the_tiles(bag, image, tiles):
    class Both(Bags):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            y = other[:, 0] if other.shape[-1] == 2 else self.features(other)[:, None]
            return super().forward(x) + y.mean((1, 2))[:, None]

    stock = Both().eval()
    net, totals = accelerate(copy.deepcopy(stock), tile=16), set()
    net.on_tile = lambda event: totals.add(event.total)
    x, other = (torch.randn(*shape, dtype=torch.float64) for shape in (bag, image))
    close(net(x, other), stock(x, other))
    assert totals == {tiles}


def test_bags_are_computed_by_tiles_and_planned():
    net, events = accelerate(Bags(), tile=16), []
    net.on_tile = events.append
    net(torch.randn(2, 3, 2, 64, 64, dtype=torch.float64)).sum().backward()
    assert len(events) >= 32
    plan = net.plan_for((2, 3, 2, 64, 64))
    assert plan.tiles == (4, 4)


STRIDES = {
    "some views": lambda x: x[:, 1:3],
    "views first": lambda x: x.transpose(0, 1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "one for all views": lambda x: x[:, :1].expand(-1, 3, -1, -1, -1),
    "raw pixels": lambda x: (x * 100).to(torch.int16),
}


@pytest.mark.parametrize("name", STRIDES)
def test_bags_may_lie_anyhow(name):
    stock = Bags().eval()
    x = STRIDES[name](torch.randn(2, 4, 2, 40, 33, dtype=torch.float64))
    if not x.is_floating_point():
        stock.stem.register_forward_pre_hook(lambda _module, given: (given[0].double() / 100,))
    close(accelerate(copy.deepcopy(stock), tile=16)(x), stock(x))


def test_bags_without_images():
    class Priors(Bags):
        def forward(self, x: Tensor, priors: Tensor) -> Tensor:
            f = [self.features(v.flatten(0, 1)).unflatten(0, v.shape[:2]) for v in (x, priors)]
            return self.pooled(torch.cat(f, 1))

    stock = Priors().eval()
    net = accelerate(copy.deepcopy(stock), tile=16)
    x, none = (torch.randn(2, views, 2, 40, 33, dtype=torch.float64) for views in (3, 0))
    close(net(x, none), stock(x, none))
    with pytest.raises(UnsupportedError, match="statistics of no images"):
        accelerate(Priors(), tile=16, batch_norm=None)(x, none)
    with pytest.raises(GigamorphError, match=r"x.to_dense\(\)"):
        accelerate(Bags(), tile=16)(x.to_sparse())


@pytest.mark.parametrize("kind", [Bags, OverViews])
def test_bags_are_compared_with_pytorch_on_demand(kind: type[Bags]) -> None:
    """That is, of as many views and channels, whatever the first convolution takes."""
    net = accelerate(kind(), verify=True)
    net(torch.rand(1, 3, 2, 40, 36, dtype=torch.float64))
    assert len(net._checked) == 1


def test_what_differs_on_bags_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    net = accelerate(Bags(), verify=True)
    monkeypatch.setattr("gigamorph.engine.verify._LIMIT", 1e-30)  # rounding
    monkeypatch.setattr("gigamorph.engine.verify._NOISE", 0)
    with pytest.raises(GigamorphError, match=r"verify: .* differs .*image \(2, 3, 2, 97, 75\)"):
        net(torch.rand(1, 3, 2, 40, 36, dtype=torch.float64))
