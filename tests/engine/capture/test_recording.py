"""Capture: the recorded program is the model's forward, call by call, and nothing of the model is touched."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from types import BuiltinFunctionType, FunctionType
from typing import Any

import pytest
import torch
from exactness import randomize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from gigamorph import accelerate, plan
from gigamorph.engine.capture.call_trees import bind, refs
from gigamorph.engine.capture.graph import Graph
from gigamorph.engine.capture.program import Program, call, name_of
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.ops.base import RULES


def replay(program: Program, model: nn.Module, image: Tensor) -> list[Tensor]:
    """Run the recorded calls on real tensors."""
    state = {
        "plain": getattr(model, "plain", None),
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    env: dict[int, Tensor] = {program.image: image}
    for number, value in enumerate(program.values):
        if value.name is not None:
            env[number] = state[value.name]
        elif value.constant is not None:
            env[number] = value.constant
    for op in program.ops:
        env.update(zip(op.outputs, call(op, env), strict=True))
    return bind(program.output, env)


class Mixed(nn.Module):
    """Module, functional and method spellings, in-place calls, views, a plain tensor, control flow, several outputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.rand(4))
        self.plain = torch.tensor([0.5, 1.0, 1.5, 2.0])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.norm(self.conv(x)), inplace=True)
        y += 0.5 * y.sigmoid()
        if y.shape[-1] % 2:
            y = F.pad(y, (0, 1))
        a, b = y.chunk(2, dim=1)
        y = torch.cat([b, a], 1) * self.scale.view(1, -1, 1, 1) + self.plain[:, None, None]
        for piece in y.unbind(0):
            piece.sum()
        return {"map": y, "vector": y.mean((2, 3)).max(dim=1).values}


@pytest.mark.parametrize("size", [(16, 16), (17, 23)])
def test_replay_is_the_forward(size):
    model = randomize(Mixed()).eval()
    image = torch.randn(2, 3, *size)
    program = capture(model, tuple(image.shape), image.dtype, "cpu")
    expected, got = model(image.clone()), replay(program, model, image.clone())
    assert len(got) == len(expected) and not program.single
    for wanted, value in zip(expected.values(), got, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("convnext_atto", {"depths": (1, 1, 2, 1)}),
        ("densenet121", {"block_config": (2, 3, 2, 2)}),
        ("mobilenetv3_small_100", {}),
    ],
)
def test_replay_of_networks(name, options):
    model = randomize(pytest.importorskip("timm").create_model(name, pretrained=False, **options)).eval()
    image = torch.randn(1, 3, 64, 96)
    program = capture(model, tuple(image.shape), image.dtype, "cpu")
    assert program.single
    with torch.no_grad():
        assert torch.equal(replay(program, model, image.clone())[0], model(image))


def test_nothing_of_the_model_is_touched():
    model = Mixed().train()
    before = copy.deepcopy(model.state_dict())
    capture(model, (2, 3, 32, 32), torch.float32, "cpu")
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert model.training and not model._forward_hooks and not torch.nn.modules.module._global_forward_hooks


class Remembers(nn.Module):
    """Keeps what it has computed, as EfficientFormerV2 does its attention biases in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.scale, self.cache, self.seen, self.calls = nn.Parameter(torch.ones(3, 1, 1)), {}, [], 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.latest = x
        self.seen.append(x.mean())
        if "scale" not in self.cache:
            self.cache["scale"] = self.scale * 2
        return (x * self.cache["scale"]).mean((2, 3))


def test_what_a_forward_keeps_is_not_kept():
    """Tensors without values would come to light in the model's next forward."""
    model = Remembers()
    model.cache["other"] = 1
    capture(model, (1, 3, 8, 8), torch.float32, "cpu")
    assert (model.cache, model.seen, model.calls, hasattr(model, "latest")) == ({"other": 1}, [], 0, False)
    image = torch.randn(1, 3, 8, 8)
    fast = accelerate(copy.deepcopy(model), tile=3)(image)
    assert torch.allclose(model(image), fast) and fast.requires_grad


def test_size_costs_nothing():
    program = capture(Mixed().eval(), (1, 3, 100_000, 100_000), torch.float32, "cpu")
    (vector,) = [v for v in refs(program.output) if program.values[v].shape == (1,)]
    assert program.values[vector].dtype == torch.float32


def test_what_is_recorded():
    model = Mixed().eval()
    program = capture(model, (2, 3, 17, 23), torch.float32, "cpu")
    names = [op.name for op in program.ops]
    assert names[:3] == ["conv2d", "batch_norm", "relu"]
    assert {"add_", "pad", "chunk", "cat"} <= set(names)
    assert {v.name for v in program.values if v.name} == {
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "scale",
        "plain",
    }
    conv = next(op for op in program.ops if op.name == "conv2d")
    assert conv.module == "conv" and program.ops[names.index("cat")].module == ""
    assert program.values[program.image].shape == (2, 3, 17, 23)


