"""Channel spaces: which channels belong together, which cannot grow and why, and what cannot be followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph.engine.errors import MorphError
from gigamorph.engine.models.resnet import resnet18
from gigamorph.engine.morph.merge import merge
from gigamorph.engine.morph.spaces import Spaces, find_spaces
from gigamorph.engine.morph.widen import widen

X = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """conv a -> `middle` -> pooled head; `middle` is given the net and the map."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor], out: int = 8, **parts: nn.Module):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        for name, part in parts.items():
            self.add_module(name, part)
        self.middle = middle
        self.head = nn.Linear(out, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self, self.a(x)).mean((2, 3)))


def spaces_of(middle: Callable[[nn.Module, Tensor], Tensor], out: int = 8, **parts: nn.Module) -> Spaces:
    return find_spaces(Net(middle, out, **parts), X)


def test_a_residual_stage_is_one_space() -> None:
    model = resnet18()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spaces = find_spaces(model, torch.zeros(1, 3, 32, 32))
    stream = spaces["conv1.weight:0"]
    names = {name for name, _ in stream.members}
    assert {"bn1.weight", "layer1.0.conv2.weight", "layer1.1.bn2.running_var"} <= names
    assert stream.width == 64 and not stream.frozen and "layer1.0.conv1.weight" not in names
    assert len(spaces.growable()) == len(spaces) - 1
    assert "output" in spaces["fc.weight:0"].frozen
    assert "conv1.weight:0" in str(spaces)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_concat_keeps_spaces_apart_and_groups_bind() -> None:
    spaces = spaces_of(
        lambda n, x: n.g(torch.cat([x, n.b(x)], 1)), 12, b=nn.Conv2d(8, 4, 1), g=nn.Conv2d(12, 12, 1, groups=3)
    )
    assert [s.frozen for s in spaces][:-1] == [""] * (len(spaces) - 1)
    assert len(spaces["a.weight:0"].order) == 2 and len(spaces["b.weight:0"].order) == 1  # whole groups of four
    assert {name for name, _ in spaces["b.weight:0"].members} >= {"b.weight", "b.bias", "g.weight"}


@pytest.mark.parametrize(
    "middle, out, parts, unit",
    [
        (lambda n, x: n.d(x), 16, {"d": nn.Conv2d(8, 16, 3, padding=1, groups=8)}, 1),
        (lambda n, x: n.d(x), 8, {"d": nn.GroupNorm(4, 8)}, 2),
        (lambda n, x: n.d(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 8, {"d": nn.LayerNorm(8)}, 8),
        (lambda n, x: x * x.mean(1, keepdim=True), 8, {}, 8),
        (lambda n, x: x * x.amax(1, keepdim=True), 8, {}, 1),
        (lambda n, x: x[:, :, 1:-1].flip(1) + F.pad(x, (0, 0, 0, 0))[:, :, 1:-1], 8, {}, 1),
    ],
)
def test_units(middle: Callable[[nn.Module, Tensor], Tensor], out: int, parts: dict[str, nn.Module], unit: int) -> None:
    space = spaces_of(middle, out, **parts)["a.weight:0"]
    assert not space.frozen
    if "flip" not in str(middle.__code__.co_names):
        assert space.width // len(space.order) == unit


@pytest.mark.parametrize(
    "middle, why",
    [
        (lambda n, x: x * x.softmax(1), "reduced"),
        (lambda n, x: x * x.sum(1, keepdim=True), "reduced"),
        (lambda n, x: F.local_response_norm(x, 3), "local_response_norm"),
        (lambda n, x: x[:, :4].repeat(1, 2, 1, 1), "fixed indices"),
        (lambda n, x: x.view(-1, 8, 64).view(-1, 8, 8, 8), "'view'"),
        (lambda n, x: x + torch.arange(8.0).view(1, 8, 1, 1), "fixed size"),
        (lambda n, x: torch.einsum("nchw,ndhw->nchw", x, x), "einsum"),
        (lambda n, x: x if len(x.flatten().tolist()) > 9 else -x, "read"),
        (lambda n, x: F.dropout(x, 0.5), "dropout"),
        (lambda n, x: F.conv1d(x.mean((2, 3))[:, None], torch.ones(1, 1, 3), padding=1)[0, 0, :, None, None] * x, ""),
    ],
)
def test_frozen_with_a_reason(middle: Callable[[nn.Module, Tensor], Tensor], why: str) -> None:
    space = spaces_of(middle)["a.weight:0"]
    assert space.frozen and why in space.frozen
    with pytest.raises(MorphError, match="cannot be widened"):
        widen(Net(middle), X, {"a.weight:0": 16})


def test_every_space_with_a_hard_coded_view_is_found() -> None:
    """Each has one class (a norm over all channels), so one count: no trial may leave it at 1 (PoolFormer)."""

    class Stage(nn.Module):
        def __init__(self, inputs: int, fixed: bool):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(inputs, 4, 1), nn.GroupNorm(1, 4)
            self.scale, self.size = nn.Parameter(torch.ones(4)), 4 if fixed else -1

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) * self.scale.view(self.size, 1, 1)

    for pattern in range(16):
        stages = [Stage(4 if i else 3, bool(pattern >> i & 1)) for i in range(4)]
        spaces = find_spaces(nn.Sequential(*stages, nn.Conv2d(4, 2, 1)), X)
        assert [s.key for s in spaces.growable()] == [f"{i}.conv.weight:0" for i in range(4) if not pattern >> i & 1]
        frozen = [s.frozen for s in spaces if s.frozen and "output" not in s.frozen]
        assert all("'view'" in why and "module '" in why for why in frozen)


