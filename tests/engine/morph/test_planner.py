"""The planner's figures against networks that are really widened."""

from __future__ import annotations

import re

import pytest
import torch
from morph_networks import half_resnet
from torch import Tensor, nn

from gigamorph.engine.errors import MorphError
from gigamorph.engine.models import LesionNet
from gigamorph.engine.morph.picture import draw, save_picture
from gigamorph.engine.morph.planner import Cost, plan_growth
from gigamorph.engine.morph.widen import widen


def grouped() -> nn.Module:
    """Groups of 4 channels, a depthwise convolution, and a flattened map of 2 x 2."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


NETS = [(lambda: LesionNet(2, 1), 32), (lambda: half_resnet(2, 1, 4), 32), (grouped, 17)]


@pytest.mark.parametrize(("make", "side"), NETS)
def test_a_step_costs_what_the_widened_network_costs_more(make, side):
    torch.manual_seed(0)
    net, image = make(), torch.randn(1, 1, side, side)
    growth = plan_growth(net, image)
    grown = 0
    for row in growth.rows:
        if row.cost is None:
            assert row.space.frozen
            continue
        _, report = widen(net, image, {row.space.id: row.space.width + row.step})
        assert row.cost.parameters == report.parameters[1] - report.parameters[0]
        assert row.cost.flops == report.flops[1] - report.flops[0]
        grown += 1
    assert grown and growth.total.parameters == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("make", "side"), NETS)
def test_prediction_of_a_widening(make, side):
    torch.manual_seed(0)
    net, image = make(), torch.randn(1, 1, side, side)
    _, report = widen(net, image, factor=1.5)
    predicted = plan_growth(net, image).predict(factor=1.5)
    assert (predicted.parameters, predicted.flops) == (report.parameters[1], report.flops[1])


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """What a real forward keeps, parameters and their views apart."""
    own = {p.untyped_storage().data_ptr() for p in [*net.parameters(), *net.buffers()]}
    found: dict[int, int] = {}
    held = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    return sum(found.values())


def test_activation_memory_is_what_a_real_forward_keeps():
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    ).eval()
    small, real = torch.randn(1, 1, 16, 16), torch.randn(1, 1, 40, 24)
    growth = plan_growth(net, small, size=(40, 24))
    linears = 4  # the one number that stands for the linear layer's weight, see _cost_after
    assert growth.total.activation_bytes == kept_bytes(net, real) + linears
    child, _ = widen(net, small, {0: 9})
    assert growth.predict({0: 9}).activation_bytes == kept_bytes(child, real) + linears


def test_costs_scale_with_the_image_but_parameters_do_not():
    net, image = LesionNet(2, 1), torch.randn(1, 1, 32, 32)
    small, large = plan_growth(net, image), plan_growth(net, image, size=(320, 320))
    assert large.total.parameters == small.total.parameters
    assert 95 < large.total.flops / small.total.flops <= 100
    assert 90 < large.total.activation_bytes / small.total.activation_bytes <= 100


def test_the_network_is_not_changed_and_its_size_is_checked():
    net, image = grouped(), torch.randn(1, 1, 17, 17)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    growth = plan_growth(net, image)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    with pytest.raises(MorphError, match="cannot be run on images of"):
        plan_growth(net, image, size=(2, 2))
    with pytest.raises(MorphError, match="narrower"):
        growth.predict({0: 2})


def test_groups_grow_by_whole_groups_and_the_table_says_so():
    growth = plan_growth(grouped(), torch.randn(1, 1, 17, 17))
    row = growth.rows[0]
    assert row.step == 4 and row.cost is not None
    channel = row.per_channel()
    assert channel is not None and channel[0] == row.cost.parameters / 4
    text = str(growth)
    assert re.search(r"^ +0 +8 +4 ", text, re.M) and "[an output of the network]" in text


def test_picture(tmp_path):
    growth = plan_growth(grouped(), torch.randn(1, 1, 17, 17))
    axes = draw(growth, "net").axes[0]
    assert len(axes.patches) == len(growth.rows)
    colours = {p.get_facecolor() for p in axes.patches}
    assert len(colours) == 2  # what can grow and what cannot
    assert any("an output of the network" in t.get_text() for t in axes.texts)
    save_picture(growth, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(MorphError, match="cannot be written"):
        save_picture(growth, tmp_path / "none" / "a.png")


def test_a_cost_reads_well():
    assert str(Cost(1234, 2_500_000, 2048)) == "1,234 parameters, 2.5 MFLOP, 2.00 KiB of activations"