def test_an_in_place_call_gives_a_new_value():
    program = capture(Mixed().eval(), (2, 3, 16, 16), torch.float32, "cpu")
    relu = next(op for op in program.ops if op.name == "relu")
    assert relu.mutated and relu.outputs != relu.inputs
    later = [v for op in program.ops[program.ops.index(relu) + 1 :] for v in op.inputs]
    assert relu.inputs[0] not in later and relu.outputs[0] in later


def test_same_object_is_the_same_value():
    """`contiguous`, `to` and dropout in evaluation return what they got."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).contiguous().to(torch.float32).mean((2, 3))

    program = capture(Net(), (1, 3, 16, 16), torch.float32, "cpu")
    assert [op.name for op in program.ops] == ["conv2d", "mean"]


def test_random_numbers_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)).train()
    before = torch.get_rng_state()
    capture(model, (1, 3, 16, 16), torch.float32, "cpu")
    assert torch.equal(before, torch.get_rng_state())


def test_errors_of_the_model_come_through():
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(RuntimeError, match="channels"):
        capture(model, (1, 5, 16, 16), torch.float32, "cpu")
    assert not torch.nn.modules.module._global_forward_hooks, "hooks must go even then"
    capture(model, (1, 3, 16, 16), torch.float32, "cpu")


@pytest.mark.parametrize(
    ("change", "read"),
    [
        (lambda x, y: x.mul_(2), lambda x, y: y),  # base changed, view read
        (lambda x, y: y.mul_(2), lambda x, y: x),  # view changed, base read
        (lambda x, y: y.mul_(2), lambda x, y: y),  # base dead
        (lambda x, y: x.mul_(2), lambda x, y: x),  # view dead
        (lambda x, y: x.mul(2), lambda x, y: x + y.sum()),
        (lambda x, y: y[:, 1].add_(1), lambda x, y: x[:, 1:3] + y),
        (lambda x, y: x.narrow(1, 1, 2).mul_(3), lambda x, y: x),
        (lambda x, y: y.permute(0, 2, 3, 1).unsqueeze(0).mul_(3), lambda x, y: x),
        (lambda x, y: y.detach().mul_(3), lambda x, y: x),
        (lambda x, y: x.select(1, 1).zero_(), lambda x, y: x + y.sum()),
    ],
)
def test_writes_through_views(change, read):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            y = x[:, :2]
            change(x, y)
            return read(x, y) * 1

    model = Net()
    image = torch.randn(1, 3, 16, 16)
    program = capture(model, tuple(image.shape), image.dtype, "cpu")
    (got,), wanted = replay(program, model, image), model(image)
    assert torch.equal(got, wanted)
    got, wanted = (torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (got, wanted))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("namespace", [torch, torch._C._nn, torch.special, torch.linalg], ids=lambda m: m.__name__)
def test_functions_of_one_name_take_their_arguments_in_one_order(namespace):
    """Rules read arguments by their place, so a function with another order must not go by the name of the rule."""
    compared = 0
    for name in RULES:
        function, known = getattr(namespace, name, None), getattr(F, name, None)
        if not isinstance(function, BuiltinFunctionType) or not isinstance(known, FunctionType):
            continue
        if name_of(function) != name:
            continue
        order = [arg.name for arg in torch._C._jit_get_schemas_for_operator(f"aten::{name}")[0].arguments]
        known = torch.nn.functional.__dict__.get(f"_{name}", known)  # behind a switch on return_indices
        expected = [arg for arg in inspect.signature(known).parameters if arg != "_stacklevel"]
        same = {"self": "input", "train": "training"}
        order = [same.get(arg, arg) for arg in order]
        shared = [arg for arg in order if arg in expected]
        places = [(order.index(arg), expected.index(arg)) for arg in shared]
        assert all(own == other for own, other in places), (
            f"{namespace.__name__}.{name}{order} is not F.{name}{expected}"
        )
        compared += bool(shared)
    assert compared > 5 or namespace in (torch.special, torch.linalg)


def test_the_first_network_of_a_process_goes_when_nobody_has_it() -> None:
    """What is imported while it was recorded had got hold of the recording."""
    code = """
import gc, weakref, torch
from torch import nn
from gigamorph import accelerate
net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1))
weight, ours = weakref.ref(net[0].weight), accelerate(net, tile=16)
ours(torch.rand(1, 1, 40, 40))
del net, ours
gc.collect()
assert weight() is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_shapes_that_dynamo_has_computed_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's cache of them has the settings of Dynamo's symbolic sizes in its key."""
    misses = []

    def counted(graph: Graph, *args: Any) -> Program:
        before = FakeTensorMode.cache_info().misses
        made = program(graph, *args)
        misses.append(FakeTensorMode.cache_info().misses - before)
        return made

    program = Graph.program
    monkeypatch.setattr(Graph, "program", counted)
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.MaxPool2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    FakeTensorMode.cache_clear()
    plan(net, (1, 67, 71))
    assert len(misses) == 1 and misses[0] <= 3  # the image and two parameters; 14 with the ops
