"""Predictions in parts, whose weights are packed one after the other: less memory, the same numbers."""

import copy
import functools
import sys

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from gigamorph import accelerate, create_model, plan
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.execution.programs import Programs
from gigamorph.engine.lowering import onednn
from gigamorph.engine.lowering.nodes import sort
from gigamorph.engine.planning.cuts import packed_bytes
from gigamorph.engine.planning.strategy import strategies

pytestmark = pytest.mark.skipif(not onednn.runs(), reason="this build of PyTorch has no packed convolutions")
PLAN = sys.modules["gigamorph.engine.planning.search"]  # the package's attribute of that name is the function


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return torch.relu(self.convs(x) + self.skip(x))


def network(widths, scale=1.0, seed=0):
    torch.manual_seed(seed)
    stages = [Block(a, b, 2) for a, b in zip((8, *widths), widths, strict=False)]
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return net.eval()


def choices(net, size):
    with torch.no_grad():
        program = capture(net, (1, 1, *size), torch.float32, "cpu")
    return list(strategies(*sort(program, "error"), False, False))


def test_late_layers_are_parts_of_their_own_where_their_weights_are():
    first, *others = choices(network((32, 128, 256)), (512, 384))
    assert len(first.staged.stages) == 1 and others
    for strategy in others:
        each = [packed_bytes(stage) for stage in strategy.staged.stages]
        assert max(each) == strategy.packed_bytes < first.packed_bytes
        assert each[0] < max(each)  # the early layers, whose maps are large and weights few, are one part
    assert len(choices(network((8, 8)), (512, 384))) == 1  # weights are few next to what would be stored


@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    widths=st.lists(st.sampled_from([16, 32, 96]), min_size=1, max_size=3).map(lambda few: [*sorted(few), 192]),
    size=st.tuples(st.integers(97, 230), st.integers(90, 230)),
    tile=st.sampled_from([(32, 32), (64, 230), (48, 48)]),
    seed=st.integers(0, 3),
)
def test_parts_give_what_the_whole_gives(widths, size, tile, seed):
    net, image = network(widths, seed=seed), torch.randn(2, 1, *size)
    number = len(choices(net, size))
    assert number > 1
    double = copy.deepcopy(net).double()
    fast, exactly = accelerate(net, tile=tile), accelerate(copy.deepcopy(double), tile=tile)
    with torch.no_grad():
        exact = double(image.double())
        stock = (net(image) - exact).abs().max()
        for chosen in range(1, number):
            alone = functools.partial(lambda n, *given: list(strategies(*given))[: n + 1][-1:], chosen)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PLAN, "strategies", alone)
                fast._runner.programs, exactly._runner.programs = Programs(), Programs()  # planned again
                found, again = fast(image), exactly(image.double())
            assert (found - exact).abs().max() <= 3 * stock + 1e-6
            assert (again - exact).abs().max() <= 1e-12 * exact.abs().max()


def test_a_budget_for_weights_that_are_packed_together_is_not_needed():
    """ResNet-18 needs less than the 160 MiB of its weights with their packed form and a tile, and larger strips fit."""
    net = create_model("resnet18", num_classes=2, in_channels=1).eval()
    made = plan(net, (2048, 2048), "145MiB", training=False)
    assert "parts" in made.choices[made.choice].name and len(made.sides) > 1 and made.tile[1] == 2048
    assert made.peak_bytes <= 145 * 2**20
