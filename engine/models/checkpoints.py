"""Checkpoints of others as files: the weights in them are found, and no code in them is run."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..parsing import parse_json
from .numpy_weights import STAND_INS, Array, as_tensors
from .weights import first_line, forms, some, subtree, unwrapped

# Where checkpoints keep weights, also in one another. As timm does, averaged ones are preferred; then come names that
# tell, then those that may be of something else (the weights of classes).
_AVERAGED = ("state_dict_ema", "model_ema", "params_ema", "ema", "ema_state_dict", "ema_model", "shadow")
_USUAL = ("state_dict", "model", "model_state_dict", "model_state", "net", "network")
_PLACES = (*_AVERAGED, *_USUAL, "checkpoint", "weights", "params", "module")
_DEPTH = 3  # of such places
_EXTRA = "_extra_state"  # what Module.get_extra_state gives, under the module's name
INDEX = ".index.json"


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
        tensors: by the names of the file, after the prefix that was asked for.
        place: where in the file they stand, as in "state_dict_ema" or "model.state_dict".
        others: places of other weights that were passed over.
        extras: names of what stands among the tensors and is none: numbers, what `get_extra_state` gives.
        shards: the files with the tensors, where the file is an index of them.
        rest: what else the checkpoint holds; objects of foreign classes are inert.
    """

    path: Path
    tensors: dict[str, Tensor]
    place: str = ""
    others: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    shards: tuple[Path, ...] = ()
    rest: Mapping[str, Any] = field(default_factory=dict)


def read_state(path: str | Path, prefix: str = "") -> State:
    """The weights in a .safetensors file, in the files that an index of Hugging Face names
    (``model.safetensors.index.json``), or in anything that torch.save wrote: a state dict, or a checkpoint with one.

    Nothing in the file is executed: classes that a checkpoint names besides tensors are not imported.

    Args:
        prefix: take the sub-tree of names that begin so (`subtree`), with or without the wrappers of DDP and
            torch.compile; or the weights of this place in the file, or a sub-tree of them, as in "generator.encoder".

    Raises:
        DataError: the file is missing or damaged, holds no state dict, or a whole pickled module; it holds several and
            the prefix names none; no name begins with the prefix.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such weights file")
    if path.name.endswith(INDEX):
        tensors, shards = _sharded(path)
        return State(path, _chosen(tensors, prefix, path), shards=shards)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            state = State(path, load_file(path))
        except Exception as error:  # the library's own error class, and those of the system
            _refuse_pointer(path)
            raise DataError(f"{path}: not a readable safetensors file: {first_line(error)}") from error
        return replace(state, tensors=_chosen(state.tensors, prefix, path))
    loaded = load_inert(path)
    found = dict(_states(loaded))
    place, prefix = _place(found, loaded, prefix, path)
    twins = {*unwrapped(found[place])}
    others = tuple(
        other for other in found if other != place and (_known(other) or twins <= {*unwrapped(found[other])})
    )
    rest = {k: v for k, v in loaded.items() if k != place.split(".")[0] and k not in _PLACES} if place else {}
    for key in place.split(".") if place else ():
        loaded = loaded[key]
    extras = tuple(name for name in loaded if name not in found[place])
    return State(path, _chosen(found[place], prefix, path), place, others, extras, rest=rest)


def _sharded(index: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """The weights in the files that an index of Hugging Face names, and these files."""
    try:
        weight_map = dict(parse_json(index.read_text())["weight_map"])
        shards = tuple(index.parent / Path(name).name for name in dict.fromkeys(weight_map.values()))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{index}: not a readable index of weights: {first_line(error)}") from error
    found: dict[str, Tensor] = {}
    for shard in shards:
        found |= read_state(shard).tensors
    missing = [name for name in weight_map if name not in found]
    if missing:
        raise DataError(f"{index}: its files do not hold {some(missing)}; fetch them again")
    return found, shards


def _states(loaded: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All state dicts in what a file holds, with their places."""
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    named = any("." in str(name) for name in tensors)
    if is_state(tensors) and all(_is_beside(k, loaded[k], named) for k in loaded if k not in tensors):
        yield place, tensors
    elif isinstance(loaded, dict) and depth < _DEPTH:
        for key, value in loaded.items():
            if isinstance(key, str):
                yield from _states(value, f"{place}.{key}" if place else key, depth + 1)


