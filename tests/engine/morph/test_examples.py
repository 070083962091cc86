"""Examples and outputs of any kind: what is compared is what the network gives, and what cannot be is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.decompose import decompose
from gigamorph.engine.morph.deepen import insert_identity, insert_pair, insert_residual
from gigamorph.engine.morph.inputs import add_planes, to_grey
from gigamorph.engine.morph.kernel_size import grow_kernel
from gigamorph.engine.morph.merge import merge
from gigamorph.engine.morph.optimizer import grow_ema, grow_optimizer
from gigamorph.engine.morph.planner import plan_growth
from gigamorph.engine.morph.recipe import Recipe, apply, grow
from gigamorph.engine.morph.spaces import find_spaces
from gigamorph.engine.morph.store import write_state
from gigamorph.engine.morph.surgery import site
from gigamorph.engine.morph.verify import compare
from gigamorph.engine.morph.widen import widen

X = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))


def small(last: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    return nn.Sequential(*parts, *([last] if last else []))


class Wrapped(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.body, self.wrap = small(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.body(x))


@dataclass
class Answer:
    logits: Tensor
    name: str = "answer"


class Holder:
    def __init__(self, inner: Any) -> None:
        self.inner = inner


@pytest.mark.parametrize("wrap", [Answer, Holder, lambda y: (1, Holder(Answer(y)))], ids=["dataclass", "object", "in"])
def test_tensors_inside_of_objects_are_compared(wrap: Any) -> None:
    model = Wrapped(wrap).eval()
    child, report = widen(model, X, factor=2)
    assert child.body[0].out_channels == 8 and child.body[2].out_channels == 2
    assert report.difference.float64 <= 1e-12
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.body[2].bias += 1
    assert compare(model, wrong, X).float64 > 1e-3


def test_a_result_without_a_tensor_is_no_equality() -> None:
    model = Wrapped(lambda y: float(y.sum()))
    with pytest.raises(MorphError, match="float without a tensor to compare"):
        compare(model, copy.deepcopy(model), X)
    with pytest.raises(MorphError, match="without a tensor to compare"):
        insert_identity(model, X, "body.0")


class Shortcut(nn.Module):
    """Like PyTorch's fast paths: reads past its modules unless a mode watches it."""

    def __init__(self, extra: float) -> None:
        super().__init__()
        self.conv, self.extra = small()[0], extra

    def forward(self, x: Tensor) -> Tensor:
        fast = not self.training and not torch.overrides.has_torch_function((x,))
        return self.conv(x) + (self.extra if fast else 0.0)


def test_what_is_run_is_what_is_checked() -> None:
    assert compare(Shortcut(0.0), Shortcut(0.0), X).float64 == 0
    assert compare(Shortcut(0.0), Shortcut(0.1), X).float64_eval > 1e-3


class Dense(nn.Module):
    """A block whose output is as wide in pixels as its last layer is in channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(x)], 1)


@pytest.mark.parametrize("insert", [insert_pair, insert_identity, insert_residual])
def test_an_insertion_is_on_channels_not_on_columns(insert: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Dense(), nn.Conv2d(7, 2, 1))
    assert X.shape[-1] == model[0].conv.out_channels
    at = site(model, "0", X)
    assert (at.channels, at.dims) == (7, 2)
    child, _ = insert(model, X, "0")
    assert child.eval()(torch.randn(1, 3, 9, 11)).shape == (1, 2, 9, 11)


def test_channels_on_the_last_axis_are_seen() -> None:
    last = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(2), Turned(), nn.Linear(6, 2))
    at = site(last, "2", X)
    assert (at.channels, at.dims, at.rank) == (6, 0, 3)


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Sometimes(nn.Module):
    """A branch that small images do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.large, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.large(x) if x.shape[-1] > 8 else x)


class Never(Sometimes):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


def test_layers_that_the_example_does_not_reach_are_named() -> None:
    spaces = find_spaces(Sometimes(), X)
    assert spaces.unread() == ["large"]
    child, _ = widen(Sometimes(), X, factor=2)  # which finds the larger image by itself
    assert child.large.weight.shape[:2] == (8, 8)
    _, report = widen(Never(), X, factor=2)
    assert any("does not reach" in line and "'large'" in line for line in report.changes)
    assert not find_spaces(small(), X).unread()


def test_noise_on_float32() -> None:
    model = small()
    child, report = widen(model, X, factor=2, noise=0.1)
    assert report.difference.float64 <= 1e-12 and report.certificate is None
    assert child[0].weight.dtype == torch.float32
    assert torch.allclose(child.eval()(X), model.eval()(X), atol=1e-5)


