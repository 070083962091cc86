"""An accelerated network answers as the network itself: methods, attributes, copies, hooks, wrappers, threads."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from exactness import LIMIT, errors, named
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gigamorph import Accelerated, GigamorphError, UnsupportedError, accelerate, dense_loss, plan, write_map
from gigamorph.engine.errors import ChangedError


class Own(nn.Module):
    """Overrides what a module can override, and counts what is asked of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.Linear(3, 2)
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.temperature, self.asked, self.steps = 1.0, [], 7

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3))) / self.temperature

    def train(self, mode: bool = True) -> Own:
        super().train(mode)
        self.norm.eval()  # frozen, as many people do it
        return self

    def to(self, *args: Any, **kwargs: Any) -> Own:
        self.asked.append("to")
        return super().to(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Own:
        self.asked.append("_apply")
        return super()._apply(fn, recurse)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.asked.append("state_dict")
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "old_head.weight" in state_dict:
            state_dict[prefix + "head.weight"] = state_dict.pop(prefix + "old_head.weight")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state

    def confidence(self, x: Tensor) -> Tensor:
        return self(x).softmax(1).amax(1)


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape or (2, 1, 37, 29), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, Accelerated]:
    torch.manual_seed(0)
    model = make().double().train()
    return model, accelerate(copy.deepcopy(model), **{"tile": 16, **options})


def agree(model: nn.Module, net: nn.Module, x: Tensor | None = None) -> None:
    """A step of both: outputs, gradients and buffers."""
    x = image() if x is None else x
    results = []
    for network in (model, net):
        network.zero_grad(set_to_none=True)
        out = network(x.to(next(network.parameters()).dtype))
        out.square().sum().backward()
        grads = {n: p.grad for n, p in network.named_parameters()}
        results.append(named([out.detach()]) | grads | dict(network.named_buffers()))
    limit = LIMIT if next(model.parameters()).dtype == torch.float64 else 1e-2
    worst = errors(*results)
    assert not [n for n, error in worst.items() if not error <= limit], worst


# -- methods and attributes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("child", [False, True], ids=["root", "child"])
def test_overridden_methods_are_the_networks(child):
    model, net = pair(Own)
    roots = [nn.ModuleDict({"net": n}) if child else n for n in (model, net)]
    for root in roots:
        root.train()
    assert net.training and not net.norm.training
    agree(model, net)
    for change in (lambda m: m.half(), lambda m: m.float(), lambda m: m.to(torch.float64)):
        for root in roots:
            change(root)
        assert net.asked == model.asked
        assert {k: v.dtype for k, v in net.named_buffers()} == {k: v.dtype for k, v in model.named_buffers()}
    model.steps = net.steps = 9
    expected, got = roots[0].state_dict(), roots[1].state_dict()
    assert list(expected) == list(got) and net.asked == model.asked
    assert not [k for k in got if "scratch" in k] and [v for k, v in got.items() if "extra" in k] == [9]
    assert expected._metadata.keys() == got._metadata.keys()
    net.steps = 0
    prefix = "net." if child else ""
    got[prefix + "old_head.weight"] = 2 * got.pop(prefix + "head.weight")
    roots[1].load_state_dict(got)
    assert net.steps == 9 and torch.equal(net.head.weight, 2 * model.head.weight)
    for root in roots:
        root.eval()
    assert not net.training and not net.conv.training


class Counting(nn.Sequential):
    """A container with an extra state."""

    steps = 0

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Conv2d(1, 2, 3)), lambda: Counting(nn.Conv2d(1, 2, 3)), Own])
def test_distributed_checkpoints(alone, make):
    """They look at the class of a module whether it has an extra state."""
    nets = [accelerate(make()) for _ in range(2)]
    nets[0].steps = 7
    wrapped = [nn.parallel.DistributedDataParallel(net) for net in nets]
    stored = get_model_state_dict(wrapped[0])
    set_model_state_dict(wrapped[1], copy.deepcopy(stored))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    with_state = type(nets[1]._network) is not nn.Sequential
    assert ("_extra_state" in stored) == with_state and (not with_state or nets[1].steps == 7)
    assert len(pickle.loads(pickle.dumps(nets[0])).state_dict()) == len(stored)


