"""Counter-based random numbers: they depend on a key and a position only, so a tile draws the same as the whole image.

Number n of key k is output n of the generator SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
generators, OOPSLA 2014) with initial state k: the state grows by a constant, so any output is computed directly.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def key_of(*numbers: int) -> np.uint64:
    """The key of non-negative numbers (seed, epoch, image, purpose); different numbers have unrelated keys."""
    return np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]


def bits(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """64 random bits for each counter (uint64, any shape); equal for equal key and counter."""
    state = counter * STEP
    state += STEP
    state += key
    return mix(state)


def mix(state: np.ndarray) -> np.ndarray:
    """The last step of SplitMix64, in place; integer overflow is intended."""
    state ^= state >> np.uint64(30)
    state *= _FIRST
    state ^= state >> np.uint64(27)
    state *= _SECOND
    state ^= state >> np.uint64(31)
    return state


def uniform(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """Uniform float64 numbers in [0, 1), multiples of 2**-53."""
    return (bits(key, counter) >> np.uint64(11)) * 2.0**-53


def normal(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """Normal float32 numbers of mean 0 and standard deviation 1: one of 65,536 equally likely quantiles, within 4.4."""
    return _quantiles()[bits(key, counter) >> np.uint64(48)]


@functools.cache
def _quantiles() -> np.ndarray:
    middles = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    values = torch.special.ndtri(middles).numpy()
    return (values / values.std()).astype(np.float32)
