"""What a network is given: dicts and lists that it changes, named tuples, lists of its own, what is no image."""

import collections
import collections.abc
import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gigamorph import accelerate
from gigamorph.engine.capture.arguments import Arguments
from gigamorph.engine.errors import GigamorphError, UnsupportedError

Pair = collections.namedtuple("Pair", "image meta")


class Network(nn.Module):
    """A convolution and pooling; cases override `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, stride=2)
        self.double()

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()

    def forward(self, x: Tensor) -> Any:
        return self.features(x).mean((2, 3))


class Sample(Network):
    """A dict that goes through, as in many frameworks: results are put into it."""

    def forward(self, batch: dict[str, Any], more: dict[str, Any] | None = None, kept: Any = ()) -> Any:
        image = batch["image"]
        if more is None:
            batch["image"] = image * 2
            batch["map"] = self.features(image)
            batch["prediction"] = batch["map"].mean((2, 3)) + batch.pop("age")
            return batch
        more["inner"]["prediction"] = self.features(image).mean((2, 3))
        kept.append(more["inner"]["prediction"].square())
        return None


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 1, 21, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_a_dict_that_a_forward_fills_is_the_callers():
    torch.manual_seed(0)
    stock = Sample()
    nets, found = (stock, accelerate(copy.deepcopy(stock), tile=8)), []
    for net in nets:
        for seed in range(2):
            batch = {"image": image(seed), "age": torch.tensor([[1.0], [2.0]]), "name": "a"}
            result = net(batch)
            batch["prediction"].square().sum().backward()
        assert list(batch) == ["image", "name", "map", "prediction"]
        assert set(result) == set(batch)
        found.append({k: v for k, v in batch.items() if isinstance(v, Tensor)} | {"grad": net.conv.weight.grad})
    close(found[1], found[0])


def test_dicts_within_dicts_and_lists_are_filled_as_well():
    torch.manual_seed(0)
    stock, found = Sample(), []
    for net in (stock, accelerate(copy.deepcopy(stock), tile=8)):
        more, kept = {"inner": {"name": "a"}}, [1]
        for seed in range(2):
            assert net({"image": image(seed)}, more=more, kept=kept) is None
        sum(kept[1:]).sum().backward()
        found.append([more["inner"]["prediction"], *kept, net.conv.weight.grad])
    assert len(found[0]) == 5
    for one, other in zip(*found, strict=True):
        close(other, one)


def test_a_named_tuple_is_the_networks_own():
    class Named(Network):
        def forward(self, given: Pair) -> Pair:
            features = self.features(given.image)
            return Pair(features, features.mean((2, 3)) + given.meta)

    stock = Named()
    given = Pair(image(), torch.ones(2, dtype=torch.float64))
    result = accelerate(stock, tile=8)(given)
    assert type(result) is Pair
    close(list(result), list(stock(given)))


@pytest.mark.parametrize("kind", [list[Tensor], "tuple[Tensor, Tensor]", collections.abc.Sequence[Tensor]])
def test_a_list_is_the_networks_own_where_its_forward_says_so(kind):
    class Views(Network):
        def forward(self, views: Any) -> Tensor:
            return torch.cat([self.features(view).mean((-2, -1)) for view in views], -1)

    Views.forward.__annotations__["views"] = kind
    stock, views = Views(), [image(0), image(1)[..., :15]]
    close(accelerate(stock, tile=8)(views), stock(views))


@pytest.mark.parametrize("how", ["iterated", "unpacked", "by number", "with a norm"])
def test_a_list_that_may_be_the_networks_own_is_refused(how):
    class Views(Network):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2).double()

        def forward(self, views: Any) -> Tensor:
            if how == "unpacked":
                first, second = views
            elif how == "by number":
                first, second = views[0], views[1][..., 1:]
            else:
                first, second = (view * 2 for view in views)
            features = [self.features(view) for view in (first, second)]
            return sum((self.norm(f) if how == "with a norm" else f).mean((-2, -1)) for f in features)

    views, net = [image(0)[:1], image(1)[:1]], accelerate(Views(), tile=8, fallback="untiled")
    with pytest.raises(Exception, match=r"its forward indexes single images|expected 4D input") as caught:
        net(views)
    assert "list[Tensor]" in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))


def test_what_is_no_image_is_told():
    net = accelerate(Network(), tile=8)
    with pytest.raises(GigamorphError, match=r"the arguments contain no image.*got: uint8 \(2, 1, 8, 8\)"):
        net({"image": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)})
    with pytest.raises(GigamorphError, match="got Network; open files with open_pixels"):
        net(Network())


def test_a_random_number_as_a_python_value_is_refused_with_what_works():
    class Jittered(Network):
        def forward(self, x: Tensor, by: float | None = None) -> Tensor:
            return super().forward(x) * (torch.rand(1).item() if by is None else by)

    class Numpys(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * np.random.rand()

    stock = Jittered()
    net = accelerate(stock, tile=8)
    with pytest.raises(UnsupportedError, match=r"random number.*pass it as an argument"):
        net(image())
    state = np.random.get_state()[1].copy()
    with pytest.raises(UnsupportedError, match=r"test_arguments.py:\d+ \(in forward\)") as caught:
        accelerate(Numpys(), tile=8)(image())
    assert "\n" not in str(caught.value) and (np.random.get_state()[1] == state).all()
    for by in (0.5, 0.25):
        close(net(image(), by), stock(image(), by))


def test_lists_of_values_are_those_of_the_networks_state_alone():
    class Cropped(Network):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("size", torch.tensor([8, 7]))

        def forward(self, x: Tensor, box: Tensor | None = None) -> Tensor:
            height, width = (self.size * 2 if box is None else box).tolist()
            return super().forward(x[:, :, :height, :width])

    stock = Cropped()
    net = accelerate(stock, tile=8)
    for size in ([8, 7], [9, 6]):
        stock.size.copy_(torch.tensor(size))
        close(net(image()), stock(image()))
    with pytest.raises(UnsupportedError, match="takes a Python value or a shape from the image"):
        net(image(), torch.tensor([16, 14]))


def test_frozen_norms_stay_frozen_where_the_network_itself_is_put_in_training_mode():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3)).double()
    net = accelerate(model, tile=8, batch_norm="frozen")
    model.train()
    model.append(nn.BatchNorm2d(2).double())
    net(image())
    assert not any(isinstance(m, nn.BatchNorm2d) and m.training for m in model.modules())
    assert all(int(m.num_batches_tracked) == 0 for m in model if isinstance(m, nn.BatchNorm2d))


def test_what_is_read_by_region_is_given_to_the_network_without_memory():
    """Tensors on another device than the network's; the others are its own arguments, by their roles."""
    device, x = torch.device("meta"), torch.zeros(2, 1, 30, 20)
    mask, weights = torch.zeros(2, 30, 20), torch.zeros(3, device="meta")
    found = Arguments.of((x, {"mask": mask}), {"weights": weights, "power": 2}, device, torch.float32)
    given, kept = found.args[0], found.args[1]["mask"]
    assert found.image is x and found.traced is given and given.shape == x.shape and given.device == device
    assert found.kwargs == {"weights": weights, "power": 2} and found.regions[id(kept)] is mask
    assert [found.roles[id(tensor)] for tensor in (given, kept, weights)] == ["image", "map", "vector"]
    chosen = Arguments.of((mask[:, None], x), {}, torch.device("cpu"), torch.float32, x)
    assert chosen.image is x and chosen.roles[id(x)] == "image"
