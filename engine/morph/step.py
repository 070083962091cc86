"""Steps: a dataclass of plain values that repeats a morph, and its JSON form (`to_json`, `from_json`).

Each kind of morph defines its step in the module of its function; a recipe is a list of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import MorphError

_KINDS: dict[str, type[Step]] = {}


@dataclass(frozen=True)
class Step:
    """Description of a morph that can be repeated on any network of the parent's architecture.

    Fields are numbers, strings, None, tuples of these, and dictionaries with strings as keys.
    """

    op: ClassVar[str] = ""  # name in recipes

    def __post_init__(self) -> None:
        check_seed(getattr(self, "seed", 0))

    def __init_subclass__(cls, op: str | None = None) -> None:
        if op is not None:
            cls.op = op
            _KINDS[op] = cls

    @property
    def where(self) -> tuple[str, ...]:
        """Paths of the modules that it changes, if it names them."""
        path = getattr(self, "path", None)
        return getattr(self, "paths", ()) if path is None else (path,)

    def repeat(self, model: nn.Module) -> nn.Module:
        """Return the grown network, which may be `model` itself; its weights do not matter and may be meta tensors."""
        raise NotImplementedError


class Edit(Step):
    """A morph that changes only some modules of a network."""

    def edit(self, model: nn.Module) -> list[str]:
        """Change `model` in place without a check; return lines that describe the changes."""
        raise NotImplementedError

    def change(self, model: nn.Module) -> list[str]:
        """Run `edit` and restore PyTorch's generator, because new layers draw weights that are then replaced."""
        with torch.random.fork_rng([]):
            return self.edit(model)

    def repeat(self, model: nn.Module) -> nn.Module:
        self.change(model)
        return model


@dataclass(frozen=True)
class EditAt(Edit):
    """An edit at one module, or directly after it."""

    path: str


@dataclass(frozen=True)
class EditAll(Edit):
    """The same edit of several modules."""

    paths: tuple[str, ...]


def check_seed(seed: int) -> None:
    """Refuse seeds that PyTorch's or NumPy's generators do not accept."""
    if not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise MorphError(f"seed must be an integer from 0 to {(1 << 32) - 1}, not {seed!r}")


def known() -> list[str]:
    """Return the names of the morphs that a recipe may contain, from all imported modules."""
    return sorted(_KINDS)


def to_json(step: Step) -> dict[str, Any]:
    """Return the step as JSON: its name under "op", and its fields that differ from their default."""
    values = {f.name: (getattr(step, f.name), f.default) for f in fields(step)}
    return {"op": step.op} | {name: value for name, (value, default) in values.items() if value is not default}


def from_json(data: Mapping[str, Any]) -> Step:
    """Restore a step from the data of `to_json`.

    Raises:
        MorphError: the morph is unknown, or a field is missing or unknown.
    """
    kind = _KINDS.get(data["op"])
    if kind is None:
        raise MorphError(f"({data['op']}) is unknown; this gigamorph knows {', '.join(known())}")
    given = {name: _frozen(value) for name, value in data.items() if name != "op"}
    names = [f.name for f in fields(kind)]
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in given]
    if wrong := missing or [name for name in given if name not in names]:
        raise MorphError(f"({kind.op}) {'lacks' if missing else 'has an unknown field'} '{wrong[0]}'")
    return kind(**given)


def _frozen(value: Any) -> Any:
    """Convert lists to tuples recursively."""
    if isinstance(value, list):
        return tuple(_frozen(v) for v in value)
    return {k: _frozen(v) for k, v in value.items()} if isinstance(value, dict) else value
