"""Third-party checkpoint files: finds the weights in them without executing code from them.

NumPy's arrays and numbers are built from their bytes, without NumPy's unpickling.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..parsing import parse_json
from .weights import first_line, forms, some, subtree, unwrapped

# Keys under which checkpoints store weights, possibly nested. As in timm, averaged weights are preferred; then
# unambiguous keys, then those that may hold something else (such as class weights).
_AVERAGED = ("state_dict_ema", "model_ema", "params_ema", "ema", "ema_state_dict", "ema_model", "shadow")
_USUAL = ("state_dict", "model", "model_state_dict", "model_state", "net", "network")
_KEYS = (*_AVERAGED, *_USUAL, "checkpoint", "weights", "params", "module")
_DEPTH = 3  # levels of such keys
_EXTRA = "_extra_state"  # where Module.get_extra_state is stored, after the module's name
INDEX = ".index.json"


class Inert:
    """Stand-in for an object of a class that is not imported: it accepts any state and does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, *_: object) -> None: ...

    def append(self, _: object) -> None: ...

    def extend(self, _: object) -> None: ...


@dataclass(frozen=True)
class WeightFile:
    """The weights of a file.

    Attributes:
        tensors: the weights by their names in the file, without the requested prefix.
        place: the key of the weights in the file, such as "state_dict_ema" or "model.state_dict".
        others: keys of other weights, which were not read.
        extras: names of values among the tensors that are not tensors: numbers, results of `get_extra_state`.
        shards: the files with the tensors, if the file is an index of them.
        rest: the other content of the checkpoint; objects of foreign classes are inert.
    """

    path: Path
    tensors: dict[str, Tensor]
    place: str = ""
    others: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    shards: tuple[Path, ...] = ()
    rest: Mapping[str, Any] = field(default_factory=dict)


def read_state(path: str | Path, prefix: str = "") -> WeightFile:
    """Read weights from a .safetensors file, a Hugging Face index or a file of torch.save.

    An index is ``model.safetensors.index.json``; torch.save may have written a state dict or a checkpoint with one.

    Nothing in the file is executed: of the classes that a checkpoint names, only those of tensors are imported.

    Args:
        prefix: selects the names that begin with it (`subtree`), with or without the wrappers of DDP and
            torch.compile; or the weights under this key of the file, or their sub-tree, as in "generator.encoder".

    Raises:
        DataError: the file is missing or damaged, holds no state dict or a whole pickled module, or holds several
            state dicts of which the prefix names none; or no name begins with the prefix.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such weights file")
    if path.name.endswith(INDEX):
        tensors, shards = _sharded(path)
        return WeightFile(path, _select_subtree(tensors, prefix, path), shards=shards)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            state = WeightFile(path, load_file(path))
        except Exception as error:  # safetensors' own error class, and OSError
            _refuse_pointer(path)
            raise DataError(f"{path}: not a readable safetensors file: {first_line(error)}") from error
        return replace(state, tensors=_select_subtree(state.tensors, prefix, path))
    loaded = load_inert(path)
    found = dict(_states(loaded))
    place, prefix = _select_state(found, loaded, prefix, path)
    twins = {*unwrapped(found[place])}
    others = tuple(
        other for other in found if other != place and (_is_known_key(other) or twins <= {*unwrapped(found[other])})
    )
    rest = {k: v for k, v in loaded.items() if k != place.split(".")[0] and k not in _KEYS} if place else {}
    for key in place.split(".") if place else ():
        loaded = loaded[key]
    extras = tuple(name for name in loaded if name not in found[place])
    return WeightFile(path, _select_subtree(found[place], prefix, path), place, others, extras, rest=rest)


def _sharded(index: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """Return the weights in the files that a Hugging Face index names, and the paths of these files."""
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
        raise DataError(f"{index}: its files do not contain {some(missing)}; download them again")
    return found, shards


def _states(loaded: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the key and the tensors of each state dict in the content of a file."""
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    named = any("." in str(name) for name in tensors)
    if is_state(tensors) and all(_may_accompany(k, loaded[k], named) for k in loaded if k not in tensors):
        yield place, tensors
    elif isinstance(loaded, dict) and depth < _DEPTH:
        for key, value in loaded.items():
            if isinstance(key, str):
                yield from _states(value, f"{place}.{key}" if place else key, depth + 1)


