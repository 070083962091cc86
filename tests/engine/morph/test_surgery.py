"""Every local morph: its step repeats it on a fresh network, on shapes alone too; nothing is changed when it fails."""

import copy
import functools
import json
from typing import Any

import pytest
import torch
from exactness import randomize
from morph_networks import half_resnet
from torch import Tensor, nn

from gigamorph.engine.errors import MorphError
from gigamorph.engine.models.resnet import ResNet
from gigamorph.engine.morph.activation import insert_activation
from gigamorph.engine.morph.decompose import decompose, insert_module, split_parallel
from gigamorph.engine.morph.deepen import insert_identity, insert_pair, insert_residual
from gigamorph.engine.morph.head import grow_head, split_class
from gigamorph.engine.morph.inputs import add_planes, to_grey
from gigamorph.engine.morph.kernel_size import grow_kernel
from gigamorph.engine.morph.step import _KINDS, Edit, from_json, to_json
from gigamorph.engine.morph.surgery import module_at, site

MORPHS = [
    lambda m, x, **o: insert_activation(m, x, "layer1", "PReLU", **o),
    lambda m, x, **o: insert_identity(m, x, "layer1.0.bn1", norm=True, act="ReLU", **o),
    lambda m, x, **o: insert_identity(m, x, "layer2", (3, 1), norm=True, **o),
    lambda m, x, **o: insert_pair(m, x, "layer2.0.conv1", "LeakyReLU", 3, **o),
    lambda m, x, **o: insert_residual(m, x, "layer2", hidden=5, **o),
    lambda m, x, **o: grow_kernel(m, x, ["conv1", "layer2.0.conv2"], (7, 9), **o),
    lambda m, x, **o: decompose(m, x, "layer1.0.conv2", (3, 3), act="GELU", between="pair", **o),
    lambda m, x, **o: decompose(m, x, "layer1.0.conv2", (3, 1), method="stable", **o),
    lambda m, x, **o: insert_module(m, x, "layer2", (3, 1), **o),
    lambda m, x, **o: split_parallel(m, x, "layer1.0.conv1", **o),
    lambda m, x, **o: to_grey(m, x[:, :1], **o),
    lambda m, x, **o: add_planes(m, torch.cat([x, x], 1), 3, **o),
    lambda m, x, **o: grow_head(m, x, "fc", 7, "softmax", **o),
    lambda m, x, **o: split_class(m, x, "fc", 1, 3, **o),
]


def net() -> ResNet:
    return half_resnet(3, 3, 4)


def parent() -> ResNet:
    torch.manual_seed(0)
    return randomize(net())  # pyright: ignore


@functools.cache
def grown(number: int) -> tuple[ResNet, Tensor, nn.Module, Any]:
    """The parent, the example, the child and the report of one morph; the parent and random numbers are as before."""
    model, x = parent(), torch.randn(2, 3, 40, 36)
    state, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    child, report = MORPHS[number](model, x)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert torch.equal(torch.get_rng_state(), numbers)
    return model, x, child, report


@pytest.mark.parametrize("number", range(len(MORPHS)))
def test_steps(number: int) -> None:
    original, x, child, report = grown(number)
    assert [m.training for m in child.modules()] == [True] * len(list(child.modules()))
    step: Any = from_json(json.loads(json.dumps(to_json(report.step))))
    assert step == report.step

    fresh = net()
    changes = step.edit(fresh)
    more = report.changes[len(changes) :]  # what the step alone cannot know
    assert [*changes, *more] == report.changes and (not more or step.op == "head") and str(report)
    fresh.load_state_dict(child.state_dict())
    image = x[:, :1] if step.op == "inputs" and step.channels == 1 else x
    image = torch.cat([x, x], 1) if step.op == "inputs" and step.channels == 6 else image
    assert torch.equal(fresh.eval()(image), copy.deepcopy(child).eval()(image))

    with torch.device("meta"):
        shapes = net()
    step.edit(shapes)
    assert {k: v.shape for k, v in shapes.state_dict().items()} == {k: v.shape for k, v in child.state_dict().items()}
    assert all(v.is_meta for v in shapes.state_dict().values())

    model = copy.deepcopy(original)
    kept = {id(p) for p in model.parameters()}
    same, _ = MORPHS[number](model, x, inplace=True)
    assert same is model and sum(id(p) in kept for p in model.parameters()) >= len(kept) - 4
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in child.state_dict().items())


@pytest.mark.parametrize("number", range(len(MORPHS)))
def test_random_numbers_go_on_as_without_the_morph(number: int) -> None:
    fresh, (*_, report) = net(), grown(number)
    before = torch.get_rng_state()
    report.step.repeat(fresh)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_edit_is_tried() -> None:
    mine = "activation identity pair residual kernel decompose module parallel inputs head split_class".split()
    every = {kind.op for kind in _KINDS.values() if issubclass(kind, Edit)}
    assert {*mine, "volume"} == every  # test_volume.py
    assert {grown(number)[-1].transform for number in range(len(MORPHS))} == set(mine)


class Places(nn.Module):
    """Outputs of many forms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)
        self.pair = Two()
        self.norm = nn.LayerNorm(4)
        self.act = nn.GELU()
        self.late = nn.Sequential(nn.Linear(4, 5), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.pair(self.conv(x))
        return self.late(self.act(self.norm((a + b).permute(0, 2, 3, 1))))


class Two(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x


@pytest.mark.parametrize(
    ("path", "want"), [("conv", (4, 2, 4)), ("norm", (4, 0, 4)), ("act", (4, 0, 4)), ("late", (5, 0, 4))]
)
def test_where_the_channels_are(path: str, want: tuple[int, int, int]) -> None:
    at = site(Places(), path, torch.randn(2, 2, 6, 7))
    assert (at.channels, at.dims, at.rank) == want


def test_no_tensor_is_refused() -> None:
    with pytest.raises(MorphError, match="'pair' does not return one batch"):
        site(Places(), "pair", torch.randn(2, 2, 6, 7))
    with pytest.raises(MorphError, match="no module 'other'"):
        module_at(Places(), "other")


def test_frozen_batchnorm_stays_frozen() -> None:
    model = parent().train()
    model.layer1[0].bn1.eval()  # pyright: ignore
    child, _ = insert_residual(model, torch.randn(2, 3, 40, 36), "layer1")
    modes = {name: module.training for name, module in child.named_modules()}
    assert not modes.pop("layer1.0.0.bn1") and all(modes.values()) and "layer1.1.body.1" in modes