class Sized(nn.Module):
    """Functional calls that are given their sizes by Python: from an attribute, computed, or written down."""

    def __init__(self, call: Callable[[Sized, Tensor], Tensor], shape: tuple[int, ...] = (8, 1, 3, 3)):
        super().__init__()
        self.channels, self.taps, self.shape, self.call = 8, 8, [8], call
        self.register_buffer("taken", torch.rand(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def _conv(m: Sized, x: Tensor, groups: int) -> Tensor:
    return F.conv2d(x, m.taken, padding=1, groups=groups)


def _layer_norm(x: Tensor, shape: Any) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), shape).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "call, attributes",
    [
        (lambda m, x: _conv(m, x, m.channels), (16, 8, [8])),
        (lambda m, x: _conv(m, x, groups=len(m.taken)), (8, 8, [8])),
        (lambda m, x: _conv(m, _conv(m, x, m.taps), m.taps), (8, 16, [8])),
        (lambda m, x: _conv(m, x, m.taps).view(len(x), m.taps, 8, 8), (8, 16, [8])),
        (lambda m, x: F.group_norm(x, m.taps), (8, 16, [8])),
        (lambda m, x: _layer_norm(x, m.shape), (8, 8, [16])),
        (lambda m, x: _layer_norm(x, (m.channels,)), (16, 8, [8])),
        (lambda m, x: _layer_norm(x, x.shape[1:2]), (8, 8, [8])),
    ],
)
def test_attributes_that_give_a_size_follow(call: Callable[[Any, Tensor], Tensor], attributes: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    model = Net(lambda n, x: n.s(x), s=Sized(call))
    child, report = widen(model, X, {"a.weight:0": 16})
    sized: Any = child.get_submodule("s")
    assert (sized.channels, sized.taps, sized.shape) == attributes and report.difference.float64 < 1e-13
    assert all(type(v) is int for v in (sized.channels, sized.taps, *sized.shape))
    own: Any = model.get_submodule("s")
    assert (own.channels, own.taps, own.shape) == (8, 8, [8]) and type(own.taps) is int
    merged, _ = merge(child, X)
    assert repr(merged) == repr(model)
    assert (merged.s.channels, merged.s.taps, merged.s.shape) == (8, 8, [8])


@pytest.mark.parametrize(
    "call, why",
    [
        (lambda m, x: _conv(m, x, 8), "groups"),
        (lambda m, x: _conv(m, x, m.channels * 1), "groups"),
        (lambda m, x: _conv(m, x, m.channels) * m.channels, "other arguments"),
        (lambda m, x: F.group_norm(x, 4), "groups"),
        (lambda m, x: _layer_norm(x, (8,)), "normalized_shape"),
    ],
)
def test_sizes_that_are_written_down_freeze(call: Callable[[Any, Tensor], Tensor], why: str) -> None:
    space = spaces_of(lambda n, x: n.s(x), s=Sized(call))["a.weight:0"]
    assert why in space.frozen and "module 's'" in space.frozen


def test_a_view_that_takes_other_sizes_into_its_batch_is_refused() -> None:
    """On those the child's function would be another one."""
    model = Net(lambda n, x: n.s(x), s=Sized(lambda m, x: _conv(m, x, m.taps).view(-1, m.taps, 8, 8)))
    with pytest.raises(MorphError, match=r"on 2 x 3 x \d+ x \d+ the child's function differs"):
        widen(model, X, {"a.weight:0": 16})


def test_one_attribute_for_two_spaces_freezes_them() -> None:
    """It could follow one of them only."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.groups, self.one, self.two = 8, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            for conv in (self.one, self.two):
                x = F.group_norm(conv(x), self.groups)
            return x

    spaces = spaces_of(lambda n, x: n.s(x), s=Two())
    assert spaces["s.one.weight:0"].frozen and spaces["s.two.weight:0"].frozen
    assert not spaces["a.weight:0"].frozen


class Tokens(nn.Module):
    """A transformer's stream: patches, a class token put before them, a position embedding, LayerNorm and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.map = nn.Parameter(torch.randn(1, 3, 8, 8))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x * self.map).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x[:, 0])


def test_a_norm_over_maps_with_padding_keeps_copies() -> None:
    """Swin's patch merging at an odd size: zeros beside the map are values of many rows of the norm."""

    def merging(n: nn.Module, x: Tensor) -> Tensor:
        x = F.pad(x[:, :, 1:, 1:].permute(0, 2, 3, 1), (0, 0, 0, 3, 0, 3))  # 7 x 7 -> 10 x 10: some rows are all zeros
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], 3)
        return n.down(n.norm(x)).permute(0, 3, 1, 2)

    parts = {"norm": nn.LayerNorm(32), "down": nn.Linear(32, 8)}
    spaces = spaces_of(merging, **parts)
    spaces.check({})  # nothing is widened
    assert not spaces["a.weight:0"].frozen and len(spaces["a.weight:0"].order) == 1
    _, report = widen(Net(merging, **parts), X, {"a.weight:0": 24})
    assert report.difference.float64 < 1e-13


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_statistic_of_equal_and_shared_values(value: float) -> None:
    """Rows of a mean may hold a value twice, share it with other rows, or be alike; an extreme too."""

    def twice(_n: nn.Module, x: Tensor) -> Tensor:
        y = F.pad(torch.cat([x, x.relu(), x], 1), (1, 1), value=value)
        return (y.mean(1, keepdim=True) * y.amax(1, keepdim=True))[:, :, :, 1:-1] * x

    spaces = spaces_of(twice)
    spaces.check({})
    assert not spaces["a.weight:0"].frozen
    assert widen(Net(twice), X, {"a.weight:0": 24})[1].difference.float64 < 1e-13