def _is_beside(name: Any, value: Any, named: bool) -> bool:
    """Whether what is no tensor may stand in a state dict: an extra state; or, among names of parts, a plain value."""
    if not isinstance(name, str):
        return False
    return f".{name}".endswith(f".{_EXTRA}") or (named and isinstance(value, int | float | str | None))


def _known(place: str) -> bool:
    return all(part in _PLACES for part in place.split("."))


def _place(found: Mapping[str, dict[str, Tensor]], loaded: Any, prefix: str, path: Path) -> tuple[str, str]:
    """Which of the state dicts in a file is meant, and what of the prefix is left to choose in it.

    It is the one in the place that is preferred, unless the prefix names another one.

    Raises:
        DataError: there is none, or several.
    """
    known = [place for place in found if not place or _known(place)]
    for names in (_AVERAGED, _USUAL):
        known = [place for place in known if any(part in names for part in place.split("."))] or known
    named = [place for place in found if place and f"{prefix}.".startswith(f"{place}.")]
    if len(known) == 1 and (not named or _form_with(found[known[0]], prefix)):
        return known[0], prefix
    if named:
        return named[0], prefix.removeprefix(named[0]).removeprefix(".")
    held = loaded.items() if isinstance(loaded, dict) else [("", loaded)]
    inert = [key for key, value in held if isinstance(value, _Inert | Array)]
    if inert and (not found or any(key in _PLACES for key in inert)):
        raise DataError(_untrusted(path))
    if not found:
        raise DataError(f"{path}: holds no state_dict; save one with torch.save(model.state_dict(), path)")
    places = known or list(found)
    raise DataError(
        f"{path}: holds weights in {some(places)}; name the place of those that are meant, as in --prefix {places[0]}"
    )


def _chosen(state: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    return subtree(_form_with(state, prefix) or unwrapped(state), prefix, path) if prefix else state


def _form_with(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor] | None:
    """The weights with as many wrappers as leave names that begin with a prefix."""
    begin = prefix.removesuffix(".") + "."
    return next((form for form in forms(state) if any(name.startswith(begin) for name in form)), None)


def is_state(found: Any) -> bool:
    """Whether it is a dictionary from names to tensors."""
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    )


_BEGINNINGS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # of what torch.save and pickle write


def load_inert(path: Path) -> Any:
    """What torch.save wrote, NumPy's arrays as tensors and its numbers as Python's; no code in it is run.

    Objects of classes besides torch's and NumPy's are inert stand-ins.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such weights file")
    stand_ins: list[Callable | tuple[Callable, str]] = [(theirs, name) for name, theirs in STAND_INS.items()]
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"PK":
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            foreign = [name for name in names if name not in STAND_INS]
            stand_ins += [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in foreign]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what that hinders is refused below
            return as_tensors(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        _refuse_pointer(path)
        if start in _BEGINNINGS:
            raise DataError(_untrusted(path)) from error
        raise DataError(f"{path}: not a readable weights file: {first_line(error)}") from error
    except Exception as error:  # zip and torch have their own errors for a damaged file
        _refuse_pointer(path)
        if "torchscript" in str(error).lower():
            raise DataError(_untrusted(path, "a TorchScript module")) from error
        told = first_line(error) if start in _BEGINNINGS else "neither torch's nor a .safetensors"
        raise DataError(f"{path}: not a readable weights file: {told}") from error


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: is Git LFS's pointer to the weights, not the weights; git lfs pull fetches them")


def _untrusted(path: Path, what: str = "a pickled module or other objects") -> str:
    return (
        f"{path}: holds {what}, and to open it runs the code in it; if you trust where it "
        "comes from, give --trust where its own code is installed, or save its state_dict()"
    )