HOOKS = {
    "state_dict": lambda m, log: m._register_state_dict_hook(lambda *_: log.append("state_dict")),
    "state_dict post": lambda m, log: m.register_state_dict_post_hook(lambda *_: log.append("post")),
    "state_dict pre": lambda m, log: m.register_state_dict_pre_hook(lambda *_: log.append("pre")),
    "load pre": lambda m, log: m.register_load_state_dict_pre_hook(lambda *_: log.append("load pre")),
    "load post": lambda m, log: m.register_load_state_dict_post_hook(lambda *_: log.append("load post")),
}


@pytest.mark.parametrize("where", ["network", "net"])
@pytest.mark.parametrize("name", HOOKS)
def test_state_dict_hooks(name, where):
    model, net = pair(Own)
    logs: tuple[list[str], list[str]] = ([], [])
    HOOKS[name](model, logs[0])
    HOOKS[name](net if where == "net" else net._network, logs[1])
    for network in (model, net):
        for root in (network, nn.Sequential(network)):
            root.load_state_dict(root.state_dict())
    assert logs[0] == logs[1] and len(logs[0]) == 2


@pytest.mark.parametrize("copied", [lambda n: n, copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_attributes_are_the_networks(copied):
    model, net = pair(Own)
    net = copied(net)
    net.temperature = model.temperature = 2.5
    assert net._network.temperature == 2.5
    agree(model, net)
    net._network.temperature = model.temperature = 3.5
    assert net.temperature == 3.5
    net.head = model.head = nn.Linear(3, 4).double()
    net.extra, net.scale = "text", nn.Parameter(torch.ones(2))
    assert net._network.extra == "text" and "scale" in dict(net._network.named_parameters())
    del net.extra, net.scale
    assert not hasattr(net, "extra") and not hasattr(net._network, "scale") and "temperature" in dir(net)
    for network in (model, net):
        network.register_buffer("seen", torch.zeros(1), persistent=False)
    assert "seen" in dict(net._network.named_buffers()) and "seen" not in net.state_dict()
    net.tile = (8, 8)
    assert not hasattr(net._network, "tile")
    net.training = False
    assert not net._network.training
    net.train(model.training)
    agree(model, net)


def test_methods_that_call_the_network():
    model, net = pair(Own)
    assert torch.equal(model.confidence(image()), net.confidence(image()))


def test_methods_that_return_the_network():
    """`net = net.freeze()` handed out the plain network."""
    net = pair(Fluent)[1]
    assert net.freeze("conv") is net and not net.conv.weight.requires_grad and net.append(nn.ReLU()) is net
    assert net.conv_of() is net.conv and net.freeze.__self__ is net
    assert str(inspect.signature(net.freeze)) == str(inspect.signature(net._network.freeze))
    assert isinstance(pickle.loads(pickle.dumps(net.freeze))("conv"), Accelerated)


class Fluent(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(OrderedDict(conv=nn.Conv2d(1, 3, 3)))

    def freeze(self, name: str) -> Fluent:
        self.get_submodule(name).requires_grad_(False)
        return self

    def conv_of(self) -> nn.Module:
        return self.conv


def test_network_that_pickles_itself():
    """What it restores is shared, not what was there before."""
    model, net = pair(Slim)
    for how in (copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n)), copy.copy):
        twin = how(net)
        assert twin._parameters is twin._network._parameters and twin._modules is twin._network._modules
        agree(how(model), twin)


class Slim(Own):
    def __getstate__(self) -> dict[str, Any]:
        return {"state": dict(self.state_dict())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.double().load_state_dict(state["state"])


def test_containers():
    layers = lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))  # noqa: E731
    model, net = pair(layers)
    assert len(net) == 3 and net[0] is net._network[0] and net[-1] in net and model[0] not in net
    assert list(net) == list(net._network) and isinstance(net[:2], nn.Sequential)
    net[1] = model[1] = nn.Tanh()
    agree(model, net)
    del net[1], model[1]
    agree(model, net)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert len(twin) == 2
    sums = [(one + nn.Sequential(nn.Sigmoid())) * 2 for one in (model, net)]
    assert str(sums[0]) == str(sums[1]) and len(2 * net) == 2 * len(net) == 4
    model += nn.Sequential(nn.Flatten())
    net += nn.Sequential(nn.Flatten())
    agree(model, net)
    other = pair(Own)[1]
    assert bool(other) and not hasattr(other, "__len__")
    with pytest.raises(TypeError):
        other[0]


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_hooks_on_the_accelerated_network():
    """They see its input, output and their gradients, as those of any module."""
    logs = []
    for network in pair(Own):
        log: list[Tensor] = []
        network.register_forward_pre_hook(lambda _m, x: (x[0] * 2,))
        network.register_forward_hook(lambda _m, _x, y: y + 1)
        network.register_full_backward_hook(lambda _m, x, y, log=log: log.extend((*x, *y)))  # pyright: ignore
        if not isinstance(network, Accelerated):
            expected = network
        else:
            agree(expected, network)
        x = image().requires_grad_()
        network(x).square().sum().backward()
        assert x.grad is not None
        logs.append([*log[-2:], x.grad])
    assert max(errors(named(logs[0]), named(logs[1])).values()) <= LIMIT


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [[32, 40], np.int64(32), 32.0, (np.float32(16), np.int8(24))])
def test_tiles_that_are_understood(tile):
    net = accelerate(Own(), tile=tile)
    assert all(type(side) is int for side in net.tile)
    net(image().float())


