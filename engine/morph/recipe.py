"""Recipes: the morphs of a network as JSON, which rebuild its architecture without the code that grew it or pickles.

A grown network has other shapes than its constructor creates. Its recipe lists the step of each morph (`Report.step`,
see `step`) with SHA-256 hashes of the state dict before and after. `apply` repeats the steps on a new network with any
weights; the grown weights then load with `load_state_dict(strict=True)`. `grow` repeats the steps on weights only, and
`grow_file` on a file, with only the new tensors of a step in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GigamorphError, MorphError
from ..files import temporary_name
from ..parsing import parse_json
from ..tiling.memory import large_blocks_on_own_pages
from .copying import duplicate, fill, named_tensors, of_kind
from .operations import import_all
from .running import first_line
from .step import Report, Step, from_json, to_json
from .store import Computed, SafetensorsFile, TensorSpec, atomic, layout, read_state, tensor_bytes, write_state
from .widen import WidenStep

import_all()  # registers all steps

FORMAT = "gigamorph recipe"
VERSION = 1


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 hashes of a state dict: one of names and shapes, one that includes the values."""

    shapes: str
    contents: str


@dataclass(frozen=True)
class Morph:
    """One step with the fingerprints of the networks before and after it."""

    step: Step
    parent: Fingerprint
    child: Fingerprint


