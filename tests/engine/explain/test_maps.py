"""Maps by tiles against stock autograd in float64, and back on the pixels of the file."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gigamorph import GigamorphError, accelerate
from gigamorph.engine.datasets.views import DownsampledSource, MirroredSource
from gigamorph.engine.explain import activation_map, find_marks, gradient_map
from gigamorph.engine.explain.maps import Explanation
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.models import create_model


def image(height, width, channels=1, seed=0) -> torch.Tensor:
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A residual block, so that two paths meet, and a classifier on average pooling."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 6, 5, 2, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1))
        self.head = nn.Linear(6, 3)

    def features(self, x):
        x = self.stem(x)
        return torch.relu(x + self.block(x))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def trained(make) -> nn.Module:
    torch.manual_seed(3)
    net = make().double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
    return net.eval()


@settings(max_examples=12)
@given(st.integers(20, 70), st.integers(20, 70), st.integers(8, 80), st.sampled_from([1, 3]), st.integers(0, 2))
def test_both_maps_are_those_of_stock_autograd(height, width, tile, channels, output):
    net = trained(lambda: Net(channels))
    source = open_pixels(image(height, width, channels))
    x = source.read(0, height, 0, width)[None].double().requires_grad_()
    maps = net.features(x)
    logit = net.head(maps.mean((2, 3)))[0, output]
    by_map, by_pixel = torch.autograd.grad(logit, (maps, x))
    tiled = accelerate(net, tile=tile)
    found = gradient_map(tiled, source, output)
    torch.testing.assert_close(found.values, by_pixel[0].abs().amax(0), rtol=1e-10, atol=1e-14)
    found = activation_map(tiled, source, output)
    torch.testing.assert_close(found.values, (by_map * maps).sum(1)[0].detach(), rtol=1e-10, atol=1e-14)
    # What all places add is the logit without its bias.
    assert found.values.sum().item() == pytest.approx((logit - net.head.bias[output]).item(), abs=1e-12)


def test_maps_of_resnet18_are_those_of_stock_autograd():
    net = trained(lambda: create_model("resnet18", 2, 1))
    source = open_pixels(image(135, 97))
    x = source.read(0, 135, 0, 97)[None].double().requires_grad_()
    kept = []
    hook = net.layer4.register_forward_hook(lambda module, inputs, out: kept.append(out))
    logit = net(x)[0, 1]
    hook.remove()
    by_map, by_pixel = torch.autograd.grad(logit, (kept[0], x))
    tiled = accelerate(net, tile=32)
    torch.testing.assert_close(gradient_map(tiled, source, 1).values, by_pixel[0, 0].abs(), rtol=1e-9, atol=1e-15)
    expected = (by_map * kept[0]).sum(1)[0].detach()
    torch.testing.assert_close(activation_map(tiled, source, 1).values, expected, rtol=1e-9, atol=1e-15)


def test_parameters_keep_their_flags_and_get_no_gradient():
    net = trained(Net)
    net.head.weight.requires_grad_(False)
    gradient_map(accelerate(net, tile=16), open_pixels(image(40, 30)), 0)
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(GigamorphError, match="output 3 does not exist; the network has 3"):
        gradient_map(accelerate(net, tile=16), open_pixels(image(40, 30)), 3)


@pytest.mark.parametrize(("left_right", "up_down"), [(True, False), (False, True), (True, True)])
def test_a_mirrored_image_is_explained_on_the_pixels_of_its_file(left_right, up_down):
    net = trained(Net)
    source = open_pixels(image(61, 47))
    mirrored = MirroredSource(source, left_right=left_right, up_down=up_down)
    found = gradient_map(accelerate(net, tile=16), mirrored, 0)
    axes = [axis for axis, is_so in ((0, up_down), (1, left_right)) if is_so]
    back = found.values.flip(axes).float().numpy()
    assert found.size == (61, 47)
    np.testing.assert_array_equal(found.read(0, 61, 0, 47), back)
    np.testing.assert_array_equal(found.read(13, 40, 7, 9), back[13:40, 7:9])


def test_of_an_averaged_image_every_cell_covers_its_block():
    source = DownsampledSource(open_pixels(image(60, 44)), 4)
    values = torch.zeros(15, 11)
    values[3, 5] = 1
    found = Explanation(source, values).read(0, 60, 0, 44)
    assert np.unravel_index(found.argmax(), found.shape)[0] in range(12, 16) and found.shape == (60, 44)
    assert found[12:16, 20:24].min() > found[:8].max() == 0
    [mark] = find_marks(Explanation(source, values))
    assert mark == (14.0, 22.0, 1.0)


def test_marks_are_the_highest_peaks_in_the_files_pixels():
    source = MirroredSource(open_pixels(image(80, 60)), left_right=True, up_down=False)
    values = torch.zeros(8, 6)
    values[1, 1], values[1, 2], values[5, 4], values[7, 0] = 3.0, 2.0, 4.0, -9.0
    values[3, 0] = values[4, 0] = 1.0  # a plateau is one mark, in its middle
    found = find_marks(Explanation(source, values))
    assert found == [(55, 15, 4), (15, 45, 3), (40, 55, 1)]
    assert find_marks(Explanation(source, values), count=1) == [(55, 15, 4)]
    assert find_marks(Explanation(source, -values.abs())) == []