@pytest.mark.parametrize("tile", [32.5, "32", True, (1, 2, 3), [], 0, (8, -1), float("nan"), float("inf"), {3, 4}])
def test_tiles_that_are_not(tile):
    with pytest.raises(GigamorphError, match="tile must be "):
        accelerate(Own(), tile=tile)


BUDGETS_THAT_ARE_NOT = [float("nan"), float("inf"), -5, -1.5, 0, True, "", "nan", "-3GiB", [3], b"1GiB", "30"]


@pytest.mark.parametrize("budget", BUDGETS_THAT_ARE_NOT)
def test_budgets_that_are_not(budget):
    with pytest.raises(GigamorphError, match="memory size"):
        accelerate(Own(), memory_budget=budget)
    assert accelerate(Own(), memory_budget=np.int64(10**9)).memory_budget == 10**9


@pytest.mark.parametrize("verify", ["no", None, 1])
def test_verify_is_true_or_false(verify):
    with pytest.raises(GigamorphError, match="verify must be "):
        accelerate(Own(), verify=verify)


@pytest.mark.parametrize("model", [None, 3, "resnet18", nn.Conv2d, torch.relu, [Own()], object.__new__(Own)])
def test_what_is_no_network(model):
    with pytest.raises(GigamorphError, match=r"torch.nn.Module|not initialised"):
        accelerate(model)


def test_a_part_that_is_accelerated_already():
    with pytest.raises(GigamorphError, match="module '1' is already accelerated"):
        accelerate(nn.Sequential(nn.Conv2d(1, 1, 3), accelerate(nn.Conv2d(1, 1, 3))))


def test_networks_without_values():
    net = accelerate(Own().to("meta"), tile=16)
    with pytest.raises(GigamorphError, match=r"'conv\.weight' is on the meta device"):
        net(image().float())
    net.to_empty(device="cpu").load_state_dict(Own().state_dict())
    net(image().float())
    with pytest.raises(GigamorphError, match="image is on the meta device"):
        net(image().float().to("meta"))
    lazy = accelerate(nn.Sequential(nn.LazyConv2d(3, 3)), tile=16)
    with pytest.raises(UnsupportedError, match="lazy"):
        lazy(image().float())
    lazy._network(image().float())
    lazy(image().float())