@dataclass
class Recipe:
    """The morphs of a network in order; the network may be trained between them."""

    morphs: list[Morph] = field(default_factory=list)

    def add(self, report: Report, parent: nn.Module, child: nn.Module) -> None:
        """Append a morph directly after it was made.

        Raises:
            MorphError: the step is not plain JSON, or the parent has other shapes than the last child.
        """
        try:
            step = from_json(json.loads(json.dumps(to_json(report.step), allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise MorphError(f"{report.transform}: the step is not plain JSON ({error}); report this") from error
        before = fingerprint(parent.state_dict())
        if self.morphs and before.shapes != self.morphs[-1].child.shapes:
            raise MorphError(
                f"{report.transform}: its parent has other parameters than the child of the recipe's last morph "
                f"({self.morphs[-1].step.op}); add every morph in order"
            )
        self.morphs.append(Morph(step, before, fingerprint(child.state_dict())))

    def to_json(self) -> str:
        """Return the recipe as JSON text."""
        morphs = [{"step": to_json(m.step), "parent": asdict(m.parent), "child": asdict(m.child)} for m in self.morphs]
        return json.dumps({"format": FORMAT, "version": VERSION, "morphs": morphs}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read a recipe from text.

        Raises:
            MorphError: the text is not a recipe, or has a later version.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise MorphError(f"the recipe is not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise MorphError(f'the JSON is not a recipe: it lacks "format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise MorphError(
                f"the recipe has version {data.get('version')}, but this gigamorph reads {VERSION}; update gigamorph"
            )
        try:
            return cls([cls._morph(number, morph) for number, morph in enumerate(data["morphs"], 1)])
        except (KeyError, TypeError, ValueError) as error:
            raise MorphError(f"the recipe is damaged: {type(error).__name__} {error}") from error

    @staticmethod
    def _morph(number: int, data: Mapping[str, Any]) -> Morph:
        try:
            step = from_json(data["step"])
        except MorphError as error:
            raise MorphError(f"recipe step {number} {error}") from None
        return Morph(step, Fingerprint(**data["parent"]), Fingerprint(**data["child"]))

    def save(self, path: str | Path) -> None:
        """Write the recipe to a file; only a complete file replaces an old one."""
        with atomic(path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a file.

        Raises:
            MorphError: the file is missing, damaged or not a recipe; the message names it.
        """
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise MorphError(f"{path}: cannot be read: {error}") from error
        except MorphError as error:
            raise MorphError(f"{path}: {error}") from error


def fingerprint(state: Mapping[str, Tensor]) -> Fingerprint:
    """Hash a state dict, one tensor at a time."""
    parts = layout(state)
    contents = hashlib.sha256()
    for name in sorted(parts):
        contents.update(json.dumps([name, str(parts[name].dtype), parts[name].shape]).encode())
        contents.update(tensor_bytes(state[name]))
    return Fingerprint(_shapes(parts), contents.hexdigest())


@torch.inference_mode(False)
def apply(recipe: Recipe, model: nn.Module) -> nn.Module:
    """Rebuild the grown architecture.

    Args:
        recipe: the morphs.
        model: a new network, constructed like the first parent; it is copied, not changed. Its weights do not matter;
            load the grown weights into the result.

    Raises:
        MorphError: the network does not have the first parent's architecture, or a morph is unknown.
    """
    model = duplicate(model)
    for number, morph in enumerate(recipe.morphs, 1):
        model = _repeat(model, morph, number)
    return model


def matches(recipe: Recipe, model: nn.Module) -> bool:
    """Return whether a network has the parameter names and shapes of the recipe's first parent."""
    return not recipe.morphs or _shapes(layout(model.state_dict())) == recipe.morphs[0].parent.shapes


@torch.inference_mode(False)
def grow(recipe: Recipe, model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Grow the parent's weights; return a mapping for `store.write_state` that computes one tensor at a time.

    Only tensors that a morph creates or changes are in memory; the others are read from `state` on request. The steps
    are repeated without a check. Use `verify.compare` for that, or run the morph on a network first.

    Args:
        recipe: the morphs; the weights may differ from the recorded ones.
        model: a network of the parent's architecture; its weights do not matter, and it is not changed. On the meta
            device (``with torch.device("meta")``) it needs no memory.
        state: the parent's weights, e.g. from `store.read_state`; they are not changed.

    Raises:
        MorphError: the weights do not fit the network, or `apply` would raise it.
    """
    model = _hollow(model)
    for number, morph in enumerate(recipe.morphs, 1):
        state, model = _grow(model, morph, number, state)
    return state


@torch.inference_mode(False)
def grow_file(recipe: Recipe, model: nn.Module, source: str | Path, target: str | Path) -> None:
    """Run `grow` from a weights file to another (or the same); a safetensors file gets the recipe in its header.

    Several morphs use intermediate files next to the target, so that only the tensors of one step are in memory.

    Raises:
        MorphError: `grow` would raise it, or a file cannot be read or written; the target is not changed.
    """
    with large_blocks_on_own_pages():
        _grow_file(recipe, model, Path(source), Path(target))


def _grow_file(recipe: Recipe, model: nn.Module, source: Path, target: Path) -> None:
    between = [temporary_name(target.with_suffix(".safetensors")) for _ in recipe.morphs[1:]]
    model, state = _hollow(model), read_state(source)
    try:
        for number, morph in enumerate(recipe.morphs, 1):
            state, model = _grow(model, morph, number, state)
            if number < len(recipe.morphs):
                write_state(between[number - 1], state)
                state = read_state(between[number - 1])
        write_state(target, state, {"recipe": recipe.to_json()})
    finally:
        for path in between:
            path.unlink(missing_ok=True)


def _repeat(model: nn.Module, morph: Morph, number: int) -> nn.Module:
    _check_parent(layout(model.state_dict()), morph, number)
    with _named(morph, number):
        model = morph.step.repeat(model)
    _check_child(layout(model.state_dict()), morph, number)
    return model


@contextmanager
def _named(morph: Morph, number: int) -> Iterator[None]:
    """Errors of a step whose arguments are missing or wrong, as one line that names the step."""
    where = f"recipe step {number} ({morph.step.op})"
    try:
        yield
    except MorphError as error:
        raise MorphError(f"{where}: {error}") from error
    except GigamorphError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise MorphError(f"{where} cannot be repeated: {type(error).__name__} {first_line(error)}") from error


def _check_parent(parts: Mapping[str, TensorSpec], morph: Morph, number: int) -> None:
    if _shapes(parts) != morph.parent.shapes:
        raise MorphError(
            f"recipe step {number} ({morph.step.op}): the network has other parameter names or shapes than the "
            "recorded parent; construct it with the same arguments"
        )


def _check_child(parts: Mapping[str, TensorSpec], morph: Morph, number: int) -> None:
    if _shapes(parts) != morph.child.shapes:
        raise MorphError(
            f"recipe step {number} ({morph.step.op}) did not give the recorded parameter names and shapes; the recipe "
            "may be damaged"
        )


def _hollow(model: nn.Module) -> nn.Module:
    """Return a copy with tensors that have shapes but no memory."""
    return duplicate(model, {id(t): of_kind(t, _hollow_tensor(t)) for t in named_tensors(model).values()})


def _hollow_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape that stores one number, with strides of zero."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _grow(
    model: nn.Module, morph: Morph, number: int, state: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], nn.Module]:
    """Return the child's weights, and the child without weights."""
    if isinstance(morph.step, WidenStep):
        return _widened(model, morph.step, morph, number, state)
    return _edited(model, morph, number, state)


def _edited(
    model: nn.Module, morph: Morph, number: int, state: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], nn.Module]:
    """Run a local morph on a network that holds the weights, and find the tensors that are new or were written to."""
    # Tensors of a file are private memory maps without memory until access. Other tensors must not be written to.
    private = isinstance(state, SafetensorsFile)
    try:
        loaded = state if private else {name: state[name].clone() for name in state}
        model.load_state_dict(loaded, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:3]) or first_line(error)
        raise MorphError(f"the weights do not fit the network: {reason}") from error
    before = model.state_dict(keep_vars=True)  # held until the end, so that no id is reused
    origin = {id(tensor): (name, tensor._version) for name, tensor in before.items()}
    child = _repeat(model, morph, number)
    parts: dict[str, TensorSpec] = {}
    made: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for name, tensor in child.state_dict(keep_vars=True).items():
        parts[name] = TensorSpec(tuple(tensor.shape), tensor.dtype)
        old, version = origin.get(id(tensor), ("", -1))
        if version == tensor._version:
            source[name] = old
        else:
            made[name] = tensor.detach()
    return Computed(parts, lambda name: made[name] if name in made else state[source[name]]), _hollow(child)


def _widened(
    model: nn.Module, step: WidenStep, morph: Morph, number: int, state: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], nn.Module]:
    """Run a widening; each tensor of the child depends only on the parent's tensor of the same name."""
    parts = dict(layout(state))
    if _shapes(parts) != _shapes(layout(model.state_dict())):
        raise MorphError("the weights do not fit the network: they have other names or shapes")
    _check_parent(parts, morph, number)
    with _named(morph, number):
        child, maps = step.check(step.spaces_of(model))
    own = model.state_dict(keep_vars=True)
    names = {id(own[name]): name for name in maps if name in own}  # a shared tensor has one map and several names
    alias = {name: names[id(tensor)] for name, tensor in own.items() if id(tensor) in names}
    for name, tensor in child.state_dict().items():
        parts[name] = TensorSpec(tuple(tensor.shape), parts[name].dtype)
    _check_child(parts, morph, number)
    fill(child, child, _hollow_tensor)

    def make(name: str) -> Tensor:
        if name not in alias:
            return state[name]
        with _named(morph, number):
            return step.grow_tensor(alias[name], state[name], maps[alias[name]])[0]

    return Computed(parts, make), child


def _shapes(parts: Mapping[str, TensorSpec]) -> str:
    text = json.dumps([[name, parts[name].shape] for name in sorted(parts)])
    return hashlib.sha256(text.encode()).hexdigest()
