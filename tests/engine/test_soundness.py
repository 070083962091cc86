"""Random modules are exact or refused; and the judge of them finds what is planted.

GIGAMORPH_MODULES=20000 for more modules than in a usual run; `benchmarks/soundness.py` shrinks and groups them.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from judge import BAD, judge, shrink
from random_modules import Spec, Visit, draw, draw_foreign, foreign_names
from random_modules.play import inputs
from random_modules.spec import Part, smaller
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gigamorph import GigamorphError

MODULES = int(os.environ.get("GIGAMORPH_MODULES", "10"))
CHUNK = 5
PLANTED = Spec(
    seed=3,
    pieces=(Part("ConvNormRelu", 1), Part("Counter", 3), Part("Gate")),
    heads=(Part("vector"), Part("map")),
    container="tuple",
    visits=(Visit(), Visit(grad="inference_mode", mode="eval"), Visit(mode="train")),
)
EVAL = Spec(seed=4, heads=(Part("vector"),), visits=(Visit(grad="no_grad"),))


@pytest.mark.parametrize("first", range(0, MODULES, CHUNK))
def test_modules_are_exact_or_refused(first: int) -> None:
    verdicts = {seed: judge(draw(seed)) for seed in range(first, min(first + CHUNK, MODULES))}
    bad = [f"seed {seed}: {v.kind}: {v.reason}" for seed, v in verdicts.items() if v.kind in BAD]
    assert not bad, "\n".join(bad)
    assert Counter(v.kind for v in verdicts.values())["exact"] > 0


def stock(net: nn.Module, _tile: tuple[int, int]) -> nn.Module:
    return net


def test_stock_is_judged_exact() -> None:
    kinds = Counter(judge(draw(seed), stock).kind for seed in range(32))
    assert set(kinds) <= {"exact", "stock fails"} and kinds["exact"] >= 24


def test_stock_is_judged_exact_on_foreign_pieces() -> None:
    names = random.Random(1).sample(foreign_names(), 48)
    verdicts = {name: judge(draw_foreign(name, 0), stock) for name in names}
    assert {name: v for name, v in verdicts.items() if v.kind != "exact"} == {}


def test_a_seed_is_always_the_same_module() -> None:
    for seed in range(20):
        assert draw(seed) == draw(seed)
        first, second = (draw(seed).build().state_dict() for _ in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first if isinstance(first[k], Tensor))


def test_the_rounding_of_a_gradient_that_is_zero_is_noise() -> None:
    """A bias in front of a live norm: stock gives 3.6e-14 where the gradient is 0, tiles give 1.3e-15."""
    train = Visit(changes=(Part("weights_in_place", 912),), mode="train", size=(15, 12), image="plain", loss="last")
    spec = Spec(
        seed=716116,
        channels=1,
        pieces=(
            Part("Up", 198),
            Part("Helper", 866),
            Part("Bottleneck", 292),
            Part("Teacher", 203),
            Part("GhostNorm", 662),
        ),
        heads=(Part("map", 624), Part("vector", 505)),
        container="named tuple",
        fitted=(Part("eval_part", 807),),
        tile=(7, 4),
        visits=(Visit(mode="eval", grad="no_grad", size=(15, 12), image="plain"), train),
    )
    assert judge(spec).kind == "exact"


def test_noise_is_of_the_last_bits() -> None:
    spec, visit = PLANTED, Visit()
    image, other = (inputs(spec, visit, 0, bits)["image"] for bits in (0, 1))
    share = ((other - image) / image).abs().max().item()
    assert 0 < share < 5e-15 and torch.equal(image, inputs(spec, visit, 0)["image"])


def planted(change: Callable[..., Any]) -> Callable[[nn.Module, tuple[int, int]], nn.Module]:
    """Makes networks whose forward's result goes through `change(network, result, image)`."""

    def make(net: nn.Module, _tile: tuple[int, int]) -> nn.Module:
        class Faulty(type(net)):
            def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
                result = super().forward(image, *args, **kwargs)
                return change(self, result, image)

        Faulty.__name__ = type(net).__name__
        net.__class__ = Faulty
        return net

    return make


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * (1 + 1e-8)


def _put(name: str, value: Any) -> Callable[..., Any]:
    def change(net: nn.Module, result: Any, image: Tensor) -> Any:
        module = net.get_submodule(name.rpartition(".")[0])
        setattr(module, name.rpartition(".")[2], value(module) if callable(value) else value)
        return result

    return change


def _no_gradient_is_zero(net: nn.Module, result: Any, image: Tensor) -> Any:
    net.extra.grad = torch.zeros_like(net.extra)
    return result


def _ordinary(net: nn.Module, result: Any, image: Tensor) -> Any:
    if not torch.is_inference_mode_enabled():
        return result
    with torch.inference_mode(False), torch.no_grad():
        return result[0].clone(), result[1]


