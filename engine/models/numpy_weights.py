"""NumPy arrays and numbers in checkpoints, built from their bytes without executing code or NumPy's unpickling."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_PLAIN = re.compile(r"[biufcSU]\d+")  # numbers and strings; objects, records and dates stay inert
_ORDERS = ("<", ">", "=", "|")


class _Dtype:
    """Stand-in for numpy.dtype: gets the dtype's name, and its state the byte order."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.dtype = np.dtype(name) if isinstance(name, str) and _PLAIN.fullmatch(name) else None

    def __setstate__(self, state: object) -> None:
        match state:
            case (_, str(order), *_) if order in _ORDERS and self.dtype is not None:
                self.dtype = self.dtype.newbyteorder(order)


class Array:
    """Stand-in for numpy.ndarray: `value` is the array, or None if its dtype is not one of numbers or strings."""

    value: np.ndarray | None = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        match state:
            case (_, tuple(shape), _Dtype(dtype=np.dtype() as dtype), fortran, bytes(data)):
                self.value = np.ndarray(shape, dtype, data, order="F" if fortran else "C")


def _scalar(kind: object = None, data: object = None, *_: object) -> Any:
    """Return a NumPy number or string as Python's; an `Array` without a value for any other dtype."""
    match kind, data:
        case _Dtype(dtype=np.dtype() as dtype), bytes(data):
            return np.ndarray((), dtype, data).item()
    return Array()


# The module moved in NumPy 2.
STAND_INS: dict[str, Callable] = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": Array,
    **{f"numpy.{core}.multiarray._reconstruct": Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
}
"""Stand-ins for NumPy's names in the unpickler; `as_tensors` turns their objects into tensors."""


def as_tensors(loaded: Any) -> Any:
    """Replace each array that has a PyTorch dtype by a tensor, in place in containers; other values stay."""
    if isinstance(loaded, dict):
        for key, value in loaded.items():
            loaded[key] = as_tensors(value)
    elif isinstance(loaded, list):
        loaded[:] = map(as_tensors, loaded)
    elif isinstance(loaded, tuple) and type(loaded) is tuple:
        return tuple(map(as_tensors, loaded))
    elif isinstance(loaded, Array) and loaded.value is not None:
        try:
            return torch.from_numpy(loaded.value.astype(loaded.value.dtype.newbyteorder("=")))
        except TypeError:  # strings, numbers of 16 bytes
            return loaded
    return loaded