def test_plans_of_networks_without_values_and_of_others_than_float32():
    for network in (Own().double(), Own().to("meta"), Own().bfloat16()):
        net = accelerate(network.eval())
        assert plan(net, (60, np.int64(50)), tile=[32, 40.0]).tile == (32, 40)
        assert net.plan_for((1, 1, 60, 50)).tile == (60, 50)
    for size in (500, (500,), "500", None, (1.5, 3), (0, 3)):
        with pytest.raises(GigamorphError, match="image_size must be"):
            plan(Own(), size)
    for shape in (60, (60, 50), (0, 1, 60, 50)):
        with pytest.raises(GigamorphError, match=r"shape must be \(N, C, H, W\), or .*, not "):
            accelerate(Own()).plan_for(shape)
    for choice in ({"halos": "x"}, {"halos": ["host"]}, {"fallback": True}, {"batch_norm": 1}):
        with pytest.raises(GigamorphError, match=r"must be .* or .*, not "):
            accelerate(Own(), **choice)


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_of_no_images(training):
    model, net = pair(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    results = [n.train(training)(image()[:0].requires_grad_()) for n in (model, net)]
    assert results[0].shape == results[1].shape and results[0].requires_grad == results[1].requires_grad
    assert max(errors(dict(model.named_buffers()), dict(net.named_buffers())).values()) == 0


# -- torch.compile, wrappers ---------------------------------------------------------------------------------------


def _part_compiled(network: nn.Module) -> nn.Module:
    network.conv = torch.compile(network.conv)  # pyright: ignore[reportArgumentType]
    return network


def _part_compiled_in_place(network: Any) -> nn.Module:
    network.conv.compile()
    return network


def _in_place(net: nn.Module) -> nn.Module:
    net.compile()
    return net


COMPILED = {
    "the accelerated network": (lambda m: m, torch.compile),
    "the accelerated network, in place": (lambda m: m, _in_place),
    "the network": (torch.compile, lambda net: net),
    "a part of it": (_part_compiled, lambda net: net),
    "a part of it, in place": (_part_compiled_in_place, lambda net: net),
}


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    """What is compiled within is recorded as what it was compiled from (recording it ended the process)."""
    before, after = COMPILED[name]
    model, _ = pair(Own)
    net = after(accelerate(before(copy.deepcopy(model)), tile=16))
    results = []
    for network in (model, net):
        out = network(image())
        grads = torch.autograd.grad(out.square().sum(), list(network.parameters()))
        results.append(named([out, *grads, *network.buffers()]))
    assert max(errors(*results).values()) <= LIMIT


def test_parts_that_are_wrapped_afterwards_are_refused(alone):
    """As an `auto_wrap_policy` does; it was said that they read a gradient, or call what cannot be recorded."""
    net = accelerate(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)))
    net[1] = nn.parallel.DistributedDataParallel(net[1])
    with pytest.raises(
        UnsupportedError, match=r"'1' is wrapped in DistributedDataParallel; .* wrap the whole network: Dist"
    ):
        net(image())


def test_wrapped_networks_are_refused():
    with pytest.raises(
        UnsupportedError, match=r"'1' is wrapped in DataParallel; .*DistributedDataParallel\(accelerate"
    ):
        accelerate(nn.Sequential(nn.Conv2d(1, 1, 3), nn.DataParallel(nn.Conv2d(1, 1, 3))))
    with pytest.raises(UnsupportedError, match="DistributedDataParallel"):
        accelerate(Own())._replicate_for_data_parallel()


# -- outputs and gradients -----------------------------------------------------------------------------------------


