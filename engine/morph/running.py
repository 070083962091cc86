"""Running a network that may fail: its inputs from an example, eval mode for a while, any error as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..errors import GigamorphError, MorphError

Example = Tensor | tuple[Tensor, ...]


def as_inputs(example: Example) -> tuple[Tensor, ...]:
    """The positional inputs that an example stands for."""
    return (example,) if isinstance(example, Tensor) else tuple(example)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and back to the mode each was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def failures(what: str) -> Iterator[None]:
    """Whatever the network's code raises, as a MorphError `what`: its first line.

    Raises:
        MorphError: see above; our own errors pass as they are.
    """
    try:
        yield
    except GigamorphError:
        raise
    except Exception as error:
        raise MorphError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """An error's first line of text, or its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
