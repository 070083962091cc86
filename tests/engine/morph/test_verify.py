"""The numeric check: what it lets through, what it stops, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gigamorph.engine.errors import MorphError
from gigamorph.engine.models.resnet import resnet18
from gigamorph.engine.morph.example import as_inputs
from gigamorph.engine.morph.other_sizes import other_inputs
from gigamorph.engine.morph.splits import certify
from gigamorph.engine.morph.step import Certificate, Step, to_json
from gigamorph.engine.morph.verify import compare, require_equal, verified_report
from gigamorph.engine.morph.widen import widen

X = torch.zeros(1, 3, 32, 32)


def small() -> Any:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_a_copy_is_equal_and_nothing_is_touched() -> None:
    model = resnet18().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    found = require_equal(model, copy.deepcopy(model), X)
    assert found.float64 == found.float32 == found.noise_ratio == 0
    assert 1e-8 < found.noise_eval < 1e-4 and 1e-8 < found.noise_train < 1e-4
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and torch.equal(state, torch.get_rng_state())


def test_tf32_is_off_in_a_check_and_back_afterwards() -> None:
    """A network that looks at the settings while it is run."""
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [place.fp32_precision for place in places]
    seen: list[tuple[Any, ...]] = []

    class Looks(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((*(place.fp32_precision for place in places), torch.is_autocast_enabled("cpu")))
            return super().forward(x)

    try:
        for place in places:
            place.fp32_precision = "tf32"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = compare(nn.Sequential(Looks(3, 4, 3)), nn.Sequential(Looks(3, 4, 3)), X)
        assert set(seen) == {("ieee", "ieee", "ieee", "ieee", False)}
        assert found.noise_eval < 1e-6
        assert [place.fp32_precision for place in places] == ["tf32"] * 4
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def test_another_order_of_channels_is_within_the_noise() -> None:
    model, child = small(), small()
    order = torch.randperm(8)
    with torch.no_grad():
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            tensor = child.state_dict()[name]
            tensor.copy_(tensor[order])
        child[4].weight.copy_(child[4].weight[:, order])
    found = require_equal(model, child, X)
    assert found.float32 > 0 and found.float64 < 1e-14


@pytest.mark.parametrize(
    "name, mode",
    [("0.weight", "eval"), ("1.running_var", "eval"), ("4.bias", "eval"), ("1.bias", "train")],
)
def test_small_errors_are_stopped(name: str, mode: str) -> None:
    model, child = small(), small()
    with torch.no_grad():
        child.state_dict()[name].view(-1)[0] += 1e-4
    found = compare(model, child, X)
    assert getattr(found, f"float64_{mode}") > 1e-8
    with pytest.raises(MorphError, match="float64"):
        require_equal(model, child, X)


def test_errors_of_train_mode_alone_are_stopped() -> None:
    model, child = small(), small()
    child[1].eps = 1e-3
    with torch.no_grad():  # the same in eval
        child[1].running_var += model[1].eps - child[1].eps
    child[1].double(), model[1].double()
    found = compare(model, child, X)
    assert found.float64_train > 1e-6 > found.float64_eval
    with pytest.raises(MorphError):
        require_equal(model, child, X)


def test_errors_of_the_running_statistics_are_stopped() -> None:
    model, child = small(), small()
    child[1].momentum = 0.2
    with pytest.raises(MorphError, match="float64"):
        require_equal(model, child, X)


class OneOfTwoNorms(nn.Module):
    """Images of `least` columns and more are normalised by another layer than narrow ones."""

    def __init__(self, least: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.large, self.small = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        norm = self.large if not self.least or x.shape[-1] >= self.least else self.small
        return norm(self.conv(x)).relu().mean((2, 3))


@pytest.mark.parametrize("least", [32, 0])
def test_running_statistics_are_compared_where_the_second_size_reads_others(least: int) -> None:
    """With 0 the second size reads the statistics that the train step left, with 32 those of the other layer."""
    model, child = OneOfTwoNorms(least).eval(), OneOfTwoNorms(least).eval()
    child.large.momentum = 0.2
    assert other_inputs(model, as_inputs(X)).alike is (least == 0)
    with pytest.raises(MorphError, match=r"differs from its parent's by .* in float64") as caught:
        verified_report(Step(), model, child, X)
    assert "but not on the example" not in str(caught.value)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(8), nn.ReLU()])
def test_a_widening_runs_its_parent_as_rarely_as_it_can(layer: nn.Module) -> None:
    """Once to follow it; in eval and train mode in both precisions; in float64 on a second size."""
    ran: list[tuple[torch.dtype, bool, int]] = []

    class Counts(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            if self.out_channels == 8 and x.device.type == "cpu":
                ran.append((x.dtype, self.training, len(x)))
            return super().forward(x)

    model = nn.Sequential(Counts(3, 8, 3), layer, nn.Conv2d(8, 4, 3)).eval()
    widen(model, X, {"0.weight:0": 12})
    single, double = torch.float32, torch.float64
    assert ran == [
        (single, False, 1),  # the labels
        (single, False, 1),
        (single, True, 1),
        (double, False, 1),
        (double, True, 1),
        (double, False, 2),
    ]


def test_a_child_that_is_right_in_float64_only_is_stopped() -> None:
    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + 1e4 - 1e4

    with pytest.raises(MorphError, match="rounding noise"):
        require_equal(small(), Cancels(), X)


def test_an_example_on_which_the_parent_magnifies_rounding_is_named() -> None:
    class Cancels(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.body, self.by = small(), by

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.by - self.by

    found = compare(Cancels(3e6), Cancels(5e6), X)
    assert found.float64 > 1e-10 and 0.1 < found.float64_ratio < 8 and 0.1 < found.noise_ratio < 8
    with pytest.raises(MorphError, match="a larger image or batch"):
        require_equal(Cancels(3e6), Cancels(5e6), X)
    with pytest.raises(MorphError, match="report this"):
        require_equal(Cancels(3e6), Cancels(1e9), X)


@pytest.mark.parametrize("roundoffs, passes", [(24, True), (48, False)])
def test_a_parent_without_rounding_counts_as_having_four_roundoffs(roundoffs: int, passes: bool) -> None:
    class Off(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + roundoffs * 2.0**-24) if x.dtype == torch.float32 else x

    found = compare(nn.Identity(), Off(), X)
    assert found.float64 == 0 and roundoffs / 4 * 0.9 < found.noise_ratio < roundoffs / 4 * 1.1
    if passes:
        require_equal(nn.Identity(), Off(), X)
    else:
        with pytest.raises(MorphError, match="rounding noise"):
            require_equal(nn.Identity(), Off(), X)


def test_nan_is_no_equality() -> None:
    model, child = small(), small()
    with torch.no_grad():
        child[4].bias.fill_(math.nan)
    with pytest.raises(MorphError):
        require_equal(model, child, X)


def test_other_shapes_and_broken_children_are_named() -> None:
    child = small()
    child[4] = nn.Conv2d(8, 5, 3)
    with pytest.raises(MorphError, match="returns"):
        compare(small(), child, X)
    child[4] = nn.Conv2d(9, 4, 3)
    with pytest.raises(MorphError, match="child cannot be run"):
        compare(small(), child, X)


class Nothing(Step):
    op = "nothing"


def test_the_report_is_json_and_counts() -> None:
    model = small()
    report = verified_report(Nothing(), model, copy.deepcopy(model), X, changes=["none"])
    assert report.transform == "nothing" and report.parameters == (532, 532)
    convolutions = 2 * (8 * 27 * 30 * 30 + 4 * 72 * 28 * 28)
    assert report.flops == (convolutions, convolutions)
    assert json.loads(json.dumps(to_json(report.step))) == {"op": "nothing"}
    assert "rounding noise" in str(report)


def test_a_violated_certificate_is_stopped() -> None:
    model = small()
    with pytest.raises(MorphError, match="1 of 10"):
        verified_report(Nothing(), model, copy.deepcopy(model), X, certificate=Certificate(10, 1))
    assert certify(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)) == Certificate(1, 0)
