"""What is done to foreign pieces from outside, and the values outside of networks that they read or change.

In a file of its own, so that nothing of it is among the globals of a piece's forward.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .. import changes, hooks, state
from ..piece import PIECES
from .base import Foreign


def foreign_pieces() -> dict[str, type[Foreign]]:
    """The classes of all foreign pieces by name."""
    return {name: kind for name, kind in sorted(PIECES.items()) if issubclass(kind, Foreign)}


def pieces_of(net: nn.Module) -> list[Foreign]:
    return [module for module in net.modules() if isinstance(module, Foreign)]


@contextlib.contextmanager
def around(net: nn.Module) -> Iterator[None]:
    """The contexts in which the pieces of a network want it to be called."""
    with contextlib.ExitStack() as stack:
        for piece in pieces_of(net):
            stack.enter_context(piece.around())
        yield


def watch(name: str, owner: Any, attribute: str) -> None:
    """Compares an attribute of a module, class or object after each visit, and restores it before each run."""
    initial = copy.deepcopy(getattr(owner, attribute))
    watch_call(
        name,
        lambda: getattr(owner, attribute),
        lambda value: setattr(owner, attribute, value),
        lambda: copy.deepcopy(initial),
    )


def watch_call(
    name: str, read: Callable[[], Any], write: Callable[[Any], Any], first: Callable[[], Any] | None = None
) -> None:
    """The same for a value that two functions read and write."""
    initial = None if first else read()
    state.WATCHED[name] = state.Watched(read, write, first or (lambda: initial))


def _fit(net: nn.Module, _dice: random.Random) -> None:
    for piece in pieces_of(net):
        piece.fit(net)


def _change(number: int) -> Callable[[nn.Module, random.Random], None]:
    def change(net: nn.Module, _dice: random.Random) -> None:
        for piece in pieces_of(net):
            piece.change(net, number)

    return change


# Known by name to the scenarios of `draw_foreign`; of weight 0, so that `draw` never takes them.
hooks.FITTINGS["foreign"] = _fit
_fit.weight = 0
for _number in (1, 2):
    changes.CHANGES[f"foreign_{_number}"] = _change(_number)
    changes.CHANGES[f"foreign_{_number}"].weight = 0
