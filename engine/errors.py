"""Every error that gigamorph raises on purpose: one line that says what is wrong, where, and what to do."""

from __future__ import annotations


class GigamorphError(Exception):
    """Base of all errors raised by gigamorph; the command line prints it as one line and exits with 2."""


class UnsupportedError(GigamorphError):
    """The network holds something that cannot be computed exactly tile by tile."""


class ChangedError(GigamorphError, RuntimeError):
    """What the backward needs was changed in place after the forward; stock PyTorch raises a RuntimeError for it."""


class BudgetError(GigamorphError):
    """No tile fits the memory budget."""


class NoRoomError(BudgetError):
    """Not even the parameters fit the memory budget, whatever the image is."""


class DataError(GigamorphError):
    """An image, table or weights file cannot be used; the message names the file."""


class MorphError(GigamorphError):
    """A network cannot be grown as asked without changing its function; nothing has been changed."""
