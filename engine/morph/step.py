"""A morph as data: a dataclass of plain values that repeats it, and its form in JSON (`to_json`, `from_json`).

Each kind of morph has its own step beside the function that makes it; a recipe is a list of them.
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
    """What a morph did: enough to do it again to any network of the parent's architecture.

    Fields hold numbers, texts, None, tuples of these, and dictionaries with texts as keys.
    """

    op: ClassVar[str] = ""  # its name in recipes

    def __post_init__(self) -> None:
        check_seed(getattr(self, "seed", 0))

    def __init_subclass__(cls, op: str | None = None) -> None:
        if op is not None:
            cls.op = op
            _KINDS[op] = cls

    @property
    def where(self) -> tuple[str, ...]:
        """Paths of the modules that it changes, where it names them."""
        return ()

    def repeat(self, model: nn.Module) -> nn.Module:
        """The grown network; `model` may become it. Its weights do not matter, and may be on the meta device."""
        raise NotImplementedError


class Edit(Step):
    """A morph that changes some modules of a network and leaves all others as they are."""

    def edit(self, model: nn.Module) -> list[str]:
        """Change `model` in place, unchecked; lines that say what changed."""
        raise NotImplementedError

    def change(self, model: nn.Module) -> list[str]:
        """`edit`, after which PyTorch's generator is where it was: layers draw weights before they get their own."""
        with torch.random.fork_rng([]):
            return self.edit(model)

    def repeat(self, model: nn.Module) -> nn.Module:
        self.change(model)
        return model


@dataclass(frozen=True)
class EditAt(Edit):
    """An edit of one module, or right after it."""

    path: str

    @property
    def where(self) -> tuple[str, ...]:
        return (self.path,)


@dataclass(frozen=True)
class EditAll(Edit):
    """The same edit of several modules."""

    paths: tuple[str, ...]

    @property
    def where(self) -> tuple[str, ...]:
        return self.paths


def check_seed(seed: int) -> None:
    """Refuse what PyTorch's and NumPy's generators do not take."""
    if not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise MorphError(f"seed {seed!r}: give a whole number from 0 to {(1 << 32) - 1}")


def known() -> list[str]:
    """Names of the morphs that a recipe may hold, of all modules that have been imported."""
    return sorted(_KINDS)


def to_json(step: Step) -> dict[str, Any]:
    """The step as JSON: its name under "op" and its fields, without those that have their default."""
    values = {f.name: (getattr(step, f.name), f.default) for f in fields(step)}
    return {"op": step.op} | {name: value for name, (value, default) in values.items() if value is not default}


def from_json(data: Mapping[str, Any]) -> Step:
    """The step that `to_json` gave.

    Raises:
        MorphError: an unknown morph, or fields that are missing or not its own.
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
    """Lists as tuples, inside of others too."""
    if isinstance(value, list):
        return tuple(_frozen(v) for v in value)
    return {k: _frozen(v) for k, v in value.items()} if isinstance(value, dict) else value
