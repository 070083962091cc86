"""Maps by tiles against stock autograd in float64, and back on the pixels of the file."""

import dataclasses

import numpy as np
import pytest
import tiny_nets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gigamorph import GigamorphError, accelerate
from gigamorph.engine.datasets.views import DownsampledSource, MirroredSource
from gigamorph.engine.explain import activation_map, find_marks, gradient_map
from gigamorph.engine.explain.maps import Explanation
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.mammography.recipes.sized import Size, SizedSource
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


def odds(logits: torch.Tensor, output: int) -> torch.Tensor:
    """log(p / (1 - p)) of the softmax."""
    p = logits.softmax(0)[output]
    return torch.log(p / (1 - p))


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
    log_odds = odds(net.head(maps.mean((2, 3)))[0], output)
    by_map, by_pixel = torch.autograd.grad(log_odds, (maps, x))
    tiled = accelerate(net, tile=tile)
    found = gradient_map(tiled, source, output)
    torch.testing.assert_close(found.values, by_pixel[0].abs().amax(0), rtol=1e-10, atol=1e-14)
    found = activation_map(tiled, source, output)
    torch.testing.assert_close(found.values, (by_map * maps).sum(1)[0].detach(), rtol=1e-10, atol=1e-14)
    assert found.log_odds == pytest.approx(log_odds.item(), rel=1e-10, abs=1e-12) and found.adds_up
    # Of the output itself: what all places add is the logit without its bias.
    logit = net.head(maps.mean((2, 3)))[0, output]
    assert tiled.evidence(source, output).sum().item() == pytest.approx(
        (logit - net.head.bias[output]).item(), abs=1e-12
    )


def test_maps_of_a_resnet_are_those_of_stock_autograd():
    net = trained(tiny_nets.resnet)
    source = open_pixels(image(135, 97))
    x = source.read(0, 135, 0, 97)[None].double().requires_grad_()
    kept = []
    hook = net.layer4.register_forward_hook(lambda module, inputs, out: kept.append(out))
    log_odds = odds(net(x)[0], 1)
    hook.remove()
    by_map, by_pixel = torch.autograd.grad(log_odds, (kept[0], x))
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


def bright() -> nn.Module:
    """A network of stride 32, padded as ResNets are, whose log-odds of the second class are what is bright."""
    layers = [nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1, bias=False), nn.ReLU()) for _ in range(5)]
    head = nn.Linear(1, 2)
    with torch.no_grad():
        for conv, _ in layers:
            conv.weight.fill_(1 / 9)
        head.weight[:, 0] = torch.tensor([0.0, 1.0])
        head.bias.zero_()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


VIEWS = {
    "as it is": lambda source: source,
    "left-right": lambda source: MirroredSource(source, left_right=True, up_down=False),
    "both": lambda source: MirroredSource(source, left_right=True, up_down=True),
    "averaged": lambda source: DownsampledSource(source, 2),
    "averaged, left-right": lambda source: MirroredSource(DownsampledSource(source, 2), left_right=True, up_down=False),
    "resized": lambda source: SizedSource(source, Size((288, 352))),
    "cropped": lambda source: SizedSource(source, Size((288,), 256)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_the_top_mark_lies_in_a_lesion_and_so_does_the_drawn_maximum(view):
    """A bright square, on the pixels of the file, whatever of its geometry the network saw changed."""
    net = accelerate(bright())
    generator = np.random.default_rng(4)
    rows, columns, side = (20, 510), (20, 570), 34
    if view in ("resized", "cropped"):
        rows, columns, side = (70, 440), (100, 460), 68
    elif view.startswith("averaged"):
        rows, columns, side = (20, 490), (30, 550), 68
    for corner in range(4):  # towards the corners of the image
        image = np.zeros((580, 643), np.float32)
        top = rows[corner // 2] + generator.integers(20)
        left = columns[corner % 2] + generator.integers(20)
        image[top : top + side, left : left + side] = 1
        found = activation_map(net, VIEWS[view](open_pixels(image)), 1)
        mark = find_marks(found)[0]
        assert top <= mark.row <= top + side and left <= mark.column <= left + side, (view, mark)
        drawn = found.relative().read(0, 580, 0, 643)
        row, column = np.unravel_index(drawn.argmax(), drawn.shape)
        assert top <= row < top + side and left <= column < left + side, (view, row, column)


def test_the_map_reaches_to_the_borders_of_the_image_and_no_farther():
    """Cells of a ResNet end half a cell before the image does."""
    source = DownsampledSource(open_pixels(np.zeros((130, 131), np.float32)), 2)
    found = activation_map(accelerate(bright()), source, 1)
    full = Explanation(source, torch.ones_like(found.values), found.cells)
    drawn = full.read(0, 130, 0, 131)
    assert (drawn[:, :130] == 1).all() and (drawn[:, 130] == 0).all()
    [mark] = find_marks(full)
    assert 0 < mark.row < 130 and 0 < mark.column < 130


def log_odds_map(values, log_odds, **more):
    source = open_pixels(torch.zeros(1, 8 * len(values), 8 * len(values[0])))
    return Explanation(source, torch.tensor(values, dtype=torch.float64), None, log_odds, **more)


def test_what_is_drawn_is_the_rise_of_the_probability_on_one_scale():
    values = np.full((9, 9), -0.01)
    values[4, 4:6] = 3, 1
    sure = log_odds_map(values, 2.0).relative().values
    without, p = 1 / (1 + np.exp(2.0)), 1 / (1 + np.exp(-2.0))
    assert sure[4, 4].item() == pytest.approx(p - without, abs=1e-6) and sure[0, 0] == 0
    assert sure[4, 5].item() == pytest.approx(1 / (1 + np.exp(2 - 4 / 3)) - without, abs=1e-6)
    # The same places in an image that is hardly positive, and noise in one that is: next to nothing.
    assert log_odds_map(values, -5.0).relative().values.max() < 0.01
    assert log_odds_map(values / 100, 2.0).relative().values.max() < 0.01
    # After a maximum places do not add up.
    values[2, 2] = 3
    assert log_odds_map(values, 2.0, adds_up=False).relative().values.max() == pytest.approx(
        p - 1 / (1 + np.e), abs=1e-4
    )


@pytest.mark.parametrize("brightness", [-2.0, 3.0])
def test_borders_of_an_image_without_anything_do_not_shine(brightness):
    """Networks answer to padding, which is not as dark as the background."""
    torch.manual_seed(0)
    shone = []
    for _ in range(4):
        net = create_model("lesionnet", 2, 1).eval()
        with torch.no_grad():
            net.fc.weight *= 20
        source = open_pixels(torch.full((1, 240, 200), brightness))
        found = activation_map(accelerate(net), source, 1)
        without = dataclasses.replace(found, border=(0, 0))
        shone.append(float(without.relative().values.max()))
        assert found.relative().values.max() < 0.05
    assert brightness > 0 or max(shone) > 0.5
