"""Random numbers that depend on a key and a place only, so that every tile of an image draws what the whole would draw.

Number n of key k is output n of the generator SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
generators, OOPSLA 2014) whose state begins at k: the state goes up by a constant, so any output is computed at once.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def key_of(*numbers: int) -> np.uint64:
    """A key for non-negative numbers (a seed, an epoch, an image, a purpose); others give an unrelated one."""
    return np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]


def bits(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """64 random bits for every counter (uint64, any shape); the same for the same key and counter."""
    state = counter * _STEP
    state += _STEP
    state += key
    state ^= state >> np.uint64(30)
    state *= _FIRST
    state ^= state >> np.uint64(27)
    state *= _SECOND
    state ^= state >> np.uint64(31)
    return state


def uniform(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), multiples of 2**-53."""
    return (bits(key, counter) >> np.uint64(11)) * 2.0**-53


def normal(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """float32 of mean 0 and standard deviation 1: one of 65,536 equally likely quantiles, within 4.4."""
    return _quantiles()[bits(key, counter) >> np.uint64(48)]


@functools.cache
def _quantiles() -> np.ndarray:
    middles = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    values = torch.special.ndtri(middles).numpy()
    return (values / values.std()).astype(np.float32)