def test_the_stream_of_a_transformer_grows_with_its_embeddings() -> None:
    spaces = find_spaces(Tokens(), X)
    stream = spaces["patches.weight:0"]
    assert not stream.frozen and len(stream.order) == 1  # LayerNorm: by whole multiples
    assert {("token", 2), ("places", 2), ("norm.weight", 0), ("down.weight", 0)} <= set(stream.members)
    assert "output" in spaces["head.weight:0"].frozen and spaces["map:1"].frozen
    child, report = widen(Tokens(), X, {"patches.weight:0": 18, "up.weight:0": 13})
    assert child.places.shape == (1, 5, 18) and report.difference.float64 < 1e-13
    assert report.certificate is not None and report.certificate.violations == 0


@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 7, 6), (1, 1, 6), (7, 6), (1, 1, 7, 6)])
@pytest.mark.parametrize("op", [torch.add, torch.mul, lambda x, p: p * x])
def test_a_parameter_over_places_does_not_hold_the_channels(shape: tuple[int, ...], op: Any) -> None:
    """A learnt mask or prior of the image: along the channels there is one of it, however many they are."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.mask, self.b = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(shape)), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(op(self.a(x), self.mask)))

    x = torch.zeros(1, 3, 7, 6)
    stream = find_spaces(Masked(), x)["a.weight:0"]
    assert not stream.frozen and len(stream.order) == 4
    child, report = widen(Masked(), x, {"a.weight:0": 7})
    assert child.mask.shape == shape and report.difference.float64 < 1e-13


class Placed(nn.Module):
    """A stream of tokens or of a map with learnt places added, held in one of many ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.a, self.b = how, nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.table, self.rows = nn.Embedding(60, 4), nn.Parameter(torch.randn(60, 4))
        self.map, self.line = nn.Parameter(torch.randn(4, 7, 6)), nn.Parameter(torch.randn(4, 1, 6))
        self.register_buffer("places", torch.arange(60).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.how in ("map", "line"):
            x = x * getattr(self, self.how)
        x = x.flatten(2).transpose(1, 2)
        places = torch.arange(x.shape[1])
        if self.how == "embedding":
            x = x + self.table(places)
        elif self.how == "buffer":
            x = x + self.table(self.places[: x.shape[1]])
        elif self.how == "rows":
            x = x + self.rows[places % 5]
        elif self.how == "slice":
            x = x + self.table.weight[: x.shape[1]]
        return self.b(torch.relu(x))


@pytest.mark.parametrize("how", ["map", "line", "embedding", "buffer", "rows", "slice"])
def test_learnt_places_grow_with_their_stream(how: str) -> None:
    x = torch.zeros(1, 3, 7, 6)
    stream = find_spaces(Placed(how), x)["a.weight:0"]
    assert not stream.frozen and len(stream.order) == 4
    child, report = widen(Placed(how), x, {"a.weight:0": 7})
    assert report.difference.float64 < 1e-13
    grown = {"map": child.map, "line": child.line, "rows": child.rows}.get(how, child.table.weight)
    assert 7 in grown.shape
    assert child.table.embedding_dim == child.table.weight.shape[1]
    narrow, _ = merge(child, x)
    assert narrow.table.embedding_dim == 4 and all(
        torch.equal(p, q) for p, q in zip(narrow.parameters(), Placed(how).parameters(), strict=True)
    )


def test_an_embedding_that_is_rescaled_or_also_a_weight_does_not_grow() -> None:
    class Tied(Placed):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).flatten(2).transpose(1, 2) + self.table(torch.arange(42))
            return F.linear(x, self.table.weight)

    x, rescaled = torch.zeros(1, 3, 7, 6), Placed("embedding")
    rescaled.table.max_norm = 1.0
    for model in (Tied("embedding"), rescaled):
        try:
            assert find_spaces(model, x)["a.weight:0"].frozen
        except MorphError as error:
            assert "in place" in str(error)


