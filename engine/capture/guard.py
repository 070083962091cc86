"""What a recording depends on, checked at every call: has anything of it changed since?

Nearly always nothing has, so the check goes over all contents at once by identity, in C: under a millisecond for
ResNet-50 (`benchmarks/guard.py`). Where something is another object it is looked at more closely: an equal number is no
change.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...kernels.precision import tf32_settings
from .holders import Holder
from .process import tracks
from .state import Effect, Snapshot
from .walk import Found

_FORM = attrgetter("shape", "dtype", "device", "requires_grad", "layout")
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.Size, torch.dtype, torch.device)


def _asked(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except RuntimeError:  # precisions were set by both of PyTorch's two ways
        return "mixed"


def process_state() -> tuple[Any, ...]:
    """Settings of the process that ops obey or that a forward may ask for."""
    module = nn.modules.module
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        _asked(torch.get_float32_matmul_precision),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        tf32_settings(),
        tuple(hook for hook in module._global_forward_hooks.values() if not tracks(hook)),
        tuple(hook for hook in module._global_forward_pre_hooks.values() if not tracks(hook)),
        bool(module._global_backward_hooks or module._global_backward_pre_hooks),
    )


def _form(tensor: Tensor) -> Any:
    return _FORM(tensor), tensor.stride() if tensor.layout == torch.strided else None


def _no_form(_tensor: Tensor) -> None:
    return None


def signature(thing: Any, form: Callable[[Tensor], Any] = _form) -> Any:
    """Of a value that every call replaces: nested types, plain values, and of tensors their form, not their values."""
    if isinstance(thing, Tensor):
        return type(thing), form(thing)
    if isinstance(thing, _PLAIN):
        return type(thing), thing
    if isinstance(thing, Mapping):
        return type(thing), tuple((key, signature(value, form)) for key, value in thing.items())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return type(thing), tuple(signature(value, form) for value in thing)
    own = getattr(thing, "__dict__", None)
    if own is not None and not callable(thing):
        return type(thing), tuple((key, signature(value, form)) for key, value in own.items())
    return type(thing), id(thing)


@dataclass(frozen=True)
class Read:
    """A Python value that the forward took from tensors of its state; right as long as it is the same."""

    take: Callable[[], Any]
    value: Any

    def holds(self) -> bool:
        now = self.take()
        return type(now) is type(self.value) and _equal(now, self.value)


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b) or (a != a and b != b)
    except (ValueError, RuntimeError):  # arrays
        return bool((a == b).all())


@dataclass
class _Watched:
    """One holder and what it is compared with."""

    holder: Holder
    contents: dict[Any, Any]
    loose: dict[Any, tuple[Callable[[Any], Any], Any]] = field(default_factory=dict)
    # keys that every call replaces -> what of their contents counts, and what that was

    def holds(self) -> bool:
        now = self.holder.read()
        if list(now) != list(self.contents):
            return False
        for key, old in self.contents.items():
            new = now[key]
            if key in self.loose:
                asked, was = self.loose[key]
                if asked(new) != was:
                    return False
            elif new is not old and not (type(new) is type(old) and isinstance(old, _PLAIN) and _equal(new, old)):
                return False
        return True


class _Tensors:
    """What a program depends on of its parameters, buffers and constants besides their values.

    The form of each, and which of them are one and the same: ties may be cut, and made.
    """

    def __init__(self, values: Sequence[Any]):
        self.types = list(map(type, values))
        self.places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        # What is neither a tensor nor None has to be the same object.
        self.others = [(p, v) for p, v in enumerate(values) if not isinstance(v, Tensor) and v is not None]
        self.same, self.forms, self.strides = self._same(values), *self._forms(values)

    def are_like(self, values: Sequence[Any]) -> bool:
        return (
            list(map(type, values)) == self.types
            and self._same(values) == self.same
            and all(values[place] is value for place, value in self.others)
            and self._forms(values) == (self.forms, self.strides)
        )

    @staticmethod
    def _same(values: Sequence[Any]) -> list[int]:
        """For each the place of the last that is the same object."""
        last = {key: place for place, key in enumerate(map(id, values))}
        return list(map(last.__getitem__, map(id, values)))

    def _forms(self, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        tensors = [values[place] for place in self.places]
        forms = list(map(_FORM, tensors))
        lying = (t for t, form in zip(tensors, forms, strict=True) if form[-1] is torch.strided)
        return forms, list(map(Tensor.stride, lying))


class Guard:
    """Whether a recording still says what the forward would do.

    Args:
        snapshot: the contents of the network's holders before the recording.
        effects: what each call changes.
        reads: what was taken from tensors as Python values.
        constants: tensors that are neither parameters nor buffers; of all of these the form counts, not the values.
        seen: identities of the tensors that the forward looked at, be it at their shape. What each call replaces and
            none looks at may have any form: the map that a hook kept of an image of another size.

    Attributes:
        kept: identities of the tensors that it keeps alive, those in the network's attributes.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        effects: Iterable[Effect],
        reads: Iterable[Read],
        constants: Iterable[Tensor],
        seen: Container[int],
    ):
        found = snapshot.found
        self.reads, self.constants = tuple(reads), tuple(constants)
        loose = replaced(effects)
        below = inside_of(found, loose)
        quick: list[tuple[Holder, dict[Any, Any]]] = []
        self.slow: list[_Watched] = []
        self.named: list[Mapping[Any, Any]] = []  # parameters and buffers: programs find them by name
        empty: list[Any] = []
        for holder, contents in zip(found.holders, snapshot.contents, strict=True):
            if id(holder) in below:
                continue
            keys = loose.get(id(holder), ())
            if holder.kind in ("_parameters", "_buffers"):
                self.named.append(holder.owner)
            elif keys:
                there = {key: contents[key] for key in keys if key in contents}
                asked = {key: partial(signature, form=_counting(old, seen)) for key, old in there.items()}
                loosely = {key: (ask, ask(there[key])) for key, ask in asked.items()}
                kept = {key: None if key in there else value for key, value in contents.items()}
                self.slow.append(_Watched(holder, kept, loosely))  # not the maps of the call before
            elif not contents and isinstance(holder.owner, (dict, list, set)):
                empty.append(holder.owner)
            elif holder.fast is not None:
                quick.append((holder, contents))
            else:
                self.slow.append(_Watched(holder, contents))
        self.empty = empty
        self.classes = [*(vars(cls) for cls in found.classes), vars(functional)]  # libraries' calls are replaced there
        self.kinds = list(found.modules.values())
        self.types = list(map(type, self.kinds))
        held = [*(contents for _, contents in quick), *(watched.contents for watched in self.slow)]
        self.kept = {id(thing) for each in held for thing in each.values() if isinstance(thing, Tensor)}
        self.quick, self.fast = quick, [holder.fast for holder, _ in quick]
        self.class_alive = list(chain.from_iterable(map(_values, self.classes)))
        self.class_ids = self._of_classes()
        self._note()
        self.tensors = _Tensors(self._state())
        self.process = process_state()

    def _note(self) -> None:
        """The identities of all contents, which are kept alive so that no other object can have theirs."""
        self.sizes, self.keys = list(map(len, self.fast)), list(chain.from_iterable(self.fast))
        self.alive = list(chain.from_iterable(map(_values, self.fast)))
        self.ids = list(map(id, self.alive))

    def _state(self) -> list[Any]:
        """The parameters, buffers and constants as they are now."""
        return [*chain.from_iterable(space.values() for space in self.named), *self.constants]

    def _of_classes(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(_values, self.classes))))

    def holds(self) -> bool:
        """Whether nothing has changed."""
        if (
            any(self.empty)
            or list(map(type, self.kinds)) != self.types
            or self.process != process_state()
            or list(map(len, self.fast)) != self.sizes
            or list(chain.from_iterable(self.fast)) != self.keys
            or self._of_classes() != self.class_ids
            or not self.tensors.are_like(self._state())
        ):
            return False
        if list(map(id, chain.from_iterable(map(_values, self.fast)))) != self.ids:
            if not all(_Watched(holder, contents).holds() for holder, contents in self.quick):
                return False
            self._note()  # equal numbers, of which the objects are others now
        return all(watched.holds() for watched in self.slow) and all(read.holds() for read in self.reads)


def _counting(thing: Any, seen: Container[int]) -> Callable[[Tensor], Any]:
    """What counts of tensors that every call replaces: their form, if the forward looked at any of them."""
    tensors: list[Tensor] = []
    signature(thing, tensors.append)
    return _form if any(id(tensor) in seen for tensor in tensors) else _no_form


def _values(space: Mapping[Any, Any]) -> Iterable[Any]:
    return dict.values(space) if isinstance(space, dict) else space.values()


def replaced(effects: Iterable[Effect]) -> dict[int, set[Any]]:
    """By holder the keys that each call replaces with something that it makes; counters are not among them."""
    found: dict[int, set[Any]] = {}
    for effect in effects:
        if effect.appended is None:
            keys = [k for k, v in effect.contents.items() if not isinstance(v, (int, float, complex, str, bytes))]
            found.setdefault(id(effect.holder), set()).update(keys)
    return found


def inside_of(found: Found, loose: Mapping[int, set[Any]]) -> set[int]:
    """The holders inside of values that each call replaces."""
    inside: set[int] = set()
    for holder in found.holders:
        if holder.parent is not None:
            above, key = holder.parent
            if id(above) in inside or key in loose.get(id(above), ()):
                inside.add(id(holder))
    return inside