def _fake(net: nn.Module, result: Any, image: Tensor) -> Any:
    with FakeTensorMode():
        net.pieces[1].left = torch.empty(3)
    return result


def _image(net: nn.Module, result: Any, image: Tensor) -> Any:
    image.data[0, 0, 0, 0] += 1
    return result


def _draws(net: nn.Module, result: Any, image: Tensor) -> Any:
    random.random()
    return result


def _state(net: nn.Module, result: Any, image: Tensor) -> Any:
    net.pieces[0].norm.running_mean.data += 1e-6
    return result


def _refuses_late(net: nn.Module, result: Any, image: Tensor) -> Any:
    raise GigamorphError("the model does something; do something else")


def _scaled(result: Any) -> Any:
    return tuple(one * 1.5 for one in result) if isinstance(result, tuple) else result * 1.5


def _stops(net: nn.Module, result: Any, image: Tensor) -> Any:
    raise KeyError("x")


FAULTS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "values": (lambda net, result, image: (result[0] * (1 + 1e-8), result[1]), "wrong", "differs by"),
    "gradient": (lambda net, result, image: (Scaled.apply(result[0]), result[1]), "wrong", "gradient"),
    "container": (lambda net, result, image: list(result), "wrong", "list"),
    "detached": (lambda net, result, image: (result[0].detach(), result[1]), "wrong", r"instead of \(.Tensor"),
    "dtype": (lambda net, result, image: (result[0].float(), result[1]), "wrong", "float32"),
    "no inference tensor": (_ordinary, "wrong", "output"),
    "fake": (_fake, "wrong", "FakeTensor"),
    "buffer": (_state, "wrong", "running_mean"),
    "attribute": (_put("pieces.1.calls", 77), "wrong", "pieces.1.calls"),
    "another attribute": (_put("pieces.1.left", 1), "wrong", "pieces.1.left"),
    "mode": (_put("pieces.0.norm.training", False), "wrong", "pieces.0.norm.training"),
    "image": (_image, "wrong", "input image"),
    "random numbers": (_draws, "wrong", "random numbers"),
    "traceback": (_stops, "traceback", "KeyError"),
    "refusal with changed state": (_refuses_late, "wrong", "after the refusal"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    change, kind, reason = FAULTS[fault]
    spec = Spec(**{**vars(PLANTED), "visits": (Visit(image="plain"), *PLANTED.visits[1:])})
    assert judge(spec, stock).kind == "exact"
    found = judge(spec, planted(change))
    assert found.kind == kind and re.search(reason, found.reason), found


def test_a_zero_gradient_is_not_none() -> None:
    def make(net: nn.Module, _tile: tuple[int, int]) -> nn.Module:
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        net.zero_grad = lambda set_to_none=True: None
        return net

    found = judge(Spec(seed=5, pieces=(Part("DetachedParameter"),)), make)
    assert found.kind == "wrong" and "gradient of parameter pieces.0.scale" in found.reason


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("the model does this; do that", "refused"),
        ("the model does this", "unclear"),
        ("no; not this", "unclear"),
        ("the model\ndoes this; do that", "unclear"),
    ],
)
def test_refusals_name_place_and_remedy(message: str, kind: str) -> None:
    class Refuses(nn.Module):
        def __init__(self, net: nn.Module):
            super().__init__()
            self.__dict__["_network"] = net
            for name in ("_parameters", "_buffers", "_modules"):
                self.__dict__[name] = net.__dict__[name]

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise GigamorphError(message)

    assert judge(PLANTED, lambda net, tile: Refuses(net)).kind == kind


def test_what_runs_where_stock_fails_is_told() -> None:
    spec = Spec(seed=6, roots=("ChangesImage",), visits=(Visit(),))

    def make(net: nn.Module, _tile: tuple[int, int]) -> nn.Module:
        net.__class__ = type(net).__mro__[2]
        return net

    assert judge(spec, stock).kind == "stock fails"
    assert judge(spec, make).kind == "lenient"


def test_the_process_is_looked_at() -> None:
    original = torch.autograd.Function.__dict__.get("apply")

    def leak(net: nn.Module, result: Any, image: Tensor) -> Any:
        torch.autograd.Function.apply = classmethod(lambda cls, *args: None)
        return result

    try:
        found = judge(EVAL, planted(leak))
    finally:
        if original is None:
            del torch.autograd.Function.apply
        else:
            torch.autograd.Function.apply = original
    assert found.kind == "wrong" and "the process" in found.reason


def test_modules_shrink_to_their_fault() -> None:
    spec = Spec(**{**vars(PLANTED), "skips": (1,), "fitted": (Part("freeze"),), "optimizer": "AdamW"})
    change = planted(lambda net, result, image: result if len(net.pieces) < 2 else _scaled(result))
    found = judge(spec, change)
    small, still = shrink(spec, found, change)
    assert still.kind == "wrong" and len(small.pieces) == 2 and len(small.visits) == 1 and not small.fitted
    assert all(one != small for one in smaller(small))