def test_a_barrier_names_the_module() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cummax(x, 1).values

    assert "module 'odd'" in spaces_of(lambda n, x: n.odd(x), odd=Odd())["a.weight:0"].frozen


def test_computed_weights_are_a_barrier() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=1)

    spaces = spaces_of(lambda n, x: n.s(x), s=Standardised(8, 8, 3))
    assert spaces["a.weight:0"].frozen and "computed" in spaces["a.weight:0"].frozen
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
    assert not spaces_of(lambda n, x: n.s(x), s=parametrized).growable()


def test_a_weight_that_is_read_as_a_whole_does_not_grow() -> None:
    spaces = spaces_of(lambda n, x: n.b(x) + n.b.weight.sum(), b=nn.Conv2d(8, 8, 1))
    assert not spaces.growable()


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x * x


def _write_to_view(_n: nn.Module, x: Tensor) -> Tensor:
    part = x[:, :4]
    part += 1.0
    return x * 2


@pytest.mark.parametrize(
    "middle, why",
    [
        (_write_to_view, "another view"),
        (lambda n, x: torch.add(x, x, out=torch.empty_like(x)), "out="),
        (lambda n, x: x.missing(), "cannot be run"),
    ],
)
def test_what_cannot_be_followed_is_refused(middle: Callable[[nn.Module, Tensor], Tensor], why: str) -> None:
    with pytest.raises(MorphError, match=why):
        spaces_of(middle)


def test_a_network_of_one_size_says_which_example_it_got() -> None:
    class Fixed(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2] == 96, f"height {x.shape[2]} is not 96"
            return super().forward(x)

    with pytest.raises(MorphError, match=r"example of 1 x 1 x 64 x 64: height 64 is not 96 .*--size HxW"):
        find_spaces(Fixed(1, 4, 3), torch.zeros(1, 1, 64, 64))


def test_scripted_and_lazy_modules_are_refused() -> None:
    with pytest.raises(MorphError, match="TorchScript"):
        spaces_of(lambda n, x: n.s(x), s=torch.jit.script(nn.ReLU()))
    with pytest.raises(MorphError, match="lazy"):
        spaces_of(lambda n, x: n.s(x), s=nn.LazyConv2d(8, 1))


def test_custom_functions_work_again_afterwards() -> None:
    spaces_of(lambda n, x: x)
    assert float(_Square.apply(torch.tensor(3.0))) == 9


def test_setitem_of_whole_maps_is_followed() -> None:
    def middle(_n: nn.Module, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :, 1:] = x[:, :, :-1]
        y[:, :, 0] = 1.0
        return y

    model = Net(middle)
    assert not find_spaces(model, X)["a.weight:0"].frozen
    assert widen(model, X, {"a.weight:0": 12})[1].difference.float64 < 1e-13
