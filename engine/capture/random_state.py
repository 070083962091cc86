"""The states of the random generators: nothing is drawn while recording."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> tuple[Any, ...]:
    """Of Python, numpy and torch."""
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()


def same_state(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    arrays = zip(before[1], now[1], strict=True)
    same = all(np.array_equal(a, b) for a, b in arrays)  # pyright: ignore[reportArgumentType]
    return before[0] == now[0] and same and torch.equal(before[2], now[2])


def put_back(state: tuple[Any, ...]) -> None:
    if not same_state(state, random_state()):
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.default_generator.set_state(state[2])
