"""Networks written as people write them: what a forward does besides calling layers neither hinders nor deceives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.accelerate import Accelerated
from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.deepen import insert_pair, insert_residual
from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.inputs import to_grey
from gigamorph.engine.morph.merge import merge
from gigamorph.engine.morph.optimizer import grow_optimizer
from gigamorph.engine.morph.spaces import find_spaces
from gigamorph.engine.morph.verify import compare
from gigamorph.engine.morph.widen import widen

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1
Middle = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """conv a, `middle`, pooled head; `middle` is given the net and the image."""

    def __init__(self, middle: Middle, **parts: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)
        self.middle = middle
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self, x)
        return self.head(y.mean((2, 3)) if y.ndim == 4 else y)


def body(net: Any, x: Tensor) -> Tensor:
    return net.b(F.relu(net.a(x)))


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.2)


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


FORWARDS: dict[str, Middle] = {
    "float() of bytes": lambda n, x: body(n, (x * 255).byte().float() / 255),
    "float()": lambda n, x: body(n, x.float() / 255),
    "float32 by name": lambda n, x: body(n, x.to(torch.float32) + torch.ones(1, dtype=torch.float32)),
    "a constant made here": lambda n, x: body(n, torch.cat([x[:, :2], torch.zeros(len(x), 1, 8, 8)], 1)),
    "an array": lambda n, x: body(n, x * torch.tensor(torch.ones(3, 1, 1).numpy())),
    "in place": lambda n, x: body(n, x.sub_(0.5).div_(0.2)),
    "a cast that is none": lambda n, x: torch.cat([(y := body(n, x))[:, :, :1], y[:, :, 1:].float()], 2),
    "a logarithm": lambda n, x: body(n, torch.log(x)),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_that_make_prepare_or_restrict_their_input(name: str) -> None:
    model, x = Net(FORWARDS[name]), X.clone()
    wide, report = widen(model, x, factor=2)
    assert wide.a.out_channels == 16 and report.difference.float64 <= 1e-12
    assert insert_pair(model, x, "b")[1].difference.float64 <= 1e-12
    assert merge(wide, x)[0].a.out_channels == 8
    assert torch.equal(x, X)  # the user's example is not written to


def test_a_difference_shows_although_the_input_is_normalised_in_place() -> None:
    one, other = Net(FORWARDS["in place"]), Net(FORWARDS["in place"])
    assert compare(one, other, X).float64 == 0
    with torch.no_grad():
        other.b.weight *= 1.01
    assert compare(one, other, X).float64 > 1e-4


def test_what_is_neither_right_on_random_nor_on_the_examples_values() -> None:
    with pytest.raises(MorphError, match=r"nan or inf on random inputs and on the example's values"):
        widen(Net(FORWARDS["a logarithm"]), torch.zeros(1, 3, 8, 8), factor=2)


OPS: dict[str, tuple[Middle, dict[str, Any], list[str]]] = {
    "max along channels": (lambda n, x: body(n, x) * torch.max(n.a(x), 1, keepdim=True)[0], {}, ["a.weight:0"]),
    "min without the axis": (lambda n, x: body(n, x) * n.a(x).min(1)[0][:, None], {}, ["a.weight:0"]),
    "glu": (lambda n, x: F.glu(n.c(n.a(x)), 1), {"c": nn.Conv2d(8, 16, 1)}, ["a.weight:0", "c.weight:0"]),
    "var_mean": (
        lambda n, x: n.a(x) / torch.var_mean(n.a(x), 1, keepdim=True, correction=0)[0].add(1).sqrt(),
        {},
        ["a.weight:0"],
    ),
    "std": (lambda n, x: n.a(x) / (n.a(x).std(1, unbiased=False, keepdim=True) + 1), {}, ["a.weight:0"]),
    "matmul": (lambda n, x: n.a(x).mean((2, 3)) @ n.w, {"w": matrix(8, 8)}, ["a.weight:0", "w:1"]),
    "of a transpose": (lambda n, x: n.a(x).mean((2, 3)) @ n.w.t(), {"w": matrix(8, 8)}, ["a.weight:0", "w:0"]),
    "from the left": (
        lambda n, x: (n.w @ n.a(x).flatten(2)).mean(2),
        {"w": matrix(8, 8)},
        ["a.weight:0", "w:0"],
    ),
    "linear of a transpose": (
        lambda n, x: F.linear(n.a(x).mean((2, 3)), n.w.transpose(0, 1)),
        {"w": matrix(8, 8)},
        ["a.weight:0", "w:1"],
    ),
    "addmm": (
        lambda n, x: torch.addmm(n.c, n.a(x).mean((2, 3)), n.w),
        {"w": matrix(8, 8), "c": matrix(8)},
        ["a.weight:0", "w:1"],
    ),
    "einsum": (
        lambda n, x: torch.einsum("nchw,oc->nohw", n.a(x), n.w),
        {"w": matrix(8, 8)},
        ["a.weight:0", "w:0"],
    ),
    "einsum, turned": (
        lambda n, x: torch.einsum("co,n...c->no...", n.w, n.a(x).movedim(1, -1)),
        {"w": matrix(8, 8)},
        ["a.weight:0", "w:1"],
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_ops_that_keep_copies(name: str) -> None:
    middle, parts, growing = OPS[name]
    model = Net(middle, **parts)
    spaces = find_spaces(model, X)
    for key in growing:
        assert not spaces[key].frozen, (key, spaces[key].frozen)
    _, report = widen(model, X, factor=2, split="kraft")
    assert report.difference.float64 <= 1e-12
    assert widen(model, X, {growing[0]: 16}, free={growing[-1]: 2} if "w" in parts else None)[1]


@pytest.mark.parametrize(
    "middle, frozen",
    [
        (lambda n, x: n.a(x) / n.a(x).var(1, keepdim=True), "reduced over its channels"),  # by n - 1
        (lambda n, x: n.a(x) * n.a(x).max(1, keepdim=True)[1], "widened inconsistently"),  # the place itself
        (lambda n, x: torch.einsum("nchw,oc->nohw", n.a(x), n.w.exp()), "einsum"),
        (lambda n, x: torch.einsum("nchw,cc->nchw", n.a(x), n.w), "einsum"),
        (lambda n, x: n.a(x) @ n.w, ""),  # along the columns
    ],
)
def test_ops_that_do_not_keep_them_are_frozen(middle: Middle, frozen: str) -> None:
    model = Net(middle, w=matrix(8, 8))
    space = find_spaces(model, X)["a.weight:0"]
    if not space.frozen:  # the columns are multiplied, not the channels
        assert widen(model, X, {"a.weight:0": 16})[1].difference.float64 <= 1e-12
    assert frozen in space.frozen


@pytest.mark.parametrize("name", ["data", "function"])
def test_what_cannot_be_followed_freezes_its_space_not_the_network(name: str) -> None:
    forwards: dict[str, Middle] = {
        "data": lambda n, x: body(n, x) * n.b(n.a(x)).data.sigmoid(),
        "function": lambda n, x: Clamp.apply(n.b(F.relu(n.a(x)))),  # pyright: ignore
    }
    model = Net(forwards[name])
    spaces = find_spaces(model, X)
    assert spaces["b.weight:0"].frozen and not spaces["a.weight:0"].frozen
    wide, report = widen(model, X, factor=2)
    assert wide.a.out_channels == 16 and report.difference.float64 <= 1e-12


def test_writing_to_data_is_refused() -> None:
    def middle(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        y.data.mul_(2)
        return y

    with pytest.raises(MorphError, match=r"writes to a tensor's '\.data'"):
        find_spaces(Net(middle), X)


def test_locks_and_files_in_attributes(tmp_path: Any) -> None:
    with (tmp_path / "log").open("w") as log:
        model = Net(body, lock=threading.Lock(), log=log, nested={"locks": [threading.Lock()], "list": [1]})
        wide, _ = widen(model, X, factor=2)
        deep, _ = insert_pair(wide, X, "a")
        assert deep.lock is model.lock and deep.nested["list"] is not model.nested["list"]


def test_scripted_parts_are_left_alone() -> None:
    model = Net(body)
    model.b = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    assert insert_pair(model, X, "a")[1].difference.float64 <= 1e-12
    for path in ("b", "b.0"):
        with pytest.raises(MorphError, match=f"'{path}' is TorchScript"):
            insert_pair(model, X, path)
    with pytest.raises(MorphError, match="'b' is TorchScript"):
        widen(model, X, factor=2)


class Segmentation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.b(F.relu(self.a(x))), size=x.shape[-2:], mode="bilinear")


@pytest.mark.parametrize("mode", ["stages", "residual", "keep"])
def test_a_front_before_a_network_that_asks_for_the_size_of_its_image(mode: str) -> None:
    child, report = front(Segmentation(), X, 2, mode)
    assert report.difference.float64 <= 1e-12 and report.step.at == ()
    assert child(torch.rand(1, 3, 16, 16)).shape == (1, 2, 8, 8)
    with pytest.raises(MorphError, match="upsamples to the image's size"):
        front(Segmentation(), X, 2, "fold")


def test_an_accelerated_network_grows_into_an_accelerated_one() -> None:
    net = accelerate(Net(body), memory_budget="1GiB", tile=8)
    for child, report in (
        widen(net, X, factor=2),
        insert_pair(net, X, "a"),
        front(net, X, 2),
        merge(widen(net, X, factor=2)[0], X),
    ):
        assert isinstance(child, Accelerated) and child.memory_budget == 2**30 and child.tile == (8, 8)
        assert report.difference.float64 <= 1e-12
    wide, report = widen(net, X, factor=2)
    assert torch.allclose(wide(X), net(X), atol=1e-5)
    optimizer = torch.optim.AdamW(net.parameters())
    net(X).sum().backward()
    optimizer.step()
    assert grow_optimizer(optimizer, net, widen(net, X, factor=2)[0], report).state
    with pytest.raises(MorphError, match="inplace"):
        widen(net, X, factor=2, inplace=True)


class Encoder(nn.Module):
    def __init__(self, activation: Any = "relu") -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation=activation)
        self.embed, self.encoder, self.head = nn.Linear(8, 16), nn.TransformerEncoder(layer, 1), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("path", ["dropout", "activation"])
def test_what_the_fast_path_of_a_transformer_passes_over_is_refused(path: str) -> None:
    model = Encoder(nn.GELU())
    with pytest.raises(MorphError, match=r"fast path of nn\.TransformerEncoderLayer skips"):
        insert_residual(model, TOKENS, f"encoder.layers.0.{path}", norm=False)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        child, _ = insert_residual(model, TOKENS, f"encoder.layers.0.{path}", norm=False)
        assert child.encoder.layers[0].get_submodule(path)[1] is not None
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_transformer_is_widened_inside_as_it_is_run() -> None:
    model = Encoder().eval()
    wide, report = widen(model, TOKENS, factor=2)
    assert wide.encoder.layers[0].linear1.out_features == 64 and report.flops[1] > report.flops[0] > 0
    with torch.no_grad():
        fast, parent = wide.eval()(TOKENS), model(TOKENS)
    assert torch.allclose(fast, parent, atol=1e-5) and torch.allclose(wide(TOKENS), parent, atol=1e-5)


def test_tokens_are_not_taken_for_channels() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    with pytest.raises(MorphError, match="ambiguous channel axis"):
        insert_residual(layer, torch.randn(2, 5, 16), "dropout1", norm=False)


@pytest.mark.parametrize("shape", [(2, 8), (8, 2)])
def test_a_view_of_a_parameter_is_given_to_a_module(shape: tuple[int, int]) -> None:
    """Learned queries, through a layer of their own: without gradients such a view wants one and has no function."""

    def middle(net: Any, x: Tensor) -> Tensor:
        return net.b(F.relu(net.a(x))) * net.key(net.queries.view(*shape).reshape(2, 8)).mean(0)[:, None, None]

    net = Net(middle, queries=matrix(2, 8), key=nn.Linear(8, 8))
    child, report = insert_residual(net, X, "a")
    assert compare(net, child, X).float64 < 1e-12 and report.flops[1] > report.flops[0]


class Targets(nn.Module):
    """Wants targets while it is trained, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(body)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        return self.net(x)


