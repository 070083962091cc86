"""Third-party state dicts: removal of wrapper prefixes, renaming, and loading into a network.

Also the limit on the memory in which a network that a file names is built.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import pickle
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import DataError, GigamorphError
from ..torch_private import TorchDispatchMode

_COMPILED, _WRAPPED = "_orig_mod", "module."  # by torch.compile; by DDP and AveragedModel
_COUNTER = "n_averaged"  # of AveragedModel, next to the wrapped names
_LISTED = 10
# Limits of `bounded`: values and tensors per value and tensor of the weights, and how many more there may be.
_FACTOR = 4  # allows for tables, masks, and tensors from which weights are drawn
_FREE = 2**27  # values
_TENSORS = 100_000


def unwrapped(state: Mapping[str, Tensor], own: Container[str] = ()) -> dict[str, Tensor]:
    """Remove the prefixes of torch.compile, DDP and AveragedModel from the names of weights.

    A wrapper's prefix is on all names and not part of the network's own names: a child may be called module.

    Args:
        own: names of the network; the form with most of these names is returned. If they are empty or no form has one,
            all wrappers are removed.
    """
    found = list(forms(state))
    fitting = [sum(name in own for name in form) for form in found]
    return found[fitting.index(max(fitting))] if any(fitting) else found[-1]


def forms(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the weights as they are, then with one wrapper after the other removed."""
    form = dict(state)
    yield form
    plain = {".".join(part for part in name.split(".") if part != _COMPILED): value for name, value in form.items()}
    if plain.keys() != form.keys():  # inside names, if only a part was compiled
        yield plain
    form = plain
    while (names := [name for name in form if name != _COUNTER]) and all(n.startswith(_WRAPPED) for n in names):
        form = {name.removeprefix(_WRAPPED): form[name] for name in names}
        yield form


