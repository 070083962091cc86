"""The tensors in the result of a forward by name, and a hook that concatenates some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import GigamorphError


def tensors_in(result: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors in a forward's result by keys, attributes and numbers joined with dots, as in "heads.0".

    Containers are mappings (also Hugging Face's), data classes, tuples (also named ones) and lists; other values
    are ignored. A single tensor is called "output".
    """
    if isinstance(result, Tensor):
        return {name or "output": result}
    parts: Mapping[Any, Any] = {}
    if isinstance(result, Mapping):
        parts = result
    elif is_dataclass(result) and not isinstance(result, type):
        parts = {one.name: getattr(result, one.name) for one in fields(result)}
    elif isinstance(result, tuple) and (named := getattr(result, "_fields", ())):
        parts = dict(zip(named, result, strict=True))
    elif isinstance(result, Sequence) and not isinstance(result, str):
        parts = dict(enumerate(result))
    found: dict[str, Tensor] = {}
    for key, part in parts.items():
        found |= tensors_in(part, f"{name}.{key}" if name else str(key))
    return found


def is_row(value: Tensor) -> bool:
    """Whether it has numbers per image and nothing else: floating point, (N,) or (N, columns)."""
    return value.ndim in (1, 2) and value.is_floating_point()


@dataclass(frozen=True)
class Columns:
    """A forward hook that concatenates some tensors of a network's result: (N, columns).

    Attributes:
        names: as in `tensors_in`. A tensor (N,) is one column.
    """

    names: tuple[str, ...]

    def __call__(self, module: Any, given: Any, result: Any) -> Tensor:
        found = tensors_in(result)
        for name in self.names:
            if name not in found or not is_row(found[name]):
                raise GigamorphError(f"the network has no row of numbers {name!r}; it outputs {format_tensors(found)}")
        rows = [found[name] for name in self.names]
        return torch.cat([row if row.ndim == 2 else row[:, None] for row in rows], 1)


def format_tensors(found: Mapping[str, Tensor]) -> str:
    """Format the names and shapes of tensors for a message."""
    shown = [f"{name} ({' x '.join(map(str, value.shape))})" for name, value in found.items()]
    more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
    return f"{', '.join(shown[:10]) or 'no tensor'}{more}"
