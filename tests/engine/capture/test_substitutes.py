"""Calls that are recorded otherwise than the forward makes them: what it says, questions about sizes and classes."""

import copy
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gigamorph import UnsupportedError, accelerate

LOG = logging.getLogger("tests.saying")
SIZES = ((13, 20), (13, 20), (21, 24))


class Part(nn.Module):
    def __init__(self, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.call, self.calls = call, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.call(self, x)


def both(call: Callable[[Any, Tensor], Tensor]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(1, 4, 3), Part(call), nn.Conv2d(4, 2, 3)).double()
    return stock, accelerate(copy.deepcopy(stock), tile=8)


def says(part: Any, x: Tensor) -> Tensor:
    print("map", x.shape, f"{x.shape[-1]} wide", part.calls, x.dtype, sep="|", end=".\n")
    warnings.warn(f"{x.shape[2]} high", DeprecationWarning, stacklevel=2)
    LOG.info("%s of %d calls", tuple(x.shape), part.calls)
    LOG.debug("not shown")
    part.calls += 1
    return x.relu()


def test_what_a_forward_says(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """At each call, with the sizes and counts of that call; in pieces too."""
    stock, fast = both(says)
    found = []
    for net in (stock, fast, accelerate(copy.deepcopy(stock), tile=8, fallback="untiled")):
        caplog.clear()
        with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO, LOG.name):
            warnings.simplefilter("always")
            for size in SIZES:
                net(torch.zeros(1, 1, *size, dtype=torch.float64))
        texts = [(one.category, str(one.message)) for one in warned]
        found.append((capsys.readouterr().out, texts, [one.getMessage() for one in caplog.records]))
        stock[1].calls = 0
    assert found[0] == found[1] == found[2]
    assert len(found[0][0].splitlines()) == len(found[0][1]) == len(found[0][2]) == len(SIZES)


def test_what_it_says_of_values_is_refused() -> None:
    _, fast = both(lambda part, x: print(x.mean()) or x)
    with pytest.raises(UnsupportedError, match="print in the forward"):
        fast(torch.zeros(1, 1, 13, 20, dtype=torch.float64))


def test_what_it_says_of_a_list_that_it_changes_is_refused() -> None:
    def last(part: Any, x: Tensor) -> Tensor:
        print(part.sizes)
        part.sizes.append(x.shape[2])
        return x

    stock, _ = both(last)
    stock[1].sizes = [1, 2]
    with pytest.raises(UnsupportedError, match="print in the forward"):
        accelerate(stock, tile=8)(torch.zeros(1, 1, 13, 20, dtype=torch.float64))


def rearranged(part: Any, x: Tensor) -> Tensor:
    x = einops.rearrange(einops.rearrange(x, "b (g c) h w -> b g c h w", g=2), "b g c h w -> b (c g) h w")
    return x * einops.reduce(x, "b c h w -> b c 1 1", "mean")


def divides(part: Any, x: Tensor) -> Tensor:
    left = np.array(x.shape[2:]) % np.power(2, 3)
    if (left > 3).any():
        x = x * float(left.max())
    if np.sqrt(x.shape[2]) > 4 and torch.tensor(x.shape[2:]).prod() > 100:
        x = x * 2
    return x


@pytest.mark.parametrize(
    "call",
    [
        lambda part, x: x * 2 if torch.jit.isinstance(x, Tensor) else x,
        lambda part, x: x * int(np.prod(x.shape[2:])) / np.prod((2, 3)),
        rearranged,
        divides,
    ],
    ids=["torch.jit.isinstance", "numpy.prod", "einops", "branches of arrays"],
)
def test_exact(call: Callable[[Any, Tensor], Tensor]) -> None:
    stock, fast = both(call)
    for size in SIZES:
        x = torch.randn(1, 1, *size, dtype=torch.float64)
        gradients = []
        for net in (stock, fast):
            given = x.clone().requires_grad_()
            y = net(given)
            gradients.append([y.detach(), *torch.autograd.grad(y.square().sum(), given)])
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def written(part: Any, x: Tensor) -> Tensor:
    many = torch.zeros(1)
    view = many[0]
    view.add_(x.shape[2])
    return x * 2 if many > 0 else x


def drawn(part: Any, x: Tensor) -> Tensor:
    return x * 2 if torch.rand(1) > 0.5 else x


@pytest.mark.parametrize("call", [written, drawn, lambda part, x: x * 2 if x.mean() > 0 else x])
def test_branches_of_what_is_not_known_are_refused(call: Callable[[Any, Tensor], Tensor]) -> None:
    _, fast = both(call)
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedError, match="branching"):
        fast(torch.ones(1, 1, 13, 20, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), state)


def test_libraries_that_ask_whether_something_compiles_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """They choose what TorchDynamo can trace; the network's own code gets what stock PyTorch answers."""
    theirs: Any = types.ModuleType("transformers")
    monkeypatch.setitem(sys.modules, "transformers", theirs)
    exec("import torch\ndef factor(): return 2 if torch.compiler.is_compiling() else 3", vars(theirs))
    (stock, _), (_, fast) = both(lambda part, x: x * 2), both(lambda part, x: x * theirs.factor())
    x = torch.randn(1, 1, 13, 20, dtype=torch.float64)
    torch.testing.assert_close(fast(x), stock(x), rtol=1e-12, atol=1e-12)