class TimmLike(nn.Module):
    """Keeps, as timm's networks do, the width for which a new head is made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.num_features = nn.Conv2d(3, 4, 1), nn.Linear(4, 2), 4
        self.feature_info = [{"num_chs": 4, "module": "stem"}]

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, classes: int) -> None:
        self.fc = nn.Linear(self.num_features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stem(x).mean((2, 3)))


def test_a_new_head_fits_the_grown_network() -> None:
    child, report = widen(TimmLike(), X, factor=2)
    assert "attribute num_features: 4 -> 8" in report.changes and any("feature_info" in c for c in report.changes)
    narrow, _ = merge(child, X)
    again = report.step.repeat(TimmLike())
    for net in (child, narrow, again):
        net.reset_classifier(5)
        assert net(X).shape == (2, 5)
    assert narrow.num_features == 4


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.gelu(self.hidden(self.embed(tokens))))


def test_integer_inputs_are_integers_when_a_step_is_repeated() -> None:
    torch.manual_seed(0)
    model, tokens = Tokens(), torch.tensor([[1, 4, 2]])
    child, report = widen(model, tokens, factor=2)
    recipe = Recipe()
    recipe.add(report, model, child)
    recipe = Recipe.from_json(recipe.to_json())
    assert apply(recipe, Tokens()).hidden.out_features == 12
    assert set(grow(recipe, Tokens(), model.state_dict())) == set(child.state_dict())
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens).sum().backward()
    optimizer.step()
    assert grow_optimizer(optimizer, model, widen(model, tokens, factor=2)[0], report).state
    narrow, folded = merge(child, tokens)
    assert narrow.hidden.out_features == 6
    assert folded.step.repeat(copy.deepcopy(child)).hidden.out_features == 6


def test_new_weights_lie_in_memory_as_files_want_them(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    made = [
        decompose(small(), X, "0", (3, 1))[0],
        decompose(small(), X, "0", (1, 3))[0],
        decompose(small(), X, "0", (3, 1), act="GELU", between="pair")[0],
        add_planes(small(), torch.cat([X, X], 1), 3)[0],
        to_grey(small(), X[:, :1])[0],
    ]
    for number, child in enumerate(made):
        save_file(child.state_dict(), tmp_path / f"{number}.safetensors")
        write_state(tmp_path / f"{number}.pt", child.state_dict())


def test_softmax_without_an_axis_is_over_channels() -> None:
    class Legacy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small(nn.Conv2d(2, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.body[3](F.softmax(self.body[:3](x)))

    with pytest.warns(UserWarning, match="Implicit dimension"):
        space = find_spaces(Legacy(), X)["body.2.weight:0"]
    assert "reduced over its channels" in space.frozen


@pytest.mark.parametrize("example", [{"x": X}, None, 3, [X, None], (X, 1), torch.tensor(1.0)])
@pytest.mark.parametrize(
    "morph", [lambda m, x: widen(m, x, factor=2), merge, lambda m, x: insert_pair(m, x, "0")], ids=["w", "m", "p"]
)
def test_an_example_of_another_kind_is_one_line(morph: Any, example: Any) -> None:
    with pytest.raises(MorphError) as caught:
        morph(small(), example)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), "2"])
def test_a_factor_that_is_no_number(factor: Any) -> None:
    with pytest.raises(MorphError, match="not a finite number"):
        widen(small(), X, factor=factor)


def test_a_list_is_as_good_as_a_tuple() -> None:
    assert widen(small(), [X], factor=2)[0][0].out_channels == 8  # pyright: ignore


def test_inside_of_inference_mode() -> None:
    model = small()
    with torch.inference_mode():
        x = torch.randn(1, 3, 6, 4)
        wide, _ = widen(model, x, factor=2)
        narrow, _ = merge(wide, x)
        deep, _ = insert_pair(narrow, x, "0")
        large, _ = grow_kernel(deep, x, "2", 3)
        wider, report = widen(model, x, factor=2)
        averaged = grow_ema(model, model, wider, report)
        grown = grow_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, wider, report)
        recipe = Recipe()
        recipe.add(report, model, wider)
        assert apply(recipe, small())[0].out_channels == 8  # pyright: ignore[reportIndexIssue]
        assert plan_growth(model, x).predict(factor=2).parameters
    assert not any(p.is_inference() for p in [*grown.param_groups[0]["params"], *averaged.parameters()])
    assert not any(p.is_inference() for p in large.parameters())
    assert wide[0].out_channels == 8 and narrow[0].out_channels == 4
