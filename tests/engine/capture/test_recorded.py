"""What a forward does besides its ops: gradient modes, state, hooks, attributes, random numbers, results.

Each case runs three training steps and one in evaluation mode, stock and by tiles, with a change in between if it has
one; outputs, gradients (and whether there are any), buffers and what it keeps must agree in float64. What TorchDynamo
refuses in a whole graph must agree in pieces (`fallback="untiled"`).
"""

import copy
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributions import Normal
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from gigamorph import accelerate
from gigamorph.engine.errors import ForwardError, GigamorphError, UnsupportedError

LIMIT = 1e-11


class Base(nn.Module):
    """Two convolutions around `middle`, pooling and a classifier; cases override `middle`, or `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("flat", torch.zeros(8))
        self.register_buffer("crop", torch.zeros(2, 4, 3, 5))
        self.scale, self.seen, self.calls = nn.Parameter(torch.ones(4, 1, 1)), [], 0

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(self.second(self.middle(self.first(x))).relu().mean((2, 3)))


Middle = Callable[[Any, Tensor], Tensor]


def silent_stem(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.norm(x)


@torch.no_grad()
def teacher(net: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, net.scale.reshape(4, 1, 1, 1).expand(4, 1, 3, 3) / 9, padding=1, groups=4)


def switched_off(net: Any, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    mean = x.mean((0, 2, 3), keepdim=True)
    torch.set_grad_enabled(True)
    return x - mean


def written_silently(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(2)
    return x + 1


def weight_clipped(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.scale.clamp_(0.9, 0.99)
    return x * net.scale


def weight_given_as_out(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        torch.mul(net.scale, 0.99, out=net.scale)
    return x * net.scale


def written_in_a_list(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        torch._foreach_mul_([net.mean, net.flat[:4]], 0.9)
        torch._foreach_lerp_([net.mean, net.flat[:4]], [net.scale.flatten(), x.mean((0, 2, 3))], 0.1)
    return x * net.mean[:, None, None] - net.flat[:4, None, None]


def own_statistics(how: str) -> Middle:
    def middle(net: Any, x: Tensor) -> Tensor:
        new = x.mean((0, 2, 3)).detach()
        if how == "assigned":
            net.mean = 0.9 * net.mean + 0.1 * new
        elif how == "data":
            net.mean.data.mul_(0.9).add_(new)
        elif how == "data assigned":
            net.mean.data = net.mean.data * 0.9 + new
        elif how == "data with a gradient":
            net.mean.data.mul_(0.9).add_(x.mean((0, 2, 3)))
        elif how == "detached with a gradient":
            net.mean.detach().mul_(0.9).add_(x.mean((0, 2, 3)))
        elif how == "given as out":
            new = x.mean((0, 2, 3))
            with torch.no_grad():
                torch.add(new, net.head.weight[0], out=net.mean)
                torch.cat([net.mean, net.scale.flatten()], out=net.flat)
        elif how == "view":
            net.flat[:4].lerp_(new, 0.1)
            net.flat.view(2, 4)[1] += 1
        elif how == "flat":
            net.flat.copy_(torch.cat([new, new + net.flat[:4]]))
        elif how == "norm of views":
            F.batch_norm(x, net.flat[:4], net.flat[4:], training=True)
        return x - net.mean[:, None, None]

    return middle


def counted(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return x * (1 + 0.1 * net.calls)


def kept(net: Any, x: Tensor) -> Tensor:
    net.seen.append(x.mean((2, 3)).detach())
    net.loss, net.feature = x.square().mean(), x
    return x


def filled_by_state(net: Any, x: Tensor) -> Tensor:
    """A number out of the network's own state, as detectors fill their strides."""
    first, second = net.flat[1] + 2, net.flat.sum() + 3
    return x * x.new_full((4, 1, 1), first) + torch.full((4, 1, 1), fill_value=second, dtype=x.dtype)


def replaced_list(net: Any, x: Tensor) -> Tensor:
    net.seen = [x.amax((2, 3)), {"size": x.shape, "mean": x.mean()}]
    return x


def averaged(net: Any, x: Tensor) -> Tensor:
    """A plain tensor attribute that is read and replaced."""
    net.average = (
        0.5 * getattr(net, "average", torch.zeros(4, 1, 1, dtype=x.dtype)) + x.mean((0, 2, 3))[:, None, None].detach()
    )
    return x - net.average


