"""What a forward changes besides its result, as a recording finds it, and how each later call does the same.

Before a recording the contents of every holder (holders.py) are noted; after it they are compared and put back. A
change becomes an `Effect`, done once at the end of each call: a counter that went from 3 to 4 is set to 4 (the guard
holds for 3 alone, so the next call is recorded anew), a feature left in an attribute or appended to a list is the value
that the call has computed.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError
from .holders import Holder
from .trees import realize, taken_apart
from .walk import Found

_PLAIN = (int, float, complex, str, bytes, type(None))


@dataclass
class Effect:
    """A change of one holder at the end of each call.

    Attributes:
        contents: by key what is set, as a pytree with `Ref`s in the place of tensors.
        gone: keys that are deleted.
        appended: of a list: what is put behind its end; None where the list gets `contents` anew.
    """

    holder: Holder
    contents: dict[Any, Any]
    gone: tuple[Any, ...] = ()
    appended: list[Any] | None = None

    @property
    def tree(self) -> Any:
        return self.contents, self.appended

    def apply(self, bind: Callable[[Any], Any]) -> None:
        """Do it; `bind` puts tensors in the place of `Ref`s."""
        thing = owner_now(self.holder)
        contents, appended = bind(self.tree)
        contents = {key: realize(value) for key, value in contents.items()}
        if appended is not None:
            thing.extend(realize(appended))
        elif isinstance(thing, (list, deque)):
            thing.clear()
            thing.extend(contents.values())
        elif isinstance(thing, set):
            thing.clear()
            thing.update(contents.values())
        elif isinstance(thing, dict):
            for key in self.gone:
                thing.pop(key, None)
            kind: Any = OrderedDict if isinstance(thing, OrderedDict) else dict
            for key, value in contents.items():
                kind.__setitem__(thing, key, value)  # a Counter's own `update` would add
        else:
            now = {**self.holder.read(), **contents}
            self.holder.write({key: value for key, value in now.items() if key not in self.gone})


def owner_now(holder: Holder) -> Any:
    """The object whose contents a holder has, found again where another one may have taken its place."""
    if holder.parent is None:
        return holder.owner
    above, key = holder.parent
    thing = owner_now(above)
    found = thing[key] if isinstance(thing, (dict, list, deque)) else above.read()[key]
    return vars(found) if isinstance(holder.owner, dict) and not isinstance(found, dict) else found


class Snapshot:
    """The contents of all holders at one time."""

    def __init__(self, found: Found):
        self.found = found
        self.contents = [holder.read() for holder in found.holders]

    def now(self) -> list[int]:
        """The identities of all contents, to see whether any changes."""
        return [id(value) for holder in self.found.holders for value in holder.read().values()]

    def restore(self) -> None:
        """Put everything back."""
        for holder, contents in zip(self.found.holders, self.contents, strict=True):
            if not _same(holder.read(), contents):
                holder.write(contents)

    def effects(self, leaf: Callable[[Tensor], Any], twins: Mapping[int, Tensor]) -> list[Effect]:
        """What has changed since, with `leaf(tensor)` in the place of tensors that the forward made.

        Args:
            twins: by the identity of real tensors what stood for them: assigning one (`self.count += 1`) is no change.

        Raises:
            UnsupportedError: naming module and attribute, for changes that cannot be done again.
        """
        found = []
        for holder, before in zip(self.found.holders, self.contents, strict=True):
            after = {k: before[k] if _twin(before.get(k), v, twins) else v for k, v in holder.read().items()}
            if not _same(after, before):
                found.append(self._effect(holder, before, after, leaf))
        return found

    def _effect(self, holder: Holder, before: Mapping[Any, Any], after: Mapping[Any, Any], leaf: Any) -> Effect:
        self._refuse(holder, before, after)

        def tree(key: Any, value: Any) -> Any:
            return taken_apart(value, leaf, self.was_there, f"{holder.name}: attribute '{key}'")

        if isinstance(holder.owner, (list, deque, set)):
            old, new = list(before.values()), list(after.values())
            grown = isinstance(holder.owner, list) and len(new) > len(old) > 0
            if grown and all(a is b for a, b in zip(old, new, strict=False)):
                return Effect(holder, {}, (), [tree(len(old) + n, v) for n, v in enumerate(new[len(old) :])])
            return Effect(holder, {n: tree(n, value) for n, value in enumerate(new)})
        changed = {k: tree(k, v) for k, v in after.items() if k not in before or not _alike(before[k], v)}
        return Effect(holder, changed, tuple(k for k in before if k not in after))

    def was_there(self, thing: Any) -> bool:
        """Whether an object was found in the walk before the recording."""
        return self.found.ids.get(id(thing)) is thing

    def _refuse(self, holder: Holder, before: Mapping[Any, Any], after: Mapping[Any, Any]) -> None:
        changed = [k for k in {**before, **after} if k not in before or k not in after or before[k] is not after[k]]
        if holder.kind in ("_parameters", "_modules"):
            what = "parameter" if holder.kind == "_parameters" else "layer"
            raise UnsupportedError(
                f"module {holder.name} makes or replaces its {what} '{changed[0]}' in the forward; run the network "
                "once before, or make it in the constructor"
            )


def _twin(old: Any, new: Any, twins: Mapping[int, Tensor]) -> bool:
    return isinstance(new, Tensor) and twins.get(id(old)) is new


def _alike(old: Any, new: Any) -> bool:
    """Whether one is the other, or a plain value like it."""
    return old is new or (type(old) is type(new) and isinstance(old, _PLAIN) and old == new)


def _same(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    if len(now) != len(before):
        return False
    pairs = zip(now.items(), before.items(), strict=True)
    return all(a == b and _alike(u, v) for (a, v), (b, u) in pairs)
