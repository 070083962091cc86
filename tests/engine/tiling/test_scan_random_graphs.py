"""Random networks, images and tiles: the scan gives stock PyTorch's outputs and gradients, in float64."""

import torch
from exactness import assert_exact
from hypothesis import HealthCheck, assume, given, settings
from random_net import Program, examples, programs
from torch.utils._pytree import tree_leaves

CHECKS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def check(program: Program) -> None:
    model = program.build()
    image = torch.randn(program.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assume(all(leaf.isfinite().all() for leaf in tree_leaves(model(image))))  # pools of nothing but -inf
    assert_exact(model, image, tile=program.tile, halos=program.halos)


@settings(max_examples=examples(12), **CHECKS)
@given(programs())
def test_random_networks(program: Program) -> None:
    check(program)


@settings(max_examples=examples(12), **CHECKS)
@given(programs(max_steps=14))
def test_deeper_random_networks(program: Program) -> None:
    check(program)
