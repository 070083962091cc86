"""What a recording depends on, checked at every call: has anything of it changed since?

Nearly always nothing has, so the check goes over all contents at once by identity, in C: under a millisecond for
ResNet-50 (`benchmarks/guard.py`). Where something is another object it is looked at more closely: an equal number is no
change.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...kernels.precision import tf32_settings
from .holders import Holder
from .looks import FORM, PLAIN, Looks, counting
from .process import tracks
from .state import Effect, Snapshot, same_value
from .walk import Found, is_leaf


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
        return same_value(a, b) or bool(a != a and b != b)
    except (ValueError, RuntimeError):  # arrays
        return bool((a == b).all())


@dataclass
class _Watched:
    """One holder and what it is compared with."""

    holder: Holder
    contents: dict[Any, Any]
    loose: Container[Any] = ()  # keys that every call replaces

    def holds(self) -> bool:
        now = self.holder.read()
        if list(now) != list(self.contents):
            return False
        for key, old in self.contents.items():
            new = now[key]
            if key in self.loose or new is old:
                continue
            if not (type(new) is type(old) and isinstance(old, PLAIN) and is_leaf(old) and _equal(new, old)):
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
        forms = list(map(FORM, tensors))
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
            none looks at may have any form: the map that a hook kept of an image of another size. Which one it is,
            and whether it is the same as another, may be asked without a look, so it counts in any case.
        given: the tensors that the call gets, which a forward may compare with what it has kept (`image is self.last`).

    Attributes:
        kept: identities of the tensors, arrays and layers that it keeps alive, those in the network's attributes.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        effects: Iterable[Effect],
        reads: Iterable[Read],
        constants: Iterable[Tensor],
        seen: Container[int],
        given: Sequence[Any] = (),
    ):
        found = snapshot.found
        self.loose: list[tuple[Holder, dict[Any, Callable[[Tensor], Any]]]] = []  # of keys what counts of their tensors
        self.reads, self.constants = tuple(reads), tuple(constants)
        loose = replaced(effects)
        below = inside_of(found, loose)
        quick: list[tuple[Holder, dict[Any, Any]]] = []
        self.slow: list[_Watched] = []
        self.named: list[Mapping[Any, Any]] = []  # parameters and buffers: programs find them by name
        empty: list[Any] = []
        for holder, contents in zip(found.holders, snapshot.contents, strict=True):
            if id(holder) in below or holder.kind == "tuple":
                continue
            keys = loose.get(id(holder), ())
            if holder.kind in ("_parameters", "_buffers"):
                self.named.append(holder.owner)
            elif keys:
                self.loose.append((holder, {key: counting(contents[key], seen) for key in contents if key in keys}))
                kept = {key: None if key in keys else value for key, value in contents.items()}
                self.slow.append(_Watched(holder, kept, keys))  # not the maps of the call before
            elif not contents and isinstance(holder.owner, (dict, list, set)):
                empty.append(holder.owner)
            elif holder.fast is not None:
                quick.append((holder, contents))
            else:
                self.slow.append(_Watched(holder, contents))
        self.empty = empty
        # Those of the libraries, where calls are replaced.
        self.classes = [*map(vars, found.classes), vars(functional), vars(Tensor)]
        self.kinds = list(found.modules.values())
        self.types = list(map(type, self.kinds))
        held = [*(contents for _, contents in quick), *(watched.contents for watched in self.slow)]
        pairs = zip(found.holders, snapshot.contents, strict=True)
        tuples = [each for holder, each in pairs if holder.kind == "tuple" and id(holder) not in below]
        alive = chain(self.kinds, chain.from_iterable(each.values() for each in (*held, *tuples)))
        kept = [thing for thing in alive if isinstance(thing, (Tensor, nn.Module, np.ndarray))]
        self.kept, self.same = set(map(id, kept)), {id(thing) for thing in kept if isinstance(thing, Tensor)}
        self.given = self._given(given)
        self.quick, self.fast = quick, [holder.fast for holder, _ in quick]
        self.class_alive = list(chain.from_iterable(map(_values, self.classes)))
        self.class_ids = self._of_classes()
        self._note()
        self.tensors = _Tensors(self._state())
        strict = [*chain.from_iterable(each.values() for each in held), *self.class_alive]
        self.elsewhere = {id(thing) for thing in strict if thing is not None} if self.loose else set[int]()
        self.looks = self._looks(given)
        self.process = process_state()

    def _note(self) -> None:
        """The identities of all contents, which are kept alive so that no other object can have theirs."""
        self.sizes, self.keys = list(map(len, self.fast)), list(chain.from_iterable(self.fast))
        self.alive = list(chain.from_iterable(map(_values, self.fast)))
        self.ids = list(map(id, self.alive))

    def _state(self) -> list[Any]:
        """The parameters, buffers and constants as they are now."""
        return [*chain.from_iterable(space.values() for space in self.named), *self.constants]

    def _given(self, given: Sequence[Any]) -> list[Any]:
        """Which of the tensors of a call the network has, where they stay or as its state."""
        places = {id(thing): place for place, thing in enumerate(self._state()) if thing is not None}
        return [places.get(key, key if key in self.same else None) for key in map(id, given)]

    def _looks(self, given: Sequence[Any]) -> list[Any]:
        """What counts of what every call replaces, as it is now; all else has to be as it was."""
        if not self.loose:
            return []
        places: dict[int, Any] = {id(thing): place for place, thing in enumerate(self._state())}
        places.update((id(tensor), ("given", place)) for place, tensor in enumerate(given) if tensor is not None)

        def known(thing: Any) -> Any:
            return ("elsewhere", id(thing)) if id(thing) in self.elsewhere else places.get(id(thing))

        looks = Looks(known)
        asked = ((holder.read(), forms) for holder, forms in self.loose)
        return [looks.at(now.get(key), form) for now, forms in asked for key, form in forms.items()]

    def _of_classes(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(_values, self.classes))))

    def holds(self, given: Sequence[Any] = ()) -> bool:
        """Whether nothing has changed."""
        if (
            any(self.empty)
            or self._given(given) != self.given
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
        if not all(watched.holds() for watched in self.slow) or self.looks != self._looks(given):
            return False
        return all(read.holds() for read in self.reads)


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