class Outputs(nn.Module):
    """A map and a vector."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.conv(x)).sigmoid()
        return self.last(y), y.mean((2, 3))


def _assign(t: Tensor) -> Tensor:
    t[:, 0] = 2
    return t


IN_PLACE = {
    "relu": lambda t: F.relu(t, inplace=True),
    "add": lambda t: t.add_(1),
    "mul": lambda t: t.mul_(t.detach() + 1),
    "assign": _assign,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", IN_PLACE)
def test_outputs_changed_in_place(name, training):
    model, net = pair(Outputs)
    results = []
    for network in (model.train(training), net.train(training)):
        outputs = [IN_PLACE[name](t) for t in network(image())]
        sum(t.square().sum() for t in outputs).backward()  # pyright: ignore[reportAttributeAccessIssue]
        grads = {n: p.grad for n, p in network.named_parameters()}
        results.append(named([t.detach() for t in outputs]) | grads)
    assert max(errors(*results).values()) <= LIMIT


def _penalty(net: Any, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    out = net(x)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
    ((grad.norm() - 1).square() + net(x).sum()).backward()


def _dual(net: Any, x: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return net(torch.autograd.forward_ad.make_dual(x, x))


def _dual_parameters(net: Any, x: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        twins = {n: torch.autograd.forward_ad.make_dual(p.detach(), p.detach()) for n, p in net.named_parameters()}
        return torch.func.functional_call(net, twins, (x,))


def _batched(net: Any, x: Tensor) -> Any:
    out = net(x)
    return torch.autograd.grad(out, list(net.parameters()), torch.ones(3, *out.shape).double(), is_grads_batched=True)


ELSE = {
    "gradient penalty": _penalty,  # whose gradient was that of the other term alone
    "hvp": lambda net, x: torch.autograd.functional.hvp(lambda y: net(y).square().sum(), x, x),  # was wrong
    "autograd.functional.jvp": lambda net, x: torch.autograd.functional.jvp(net, x, x),  # was zero
    "func.jvp": lambda net, x: torch.func.jvp(net, (x,), (x,)),  # was zero
    "jacfwd": lambda net, x: torch.func.jacfwd(net)(x),  # was zero
    "grad": lambda net, x: torch.func.grad(lambda y: net(y).sum())(x),
    "vmap": lambda net, x: torch.func.vmap(lambda y: net(y[None]))(x),
    "dual tensor": _dual,
    "dual parameters": _dual_parameters,
    "batched gradients": _batched,
}


@pytest.mark.parametrize("make", [Own, lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 1, 3))])
@pytest.mark.parametrize("name", ELSE)
def test_other_derivatives_are_refused(name, make):
    net = pair(make)[1].eval()
    with pytest.raises(UnsupportedError, match=r"tiles; use"):
        ELSE[name](net, image())
    net(image()).sum().backward()


def _fake(net: Any, x: Tensor) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return net(mode.from_tensor(x))


TRACES = {
    "jit.trace": torch.jit.trace,
    "jit.script": lambda net, _x: torch.jit.script(net),
    "export": lambda net, x: torch.export.export(net, (x,)),
    "fx": lambda net, _x: torch.fx.symbolic_trace(net),
    "fx of what holds it": lambda net, _x: torch.fx.symbolic_trace(nn.Sequential(net)),
    "make_fx": lambda net, x: make_fx(net)(x),  # held the image as a constant
    "fake tensors": _fake,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRACES)
def test_traces_are_refused(name, monkeypatch):
    # In PyTorch 2.11 a failed export leaves its hook, which Dynamo does not record.
    monkeypatch.setattr(torch.nn.modules.module, "_global_buffer_registration_hooks", OrderedDict())
    model, net = pair(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()))
    with pytest.raises(UnsupportedError, match="network itself"):
        TRACES[name](net.eval(), image())
    assert max(errors(named([model(image())]), named([net(image())])).values()) <= LIMIT


def test_a_strict_export_says_why_not():
    """TorchDynamo's own refusal, with our reason."""
    _, net = pair(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()))
    with pytest.raises(Exception, match="by tiles, which cannot be traced; export the network itself"):
        torch.export.export(net.eval(), (image(),), strict=True)


def test_first_derivatives_with_create_graph():
    model, net = pair(Own)
    results = []
    for network in (model, net):
        x = image().requires_grad_()
        results.append(
            named(torch.autograd.grad(network(x).square().sum(), [x, *network.parameters()], create_graph=True))
        )
    assert max(errors(*results).values()) <= LIMIT
    jacobians = [
        torch.autograd.functional.jacobian(network, image(1, 1, 9, 7)) for network in (model.eval(), net.eval())
    ]
    assert max(errors(named(jacobians[:1]), named(jacobians[1:])).values()) <= LIMIT


@pytest.mark.parametrize("child", [False, True], ids=["root", "child"])
def test_functional_call(child):
    """With other parameters, and again with its own."""
    model, net = pair(Own)
    x, results = image(), []
    for network in (model, net):
        root = nn.Sequential(network) if child else network
        others = {n: (p.detach() * 1.5).requires_grad_() for n, p in root.named_parameters()}
        first = root(x)
        out = torch.func.functional_call(root, others, (x,))
        grads = torch.autograd.grad(out.square().sum(), list(others.values()))
        results.append(named([first, out, *grads, root(x)]))
    assert max(errors(*results).values()) <= LIMIT


