"""The states of the random generators: nothing is drawn while recording."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def random_state(generators: Sequence[Any] = ()) -> tuple[Any, ...]:
    """Of Python, numpy and torch, and of further generators of theirs."""
    further = [_state_of(generator) for generator in generators]
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state(), further


def same_state(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    arrays = zip(before[1], now[1], strict=True)
    same = all(np.array_equal(a, b) for a, b in arrays)  # pyright: ignore[reportArgumentType]
    return before[0] == now[0] and same and torch.equal(before[2], now[2]) and before[3] == now[3]


def put_back(state: tuple[Any, ...], generators: Sequence[Any] = ()) -> None:
    if not same_state(state, random_state(generators)):
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.default_generator.set_state(state[2])
        for generator, own in zip(generators, state[3], strict=True):
            _set_state(generator, own)


def _state_of(generator: Any) -> bytes:
    if isinstance(generator, torch.Generator):  # a recording draws nothing from it, but a forward may seed it
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, random.Random):
        return pickle.dumps(generator.getstate())
    legacy = isinstance(generator, np.random.RandomState)
    return pickle.dumps(generator.get_state(legacy=False) if legacy else generator.bit_generator.state)


def _set_state(generator: Any, state: bytes) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif isinstance(generator, random.Random):
        generator.setstate(pickle.loads(state))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(pickle.loads(state))
    else:
        generator.bit_generator.state = pickle.loads(state)
