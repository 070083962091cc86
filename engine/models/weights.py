"""State dicts of others: without the names of wrappers, renamed, and fitted to a network."""

from __future__ import annotations

import difflib
import hashlib
import pickle
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import DataError, GigamorphError

_COMPILED, _WRAPPED = "_orig_mod", "module."  # by torch.compile; by DDP and AveragedModel
_COUNTER = "n_averaged"  # of AveragedModel, beside the names that it wraps
_LISTED = 10


def unwrapped(state: Mapping[str, Tensor], own: Container[str] = ()) -> dict[str, Tensor]:
    """Weights by their names without what torch.compile, DDP and AveragedModel put before them.

    A wrapper is what all names have, and not part of the network's own names: a child of it may be called module.

    Args:
        own: the names of the network; if no wrapper more or less gives one of them, or they are not known, none is
            left.
    """
    found = list(forms(state))
    fitting = [sum(name in own for name in form) for form in found]
    return found[fitting.index(max(fitting))] if any(fitting) else found[-1]


def forms(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
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
        raise DataError(f"{path}: no weight begins with {prefix!r}; they begin with {some(first)}")
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

    BatchNorm's counters may be missing: older files lack them and no result depends on them. So may all names but one
    of a tensor that the network has under several. Weights of another floating dtype are converted to the network's.

    Raises:
        DataError: missing or other names (at most ten of each, and the nearest ones), other shapes, values that are
            not finite, or differ where the network has one tensor under several names.
    """
    own = own_tensors(network)
    tied = _tied(own)
    told = [[name for name in names if name in state] for names in tied]
    apart = [n for n in told if any(not _same(state[n[0]], state[name]) for name in n[1:])]
    state = {**state, **_untold(tied, state)}
    problems = differences(own, state)
    if apart:
        each = " and ".join(apart[0])
        problems.append(f"{each} are one tensor of the model, and differ in the file")
    fitting = _prefixes(own, state) if problems else []
    if fitting:
        rest = [name for name in state if not name.startswith(f"{fitting[0]}.")]
        raise DataError(
            f"{path}: all names of the model are there after {' and after '.join(map(repr, fitting))}, beside others "
            f"({some(rest)}); take them with --prefix {fitting[0]}"
        )
    dense = {name: value for name, value in state.items() if _dense(value)}
    bad = {name: _not_finite(value) for name, value in dense.items() if value.is_floating_point()}
    bad = {name: count for name, count in bad.items() if count}
    if bad:
        count = sum(bad.values())
        problems.append(f"{count} value{'s are' if count > 1 else ' is'} NaN or infinite, in {some(bad)}")
    if problems:
        raise DataError(f"{path}: weights do not fit the model: {'; '.join(problems)}")
    counters = {name: value for name, value in network.state_dict().items() if name not in state}
    network.load_state_dict({**state, **counters}, strict=True)


def _tied(own: Mapping[str, Tensor]) -> list[list[str]]:
    """Names under which a network has the same tensor, where there are several."""
    found: dict[tuple, list[str]] = {}
    for name, value in own.items():
        place = value.untyped_storage().data_ptr() if _dense(value) else 0  # 0: in no memory, as on the device meta
        if place:
            found.setdefault((place, value.storage_offset(), value.shape, value.stride()), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and _dense(one) and _dense(other)
    return alike and torch.equal(one, other.to(one.dtype))


def _untold(tied: Sequence[Sequence[str]], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file leaves out, as safetensors does, since it has the same tensor under another name of the network."""
    found = {}
    for names in tied:
        told = [name for name in names if name in state]
        found |= {name: state[told[0]] for name in names if told and name not in state}
    return found


def _not_finite(value: Tensor) -> int:
    small = value.element_size() == 1  # floats of 8 bits, which have no such function
    return int((~(value.float() if small else value).isfinite()).sum())


def own_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network.

    Raises:
        GigamorphError: a module of it keeps what is no tensor there, or has no shape yet.
    """
    found = {name: value for name, value in network.state_dict().items() if value is not None}
    for name, value in found.items():
        if is_lazy(value):
            raise GigamorphError(
                f"{type(network).__name__}: {name} has no shape before its first forward (a lazy module); give a "
                "factory that calls the network once before it returns it"
            )
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
    kinds = [
        f"{name} is {_kind(value)}, the model has {_kind(own[name])}"
        for name, value in state.items()
        if name in own and _loses(value, own[name])
    ]
    found = []
    if missing:
        found.append(f"{_count(missing)} of the model missing in the file: {some(_beside(missing, extra))}")
    if extra:
        found.append(f"{_count(extra)} of the file not in the model: {some(_beside(extra, missing))}")
    if shapes:
        found.append(f"{len(shapes)} of other shape: {some(shapes)}")
    if kinds:
        found.append(f"{len(kinds)} of another kind, which would lose what they say: {some(kinds)}")
    return found


def _loses(value: Tensor, own: Tensor) -> bool:
    """Whether a tensor says what one of the network's kind cannot hold, or may."""
    if own.is_floating_point():
        return not (value.is_floating_point() and _dense(value))
    whole = value.isfinite() & (value == value.trunc()) if value.is_floating_point() else None
    return whole is not None and not bool(whole.all())


def _dense(value: Tensor) -> bool:
    return value.layout is torch.strided


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.") + ("" if _dense(value) else f" ({value.layout})")


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


def some(names: Iterable[str]) -> str:
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
