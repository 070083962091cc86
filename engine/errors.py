"""Classes of the errors that gigamorph raises. A message is one line: what is wrong, where, and what to do."""

from __future__ import annotations

import functools
from typing import Any, ClassVar


class GigamorphError(Exception):
    """Base of all errors raised by gigamorph; the command line prints it as one line and exits with 2."""


class UnsupportedError(GigamorphError, NotImplementedError):
    """The network contains an op that cannot be computed exactly tile by tile.

    Attributes:
        module: path of the module that calls the op, as in `named_modules`; None if it is unknown.
        op: name of the op, as "conv2d"; None if it is unknown.
    """

    def __init__(self, message: str, module: str | None = None, op: str | None = None) -> None:
        super().__init__(message)
        self.module, self.op = module, op


class ForwardError(GigamorphError):
    """An error that the network's own forward raises for an image; `forward_error` makes it.

    Attributes:
        kind: class of the original error.
    """

    kind: ClassVar[type[Exception]]

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would quote the message

    def __reduce__(self) -> Any:
        return forward_error, (self.kind, str(self.args[0]))


def forward_error(kind: type[Exception], message: str) -> ForwardError:
    """A `ForwardError` that is also an instance of `kind`."""
    return _forward_error(kind)(message)


@functools.cache
def _forward_error(kind: type[Exception]) -> type[ForwardError]:
    return type(kind.__name__, (ForwardError, kind), {"kind": kind, "__module__": __name__})


def from_network(error: Exception) -> bool:
    """Whether the network's own code raised the error, not gigamorph."""
    return isinstance(error, ForwardError) or not isinstance(error, GigamorphError)


class ChangedError(GigamorphError, RuntimeError):
    """A tensor that the backward needs was changed in place after the forward, a RuntimeError as in stock PyTorch."""


class BudgetError(GigamorphError, MemoryError):
    """No tile fits the memory budget.

    Attributes:
        needed_bytes: the smallest budget that fits, if it is known.
    """

    def __init__(self, message: str, needed_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class NoRoomError(BudgetError):
    """The parameters alone exceed the memory budget, whatever the image is."""


class DataError(GigamorphError, ValueError):
    """An image, table or weights file cannot be used; the message names the file."""


class UntrustedError(GigamorphError, PermissionError):
    """A file refers to code that would have to run, and the user does not trust that code."""


class MorphError(GigamorphError):
    """A network cannot be grown as requested without a change of its function; it is unchanged."""


def by_name(name: str) -> type[GigamorphError] | None:
    """The error class of gigamorph with this name, or None."""
    found = globals().get(name)
    is_own = isinstance(found, type) and issubclass(found, GigamorphError) and not issubclass(found, ForwardError)
    return found if is_own else None
