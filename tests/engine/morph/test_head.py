"""More outputs: old ones or their probabilities stay, split classes add up."""

import copy
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.head import grow_head, split_class
from gigamorph.engine.morph.step import from_json


class Net(nn.Module):
    """A linear or convolutional head, with something behind it; returns a tensor, or a dict with the features."""

    def __init__(self, classes: int, bias: bool, kind: str, after: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, classes, bias) if kind != "conv" else nn.Conv2d(6, classes, 1, bias=bias)
        self.kind, self.after = kind, after or nn.Identity()

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        y = self.after(self.head(x if self.kind == "conv" else x.mean((2, 3))))
        return {"features": x, "logits": y} if self.kind == "dict" else y


def logits(result: Any) -> Tensor:
    return result["logits"] if isinstance(result, dict) else result


cases = st.tuples(st.integers(1, 5), st.booleans(), st.sampled_from(["linear", "conv", "dict"]), st.integers(0, 99))


@settings(max_examples=12, deadline=None)
@given(cases, st.integers(1, 4), st.booleans())
def test_independent(case: Any, new: int, training: bool) -> None:
    classes, bias, kind, seed = case
    torch.manual_seed(seed)
    model, x = Net(classes, bias, kind), torch.randn(2, 1, 6, 7, dtype=torch.float64)
    model = model.double()
    child, report = grow_head(model, x, "head", classes + new)
    assert report.difference.float64 <= 1e-12
    child.train(training)
    want, have = logits(copy.deepcopy(model).train(training)(x)), logits(child(x))
    assert have.shape[1] == classes + new
    assert (have[:, :classes] - want).abs().max() <= 1e-12
    assert not have[:, classes:].any()
    (have - 1).square().sum().backward()
    assert (child.head.weight.grad[classes:] != 0).any()