# -- threads -------------------------------------------------------------------------------------------------------


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_threads_on_one_network():
    """Images of several sizes, recorded at the same time, forward and backward."""
    model, net = pair(Outputs)
    model.eval(), net.eval()
    images = [image(1, 1, 20 + 7 * n, 26 + n, seed=n) for n in range(4)]

    def work(network: nn.Module, x: Tensor) -> list[Tensor]:
        found = []
        for _ in range(3):
            outputs = network(x)
            loss = sum(t.square().sum() for t in outputs)
            found = [*outputs, *torch.autograd.grad(loss, list(network.parameters()))]  # pyright: ignore
        return found

    expected = [work(model, x) for x in images]
    got = in_threads(*(lambda x=x: work(net, x) for x in images))
    for want, have in zip(expected, got, strict=True):
        assert max(errors(named(want), named(have)).values()) <= LIMIT


def test_threads_on_two_networks_with_dropout():
    """Both passes over the tiles of a network draw the same masks, whatever the other network does."""

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x * self.scale, 0.5)

    def work(net: Accelerated) -> list[tuple[Tensor, Tensor]]:
        found = []
        for _ in range(6):
            out = net(image(1, 1, 40, 40))
            (grad,) = torch.autograd.grad(out.square().sum() / 2, [net.scale])
            found.append((out.detach().square().sum(), grad))
        return found

    nets = [accelerate(Dropped().double(), tile=8) for _ in range(2)]
    for net in nets:
        net(image(1, 1, 40, 40))  # recorded one after the other
    for found in in_threads(*(lambda net=net: work(net) for net in nets)):
        for want, have in found:
            torch.testing.assert_close(want, have)


# -- inference mode ------------------------------------------------------------------------------------------------


def test_networks_made_in_inference_mode():
    """Parameters and buffers that know of no changes; those in training mode are written to."""
    with torch.inference_mode():
        model, net = pair(Outputs)
        results = [named([*network(image()), *network(image()), *network.buffers()]) for network in (model, net)]
    assert max(errors(*results).values()) <= LIMIT


@pytest.mark.parametrize("training", [False, True])
def test_all_that_computes_in_inference_mode(training, tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)).double().train(training)
    labels = torch.ones(2, 33, 25, dtype=torch.int64)
    pooled = nn.Sequential(copy.deepcopy(model), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        net, classes = (accelerate(copy.deepcopy(m), tile=16) for m in (model, pooled))
        out = torch.empty(2, 2, 33, 25, dtype=torch.float64)
        with mode():
            write_map(net, image(), out)
            loss = dense_loss(net, image(), labels, nn.CrossEntropyLoss())
            evidence, several = classes.evidence(image(), 1), classes([image()[:1], image()[1:, :, :20]])
            accelerate(copy.deepcopy(pooled), tile=16, verify=True)(image())
        grads = torch.autograd.grad(classes(image()).square().sum(), list(classes.parameters()))
        results.append(named([out, loss, evidence, several, *grads]) | dict(classes.named_buffers()))
    assert max(errors(*results).values()) == 0


def test_hooks_within_a_replaced_forward():
    """A wrapper that is set on the accelerated network runs around hooks that the network had; stock's runs within."""
    model = Own().double().eval()
    model.register_forward_pre_hook(lambda _module, args: (args[0] * 0.5,) if args else None)
    net = accelerate(model, tile=16)
    original = net.forward
    net.forward = lambda x: original(x + 1)
    with pytest.raises(GigamorphError, match="register them on the accelerated network"):
        net(image(1, 1, 20, 20))


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3)
        self.forward = self.in_training

    def in_training(self, x: Tensor) -> Tensor:
        return self.layer(x).mean((2, 3))

    def in_test(self, x: Tensor) -> Tensor:
        return self.layer(x).relu().mean((2, 3))


def test_a_method_in_the_place_of_forward_is_computed_by_tiles() -> None:
    stock = Modes().double()
    fast, x, tiles = accelerate(copy.deepcopy(stock), tile=16), image(1, 1, 60, 50), []
    fast.on_tile = tiles.append
    changes: list[Callable[[Any], Any]] = [
        lambda net: None,
        lambda net: setattr(net, "forward", net.in_test),
        lambda net: setattr(net, "forward", MethodType(functools.wraps(Modes.in_test)(twice), net)),
        lambda net: setattr(net, "forward", net.in_training),
    ]
    for change in changes:
        tiles.clear()
        change(stock)
        change(fast)
        assert max(errors(named([stock(x)]), named([fast(x)])).values()) < LIMIT
        assert len(tiles) > 4
    del stock.forward, fast.forward
    for net in (stock, fast):
        with pytest.raises(NotImplementedError):
            net(x)


