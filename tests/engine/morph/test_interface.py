"""How growth is asked for: one door, factors per layer, layers that are left alone, widths that suit a machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from morph_networks import half_resnet
from torch import nn

import gigamorph
from gigamorph.engine.errors import MorphError
from gigamorph.engine.models.resnet import ResNet
from gigamorph.engine.morph.optimizer import grow_optimizer
from gigamorph.engine.morph.widen import widen

X = torch.zeros(1, 1, 32, 32)


def small() -> ResNet:
    torch.manual_seed(0)
    return half_resnet(2, 1, 4, blocks=3)


def test_every_morph_is_at_the_door() -> None:
    model = small()
    wide, _ = gigamorph.widen(model, X, factor=1.5)
    deep, _ = gigamorph.deepen(wide, X, "layer1.0")
    deep, _ = gigamorph.deepen(deep, X, "layer2.0", "pair", act="ReLU")
    assert isinstance(deep, nn.Module) and issubclass(gigamorph.MorphError, gigamorph.GigamorphError)
    with pytest.raises(MorphError, match="unknown how='wider'"):
        gigamorph.deepen(model, X, "layer1.0", "wider")


def widths(model: Any) -> list[int]:
    return [block.conv1.out_channels for block in (*model.layer1, *model.layer2)]


def test_factors_by_layer_and_layers_that_are_left_alone() -> None:
    assert widths(small()) == [4, 4, 4, 8]
    assert widths(widen(small(), X, factor={"layer1.2.conv1": 2, "layer2.*": 1.5})[0]) == [4, 4, 8, 12]
    assert widths(widen(small(), X, factor=2, ignore=["layer1.0", "layer2.0.conv1"])[0]) == [4, 8, 8, 8]
    child, _ = widen(small(), X, {"layer2.0.conv1.weight:0": 11}, factor={"layer2": 2})
    assert child.layer2[0].conv1.out_channels == 11 and child.layer2[0].conv2.out_channels == 16
    for wrong in ({"factor": {"layer9": 2}}, {"factor": 2, "ignore": ["fc"]}):
        with pytest.raises(MorphError, match="matches no module with channels that can grow"):
            widen(small(), X, **wrong)
    for value in (0.5, float("nan"), "2"):
        with pytest.raises(MorphError, match="give 1 or more"):
            widen(small(), X, factor={"layer1": value})  # pyright: ignore


def test_widths_that_are_multiples() -> None:
    assert widths(widen(small(), X, factor=1.4, round_to=8)[0]) == [8, 8, 8, 8]  # never less than there is
    assert widths(widen(small(), X, factor=2.8, round_to=8)[0]) == [8, 8, 8, 24]
    with pytest.raises(MorphError, match=r"round_to must be .* of at least 1, not 0"):
        widen(small(), X, factor=2, round_to=0)


MODULE = """
from torch import nn


class Net(nn.Sequential):
    pass


def narrow(num_classes=2):
    return Net(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, num_classes, 3))


def other(num_classes=2):
    return Net(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=4), nn.Conv2d(16, num_classes, 3, 2))


def broad(num_classes=2):
    return Net(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=4), nn.Conv2d(16, num_classes, 3))
"""


def test_growth_into_a_network_that_has_a_name(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "named_networks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import named_networks  # pyright: ignore[reportMissingImports]

    child, report = widen(named_networks.narrow(5), X, factor=2)
    assert any("named_networks.broad builds" in line for line in report.changes)
    broad = named_networks.broad(5)
    broad.load_state_dict(child.state_dict())
    assert torch.equal(broad(X), child(X))
    assert not any("builds" in line for line in widen(named_networks.narrow(5), X, factor=1.5)[1].changes)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 2 * grads[0]


class Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (x - x.mean((2, 3), keepdim=True)) * scale[None, :, None, None]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        return None, None


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.scale = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(Affine.apply(Double.apply(self.a(x)), self.scale))  # pyright: ignore


def test_a_custom_function_that_is_declared(monkeypatch: Any) -> None:
    from gigamorph.engine.morph import families
    from gigamorph.engine.morph.families import declare

    monkeypatch.setattr(families, "DECLARED", {})
    with pytest.raises(MorphError, match="no space can be widened"):
        widen(Custom(), X, factor=2)
    declare(Double, "elementwise")
    declare(Affine, "channelwise")
    child, report = widen(Custom(), X, factor=2)
    assert child.a.out_channels == 8 and len(child.scale) == 8 and report.difference.float64 <= 1e-12
    for wrong in ((Double, "spatial"), (nn.Conv2d, "elementwise")):
        with pytest.raises(MorphError, match=r"unknown|not a subclass"):
            declare(*wrong)


class Lamb(torch.optim.AdamW):
    """An optimizer of another library, by its states."""


@pytest.mark.parametrize(
    "kind, options",
    [
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adadelta, {}),
        (Lamb, {"amsgrad": True}),
    ],
)
def test_states_of_other_optimizers(kind: Any, options: dict[str, Any]) -> None:
    """After a widening into equal halves the child's own first steps would have left these very states."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    child, report = widen(model, x, {0: 8}, split="sterbenz")
    halves, _ = widen(model, x, {0: 8}, split="kraft")
    optimizer, own = kind(model.parameters(), lr=1e-9, **options), kind(halves.parameters(), lr=1e-9, **options)
    for net, opt in ((model, optimizer), (halves, own)):
        for _ in range(2):
            opt.zero_grad()
            net(x).square().sum().backward()
            opt.step()
    made = grow_optimizer(optimizer, model, child, report)
    assert type(made) is kind
    for p, q in zip(child.parameters(), halves.parameters(), strict=True):
        for key, value in made.state[p].items():
            scale = q.shape != () and value.ndim
            if key in ("acc_delta",):  # of steps, which plain rates change
                continue
            assert not scale or torch.allclose(value, own.state[q][key], rtol=1e-3, atol=1e-12), key
    child(x).sum().backward()
    made.step()


def test_an_optimizer_whose_state_is_not_known_is_refused_by_its_state() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    x = torch.randn(1, 3, 8, 8)
    optimizer = torch.optim.Rprop(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    child, report = widen(model, x, factor=2)
    with pytest.raises(MorphError, match="Rprop: cannot map its state 'prev'"):
        grow_optimizer(optimizer, model, child, report)
    with pytest.raises(MorphError, match="commute"):
        grow_optimizer(torch.optim.NAdam(model.parameters()), model, child, report, lr="commute")


class Warm(torch.optim.SGD):
    """Made with something that no group keeps."""

    def __init__(self, params: Any, steps: int, **options: Any) -> None:
        super().__init__(params, **options)
        self.steps = steps


def test_an_optimizer_that_cannot_be_made_anew_is_refused() -> None:
    model = small()
    child, report = widen(model, X, factor=2)
    with pytest.raises(MorphError, match=r"Warm cannot be rebuilt .*create a new optimizer: .*'steps'"):
        grow_optimizer(Warm(model.parameters(), 5, lr=0.1), model, child, report)