@settings(max_examples=15, deadline=None)
@given(cases, st.integers(1, 4), st.sampled_from([None, 0.1]))
def test_of_a_softmax_logits_stay_and_new_classes_have_their_prior(case: Any, new: int, prior: float | None) -> None:
    classes, bias, kind, seed = case
    torch.manual_seed(seed)
    model, x = Net(classes + 1, bias, kind).double(), torch.randn(2, 1, 6, 7, dtype=torch.float64)
    child, report = grow_head(model, x, "head", classes + 1 + new, "softmax", prior=prior)
    want, have = logits(model.eval()(x)), logits(child.eval()(x))
    torch.testing.assert_close(have[:, : classes + 1], want, rtol=0, atol=1e-12)
    p = have.detach().softmax(1)
    old, added = p[:, : classes + 1], p[:, classes + 1 :]
    torch.testing.assert_close(old, want.softmax(1) * (1 - added.sum(1, keepdim=True)), rtol=1e-12, atol=0)
    odds = (added[:, 0] / (1 - added.sum(1))).log().mean()
    prior = prior or 0.01
    assert abs(odds.item() - math.log(prior / (1 - new * prior))) < 1e-4
    factors = re.search(r"multiplied by ([\d.]+) to ([\d.]+) on the example", report.changes[-1])
    assert factors is not None
    shares = 1 - added.sum(1)
    assert [float(f) for f in factors.groups()] == pytest.approx([float(shares.min()), float(shares.max())], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_loss_of_a_new_class_is_that_of_its_prior(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Net(3, True, "linear").to(dtype), torch.randn(4, 1, 6, 7, dtype=dtype)
    child, _ = grow_head(model, x, "head", 5, "softmax", prior=0.02)
    new = torch.full((4,), 4)
    z = child.eval()(x).float()
    assert abs(float(F.cross_entropy(z, new)) + math.log(0.02)) < 0.1
    smooth = F.cross_entropy(z, torch.tensor([0, 1, 2, 0]), label_smoothing=0.1)
    before = F.cross_entropy(model.eval()(x).float(), torch.tensor([0, 1, 2, 0]), label_smoothing=0.1)
    assert 0 < float(smooth) - float(before) < 0.3
    smooth.backward()
    assert all(bool(p.grad.isfinite().all()) for p in child.parameters() if p.grad is not None)
    independent, _ = grow_head(model, x, "head", 5, prior=0.02)
    assert torch.allclose(independent(x)[:, 3:].sigmoid().float(), torch.tensor(0.02), rtol=0.02)


def test_recipes_of_silent_classes_are_repeated_as_they_were() -> None:
    model = Net(3, True, "linear")
    step = from_json({"op": "head", "path": "head", "outputs": 4, "kind": "softmax"})
    assert float(step.repeat(model).head.bias[3]) == -1e4


@settings(max_examples=25, deadline=None)
@given(cases, st.integers(2, 4), st.data())
def test_split_class(case: Any, into: int, data: Any) -> None:
    classes, bias, kind, seed = case
    torch.manual_seed(seed)
    model, x = Net(classes + 1, bias, kind).double(), torch.randn(2, 1, 6, 7, dtype=torch.float64)
    index = data.draw(st.integers(0, classes))
    shares = data.draw(st.one_of(st.none(), st.just([0.5] + [0.5 / (into - 1)] * (into - 1))))
    child, report = split_class(model, x, "head", index, into, shares=shares)
    assert report.difference.float64 <= 1e-12
    want, have = logits(model.eval()(x)).softmax(1), logits(child.eval()(x)).softmax(1)
    total = have[:, : classes + 1].clone()
    total[:, index] += have[:, classes + 1 :].sum(1)
    assert (total - want).abs().max() <= 1e-12
    assert torch.allclose(have[:, index], want[:, index] * (shares or [1 / into])[0])


@pytest.mark.parametrize("after", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_a_network_that_ends_with_softmax(after: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = Net(3, True, "linear", after), torch.randn(2, 1, 6, 7)
    grow_head(model, x, "head", 5, "softmax")
    split_class(model, x, "head", 1, 3)
    with pytest.raises(MorphError, match=r"'head': the function differs, .* use kind 'softmax'"):
        grow_head(model, x, "head", 5)


def test_in_place_and_step() -> None:
    torch.manual_seed(0)
    model, x = Net(3, False, "linear"), torch.randn(2, 1, 6, 7)
    child, report = split_class(model, x, "head", 1, shares=[0.25, 0.75])
    child, second = grow_head(child, x, "head", 6, "softmax", inplace=True)
    fresh = Net(3, False, "linear")
    for step in (report.step, second.step):
        step.edit(fresh)
    fresh.load_state_dict(child.state_dict())
    assert torch.equal(fresh.eval()(x), child.eval()(x))
    assert model.head.out_features == 3 and child.head.out_features == 6


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m, x: grow_head(m, x, "head", 3), "already has 3 outputs"),
        (lambda m, x: grow_head(m, x, "head", 5, "multi"), "kind 'multi'"),
        (lambda m, x: grow_head(m, x, "head", 5, prior=1.0), "prior must be .*not 1.0"),
        (lambda m, x: grow_head(m, x, "head", 8, "softmax", prior=0.2), "5 new classes have 1 together"),
        (lambda m, x: grow_head(m, x, "body", 5), "'body' is a Sequential"),
        (lambda m, x: grow_head(m, x, "body.0", 7), "cannot be run"),
        (lambda m, x: split_class(m, x, "head", 3), "has no class 3"),
        (lambda m, x: split_class(m, x, "head", 0, 1), "2 or more"),
        (lambda m, x: split_class(m, x, "head", 0, 2, shares=[0.5, 0.6]), "with sum 1"),
    ],
)
def test_refusals(run: Any, message: str) -> None:
    model = Net(3, True, "linear")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MorphError, match=message):
        run(model, torch.randn(2, 1, 6, 7))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_a_rectified_head_cannot_be_a_softmax() -> None:
    model = Net(3, True, "conv", nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    x = torch.randn(2, 1, 6, 7)
    grow_head(model, x, "head", 4)
    with pytest.raises(MorphError, match=r"'head': the function differs, .* use kind 'independent'"):
        grow_head(model, x, "head", 4, "softmax")
    with pytest.raises(MorphError, match="only classes of a softmax"):
        split_class(model, x, "head", 0)