def subtree(state: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it.

    Raises:
        DataError: no name begins with it; the message names the existing prefixes.
    """
    if prefix and not prefix.endswith("."):
        prefix += "."
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        first = dict.fromkeys(name.split(".")[0] + "." for name in state if "." in name)
        raise DataError(f"{path}: no weight begins with {prefix!r}; existing prefixes: {some(first)}")
    return found


def common_prefix(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Return the prefix of all names of a file whose rest is in the network; "" if there is none."""
    first = next(iter(tensors), "")
    parts = first.split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        if first.removeprefix(prefix) in own and all(name.startswith(prefix) for name in tensors):
            return prefix
    return ""


def renamed(state: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Replace the beginning of each name by the first rule (theirs, ours) that fits; other names stay."""

    def name_of(name: str) -> str:
        for theirs, ours in rules:
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return name

    return {name_of(name): value for name, value in state.items()}


def load_exactly(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load all weights of a network, and refuse any name, shape or value that does not fit.

    BatchNorm's counters may be missing: older files lack them, and they do not affect results. If the network has a
    tensor under several names, one of them is enough. Other floating dtypes are converted to the network's.

    Raises:
        DataError: names are missing or unknown (the message lists at most ten of each, with the nearest ones), shapes
            differ, values are not finite, or differ where the network has one tensor under several names.
    """
    own = own_tensors(network)
    tied = _tied(own)
    present = [[name for name in names if name in state] for names in tied]
    apart = [n for n in present if any(not _equal(state[n[0]], state[name]) for name in n[1:])]
    state = {**state, **_from_tied_names(tied, state)}
    problems = differences(own, state)
    if apart:
        each = " and ".join(apart[0])
        problems.append(f"{each} are one tensor of the model, but differ in the file")
    fitting = _prefixes(own, state) if problems else []
    if fitting:
        rest = [name for name in state if not name.startswith(f"{fitting[0]}.")]
        raise DataError(
            f"{path}: contains all names of the model after {' and after '.join(map(repr, fitting))}, and others "
            f"({some(rest)}); select them with --prefix {fitting[0]}"
        )
    dense = {name: value for name, value in state.items() if _dense(value)}
    bad = {name: _count_not_finite(value) for name, value in dense.items() if value.is_floating_point()}
    bad = {name: count for name, count in bad.items() if count}
    if bad:
        count = sum(bad.values())
        problems.append(f"{count} value{'s are' if count > 1 else ' is'} NaN or infinite, in {some(bad)}")
    if problems:
        raise DataError(f"{path}: weights do not fit the model: {'; '.join(problems)}")
    counters = {name: value for name, value in network.state_dict().items() if name not in state}
    network.load_state_dict({**state, **counters}, strict=True)


def _tied(own: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of each tensor that the network has under several names."""
    found: dict[tuple, list[str]] = {}
    for name, value in own.items():
        place = value.untyped_storage().data_ptr() if _dense(value) else 0  # 0: no storage, as on the meta device
        if place:
            found.setdefault((place, value.storage_offset(), value.shape, value.stride()), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and _dense(one) and _dense(other)
    return alike and torch.equal(one, other.to(one.dtype))


def _from_tied_names(tied: Sequence[Sequence[str]], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a file omits because it has them under another name of the network (safetensors does)."""
    found = {}
    for names in tied:
        present = [name for name in names if name in state]
        found |= {name: state[present[0]] for name in names if present and name not in state}
    return found


def _count_not_finite(value: Tensor) -> int:
    small = value.element_size() == 1  # 8-bit floats have no isfinite
    return int((~(value.float() if small else value).isfinite()).sum())


def own_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a network.

    Raises:
        GigamorphError: a module stores something other than a tensor there, or a tensor has no shape yet.
    """
    found = {name: value for name, value in network.state_dict().items() if value is not None}
    for name, value in found.items():
        if is_lazy(value):
            raise GigamorphError(
                f"{type(network).__name__}: {name} has no shape before its first forward (a lazy module); use a "
                "factory that calls the network once before it returns it"
            )
        if not isinstance(value, Tensor):
            raise GigamorphError(
                f"{type(network).__name__}: stores a {type(value).__name__} as {name} in its state_dict, which a file "
                "of tensors cannot contain; use a network whose get_extra_state returns a tensor or nothing"
            )
    return found


def _prefixes(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes under which a file has all names of a network, among other names."""
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    last = f".{names[0]}" if names else "\0"
    found = [name.removesuffix(last) for name in state if name.endswith(last)]
    return [prefix for prefix in found if all(f"{prefix}.{name}" in state for name in names)]


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return why weights do not fit a network's, one phrase each: at most ten names, with the nearest of the others."""
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(value.shape)}, the model has {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and own[name].shape != value.shape
    ]
    kinds = [
        f"{name} is {_dtype_name(value)}, the model has {_dtype_name(own[name])}"
        for name, value in state.items()
        if name in own and _loses_information(value, own[name])
    ]
    found = []
    if missing:
        found.append(f"{_count(missing)} of the model missing in the file: {some(_with_nearest(missing, extra))}")
    if extra:
        found.append(f"{_count(extra)} of the file not in the model: {some(_with_nearest(extra, missing))}")
    if shapes:
        found.append(f"{len(shapes)} of other shape: {some(shapes)}")
    if kinds:
        found.append(f"{len(kinds)} of another kind, whose conversion would lose information: {some(kinds)}")
    return found


def _loses_information(value: Tensor, own: Tensor) -> bool:
    """Whether a conversion to the dtype and layout of the network's tensor loses, or may lose, information."""
    if own.is_floating_point():
        return not (value.is_floating_point() and _dense(value))
    whole = value.isfinite() & (value == value.trunc()) if value.is_floating_point() else None
    return whole is not None and not bool(whole.all())


def _dense(value: Tensor) -> bool:
    return value.layout is torch.strided


def _dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.") + ("" if _dense(value) else f" ({value.layout})")


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} name is" if len(names) == 1 else f"{len(names)} names are"


def _with_nearest(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Append to each name the nearest of the others: the same one with another prefix, else one of similar spelling."""
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


class bounded(TorchDispatchMode):  # noqa: N801
    """Context manager that refuses to allocate tensors whose total size far exceeds that of the weights.

    Args:
        weights: the weights that will be loaded into the network.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = _FACTOR * sum(value.numel() for value in weights.values()) + _FREE
        self._tensors = _FACTOR * len(weights) + _TENSORS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = args[0] if args and isinstance(args[0], list | tuple) else ()
        if size and all(isinstance(one, int) for one in size):
            self._values -= max(0, math.prod(size))
            self._tensors -= 1
        if self._values < 0 or self._tensors < 0:
            raise DataError("it would be far larger than its weights; correct its arguments, or use another file")
        return func(*args, **(kwargs or {}))


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """Format an error in one line."""
    if isinstance(error, pickle.UnpicklingError):  # its own text advises to execute the file
        return "not a torch file, or one that contains more than tensors"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
