"""A Ctrl-C of which the user has been told."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import rich_click as click
from click.exceptions import Exit


class Stopped(KeyboardInterrupt):
    """Raised by a command that has said in a line how it goes on."""


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Whether a Ctrl-C has come inside. Libraries that are imported just then swallow it, and fail later."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.default_int_handler(number, frame)

    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    own = plain and threading.current_thread() is threading.main_thread()
    if own:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Commands(click.RichGroup):
    """Commands that may end so: with 130 and no further word, others with a line that says who ended them."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except Stopped:
            raise Exit(130) from None
        except KeyboardInterrupt:  # click would print an empty line
            click.echo("stopped by Ctrl-C", err=True)
            raise Exit(130) from None
