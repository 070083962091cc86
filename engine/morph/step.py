"""Steps and reports: a dataclass of plain values that repeats a morph, its JSON form, and what its check found.

Each kind of morph defines its step in the module of its function; a recipe is a list of steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
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


FLOAT64_ROUNDOFF = 2.0**-29  # unit roundoff of float64 over that of float32


@dataclass(frozen=True)
class Difference:
    """Largest relative differences of all outputs, child against parent; nan if the networks return nan or inf.

    Each is the maximum norm of the difference over the maximum norm of the parent's output. `noise` is the parent's
    float32 output against its own float64 output, at least 4 * 2^-24. `train` covers train mode and the running
    statistics after it; it is None if train mode was not compared.
    """

    float64_eval: float
    float64_train: float | None
    float32_eval: float
    float32_train: float | None
    noise_eval: float
    noise_train: float | None

    @property
    def float64(self) -> float:
        """The worse of the two modes."""
        return worst(self.float64_eval, self.float64_train)

    @property
    def float32(self) -> float:
        """The worse of the two modes."""
        return worst(self.float32_eval, self.float32_train)

    @property
    def noise_ratio(self) -> float:
        """float32 difference over the parent's own noise, the worse of the two modes."""
        return worst(self.float32_eval / self.noise_eval, ratio(self.float32_train, self.noise_train))

    @property
    def float64_ratio(self) -> float:
        """float64 difference over the parent's own noise scaled to float64's roundoff, the worse of the two modes.

        A ratio of a few units means that the difference is rounding, magnified by the network: if BatchNorm in train
        mode has only a few values per channel, correct morphs differ by 1e-12 and more.
        """
        ratios = self.float64_eval / self.noise_eval, ratio(self.float64_train, self.noise_train)
        return worst(*ratios) / FLOAT64_ROUNDOFF

    def in_eval(self) -> Difference:
        """Return the differences of eval mode only."""
        return replace(self, float64_train=None, float32_train=None, noise_train=None)

    def __str__(self) -> str:
        def train(value: float | None) -> str:
            return f" (train mode {value:.1e})" if value is not None else ""

        return (
            f"float64 {self.float64_eval:.1e}{train(self.float64_train)}, "
            f"float32 {self.float32_eval:.1e}{train(self.float32_train)}; "
            f"{self.float64_ratio:.1f} and {self.noise_ratio:.1f} times the parent's own rounding noise, "
            f"which is {self.noise_eval:.1e} in float32{train(self.noise_train)}"
        )


@dataclass(frozen=True)
class Certificate:
    """Exact check of `S E = I` on the stored numbers: the number of sums of weights, and of violations."""

    entries: int = 0
    violations: int = 0

    def __add__(self, other: Certificate) -> Certificate:
        return Certificate(self.entries + other.entries, self.violations + other.violations)

    def __str__(self) -> str:
        return f"{self.violations} of {self.entries} weights violate S E = I"


@dataclass(frozen=True)
class Report:
    """Result of a morph and its checks; `step` repeats the morph on a new network."""

    step: Step
    difference: Difference
    parameters: tuple[int, int]  # before, after
    flops: tuple[int, int]  # before, after; multiplications and additions of one eval forward on the example
    changes: list[str] = field(default_factory=list)  # one line per space, layer, ... that is new or grew
    certificate: Certificate | None = None
    others: tuple[str, ...] = ()  # shapes of further inputs on which eval mode is equal in float64

    @property
    def transform(self) -> str:
        """Name of the morph."""
        return self.step.op

    def __str__(self) -> str:
        (p0, p1), (f0, f1) = self.parameters, self.flops
        lines = [
            f"{self.transform}: parameters {p0:,} -> {p1:,}, FLOPs {f0:,} -> {f1:,}",
            f"difference: {self.difference}",
        ]
        if self.certificate is not None:
            lines.append(f"certificate: {self.certificate}")
        if self.others:
            lines.append(f"equal too on: {'; '.join(self.others)}")
        return "\n".join([*lines, *(f"  {line}" for line in self.changes)])


def worst(a: float, b: float | None) -> float:
    if b is None:
        return a
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b
