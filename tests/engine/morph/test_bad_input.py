"""What no morph can do exactly is refused: one line, with the module's path, and the network is as it was."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.decompose import decompose, split_parallel
from gigamorph.engine.morph.deepen import insert_identity, insert_residual
from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.head import grow_head
from gigamorph.engine.morph.inputs import to_grey
from gigamorph.engine.morph.kernel_size import grow_kernel
from gigamorph.engine.morph.merge import merge
from gigamorph.engine.morph.planner import plan_growth
from gigamorph.engine.morph.widen import widen

X = torch.zeros(1, 3, 8, 8)


class Call(nn.Module):
    """A function of the map, with modules of its own."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: nn.Module):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Standardised(nn.Conv2d):
    """Weight standardisation, as in NFNets and BiT."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (f(self.weight, (1, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        return F.conv2d(x, (self.weight - mean) / std, self.bias, padding=self.padding)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def net(mixer: nn.Module, stem: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    parts = {"stem": stem or nn.Conv2d(3, 4, 3, padding=1), "mixer": mixer, "act": nn.ReLU(), "last": conv()}
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(4, 2)}
    return nn.Sequential(OrderedDict(parts | head))


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module)


def shuffle(m: Any, x: Tensor) -> Tensor:
    """A unit of ShuffleNetV2."""
    left, right = x.chunk(2, 1)
    x = torch.cat([left, m.conv(right)], 1)
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def write_to_view(_m: Any, x: Tensor) -> Tensor:
    part = x[:, :2]
    part += 1.0
    return x * 2


def tied() -> nn.Module:
    model = net(conv())
    model.last.weight = model.mixer.weight
    return model


Run = Callable[[nn.Module, bool], Any]
CASES: dict[str, tuple[Callable[[], nn.Module], Run, str]] = {}


def case(name: str, make: Callable[[], nn.Module], why: str, **runs: Run) -> None:
    for run, function in runs.items():
        CASES[f"{name}: {run}"] = make, function, why


def at(function: Callable[..., Any], *arguments: Any) -> Run:
    return lambda m, inplace: function(m, X, *arguments, inplace=inplace)


wider = at(widen, {"stem.weight:0": 8})


def mixer(function: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> Callable[[], nn.Module]:
    return lambda: net(Call(function, **parts))


def fixed_view(_m: Any, x: Tensor) -> Tensor:
    return x.view(-1, 4, 64).view(-1, 4, 8, 8)


def and_back(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(m.a(x), m.a.weight.mT, padding=1)


def broken() -> nn.Module:
    made = net(conv())
    made.mixer.weight.data[0, 0, 0, 0] = torch.inf
    return made


local = {"kernel": at(grow_kernel, "mixer", 5), "decompose": at(decompose, "mixer"), "add": at(split_parallel, "mixer")}
stem: dict[str, Run] = {
    "fold": lambda m, inplace: front(m, X, 2, "fold", inplace=inplace),
    "grey": lambda m, inplace: to_grey(m, X[:, :1], inplace=inplace),
}
case("a hard-coded view", mixer(fixed_view), "'view' in module 'mixer'", widen=wider)
case("weight standardisation", lambda: net(Standardised(4, 4, 3, padding=1)), "module 'mixer'", widen=wider, **local)
case("a parametrized weight", lambda: net(parametrizations.weight_norm(conv())), "module 'mixer", widen=wider, **local)
case("spectral norm", lambda: net(parametrizations.spectral_norm(conv())), "module 'mixer", widen=wider, **local)
case("a weight made by a hook", lambda: net(old_weight_norm(conv())), "module 'mixer'", widen=wider, **local)
case("a parametrized stem", lambda: net(conv(), parametrizations.weight_norm(nn.Conv2d(3, 4, 1))), "'stem'", **stem)
case("tied weights", tied, "module 'mixer' shares a weight with 'last'", **local)
case("a weight read elsewhere", mixer(and_back, a=conv()), "'mixer", widen=wider, kernel=at(grow_kernel, "mixer.a", 5))
case("the order of ShuffleNet", mixer(shuffle, conv=nn.Conv2d(2, 2, 1)), "module 'mixer", widen=wider)
case("a write into a view", mixer(write_to_view), "module 'mixer'", widen=wider, merge=lambda m, _: merge(m, X))
case(
    "a smaller width",
    lambda: net(conv()),
    "space stem.weight:0 already has width 4",
    widen=at(widen, {"stem.weight:0": 3}),
)
case("a smaller kernel", lambda: net(conv()), "module 'mixer'", kernel=at(grow_kernel, "mixer", 1))
case("a smaller head", lambda: net(conv()), "module 'fc'", head=at(grow_head, "fc", 1))
case(
    "infinity in a weight",
    broken,
    "mixer.weight' of the network contains NaN",
    widen=wider,
    head=at(grow_head, "fc", 5),
)
case(
    "one kernel for two layers",
    lambda: net(conv()),
    "kernels must be two sizes, one for each layer, e.g. (1, 3), not 3",
    parts=at(decompose, "mixer", 3),
)
case("half a width", lambda: net(conv()), "8.0 is not a width", widen=at(widen, {"stem.weight:0": 8.0}))
case(
    "negative noise",
    lambda: net(conv()),
    "noise must be 0 or positive, relative to the weights' standard deviation, not -1",
    widen=lambda m, i: widen(m, X, factor=2, noise=-1, inplace=i),
)
case(
    "no image",
    lambda: net(conv()),
    "an empty tensor of shape (0, 3, 8, 8)",
    widen=lambda m, i: widen(m, X[:0], factor=2, inplace=i),
)
case("a module that is not there", lambda: net(conv()), "no module 'mixer.a'", deepen=at(insert_identity, "mixer.a"))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_refused_and_untouched(name: str, inplace: bool) -> None:
    make, run, why = CASES[name]
    model = make()
    before, printed = copy.deepcopy(model.state_dict()), repr(model)
    modules, tensors = list(model.modules()), list(model.state_dict(keep_vars=True).values())
    with pytest.raises(MorphError) as caught:
        run(model, inplace)
    text = str(caught.value)
    assert why in text and "\n" not in text
    after = model.state_dict(keep_vars=True)
    assert repr(model) == printed and list(after) == list(before)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(after.values(), tensors, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    model(X)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("run", [wider, lambda m, _: merge(m, X), lambda m, _: plan_growth(m, X)])
def test_what_stands_for_a_network_is_named(run: Run) -> None:
    with pytest.raises(MorphError, match="is compiled; give the network itself"):
        run(torch.compile(net(conv())), False)  # pyright: ignore[reportArgumentType]
    with pytest.raises(MorphError, match="module 'fc' is quantised"):
        run(torch.ao.quantization.quantize_dynamic(net(conv()), {nn.Linear}), False)
    with pytest.raises(MorphError, match="the model is a NoneType"):
        run(None, False)  # pyright: ignore[reportArgumentType]


def test_costs_of_a_forward_that_reads_a_value() -> None:
    model = net(Call(lambda _, x: x * 2 if x.mean().item() > 1e9 else x))
    with pytest.raises(MorphError, match=r"depends on a value of a tensor \(.item"):
        plan_growth(model, X)


def test_a_factor_for_a_network_of_which_nothing_can_grow() -> None:
    model = nn.Sequential(Standardised(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(MorphError, match=r"no space can be widened.*module '0'"):
        widen(model, X, factor=2)


SMALL = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize("insert", [insert_residual, insert_identity])
@pytest.mark.parametrize("path", ["2", "3", "4"])
def test_a_batch_norm_that_would_see_one_value_is_refused(insert: Any, path: str) -> None:
    image = torch.zeros(1, 1, 8, 8)
    with pytest.raises(MorphError, match=f"'{path}' each channel has one value on this example.*norm=False"):
        insert(SMALL, image, path, norm=True)
    insert(SMALL, image, path, norm=False)
    child, _ = insert(SMALL, torch.zeros(2, 1, 8, 8), path, norm=True)
    child.train()(torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize("wanted", [{"factor": 1}, {"counts": {0: 4}}, {"counts": {}}, {"free": {0: 0}}])
def test_a_widening_to_the_present_width_says_so(wanted: Any) -> None:
    with pytest.raises(MorphError, match="every space already has the requested width"):
        widen(SMALL, torch.zeros(1, 1, 8, 8), **wanted)


@pytest.mark.parametrize("seed", [-3, 2**40, 1.5])
@pytest.mark.parametrize(
    "run",
    [
        lambda m, x, seed: widen(m, x, factor=2, seed=seed),
        lambda m, x, seed: insert_residual(m, x, "0", seed=seed),
        lambda m, x, seed: front(m, x, 2, seed=seed),
        lambda m, x, seed: decompose(m, x, "0", (3, 1), seed=seed),
        lambda m, x, seed: split_parallel(m, x, "0", seed=seed),
    ],
)
def test_a_seed_out_of_range_is_one_line(run: Any, seed: Any) -> None:
    with pytest.raises(MorphError, match=f"^seed must be an integer from 0 to 4294967295, not {seed}$"):
        run(SMALL, torch.zeros(1, 1, 8, 8), seed)


@pytest.mark.parametrize("image", ["cpu", "meta"])
@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: widen(m, x, factor=2),
        lambda m, x: merge(m, x),
        lambda m, x: insert_residual(m, x, "0"),
        lambda m, x: front(m, x, 2),
        lambda m, x: grow_head(m, x, "4", 5, "softmax"),
    ],
)
def test_a_network_without_weights_is_one_line(run: Any, image: str) -> None:
    model = copy.deepcopy(SMALL).to("meta")
    with pytest.raises(MorphError, match=r"^'0.weight' is on the meta device and has no values"):
        run(model, torch.zeros(1, 1, 8, 8, device=image))