def redundancy(net: Any, x: Tensor) -> Tensor:
    """As the loss of Barlow Twins is written."""
    rows = x.mean((2, 3))
    both = rows.T @ rows
    on = torch.diagonal(both).add_(-1).pow_(2).sum()
    return x * (on + both.pow(2).sum())


def norm_in_reverse(net: Any, x: Tensor) -> Tensor:
    features = [x, x.relu(), x * x.mean((2, 3), keepdim=True).sigmoid()]
    return sum(net.norm(feature) for feature in reversed(features))


def norm_unused(net: Any, x: Tensor) -> Tensor:
    net.norm(x)
    return x


def ghost_norm(net: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    both = net.flat.repeat(n)
    mean, var = both[: n * c].clone(), both[: n * c].clone()
    y = F.batch_norm(x.reshape(1, n * c, h, w), mean, var, training=True).reshape(x.shape)
    net.mean.copy_(mean.view(n, c).mean(0))
    return y


def drawn(net: Any, x: Tensor) -> Tensor:
    noise = torch.randn(4, 1, 1, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    return x + noise


def asks_for_grad(net: Any, x: Tensor) -> Tensor:
    return x * 2 if torch.is_grad_enabled() and x.requires_grad else x - 1


def asks_for_type(net: Any, x: Tensor) -> Tensor:
    return x + 1 if type(x) is torch.Tensor else x * 0


def own_momentum(net: Any, x: Tensor) -> Tensor:
    return net.norm(x) * (1 + net.norm.num_batches_tracked.item() / 10)


def shapes(net: Any, x: Tensor) -> Tensor:
    x = x * x.new((3, 2, 1, 5))[:, None, None] + x.new([0.5])
    return (
        x
        + x.new(x.shape).fill_(2)
        + x.new(2).fill_(1).sum()
        + torch.from_numpy(torch.arange(4.0).double().numpy())[:, None, None]
    )


@functools.lru_cache
def _table(count: int) -> Tensor:
    return torch.arange(float(count), dtype=torch.float64)[:, None, None]


def by_a_mask(net: Any, x: Tensor) -> Tensor:
    own = net.mean + torch.arange(4) > 1
    gate = x.mean((2, 3))[..., torch.tensor([True, False, False, False])]
    return torch.cat([x[:, own], x[:, ~own]], 1) * gate[:, :, None, None]


def into_a_mask(net: Any, x: Tensor) -> Tensor:
    own = net.mean + torch.arange(4) > 1
    x = x * 2
    x[:, own] *= net.scale[own]
    x[:, ~own] = x[:, own][:, :1] - 1
    x[:, net.mean.argmax()] += 3
    net.mean[net.mean > 5] = 0
    return x


@functools.lru_cache
def _columns(height: int, width: int) -> Tensor:
    return torch.linspace(-1, 1, width, dtype=torch.float64).expand(1, 1, height, width).contiguous()


def sized_by_the_class(net: Any, x: Tensor) -> Tensor:
    return x * torch.Tensor(torch.Size([1, 1])).fill_(0.5)


def cached(net: Any, x: Tensor) -> Tensor:
    return x + _table(x.shape[1])


def cached_and_written(net: Any, x: Tensor) -> Tensor:
    table = _table(x.shape[1])
    table += 1
    return x * table


def cached_by_size(net: Any, x: Tensor) -> Tensor:
    return x * _columns(*x.shape[2:])


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@torch.jit.script
def scripted(x: Tensor, power: float = 2.0) -> Tensor:
    if x.dim() == 4:
        x = swish(x)
    return x.abs().pow(power)


def made_by_class(net: Any, x: Tensor) -> Tensor:
    hue = torch.Tensor(x.shape[0], *x.shape[2:]).to(x.device).to(x.dtype)
    hue[x[:, 0] > 0] = 0.5
    hue[x[:, 0] <= 0] = 2
    return x * hue[:, None] * (torch.Tensor([0.25]).type_as(x) + torch.Tensor().numel())


def variables(net: Any, x: Tensor) -> Tensor:
    return x + Variable(net.crop).sum() * Variable(x, requires_grad=False) * Variable(net.scale)


def distributions(net: Any, x: Tensor) -> Tensor:
    """They broadcast what they are given, of which some comes back as it is, and look at it."""
    noise = Normal(x.mean((2, 3), keepdim=True), 1.0).rsample() + Normal(0.5, net.scale.exp()).rsample()
    first, second = torch.broadcast_tensors(net.mean, net.mean)
    return x * noise + float((first + second).sum())


MIDDLES: dict[str, Middle] = {
    "checkpointed": lambda net, x: checkpoint(lambda y: net.scale * y.tanh(), x, use_reentrant=False),
    "checkpointed, reentrant": lambda net, x: checkpoint(torch.tanh, x, use_reentrant=True) * net.scale,
    "distributions": distributions,
    "a scripted function": lambda net, x: scripted(x, power=1.5) + x * scripted(x.mean((2, 3), keepdim=True)),
    "tensors made by their class": made_by_class,
    "channels by a mask": by_a_mask,
    "an index of its own": lambda net, x: x[:, : (net.mean < 9).sum()] * net.scale[net.mean.argmax()],
    "no_grad around a norm": silent_stem,
    "what the backward reads, on the host": lambda net, x: _packed(torch.autograd.graph.save_on_cpu(), x) * x,
    "a buffer that takes a crop": lambda net, x: (net.crop.copy_(x[:, :, 2:5, 4:9].detach()), x)[1],
    "decorated": lambda net, x: x + teacher(net, x),
    "switched": switched_off,
    "a gate without gradients": lambda net, x: x * x.mean((2, 3), keepdim=True).detach().sigmoid(),
    "written without gradients": written_silently,
    "a weight that is clipped": weight_clipped,
    "a weight that is given as out": weight_given_as_out,
    "buffers that are written in a list": written_in_a_list,
    "a parameter behind detach alone": lambda net, x: x * net.scale.detach(),
    "branch on gradients": asks_for_grad,
    "the type of a tensor": asks_for_type,
    **{
        f"statistics, {how}": own_statistics(how)
        for how in (
            *("assigned", "data", "data assigned", "data with a gradient", "detached with a gradient"),
            *("given as out", "view", "flat", "norm of views"),
        )
    },
    "a counter": counted,
    "filled by state": filled_by_state,
    "losses and features": kept,
    "a list that is replaced": replaced_list,
    "a plain tensor that is replaced": averaged,
    "a diagonal that is written": redundancy,
    "one norm in reverse order": norm_in_reverse,
    "a norm that nobody reads": norm_unused,
    "a norm that views the batch": ghost_norm,
    "a generator of its own": drawn,
    "an item of a buffer": own_momentum,
    "new and from_numpy": shapes,
    "a cached table": cached,
    "a cached table that is written to": cached_and_written,
    "a cached table by size": cached_by_size,
    "channels written through a view": lambda net, x: _write(x * 1),
    "complex numbers": lambda net, x: torch.view_as_real(torch.complex(x, x.flip(1)).exp()).sum(-1),
    "Variable": variables,
    "a copy of a buffer": lambda net, x: x + copy.deepcopy(net.mean).add_(1)[:, None, None],
    "einsum of channels": lambda net, x: torch.einsum("nchw,oc->nohw", x, net.head.weight.repeat(2, 1)),
}


def _write(x: Tensor) -> Tensor:
    y = x[:, 1:3]
    y.mul_(3)
    x[:, 0] = y[:, 1]
    return x + y.sum(1, keepdim=True)


def network(middle: Middle, seed: int = 0) -> Base:
    torch.manual_seed(seed)
    return type("Net", (Base,), {"middle": middle})().double()


def plain(thing: Any) -> Any:
    """Attributes with tensors as lists and modules left out."""
    if isinstance(thing, Tensor):
        return thing
    if isinstance(thing, dict):
        return {k: plain(v) for k, v in thing.items()}
    if isinstance(thing, (list, tuple)) and not isinstance(thing, torch.Size):
        return [plain(v) for v in thing]
    return thing


def steps(net: Any, network: Any, change: Callable[[Any], None] | None = None) -> list[dict[str, Any]]:
    found = []
    optimizer = torch.optim.SGD(net.parameters(), 1e-2, weight_decay=1e-2)
    for number in range(4):
        if number == 2 and change is not None:
            change(network)
        if number == 3:
            network.eval()
        torch.manual_seed(number)
        x = torch.randn(2, 1, 23, 18, dtype=torch.float64)
        optimizer.zero_grad()
        out = net(x)
        leaves = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        terms = [
            (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape)).sum()
            for t in leaves
            if t.requires_grad
        ]
        if terms:
            sum(terms).backward()
        optimizer.step()
        kept = {k: plain(v) for k, v in vars(network).items() if not k.startswith("_")}
        found.append(
            {
                "out": leaves,
                "grads": {n: p.grad for n, p in network.named_parameters()},
                "image": x,
                "wants": [t.requires_grad for t in leaves],
                "buffers": dict(network.named_buffers()),
                "kept": kept,
            }
        )
        found[-1] = copy.deepcopy({k: _detached(v) for k, v in found[-1].items()})
    return found


def _detached(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {k: _detached(v) for k, v in tree.items() if not callable(v)}
    return [_detached(v) for v in tree] if isinstance(tree, list) else tree


def same(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert a.shape == b.shape and a.dtype == b.dtype, where
        assert (a - b).abs().max() <= LIMIT * b.abs().max().clamp_min(1) if a.numel() else True, where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for n, (p, q) in enumerate(zip(a, b, strict=True)):
            same(p, q, f"{where}[{n}]")
    else:
        assert a == b, where


def agree(stock: Base, change: Callable[[Any], None] | None = None, **options: Any) -> None:
    twin = copy.deepcopy(stock)
    _table.cache_clear()
    wanted = steps(stock, stock, change)
    _table.cache_clear()
    got = steps(accelerate(twin, tile=(7, 10), **options), twin, change)
    _table.cache_clear()
    same(got, wanted)


# TorchDynamo refuses these in a whole graph.
IN_PIECES = {
    *("channels by a mask", "an index of its own", "a copy of a buffer"),
    *("what the backward reads, on the host", "a generator of its own", "Variable"),
}


def refused(net: nn.Module, match: str = r"test_recorded.py:\d+|the network's forward cannot be recorded") -> None:
    """By default, with nothing changed: stock runs as before."""
    before, x = copy.deepcopy(net), torch.randn(1, 1, 16, 16, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=match) as caught:
        accelerate(net, tile=8)(x)
    assert "\n" not in str(caught.value)
    torch.manual_seed(1)
    got = net(x)
    torch.manual_seed(1)
    assert torch.equal(got, before(x))


@pytest.mark.parametrize("name", MIDDLES)
def test_the_same_as_stock(name):
    stock = network(MIDDLES[name])
    if name in IN_PIECES:
        refused(copy.deepcopy(stock))
    agree(stock, fallback="untiled" if name in IN_PIECES or name == "complex numbers" else None)


# -- a stale recording ----------------------------------------------------------------------------------------------


def with_options(net: Any, x: Tensor) -> Tensor:
    return (
        F.dropout(net.norm(x), getattr(net, "p", 0.0)) * getattr(net, "temperature", 1.0)
        + net.table * SETTING["x"]
        + net.table
    )


SETTING = {"x": 1.0}


def other_forward(net: Any) -> None:
    net.first.forward = lambda x: F.conv2d(x, net.first.weight * 2, None, padding=1)


def other_class(net: Any) -> None:
    class Mine(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    net.first.__class__ = Mine


CHANGES: dict[str, Callable[[Any], Any]] = {
    "momentum": lambda net: setattr(net.norm, "momentum", 0.5),
    "eps": lambda net: setattr(net.norm, "eps", 0.1),
    "stride": lambda net: setattr(net.second, "stride", (1, 1)),
    "dilation": lambda net: setattr(net.second, "dilation", (2, 2)),
    "temperature": lambda net: setattr(net, "temperature", 3.0),
    "plain tensor": lambda net: setattr(net, "table", torch.ones(4, 1, 1, dtype=torch.float64) * 5),
    "plain tensor in place": lambda net: net.table.add_(1),
    "plain tensor of another shape": lambda net: setattr(net.table, "data", torch.linspace(0, 1, 18).double()),
    "forward": other_forward,
    "class": other_class,
    "module": lambda net: setattr(net, "first", copy.deepcopy(net.first)),
    "hook": lambda net: net.first.register_forward_hook(lambda m, a, y: y * 2),
    "setting of the file": lambda net: SETTING.update(x=4.0),
    "frozen": lambda net: net.second.requires_grad_(False),
    "norm in evaluation mode": lambda net: net.norm.eval(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(name):
    stock = network(with_options)
    stock.table = torch.ones(4, 1, 1, dtype=torch.float64)

    def change(net: Any) -> None:
        CHANGES[name](net)

    try:
        twin = copy.deepcopy(stock)
        wanted = steps(stock, stock, change)
        SETTING["x"] = 1.0
        same(steps(accelerate(twin, tile=9), twin, change), wanted)
    finally:
        SETTING["x"] = 1.0


def test_a_function_of_pytorch_that_is_replaced(monkeypatch):
    stock = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()).double()
    fast, x = accelerate(stock, tile=8), torch.randn(1, 1, 18, 21, dtype=torch.float64)
    before = fast(x)
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: torch.tanh(x))
    assert not torch.allclose(before, stock(x))
    same(fast(x).detach(), stock(x).detach())


@pytest.mark.parametrize("fallback", [None, "untiled"])
def test_a_function_in_the_place_of_the_one_that_it_calls(monkeypatch, fallback):
    """PyTorch hands on what is at the place of its function, so that the other one would act twice."""
    own, net = F.interpolate, nn.Sequential(nn.Conv2d(1, 2, 3), nn.Upsample(scale_factor=2)).double()
    monkeypatch.setattr(F, "interpolate", lambda x, *args, **kwargs: own(x, *args, **kwargs) * 2)
    with pytest.raises(UnsupportedError, match=r"'interpolate', but torch\.nn\.functional has another function"):
        accelerate(net, tile=8, fallback=fallback)(torch.randn(1, 1, 18, 21, dtype=torch.float64))


def of_one_norm(net: Any, x: Tensor, first: bool, second: bool) -> Tensor:
    """One norm's statistics twice, each time of the batch or running."""
    for live in (first, second):
        x = F.batch_norm(x, net.norm.running_mean, net.norm.running_var, training=live)
    return x


@pytest.mark.parametrize("way", ["two", "through a view", "without a gradient", "frozen last"])
def test_one_norm_in_two_modes(way):
    """Refused where PyTorch's gradient takes statistics that were updated after the call that they are of."""
    middles: dict[str, Middle] = {
        "two": lambda net, x: of_one_norm(net, x, False, True),
        "through a view": lambda net, x: of_one_norm(net, x * net.norm.running_var.reshape(4, 1, 1), True, True),
        "without a gradient": lambda net, x: of_one_norm(net, x, True, True) * (1 + silent_stem(net, x).mean()),
        "frozen last": lambda net, x: of_one_norm(net, x, True, False),
    }
    torch.manual_seed(0)
    stock = type("Case", (Base,), {"middle": middles[way]})().double()
    twin, x = copy.deepcopy(stock), torch.randn(2, 1, 22, 26, dtype=torch.float64)
    net = accelerate(twin, tile=9)
    if way in ("two", "through a view"):
        with pytest.raises(UnsupportedError, match="updates running statistics that"):
            net(x)
        return
    for called in (stock, net):
        called(x).sum().backward()
    for one, other in zip(stock.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=LIMIT, atol=LIMIT)
    for one, other in zip(stock.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(one, other, rtol=LIMIT, atol=LIMIT)


class Tied(nn.Module):
    """One weight and one running mean under two names each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)
        self.norm, self.other = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        self.double()
        self.tie()

    def tie(self) -> None:
        self.second.weight, self.other.running_mean = self.first.weight, self.norm.running_mean

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(self.norm(self.first(x)).relu())).mean((2, 3))


def cut(net: Any) -> None:
    net.second.weight = nn.Parameter(net.second.weight.detach().clone())
    net.other.running_mean = net.norm.running_mean.clone()


@pytest.mark.parametrize("way", ["assigned", "cut", "tied"])
def test_ties_of_parameters_and_buffers(way):
    """Cut or made between steps: each name has its gradient, and each buffer its update."""
    torch.manual_seed(0)
    stock = Tied()
    if way == "tied":
        cut(stock)
    elif way == "assigned":  # buffers would share memory, which is refused
        stock.other.running_mean = stock.norm.running_mean.clone()
    twin, x = copy.deepcopy(stock), torch.randn(2, 2, 22, 26, dtype=torch.float64)
    net = accelerate(twin, tile=9)
    for number in range(2):
        for called, own in ((stock, stock), (net, twin)):
            if number:
                own.zero_grad()
                if way == "assigned":
                    called.load_state_dict(called.state_dict(), assign=True)
                else:
                    (cut if way == "cut" else Tied.tie)(own)
            (called(x) ** 2).sum().backward()
        named = (
            dict(stock.named_parameters(remove_duplicate=False)),
            dict(twin.named_parameters(remove_duplicate=False)),
        )
        for key, parameter in named[0].items():
            assert torch.allclose(parameter.grad, named[1][key].grad, rtol=LIMIT, atol=LIMIT), key
        for key, buffer in stock.state_dict().items():
            assert torch.allclose(buffer, twin.state_dict()[key], rtol=LIMIT, atol=LIMIT), key


def test_nothing_is_recorded_again_without_a_change(graphs):
    net = accelerate(network(with_options), tile=9)
    net.table = torch.ones(4, 1, 1, dtype=torch.float64)
    x = torch.randn(2, 1, 23, 18, dtype=torch.float64)
    for _ in range(3):
        net(x).sum().backward()
        net.norm.momentum = 0.1  # another object of the same value
    assert len(graphs) == 1


# -- results --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    logits: Tensor
    maps: list[Tensor]
    size: Any = None


class Named(dict):
    """A mapping of one's own."""


@pytest.mark.parametrize(
    "make",
    [
        lambda y, m: Result(y, [m], m.shape),
        lambda y, m: types.SimpleNamespace(logits=y, maps=(m, None)),
        lambda y, m: Named(logits=y, more=Named(m=m)),
        lambda y, m: [y, {"m": m.detach()}, "text", 3],
    ],
)
def test_containers(make):
    class Net(Base):
        def forward(self, x: Tensor) -> Any:
            m = self.second(self.first(x))
            return make(self.head(m.mean((2, 3))), m)

    torch.manual_seed(0)
    stock = Net().double()
    x = torch.randn(1, 1, 20, 17, dtype=torch.float64)
    fallback = "untiled" if isinstance(stock(x), types.SimpleNamespace) else None
    got, wanted = accelerate(copy.deepcopy(stock), tile=8, fallback=fallback)(x), stock(x)

    def compare(a: Any, b: Any) -> None:
        assert type(a) is type(b)
        if isinstance(b, Tensor):
            assert torch.allclose(a, b, atol=1e-12) and a.requires_grad == b.requires_grad and type(a) is Tensor
        elif isinstance(b, dict):
            assert list(a) == list(b)
            [compare(a[k], b[k]) for k in b]
        elif isinstance(b, (list, tuple)):
            [compare(p, q) for p, q in zip(a, b, strict=True)]
        elif hasattr(b, "__dict__"):
            compare(vars(a), vars(b))
        else:
            assert a == b

    compare(got, wanted)


# -- arguments ------------------------------------------------------------------------------------------------------


class Siamese(nn.Module):
    """Two images through one encoder, a mask and metadata; contrastive distance and a map."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.fc = nn.Linear(3, 4)

    def forward(self, a: Tensor, b: Tensor, *, mask: Tensor | None = None, meta: Tensor | None = None, power: int = 2):
        x, y = self.encoder(a), self.encoder(b if mask is None else b * mask)
        u, v = x.mean((2, 3)), y.mean((2, 3))
        if meta is not None:
            v = v + self.fc(meta)
        return (u - v).abs().pow(power).sum(1), x - y


@pytest.mark.parametrize("extra", [{}, {"power": 3}, {"mask": True}, {"mask": True, "meta": True}])
def test_siamese(extra):
    torch.manual_seed(0)
    stock = Siamese().double()
    nets = accelerate(copy.deepcopy(stock), tile=9), stock
    a, b = (torch.randn(2, 1, 25, 22, dtype=torch.float64) for _ in range(2))
    given = dict(extra)
    if "mask" in given:
        given["mask"] = (torch.rand(2, 1, 25, 22) > 0.3).double()
    if "meta" in given:
        given["meta"] = torch.randn(2, 3, dtype=torch.float64)
    for _ in range(2):
        results = []
        for net in nets:
            pair = [t.clone().requires_grad_() for t in (a, b)]
            distance, change = net(pair[0], b=pair[1], **given)
            # Contrastive (Hadsell et al., 2006): one pair belongs together, the other does not.
            loss = distance[0].square() + F.relu(1 - distance[1]).square() + change.square().mean()
            net.zero_grad()
            loss.backward()
            results.append([loss, *(t.grad for t in pair), *(p.grad for p in net.parameters()), *net.buffers()])
        for got, wanted in zip(*results, strict=True):
            assert (got is None) == (wanted is None)
            assert got is None or torch.allclose(got, wanted, rtol=1e-11, atol=1e-12)


def test_the_image_may_be_changed_in_place():
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            x.sub_(0.5)
            x[:, :, :3] = 0
            return super().forward(x)

    stock = network(Base.middle)
    stock.__class__ = Net
    agree(stock)


# -- the process ----------------------------------------------------------------------------------------------------


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


def test_custom_functions_are_exact():
    """On vectors, and on maps if they are arithmetic on each element (test_custom.py)."""

    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            return Custom.apply(super().forward(x))

    torch.manual_seed(0)
    agree(Net().double())
    agree(network(lambda net, x: Custom.apply(x)))


@pytest.mark.parametrize("fallback", [None, "untiled"])
def test_an_error_of_the_forward_changes_nothing(fallback):
    """Hooks keep a feature and raise, and the caller catches: it is the forward's own error, with the line."""

    def middle(net: Any, x: Tensor) -> Tensor:
        net.calls += 1
        net.seen.append(x)
        net.norm(x)
        raise KeyError("seen enough")

    stock, x = network(middle), torch.randn(1, 1, 16, 16, dtype=torch.float64)
    buffers, state = copy.deepcopy(dict(stock.named_buffers())), torch.get_rng_state()
    with pytest.raises(KeyError, match="seen enough") as caught:
        accelerate(stock, tile=8, fallback=fallback)(x)
    assert "\n" not in str(caught.value) and torch.equal(torch.get_rng_state(), state)
    if fallback is None:
        assert isinstance(caught.value, ForwardError) and "test_recorded.py" in str(caught.value)
        assert stock.calls == 0 and stock.seen == []
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in stock.named_buffers())


# TorchDynamo refuses these in a whole graph, or the recorder does; in pieces the first ones are exact.
REFUSED_IN_ONE_GRAPH: dict[str, Middle] = {
    "a list in a hook": lambda net, x: _into_a_list(x),
    "seeded": lambda net, x: (torch.manual_seed(0), x)[1],
    "forked": lambda net, x: (_fork(), x)[1],
    "an item of the image": lambda net, x: x * x.mean().item(),
    "an item of the image that was broadcast": lambda net, x: (
        x * torch.broadcast_tensors(x.mean((2, 3)), net.scale[0])[0].sum().item()
    ),
    "sparse, a list of indices": lambda net, x: (
        x * torch.sparse_coo_tensor(torch.tensor([[0, 1, 2, 3]]), x.mean((0, 2, 3))).to_dense().sum()
    ),
    "copied as an object": lambda net, x: x * copy.copy(net.mean)[:, None, None],
    "where a tensor lies": lambda net, x: x * 2 if net.scale.data_ptr() == net.mean.data_ptr() else x,
    "how often a tensor was written to": lambda net, x: x * 2 if net.mean._version > 99 else x,
    "a shape that is caught": lambda net, x: x * _caught(lambda x: len(x.nonzero()), x),
    "a seed that is caught": lambda net, x: x * _caught(lambda x: torch.manual_seed(0), x),
}
REFUSED: dict[str, tuple[Middle, str]] = {
    "into channels by a mask": (into_a_mask, r"test_recorded.py:\d+"),
    "a kept handle": (lambda net, x: (net.seen.append(x.register_hook(lambda g: g)), x)[1], "cannot be recorded"),
    "a gradient inside": (lambda net, x: x * torch.autograd.grad(x.sum(), x)[0], r"test_recorded.py:\d+"),
    "checkpointed statistics": (
        lambda net, x: checkpoint(net.norm, x, use_reentrant=False),
        "which the backward would change again",
    ),
    "gradients that stay off": (
        lambda net, x: (torch.set_grad_enabled(False), x)[1],
        r"changes the gradient mode and does not restore it \(in .*\); use a with block",
    ),
    "checkpointed without a gradient": (
        lambda net, x: checkpoint(lambda y: net.scale * y.tanh(), x.detach(), use_reentrant=True),
        "pass use_reentrant=False",
    ),
    "vmap": (lambda net, x: torch.vmap(lambda row: row * 2)(x), "torch.func"),
    "a branch for the compiler": (
        lambda net, x: torch.cond(x.sum() > 0, lambda a: a * 2, lambda a: a * 3, (x,)),
        "'cond', which has no rule",
    ),
    "a number of memory without values": (
        lambda net, x: x * float(torch.add(net.mean, 1, out=torch.empty(4, dtype=x.dtype)).sum()),
        r"uninitialised memory \('item'\); use torch.zeros",
    ),
    "numbers of tensors, by the class": (
        lambda net, x: x * torch.Tensor([net.mean[0], 2])[:1],
        "data is not allocated",
    ),
    **({"a size by the class": (sized_by_the_class, "expected|broadcast|rule")} if torch.__version__ < "2.15" else {}),
    "old constructors": (lambda net, x: x * len(torch.FloatTensor(2, 3)), "use plain PyTorch"),
}
EXACT: dict[str, Middle] = {
    "a hook on a parameter": lambda net, x: (net.scale.register_hook(lambda g: g * 2), x * net.scale)[1],
    "a new layer": lambda net, x: (setattr(net, "made", nn.ReLU()), net.made(x))[1],
    "a gradient of before": lambda net, x: x if net.scale.grad is None else x * 2,
    "numbers of tensors": lambda net, x: x * torch.tensor([net.mean[0], 2.0, 3, 4])[:, None, None],
    "an item that is caught": lambda net, x: x * _caught(lambda x: x.mean().item(), x),
    "an array that is caught": lambda net, x: x * _caught(lambda x: x.detach().numpy().sum(), x),
    "another error that is caught": lambda net, x: x * _caught(_as_another_error, x),
}


def _into_a_list(x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    x.register_hook(lambda grad: seen.append(grad))
    return x


def _packed(hooks: Any, x: Tensor) -> Tensor:
    with hooks:
        return x.sigmoid()


def _in_float16() -> Tensor:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        return torch.full((1,), 0.3)
    finally:
        torch.set_default_dtype(before)


def _fork() -> None:
    with torch.random.fork_rng():
        torch.rand(1)


def _caught(call: Callable[[Tensor], Any], x: Tensor) -> float:
    try:
        call(x)
    except Exception:
        return 2.0
    return 1.0


def _as_another_error(x: Tensor) -> None:
    try:
        float(x.sum())
    except Exception as error:
        raise ValueError("the image is empty") from error


def test_a_mask_that_is_too_short_is_refused():
    """Its positions would do; in stock it is an error."""
    with pytest.raises(IndexError, match="shape of the mask"):
        accelerate(network(lambda net, x: x[:, net.mean[:3] > -9]), tile=8)(torch.randn(1, 1, 16, 16).double())


def test_another_default_dtype():
    refused(network(lambda net, x: x + _in_float16()))


def test_a_profiler_with_stacks_may_look_on():
    """It reads the gradients of each module that is called."""
    stock, x = network(lambda net, x: x * net.scale), torch.randn(1, 1, 16, 16, dtype=torch.float64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True):
        fast = accelerate(stock, tile=8)(x)
    torch.testing.assert_close(fast, stock(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED_IN_ONE_GRAPH)
def test_refused_in_one_graph(name):
    refused(network(REFUSED_IN_ONE_GRAPH[name]))
    agree(network(REFUSED_IN_ONE_GRAPH[name]), fallback="untiled")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    middle, match = REFUSED[name]
    stock = network(middle)
    with pytest.raises(GigamorphError, match=match) as caught:
        accelerate(stock, tile=8)(torch.randn(1, 1, 16, 16, dtype=torch.float64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    agree(network(EXACT[name]))