class Auxiliary(Net):
    """Has a head in train mode only."""

    def __init__(self) -> None:
        super().__init__(body)
        self.aux = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return (y, self.aux(self.a(x))) if self.training else y


def test_train_mode_that_cannot_be_compared() -> None:
    _, report = insert_pair(Targets(), X, "net.a")
    assert report.difference.float64_train is None and "train mode" not in str(report.difference)
    assert any("train mode was not compared" in c and "targets should not be none" in c for c in report.changes)
    with pytest.raises(MorphError, match=r"does not reach 'aux'.*train=False"):
        widen(Auxiliary(), X, factor=2)
    wide, report = widen(Auxiliary(), X, factor=2, train=False)
    assert wide.a.out_channels == 16 and any("'aux'" in c for c in report.changes)
    assert insert_pair(Auxiliary(), X, "a")[1].difference.float64_train is not None


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = Net(body), nn.Linear(1, 8)

    def forward(self, image: Tensor, extra: dict[str, Any], *, flip: bool = False) -> dict[str, Tensor]:
        x = image.flip(-1) if flip else image
        y = self.net.b(self.net.a(x)) * self.scale(extra["ages"][0])[:, :, None, None]
        return {"logits": self.net.head(y.mean((2, 3)))}


def test_keyword_examples() -> None:
    from gigamorph.engine.morph.recipe import Recipe, apply

    torch.manual_seed(0)
    model = Keywords()
    example = {"image": X, "extra": {"ages": [torch.ones(2, 1)], "site": "a"}, "flip": True}
    wide, report = widen(model, example, factor=2)
    assert wide.net.a.out_channels == 16 and report.difference.float64 <= 1e-12
    positional, _ = widen(model, (X, {"ages": [torch.ones(2, 1)]}), factor=2)
    assert positional.net.a.out_channels == 16
    assert insert_pair(model, example, "net.a")[1].difference.float64 <= 1e-12
    narrow, folded = merge(wide, example)
    recipe = Recipe()
    recipe.add(report, model, wide)
    recipe.add(folded, wide, narrow)
    assert apply(Recipe.from_json(recipe.to_json()), Keywords()).net.a.out_channels == 8


def test_grey_from_rgb_of_positive_images() -> None:
    model = Net(lambda n, x: body(n, x).clamp(min=0).sqrt())
    assert to_grey(model, X[:, :1])[1].difference.float64 <= 1e-12
