"""Weights that are made anew at each call: pruning masks, weight, spectral and orthogonal norms; steps and copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import LIMIT, errors
from recordings import recordings
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

from gigamorph import accelerate

pytestmark = pytest.mark.filterwarnings("ignore")

MASKED: dict[str, Callable[[Any], Any]] = {
    "mask": lambda m: prune.l1_unstructured(m[2], "weight", 0.5),
    "mask of channels": lambda m: prune.ln_structured(m[2], "weight", 0.5, 2, 0),
    "old weight_norm": lambda m: utils.weight_norm(m[2]),
}
PARAMETRIZED: dict[str, Callable[[Any], Any]] = {
    "weight_norm": lambda m: parametrizations.weight_norm(m[2]),
    "orthogonal": lambda m: parametrizations.orthogonal(m[5]),
}
SPECTRAL: dict[str, Callable[[Any], Any]] = {
    "spectral_norm": lambda m: parametrizations.spectral_norm(m[2]),
    "spectral_norm of the head": lambda m: parametrizations.spectral_norm(m[5]),
    "old spectral_norm": lambda m: utils.spectral_norm(m[2]),
}


def image() -> Tensor:
    return torch.randn(2, 1, 25, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    made = nn.Sequential(*layers).double()
    {**MASKED, **PARAMETRIZED, **SPECTRAL}[name](made)
    return made


def steps(net: nn.Module) -> dict[str, Any]:
    """Three steps of training and inference."""
    found: dict[str, Any] = {}
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for number in range(3):
        optimizer.zero_grad()
        out = net(image() * (number + 1))
        out.square().sum().backward()
        found |= {f"{number} {n}": p.grad for n, p in net.named_parameters()} | {f"{number} output": out.detach()}
        optimizer.step()
        with torch.no_grad():
            found[f"{number} inferred"] = net(image())
    return found | {n: b.clone() for n, b in net.named_buffers()}


def agree(*results: dict[str, Any]) -> None:
    assert max(errors(*results).values()) <= LIMIT


@pytest.mark.parametrize("name", [*MASKED, *PARAMETRIZED, *SPECTRAL])
def test_training(name):
    agree(*(steps(net.train()) for net in (network(name), accelerate(network(name), tile=16))))


@pytest.mark.parametrize("name", [*MASKED, *PARAMETRIZED, *SPECTRAL])
def test_evaluation(name):
    agree(*(steps(net.eval()) for net in (network(name), accelerate(network(name), tile=16))))


@pytest.mark.parametrize("when", ["before", "behind a step"])
@pytest.mark.parametrize(
    ("name", "how"),
    [*((n, lambda net: pickle.loads(pickle.dumps(net))) for n in MASKED), *((n, copy.deepcopy) for n in PARAMETRIZED)],
)
def test_copies(name, how, when):
    """Those that ordinary PyTorch makes of the network itself."""
    results = []
    for net in (network(name), accelerate(network(name), tile=16)):
        if when != "before":
            net(image()).sum().backward()
        results.append(steps(how(net)))
    agree(*results)


@pytest.mark.parametrize("name", [*MASKED, *PARAMETRIZED])
def test_verify(name):
    """It copies also what `copy.deepcopy` refuses: weights that were computed from others."""
    net = accelerate(network(name), tile=16, verify=True)
    net(image())
    net.eval()(image())


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_discriminator_that_is_frozen_in_turn_is_not_recorded_in_every_step(name):
    """What the frozen forward leaves in `weight` has no gradient, and nobody reads it."""
    nets, counts, results = (network(name), accelerate(network(name), tile=16)), [], ({}, {})
    with recordings() as made:
        for number in range(4):
            for net, found in zip(nets, results, strict=True):
                net.zero_grad()
                (net(image()) - net(image() + 1)).square().sum().backward()
                found |= {f"{number} {n}": p.grad for n, p in net.named_parameters()}
                net.requires_grad_(False)
                fake = image().requires_grad_()
                net(fake).sum().backward()
                net.requires_grad_(True)
                found[f"{number} fake"] = fake.grad
            counts.append(len(made))
    agree(*results)
    assert counts[2:] == counts[1:3], counts
