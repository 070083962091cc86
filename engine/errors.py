"""Every error that gigamorph raises on purpose: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import functools
from typing import Any, ClassVar


class GigamorphError(Exception):
    """Base of all errors raised by gigamorph; the command line prints it as one line and exits with 2."""


class UnsupportedError(GigamorphError):
    """The network holds something that cannot be computed exactly tile by tile."""


class ForwardError(UnsupportedError):
    """What the network's own forward raises for an image; `forward_error` makes it.

    Attributes:
        kind: class of the error that the forward raises.
    """

    kind: ClassVar[type[Exception]]

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would quote it

    def __reduce__(self) -> Any:
        return forward_error, (self.kind, str(self.args[0]))


def forward_error(kind: type[Exception], message: str) -> ForwardError:
    """A `ForwardError` that is also an error of the class `kind`."""
    return _forward_error(kind)(message)


@functools.cache
def _forward_error(kind: type[Exception]) -> type[ForwardError]:
    return type(kind.__name__, (ForwardError, kind), {"kind": kind, "__module__": __name__})


def from_network(error: Exception) -> bool:
    """Whether the network's own code has raised an error, not gigamorph."""
    return isinstance(error, ForwardError) or not isinstance(error, GigamorphError)


class ChangedError(GigamorphError, RuntimeError):
    """What the backward needs was changed in place after the forward; stock PyTorch raises a RuntimeError for it."""


class BudgetError(GigamorphError):
    """No tile fits the memory budget."""


class NoRoomError(BudgetError):
    """Not even the parameters fit the memory budget, whatever the image is."""


class DataError(GigamorphError):
    """An image, table or weights file cannot be used; the message names the file."""


class UntrustedError(GigamorphError, PermissionError):
    """A file names code of its own, which is not run unless the user trusts it."""


class MorphError(GigamorphError):
    """A network cannot be grown as asked without changing its function; nothing has been changed."""


def by_name(name: str) -> type[GigamorphError] | None:
    """The class of errors of gigamorph's that has this name."""
    found = globals().get(name)
    is_own = isinstance(found, type) and issubclass(found, GigamorphError) and not issubclass(found, ForwardError)
    return found if is_own else None
