"""Local morphs and fronts of random programs hold on images of another size than the example's, to float64 rounding."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from morph_networks import X, relative
from morph_programs import Program, programs
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.deepen import insert_identity, insert_pair, insert_residual
from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.kernel_size import grow_kernel

PROGRAMS = max(1, int(os.environ.get("GIGAMORPH_PROGRAMS", 16)) // 4)
OTHER = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.Linear, nn.PReLU)
MORPHS: dict[str, Callable[[nn.Module, Tensor, str], Any]] = {
    "identity": insert_identity,
    "pair": insert_pair,
    "residual": insert_residual,
    "kernel": lambda m, x, path: grow_kernel(m, x, path, 5),
    "front": lambda m, x, _: front(m, x, 2),
}
tally = dict.fromkeys(MORPHS, 0)


@pytest.mark.parametrize("name", MORPHS)
@settings(max_examples=PROGRAMS, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(6), st.integers(0, 99))
def test_random_programs_at_a_second_size(name: str, program: Program, which: int) -> None:
    model = program.build().double()
    paths = [path for path, module in model.named_modules() if isinstance(module, LAYERS)]
    try:
        with torch.no_grad():
            want = model(OTHER)
        child, _ = MORPHS[name](model, X.double(), paths[which % len(paths)])
    except (MorphError, RuntimeError, KeyError):  # refused, or a program that takes one size only
        return
    large = F.interpolate(OTHER, scale_factor=2, mode="nearest") if name == "front" else OTHER
    with torch.no_grad():
        assert relative(child.eval()(large), want) <= 1e-12
    tally[name] += 1


@pytest.mark.slow  # it counts what the others of this file tried
def test_all_were_tried() -> None:
    assert all(tally.values()), tally
