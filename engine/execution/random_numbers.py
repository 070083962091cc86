"""Random number generators of a program, and their states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..capture.program import RANDOM, Program


def random_state(device: torch.device) -> list[Tensor]:
    """The states of PyTorch's own generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def generators_of(program: Program) -> list[torch.Generator]:
    """The `torch.Generator` objects that a network draws from."""
    ops = [op for op in program.ops if op.name.rstrip("_") in RANDOM]
    return [leaf for op in ops for leaf in tree_leaves((op.args, op.kwargs)) if isinstance(leaf, torch.Generator)]


def states_of(generators: Sequence[torch.Generator]) -> list[Tensor]:
    return [generator.get_state() for generator in generators]


def set_states(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


@contextlib.contextmanager
def as_they_were(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> Iterator[None]:
    """Context for recomputation: sets generators to earlier states, and restores their current states afterwards."""
    now = states_of(generators)
    set_states(generators, states)
    try:
        yield
    finally:
        set_states(generators, now)