def twice(net: Any, x: Tensor) -> Tensor:
    return net.layer(x).amax((2, 3)) * 2


class TwoHeads(nn.Module):
    def __init__(self, square: bool):
        super().__init__()
        self.stem, self.other, self.square = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, bias=False), square

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        weight = Square.apply(self.other.weight) if self.square else self.other.weight
        return x.mean((2, 3)), F.conv2d(x, weight).amax((2, 3))  # pyright: ignore[reportArgumentType]


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]


@pytest.mark.parametrize("way", ["hook", "post hook", "custom function"])
def test_what_autograd_visits_without_a_gradient(way: str):
    """Of what a loss does not reach, stock calls no hook and no custom function; autograd would, with None or zeros."""
    model = TwoHeads(way == "custom function").double()
    twin = copy.deepcopy(model)
    for weight in (model.other.weight, twin.other.weight):
        if way == "hook":
            weight.register_hook(lambda grad: grad.clamp(-1, 1))
        elif way == "post hook":
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", weight.grad * 2))
    net = accelerate(twin, tile=7)
    x = image(1, 1, 20, 20)
    for network in (model, net):
        sum(out.sum() for out in network(x)).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for a, b in zip(model.parameters(), net.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= LIMIT * a.grad.abs().max()
    if way != "custom function":  # its graph is known, and is not run where no gradient comes
        with pytest.raises(GigamorphError, match="this loss does not reach it"):
            net(x)[0].sum().backward()
        return
    for network in (model, net):
        network.zero_grad()
        network(x)[0].sum().backward()
    for a, b in zip(model.parameters(), net.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)


class StaleWeight(nn.Module):
    """Reads a weight that was made once, outside of the forward, as pruning leaves one where its module is not called.

    Attributes:
        split: whether a second output depends on the weight, beside one that does not.
    """

    def __init__(self, split: bool):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)
        self.mask, self.split = (torch.rand(3, 3, 3, 3, dtype=torch.float64) > 0.3).double(), split
        self.double()
        self.weight = self.conv.weight * self.mask
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        y = F.conv2d(x, self.weight, padding=1)
        if self.split:
            return y.mean((2, 3)), self.head((y.detach() + self.conv.bias[:, None, None]).mean((2, 3)))
        self.mean = y.mean((0, 2, 3)).detach() + self.mean
        return self.head(y.detach().relu().mean((2, 3)))