def _may_accompany(name: Any, value: Any, named: bool) -> bool:
    """Whether a state dict may have a value that is not a tensor: an extra state, or a plain one among dotted names."""
    if not isinstance(name, str):
        return False
    return f".{name}".endswith(f".{_EXTRA}") or (named and isinstance(value, int | float | str | None))


def _is_known_key(place: str) -> bool:
    return all(part in _KEYS for part in place.split("."))


def _select_state(found: Mapping[str, dict[str, Tensor]], loaded: Any, prefix: str, path: Path) -> tuple[str, str]:
    """Return the key of the state dict to read, and the prefix that remains to be applied in it.

    Averaged weights are preferred, then the usual keys, unless the prefix names another key.

    Raises:
        DataError: the file holds no state dict, or several.
    """
    known = [place for place in found if not place or _is_known_key(place)]
    for names in (_AVERAGED, _USUAL):
        known = [place for place in known if any(part in names for part in place.split("."))] or known
    named = [place for place in found if place and f"{prefix}.".startswith(f"{place}.")]
    if len(known) == 1 and (not named or _form_with(found[known[0]], prefix)):
        return known[0], prefix
    if named:
        return named[0], prefix.removeprefix(named[0]).removeprefix(".")
    held = loaded.items() if isinstance(loaded, dict) else [("", loaded)]
    inert = [key for key, value in held if isinstance(value, Inert | Array)]
    if inert and (not found or any(key in _KEYS for key in inert)):
        raise DataError(_untrusted(path))
    if not found:
        raise DataError(f"{path}: contains no state_dict; save one with torch.save(model.state_dict(), path)")
    places = known or list(found)
    raise DataError(
        f"{path}: contains weights under {some(places)}; select one of these keys, as in --prefix {places[0]}"
    )


def _select_subtree(state: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    return subtree(_form_with(state, prefix) or unwrapped(state), prefix, path) if prefix else state


def _form_with(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor] | None:
    """Return the form with fewest wrappers removed in which a name begins with the prefix; None if there is none."""
    begin = prefix.removesuffix(".") + "."
    return next((form for form in forms(state) if any(name.startswith(begin) for name in form)), None)


def is_state(found: Any) -> bool:
    """Whether `found` is a non-empty dictionary from names to tensors."""
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    )


_MAGIC_BYTES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # first bytes of torch.save and pickle files


def load_inert(path: Path) -> Any:
    """Load a torch.save file without executing code; NumPy arrays become tensors, NumPy numbers Python's.

    Objects of classes other than torch's and NumPy's become inert stand-ins.

    Raises:
        DataError: the file is missing, damaged, or can only be opened by executing code.
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
            stand_ins += [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in foreign]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # unreadable protocols are refused below
            return as_tensors(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        _refuse_pointer(path)
        if start in _MAGIC_BYTES:
            raise DataError(_untrusted(path)) from error
        raise DataError(f"{path}: not a readable weights file: {first_line(error)}") from error
    except Exception as error:  # zipfile and torch raise various errors for a damaged file
        _refuse_pointer(path)
        if "torchscript" in str(error).lower():
            raise DataError(_untrusted(path, "a TorchScript module")) from error
        reason = first_line(error) if start in _MAGIC_BYTES else "neither a torch nor a .safetensors file"
        raise DataError(f"{path}: not a readable weights file: {reason}") from error


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: is a Git LFS pointer, not the weights; run git lfs pull")


def _untrusted(path: Path, what: str = "a pickled module or other objects") -> str:
    return (
        f"{path}: holds {what}, and opening it executes the code in it; if you trust its origin, pass --trust "
        "where its code is installed, or save its state_dict()"
    )


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
