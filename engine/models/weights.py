"""State dicts in files of others: found in a checkpoint, renamed, and fitted to a network; no code in them is run."""

from __future__ import annotations

import difflib
import hashlib
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError

# Where checkpoints keep weights; as timm does, averaged ones are preferred.
_PLACES = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "model_state", "net", "network")
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")  # torch.compile, DDP, in either order
_LISTED = 10


class _Inert:
    """Stands for an object of a class that is not imported: it takes whatever it is given and does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, *_: object) -> None: ...

    def append(self, _: object) -> None: ...

    def extend(self, _: object) -> None: ...


@dataclass(frozen=True)
class State:
    """The weights of a file.

    Attributes:
        tensors: by the names of the file, without the wrappers of DDP and torch.compile.
        place: where in the file they stand, as in "state_dict_ema".
        rest: what else the checkpoint holds; objects of foreign classes are inert.
    """

    path: Path
    tensors: dict[str, Tensor]
    place: str = ""
    rest: Mapping[str, Any] = field(default_factory=dict)


def read_state(path: str | Path) -> State:
    """The weights in a .safetensors file, or in anything that torch.save wrote: a state dict, or a checkpoint with one.

    Nothing in the file is executed: classes that a checkpoint names besides tensors are not imported.

    Raises:
        DataError: the file is missing or damaged, holds no state dict, or a whole pickled module.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return State(path, load_file(path))
        except Exception as error:  # the library's own error class, and those of the system
            raise DataError(f"{path}: not a readable safetensors file: {first_line(error)}") from error
    loaded = load_inert(path)
    place, rest = "", {}
    if isinstance(loaded, dict) and not is_state(loaded):
        for key in _PLACES:
            if is_state(loaded.get(key)):
                place, rest = key, {k: v for k, v in loaded.items() if k != key and k not in _PLACES}
                loaded = loaded[key]
                break
    if not is_state(loaded):
        held = [loaded, *loaded.values()] if isinstance(loaded, dict) else [loaded]
        if any(isinstance(value, _Inert) for value in held):
            raise DataError(_untrusted(path))
        raise DataError(f"{path}: holds no state_dict; save one with torch.save(model.state_dict(), path)")
    return State(path, {_unwrapped(name): value for name, value in loaded.items()}, place, rest)


def is_state(found: Any) -> bool:
    """Whether it is a dictionary from names to tensors."""
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    )


def load_inert(path: Path) -> Any:
    """What torch.save wrote; objects of classes besides torch's are inert stand-ins, and no code of theirs is run."""
    if not path.is_file():
        raise DataError(f"{path}: no such weights file")
    stand_ins: list[Callable | tuple[Callable, str]] = []
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"PK":
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            stand_ins = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise DataError(_untrusted(path)) from error
        raise DataError(f"{path}: not a readable weights file: {first_line(error)}") from error
    except Exception as error:  # zip and torch have their own errors for a damaged file
        raise DataError(f"{path}: not a readable weights file: {first_line(error)}") from error


def _untrusted(path: Path) -> str:
    return (
        f"{path}: holds a pickled module or other objects, and to open it runs the code in it; if you trust where it "
        "comes from, give --trust where its own code is installed, or save its state_dict()"
    )


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def subtree(state: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it.

    Raises:
        DataError: if there are none; the message names the prefixes that there are.
    """
    if prefix and not prefix.endswith("."):
        prefix += "."
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        first = dict.fromkeys(name.split(".")[0] + "." for name in state if "." in name)
        raise DataError(f"{path}: no weight begins with {prefix!r}; they begin with {_some(first)}")
    return found


def renamed(state: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Names with their beginning exchanged by the first rule (theirs, ours) that fits; others stay as they are."""

    def name_of(name: str) -> str:
        for theirs, ours in rules:
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return name

    return {name_of(name): value for name, value in state.items()}


def load_exactly(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load all weights of a network, and refuse what does not fit it name by name.

    BatchNorm's counters may be missing: older files lack them and no result depends on them. Weights of another
    floating dtype are converted to the network's.

    Raises:
        DataError: missing or other names (at most ten of each, and the nearest ones), other shapes, values that are
            not finite.
    """
    own = network.state_dict()
    problems = differences(own, state)
    bad = [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        count = sum(int((~state[name].isfinite()).sum()) for name in bad)
        problems.append(f"{count} values are NaN or infinite, in {_some(bad)}")
    if problems:
        raise DataError(f"{path}: weights do not fit the model: {'; '.join(problems)}")
    counters = {name: value for name, value in own.items() if name not in state}
    network.load_state_dict({**state, **counters}, strict=True)


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """What keeps weights from fitting a network's, a phrase each: at most ten names, with the nearest of the others."""
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(value.shape)}, the model has {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and own[name].shape != value.shape
    ]
    found = []
    if missing:
        found.append(f"{_count(missing)} of the model missing in the file: {_some(_beside(missing, extra))}")
    if extra:
        found.append(f"{_count(extra)} of the file not in the model: {_some(_beside(extra, missing))}")
    if shapes:
        found.append(f"{len(shapes)} of other shape: {_some(shapes)}")
    return found


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} name is" if len(names) == 1 else f"{len(names)} names are"


def _beside(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Each of the first names with the nearest of the others: the same one in another place, else one spelt alike."""
    listed = []
    for name in names[:_LISTED]:
        near = [other for other in others if f".{other}".endswith(f".{name}") or f".{name}".endswith(f".{other}")]
        near = near or difflib.get_close_matches(name, others[:2000], 1, 0.6)
        listed.append(f"{name} (nearest: {near[0]})" if near else name)
    return [*listed, *names[_LISTED:]]


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return ", ".join(every[:_LISTED]) + more


def sha256(path: str | Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, pickle.UnpicklingError):  # whose own text advises to run the code in the file
        return "no file of torch, or one that holds more than tensors"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