def test_a_graph_that_an_earlier_backward_has_used_up():
    """Stock does not come to it where the loss does not reach it; nor does a result that no gradient goes through."""
    torch.manual_seed(0)
    x, model = image(1, 3, 20, 20), StaleWeight(split=False)
    net = accelerate(StaleWeight(split=False), tile=7)
    net.load_state_dict(model.state_dict())
    net.weight = net.conv.weight * net.mask  # pyright: ignore[reportOperatorIssue]
    model.weight = model.conv.weight * net.mask  # pyright: ignore[reportOperatorIssue]
    for network in (model, net, model, net):
        network(x).sum().backward()
    for a, b in zip(model.parameters(), net.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or (a.grad - b.grad).abs().max() <= LIMIT * a.grad.abs().max()
    net = accelerate(StaleWeight(split=True), tile=7)
    net(x)[0].sum().backward()
    with pytest.raises(GigamorphError, match="made before an earlier backward, and this loss does not reach it"):
        net(x)[1].sum().backward()


def test_memory_that_two_tensors_of_the_network_share():
    """Written to through one of them, and read through the other."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.weight = self.conv.weight.data

        def forward(self, x: Tensor) -> Tensor:
            self.weight.clamp_(-0.1, 0.1)
            return self.conv(x).mean((2, 3))

    with pytest.raises(UnsupportedError, match="whose memory another tensor of the network shares"):
        accelerate(Shared(), tile=8)(torch.randn(1, 1, 20, 20))


def test_torchscript_is_refused_by_name():
    for model in (torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 3))), nn.Sequential(torch.jit.script(nn.ReLU()))):
        with pytest.raises(UnsupportedError, match=r"(the model|module '0') is a TorchScript module"):
            accelerate(model, tile=8)(torch.zeros(1, 1, 9, 9))


def test_hooks_on_saved_tensors_see_those_of_the_step_alone():
    """`torch.autograd.graph.save_on_cpu` and the like around a forward."""
    torch.manual_seed(0)
    stock, x = Own().double(), torch.randn(2, 1, 21, 18, dtype=torch.float64)
    nets, seen = (stock, accelerate(copy.deepcopy(stock), tile=8)), []
    for net in nets:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            loss = net(x).square().sum()
        loss.backward()
    assert seen and not any(isinstance(t, FakeTensor) for t in seen)
    assert torch.allclose(nets[1].conv.weight.grad, stock.conv.weight.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_around_an_accelerated_network(use_reentrant, live):
    """Running statistics change in both runs, as in stock PyTorch, or are refused where the second one stops early."""
    torch.manual_seed(0)
    stock, x = Own().double().train(), torch.randn(2, 1, 21, 18, dtype=torch.float64, requires_grad=True)
    nets, grads = (stock, accelerate(copy.deepcopy(stock), tile=8)), []
    for net in nets:
        nn.Module.train(net.norm, live)
        if live and not use_reentrant and net is not stock:
            with pytest.raises(UnsupportedError, match="remove the checkpoint"):
                checkpoint(net, x, use_reentrant=False)
            return
        checkpoint(net, x, use_reentrant=use_reentrant).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
        x.grad = None
    for got, wanted in zip(*grads, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-11, atol=1e-12)


class Normalized(nn.Module):
    """Neither the image nor the teacher's weights are kept by stock PyTorch for its backward."""

    def __init__(self):
        super().__init__()
        self.teacher, self.conv = nn.Conv2d(1, 2, 3).requires_grad_(False), nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x / 2 - 1
        return self.conv(x).relu() - self.teacher(x).relu().detach()


def test_what_is_changed_in_place_before_the_backward():
    """Stock goes on: it keeps what was made of both. Tiles are computed again."""
    model, net = pair(Normalized)
    x = image()
    for change in (lambda _net: x.mul_(2), lambda net: net.load_state_dict(net.state_dict())):
        model(x).square().sum().backward()
        out = net(x).square().sum()
        change(net)
        with pytest.raises(GigamorphError, match=r"modified by an inplace operation after the forward.*; change"):
            out.backward()
    assert issubclass(ChangedError, RuntimeError)  # as stock's, where stock raises


class Tanh(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.tanh(*args) if func is Tensor.relu else func(*args, **(kwargs or {}))


class Swapped(Normalized):
    def forward(self, x: Tensor) -> Tensor:
        with Tanh():
            return super().forward(x)


def test_function_modes():
    """Within the forward and around it; a device is a mode, too."""
    model, net = pair(Swapped)
    agree(model, net)
    model, net = pair(Normalized)
    with torch.device("cpu"):
        agree(model, net)
    with Tanh():
        agree(model, net)


class Tags(Normalized):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        (x if self.of_image else out).scale = 2
        return out


@pytest.mark.parametrize("of_image", [True, False])
def test_attributes_of_tensors(of_image):
    """What a forward sets at a tensor is there; what a tensor brings in addition to its values is refused."""
    model, net = pair(Tags)
    model.of_image = net.of_image = of_image
    x, y = image(), image()
    out, wanted = net(x), model(y)
    assert (vars(out), vars(x)) == (vars(wanted), vars(y))
    x = image()
    x.scale = 3
    with pytest.raises(GigamorphError, match="the attribute 'scale'"):
        pair(Normalized)[1](x)


class Meta(Tensor):
    """As MONAI's MetaTensor: what ops give is of this class."""


class Picture(Tensor):
    """As torchvision's tv_tensors: what ops give is a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def test_classes_of_tensors():
    """A result that stock would give as another class is refused; else the class of the image is nobody's concern."""
    model, net = pair(Normalized)
    with pytest.raises(GigamorphError, match=r"is a Meta; .* pass x.as_subclass\(torch.Tensor\)"):
        net(image().as_subclass(Meta))
    for x in (image().as_subclass(Picture), nn.Parameter(image(), requires_grad=False)):
        assert type(model(x)) is type(net(x)) is Tensor
        assert (model(x) - net(x)).abs().max() < 1e-12
