"""What a forward changes besides its result, as a recording finds it, and how each later call does the same.

Before a recording the contents of every holder (holders.py) are noted; after it they are compared and put back. A
change becomes an `Effect`, done once at the end of each call: a counter that went from 3 to 4 is set to 4 (the guard
holds for 3 alone, so the next call is recorded anew), a feature left in an attribute or appended to a list is the value
that the call has computed.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import UnsupportedError
from .holders import Holder, plain_kind
from .trees import Kept, TakenApart, realize
from .walk import Found

_PLAIN = (int, float, complex, str, bytes, type(None))


@dataclass
class Effect:
    """A change of one holder at the end of each call.

    Attributes:
        contents: by key what is set, as a pytree with `Ref`s in the place of tensors.
        gone: keys that are deleted.
        appended: of a list: what is put behind its end; None where the list gets `contents` anew.
        order: of a dict all its keys in their order, if it is not by what is set and deleted.
        keys: those of `contents` that the forward has made, and what each call makes in their place.
    """

    holder: Holder
    contents: dict[Any, Any]
    gone: tuple[Any, ...] = ()
    appended: list[Any] | None = None
    order: tuple[Any, ...] = ()
    keys: dict[Any, Any] = field(default_factory=dict)

    @property
    def tree(self) -> Any:
        return self.contents, self.appended, self.keys

    def ready(self, bind: Callable[[Any], Any], shared: dict[int, Any]) -> Callable[[], None]:
        """What does it; `bind` puts tensors in the place of `Ref`s, `shared` see `realize`.

        All effects of a call are made ready before the first is done: one may replace what another finds.
        """
        contents, appended, keys = bind(self.tree)
        keys = {key: realize(made, shared) for key, made in keys.items()}
        contents = {keys.get(key, key): realize(value, shared) for key, value in contents.items()}
        appended = None if appended is None else realize(appended, shared)
        order = [keys.get(key, key) for key in self.order]
        return partial(self._do, owner_now(self.holder), contents, appended, order)

    def _do(self, thing: Any, contents: dict[Any, Any], appended: list[Any] | None, order: list[Any]) -> None:
        if appended is not None:
            thing.extend(appended)
        elif isinstance(thing, (list, deque)):
            thing.clear()
            thing.extend(contents.values())
        elif isinstance(thing, set):
            thing.clear()
            thing.update(contents.values())
        elif isinstance(thing, dict):
            for key in self.gone:
                thing.pop(key, None)
            kind = plain_kind(thing)
            for key, value in contents.items():
                kind.__setitem__(thing, key, value)  # a Counter's own `update` would add
            for key in order:
                kind.__setitem__(thing, key, kind.pop(thing, key))
        else:
            holder = self.holder
            if thing is not holder.owner and holder.again is not None:
                holder = holder.again(thing) or holder
            now = {**holder.read(), **contents}
            holder.write({key: value for key, value in now.items() if key not in self.gone})


def owner_now(holder: Holder) -> Any:
    """The object whose contents a holder has, found again where another one may have taken its place."""
    if holder.parent is None:
        return holder.owner
    found = Place.of(*holder.parent)()
    return vars(found) if holder.kind == "attributes" else found


@dataclass(frozen=True)
class Place:
    """Where the network has something, told so that no object on the way is kept that calls replace.

    Attributes:
        root: a holder that stays.
        owner: the identity of its owner.
        steps: from its contents on, keys, and whether each is one of an object's attributes.
    """

    root: Holder = field(compare=False)
    owner: int
    steps: tuple[tuple[bool, Any], ...]

    @classmethod
    def of(cls, holder: Holder, key: Any) -> Place:
        steps = [(holder.kind == "attributes", key)]
        while holder.parent is not None:
            holder, key = holder.parent
            steps.insert(0, (holder.kind == "attributes", key))
        return cls(holder, id(holder.owner), tuple(steps))

    def __call__(self) -> Any:
        """What is there now."""
        (_, first), *rest = self.steps
        found = self.root.read()[first]
        for attribute, key in rest:
            within = vars(found) if attribute else found
            within = within.flat if isinstance(within, np.ndarray) else within
            found = within[key] if isinstance(within, (dict, list, tuple, deque, np.flatiter)) else getattr(within, key)
        return found


class Snapshot:
    """The contents of all holders at one time."""

    def __init__(self, found: Found):
        self.found = found
        self.contents = [holder.read() for holder in found.holders]
        self._places: dict[int, Place] | None = None
        self._replaced = frozenset[int]()

    def now(self) -> list[int]:
        """The identities of all contents, to see whether any changes."""
        return [id(value) for holder in self.found.holders for value in holder.read().values()]

    def replace(self, others: Mapping[int, Any]) -> None:
        """Put others, by the identities of what they replace, into the holders, and the tuples there."""

        def other(thing: Any) -> Any:
            if isinstance(thing, tuple) and any(other(part) is not part for part in thing):
                parts = map(other, thing)
                return type(thing)._make(parts) if hasattr(thing, "_make") else tuple(parts)  # pyright: ignore
            if type(thing) is weakref.ref and id(thing()) in others:
                return weakref.ref(others[id(thing())])
            return others.get(id(thing), thing)

        self._replaced = frozenset(others)
        for holder, contents in zip(self.found.holders, self.contents, strict=True) if others else ():
            now = {key: other(value) for key, value in contents.items()}
            if any(now[key] is not value for key, value in contents.items()):
                holder.write(now)

    def restore(self) -> None:
        """Put everything back."""
        for holder, contents in zip(self.found.holders, self.contents, strict=True):
            if not _same(holder.read(), contents):
                holder.write(contents)

    def changes(self, twins: Mapping[int, Tensor]) -> Iterator[tuple[Holder, dict[Any, Any], dict[Any, Any]]]:
        """The holders that have changed since, with their contents before and after.

        Args:
            twins: by the identity of real tensors what stood for them: assigning one (`self.count += 1`) is no change.
        """
        for holder, before in zip(self.found.holders, self.contents, strict=True):
            # What the call is given may be another tensor in the next one, and is put there again.
            stays = isinstance(holder.owner, (list, deque, set)) or holder.kind in ("_parameters", "_buffers")
            anew = frozenset[int]() if stays else self._replaced
            after = {k: before[k] if _twin(before.get(k), v, twins, anew) else v for k, v in holder.read().items()}
            if not _same(after, before):
                yield holder, before, after

    def effects(self, apart: TakenApart, twins: Mapping[int, Tensor]) -> list[Effect]:
        """What has changed since, taken apart.

        Args:
            twins: see `changes`.

        Raises:
            UnsupportedError: naming module and attribute, for changes that cannot be done again.
        """
        return [self._effect(*change, apart) for change in self.changes(twins)]

    def _effect(self, holder: Holder, before: Mapping[Any, Any], after: Mapping[Any, Any], apart: TakenApart) -> Effect:
        self._refuse(holder, before, after)

        def tree(key: Any, value: Any) -> Any:
            return apart.tree(value, f"{holder.name}: attribute '{key}'")

        if isinstance(holder.owner, (list, deque, set)):
            old, new = list(before.values()), list(after.values())
            grown = isinstance(holder.owner, list) and len(new) > len(old) > 0
            if grown and all(a is b for a, b in zip(old, new, strict=False)):
                return Effect(holder, {}, (), [tree(len(old) + n, v) for n, v in enumerate(new[len(old) :])])
            return Effect(holder, {n: tree(n, value) for n, value in enumerate(new)})
        changed = {k: tree(k, v) for k, v in after.items() if k not in before or not _alike(before[k], v)}
        keys = apart.keys(changed) if holder.kind == "dict" else {}
        gone = tuple(k for k in before if k not in after)
        order = [*(k for k in before if k in after), *(k for k in after if k not in before)]
        moved = holder.kind == "dict" and order != list(after)
        return Effect(holder, changed, gone, None, tuple(after) if moved else (), keys)

    def was_there(self, thing: Any) -> bool:
        """Whether an object was found in the walk before the recording."""
        return self.found.ids.get(id(thing)) is thing

    def kept(self, thing: Any) -> Kept | None:
        """An object that was there before the recording, and where each call finds it; None for all else."""
        if not self.was_there(thing):
            return None
        return Kept(self.places().get(id(thing), lambda: thing))

    def places(self) -> dict[int, Place]:
        """By the identity of what the holders have: the first place where it is."""
        if self._places is None:
            self._places = {}
            for holder, contents in zip(self.found.holders, self.contents, strict=True):
                if not isinstance(holder.owner, set):  # what is in a set has no place of its own
                    for key, content in contents.items():
                        if not isinstance(content, _PLAIN) and id(content) not in self._places:
                            self._places[id(content)] = Place.of(holder, key)
        return self._places

    def _refuse(self, holder: Holder, before: Mapping[Any, Any], after: Mapping[Any, Any]) -> None:
        changed = [k for k in {**before, **after} if k not in before or k not in after or before[k] is not after[k]]
        if holder.kind in ("_parameters", "_modules"):
            what = "parameter" if holder.kind == "_parameters" else "layer"
            raise UnsupportedError(
                f"module {holder.name} makes or replaces its {what} '{changed[0]}' in the forward; run the network "
                "once before, or make it in the constructor"
            )


def _twin(old: Any, new: Any, twins: Mapping[int, Tensor], anew: frozenset[int]) -> bool:
    return isinstance(new, Tensor) and twins.get(id(old)) is new and id(old) not in anew


def _alike(old: Any, new: Any) -> bool:
    """Whether one is the other, or a plain value like it."""
    return old is new or (type(old) is type(new) and isinstance(old, _PLAIN) and same_value(old, new))


def same_value(a: Any, b: Any) -> bool:
    """Whether plain values of one type are the same: 0.0 is another one than -0.0, and what is no number is itself."""
    return repr(a) == repr(b) if isinstance(a, (float, complex)) else bool(a == b)


def _same(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    if len(now) != len(before):
        return False
    pairs = zip(now.items(), before.items(), strict=True)
    return all((a is b or (not isinstance(a, Tensor) and a == b)) and _alike(u, v) for (a, v), (b, u) in pairs)
