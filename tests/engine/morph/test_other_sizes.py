"""Forwards that branch by the size of their input: both branches are proven, or the morph is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from morph_networks import relative
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.decompose import decompose
from gigamorph.engine.morph.deepen import insert_identity, insert_pair, insert_residual
from gigamorph.engine.morph.example import as_inputs
from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.head import grow_head
from gigamorph.engine.morph.kernel_size import grow_kernel
from gigamorph.engine.morph.merge import merge
from gigamorph.engine.morph.other_sizes import other_inputs
from gigamorph.engine.morph.step import from_json, to_json
from gigamorph.engine.morph.verify import compare, verified_report
from gigamorph.engine.morph.widen import widen

X = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
Condition = Callable[[Tensor, Tensor], bool]
# What the forward asks of its image and of its first map, and the shape of an image for which the answer is another.
CONDITIONS: dict[str, tuple[Condition, tuple[int, ...]]] = {
    "width": (lambda x, y: x.shape[-1] > 100, (1, 1, 16, 128)),
    "odd": (lambda x, y: x.size(2) % 2 == 1, (1, 1, 15, 16)),
    "batch": (lambda x, y: len(x) > 2, (4, 1, 16, 16)),
    "square": (lambda x, y: x.shape[2] != x.shape[3], (1, 1, 16, 18)),
    "map": (lambda x, y: y.size(3) // 2 >= 1000, (1, 1, 16, 2001)),
    "area": (lambda x, y: y.shape[2] * y.shape[3] >= 100_000, (1, 1, 400, 400)),
    "equal": (lambda x, y: x.shape[-1] == 777, (1, 1, 16, 777)),
    "ratio": (lambda x, y: x.shape[-1] / x.shape[-2] > 1.5, (1, 1, 16, 80)),
}


class Arms(nn.Module):
    """The other branch has a layer of its own, or weighs the channels against each other."""

    def __init__(self, condition: Condition, layer: bool) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
        self.condition, self.layer = condition, layer

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        if self.condition(x, y):
            y = self.b(y) if self.layer else F.softmax(y, 1)
        return self.fc(y.mean((2, 3)))


def arms(name: str, layer: bool) -> Arms:
    torch.manual_seed(0)
    return Arms(CONDITIONS[name][0], layer).eval()


@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("name", CONDITIONS)
def test_widening_holds_on_both_branches(name: str, layer: bool) -> None:
    model = arms(name, layer)
    if not layer:  # the channels are read by a softmax on the other branch alone
        with pytest.raises(MorphError, match=r"no space can be widened.*softmax"):
            widen(model, X, factor=2)
        return
    child, report = widen(model, X, factor=1.5)
    before = dict(model.named_parameters())
    assert {"a", "b"} <= {n.split(".")[0] for n, p in child.named_parameters() if p.shape != before[n].shape}
    assert report.others
    for shape in (X.shape, CONDITIONS[name][1]):
        x = torch.randn(shape)
        assert relative(child(x), model(x)) < 1e-5
    step = from_json(json.loads(json.dumps(to_json(report.step))))
    step.repeat(arms(name, layer)).load_state_dict(child.state_dict())
    narrow, _ = merge(child, X)
    assert narrow.b.weight.shape == model.b.weight.shape and compare(model, narrow, X).float64 < 1e-12


LOCAL: dict[str, Callable[[nn.Module], tuple[nn.Module, Any]]] = {
    "residual": lambda m: insert_residual(m, X, "a"),
    "identity": lambda m: insert_identity(m, X, "a"),
    "pair": lambda m: insert_pair(m, X, "a"),
    "kernel": lambda m: grow_kernel(m, X, "a", 5),
    "decompose": lambda m: decompose(m, X, "a", (3, 1)),
    "head": lambda m: grow_head(m, X, "fc", 4),
}


@pytest.mark.parametrize("morph", LOCAL)
def test_local_morphs_are_compared_on_both_branches(morph: str) -> None:
    model = arms("width", True)
    child, report = LOCAL[morph](model)
    assert any("16 x 101" in shape for shape in report.others)
    x = torch.randn(1, 1, 16, 128)
    assert relative(child(x)[:, :2], model(x)) < 1e-5


@pytest.mark.parametrize("name", ["width", "odd", "square", "area"])
def test_a_front_goes_before_all_of_a_network_that_asks_for_the_size(name: str) -> None:
    model = arms(name, True)
    child, _ = front(model, X, 2)
    for shape in (X.shape, CONDITIONS[name][1], (1, 1, 16, 64)):
        x = torch.randn(shape)
        large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert relative(child(large), model(x)) < 1e-5
    if name in ("width", "odd"):
        with pytest.raises(MorphError, match=r"on 1 x 1 x \d+ x \d+ the child's function differs|on 2 x 1 x"):
            front(model, X, 2, "fold")


def test_a_size_among_the_numbers() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y * y.shape[-1]) / x.shape[-1]

    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(2, 1, 23, 31)
    child, _ = widen(model, X, factor=2)
    assert relative(child(x), model(x)) < 1e-5
    large, _ = front(model, X, 2)
    assert relative(large(x.repeat_interleave(2, 2).repeat_interleave(2, 3)), model(x)) < 1e-5


def test_the_error_names_the_size_that_differs() -> None:
    model, other = arms("width", True), arms("width", True)
    other.b.weight.data.mul_(2)
    step = insert_identity(model, X, "a")[1].step
    with pytest.raises(MorphError, match=r"on 1 x 1 x 16 x 101 the child's function differs from its parent's by"):
        verified_report(step, model, other, X)


def test_a_branch_that_no_size_reaches_is_refused() -> None:
    model = Arms(lambda x, y: x.shape[-1] * 2 % 1000 == 7, True)
    with pytest.raises(MorphError, match=r"compares a size at .*test_other_sizes.py:\d+ \(32 == 7\), but no image"):
        widen(model, X, factor=2)


def test_a_branch_by_precision_is_compared_in_it() -> None:
    model = Arms(lambda x, y: x.dtype == torch.bfloat16, True)
    assert "1 x 1 x 16 x 16 in bfloat16" in insert_residual(model, X, "a")[1].others
    other = Arms(lambda x, y: x.dtype == torch.bfloat16, True)
    other.load_state_dict(model.state_dict())
    other.b.bias.data.add_(9)
    with pytest.raises(MorphError, match="on 1 x 1 x 16 x 16 in bfloat16 the child's function differs"):
        verified_report(insert_identity(model, X, "a")[1].step, model, other, X)


def test_what_needs_values_is_compared_on_a_second_size() -> None:
    class Peak(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / max(x.abs().max().item(), 1.0)

    model = nn.Sequential(nn.Conv2d(1, 4, 3), Peak(), nn.Conv2d(4, 2, 3))
    assert insert_residual(model, X, "0")[1].others == ("2 x 1 x 21 x 12",)


def test_a_network_of_one_size() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    assert widen(model, X, factor=2)[1].others == ("2 x 1 x 16 x 16",)


def test_nothing_is_searched_where_no_size_is_read() -> None:
    found = other_inputs(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), as_inputs(X))
    assert found.second is not None and not found.branching and not found.halves


def test_the_second_size_of_a_large_image_is_a_small_one() -> None:
    found = other_inputs(nn.Conv2d(3, 8, 3), as_inputs(torch.zeros(1, 3, 448, 512)))
    assert found.second is not None and found.second.shapes == ((2, 3, 71, 48),) and found.alike
