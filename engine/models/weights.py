"""State dicts in files of others: found in a checkpoint, renamed, and fitted to a network; no code in them is run."""

from __future__ import annotations

import difflib
import hashlib
import json
import pickle
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, GigamorphError

# Where checkpoints keep weights, also in one another. As timm does, averaged ones are preferred; then come names that
# tell, then those that may be of something else (the weights of classes).
_AVERAGED = ("state_dict_ema", "model_ema", "params_ema")
_USUAL = ("state_dict", "model", "model_state_dict", "model_state", "net", "network")
_PLACES = (*_AVERAGED, *_USUAL, "checkpoint", "weights", "params", "module")
_DEPTH = 3  # of such places
_COMPILED, _WRAPPED = "_orig_mod", "module."  # by torch.compile; by DDP and AveragedModel
_COUNTER = "n_averaged"  # of AveragedModel, beside the names that it wraps
_EXTRA = "_extra_state"  # what Module.get_extra_state gives, tensor or not, under the module's name
_LISTED = 10
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
        extras: names of what modules keep beside their tensors (`get_extra_state`) and is no tensor itself.
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
            raise DataError(f"{path}: not a readable safetensors file: {first_line(error)}") from error
        return replace(state, tensors=_chosen(state.tensors, prefix, path))
    loaded = load_inert(path)
    found = dict(_states(loaded))
    place, prefix = _place(found, loaded, prefix, path)
    others = tuple(other for other in found if other != place and _known(other))
    rest = {k: v for k, v in loaded.items() if k != place.split(".")[0] and k not in _PLACES} if place else {}
    for key in place.split(".") if place else ():
        loaded = loaded[key]
    extras = tuple(name for name in loaded if name not in found[place])
    return State(path, _chosen(found[place], prefix, path), place, others, extras, rest=rest)


def _sharded(index: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """The weights in the files that an index of Hugging Face names, and these files."""
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
        shards = tuple(index.parent / Path(name).name for name in dict.fromkeys(weight_map.values()))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{index}: not a readable index of weights: {first_line(error)}") from error
    found: dict[str, Tensor] = {}
    for shard in shards:
        found |= read_state(shard).tensors
    missing = [name for name in weight_map if name not in found]
    if missing:
        raise DataError(f"{index}: its files do not hold {_some(missing)}; fetch them again")
    return found, shards


def _states(loaded: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All state dicts in what a file holds, with their places."""
    tensors = {k: v for k, v in loaded.items() if not _is_extra(k, v)} if isinstance(loaded, dict) else {}
    if is_state(tensors):
        yield place, tensors
    elif isinstance(loaded, dict) and depth < _DEPTH:
        for key, value in loaded.items():
            if isinstance(key, str):
                yield from _states(value, f"{place}.{key}" if place else key, depth + 1)


def _is_extra(name: Any, value: Any) -> bool:
    return isinstance(name, str) and f".{name}".endswith(f".{_EXTRA}") and not isinstance(value, Tensor)


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
    inert = [key for key, value in held if isinstance(value, _Inert)]
    if inert and (not found or any(key in _PLACES for key in inert)):
        raise DataError(_untrusted(path))
    if not found:
        raise DataError(f"{path}: holds no state_dict; save one with torch.save(model.state_dict(), path)")
    places = known or list(found)
    raise DataError(
        f"{path}: holds weights in {_some(places)}; name the place of those that are meant, as in --prefix {places[0]}"
    )


def _chosen(state: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    return subtree(_form_with(state, prefix) or unwrapped(state), prefix, path) if prefix else state


def _form_with(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor] | None:
    """The weights with as many wrappers as leave names that begin with a prefix."""
    begin = prefix.removesuffix(".") + "."
    return next((form for form in _forms(state) if any(name.startswith(begin) for name in form)), None)


def unwrapped(state: Mapping[str, Tensor], own: Container[str] = ()) -> dict[str, Tensor]:
    """Weights by their names without what torch.compile, DDP and AveragedModel put before them.

    A wrapper is what all names have, and not part of the network's own names: a child of it may be called module.

    Args:
        own: the names of the network; if no wrapper more or less gives one of them, or they are not known, none is
            left.
    """
    forms = list(_forms(state))
    fitting = [sum(name in own for name in form) for form in forms]
    return forms[fitting.index(max(fitting))] if any(fitting) else forms[-1]


def _forms(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The weights as they are, then without one wrapper after the other."""
    form = dict(state)
    yield form
    plain = {".".join(part for part in name.split(".") if part != _COMPILED): value for name, value in form.items()}
    if plain.keys() != form.keys():  # it stands where a module was compiled, of a part of them only inside
        yield plain
    form = plain
    while (names := [name for name in form if name != _COUNTER]) and all(n.startswith(_WRAPPED) for n in names):
        form = {name.removeprefix(_WRAPPED): form[name] for name in names}
        yield form


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


def common_prefix(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """What stands before all names of a file, where the names after it are the network's; "" otherwise."""
    first = next(iter(tensors), "")
    parts = first.split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        if first.removeprefix(prefix) in own and all(name.startswith(prefix) for name in tensors):
            return prefix
    return ""


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
    own = own_tensors(network)
    problems = differences(own, state)
    bad = [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        count = sum(int((~state[name].isfinite()).sum()) for name in bad)
        problems.append(f"{count} values are NaN or infinite, in {_some(bad)}")
    if problems:
        fitting = [repr(prefix) for prefix in _prefixes(own, state)]
        hint = f"; all names of the model are there after {_some(fitting)}: give that as --prefix" if fitting else ""
        raise DataError(f"{path}: weights do not fit the model: {'; '.join(problems)}{hint}")
    counters = {name: value for name, value in network.state_dict().items() if name not in state}
    network.load_state_dict({**state, **counters}, strict=True)


def own_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network.

    Raises:
        GigamorphError: a module of it keeps what is no tensor there.
    """
    found = {name: value for name, value in network.state_dict().items() if value is not None}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise GigamorphError(
                f"{type(network).__name__}: keeps a {type(value).__name__} as {name} in its state_dict, which a file "
                "of tensors cannot hold; give a network whose get_extra_state gives a tensor or nothing"
            )
    return found


def _prefixes(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """What stands before all names of a network in a file that has other names too."""
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    last = f".{names[0]}" if names else "\0"
    found = [name.removesuffix(last) for name in state if name.endswith(last)]
    return [prefix for prefix in found if all(f"{prefix}.{name}" in state for name in names)]


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
