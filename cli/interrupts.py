"""Handling of Ctrl-C: safe during imports, and reported once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import rich_click as click
from click.exceptions import Exit

_OWN_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Stopped(KeyboardInterrupt):
    """Raised by a command that has already printed how to continue."""


@contextlib.contextmanager
def interrupt_recorded() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed inside the context.

    A Ctrl-C during the import of a library is deferred until the import ends: libraries swallow it and may fail later,
    and PyTorch's compiled code ends the process. A second Ctrl-C is not deferred.
    """
    pressed = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        first, pressed = not pressed, True
        if first and _imports_in_progress(frame) > before and sys.getprofile() is None:
            sys.setprofile(on_profile_event)
        else:
            sys.setprofile(None)
            signal.default_int_handler(number, frame)

    def on_profile_event(frame: FrameType, event: str, arg: object) -> None:
        if event == "return" and frame.f_code.co_name == "<module>" and _imports_in_progress(frame.f_back) <= before:
            sys.setprofile(None)
            raise KeyboardInterrupt

    default_handler = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    replaces_handler = default_handler and threading.current_thread() is threading.main_thread()
    before = _imports_in_progress(sys._getframe())
    if replaces_handler:
        signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: pressed
    finally:
        if replaces_handler:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _imports_in_progress(frame: FrameType | None) -> int:
    """Count the nested imports of modules outside gigamorph in the call stack."""
    count = 0
    while frame is not None:
        code = frame.f_code
        count += code.co_name == "<module>" and not code.co_filename.startswith(_OWN_FOLDER)
        frame = frame.f_back
    return count


class Commands(click.RichGroup):
    """Command group that exits with code 130 after Ctrl-C; it prints a line unless the command printed one."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except Stopped:
            raise Exit(130) from None
        except KeyboardInterrupt:  # click would print an empty line
            click.echo("stopped by Ctrl-C", err=True)
            raise Exit(130) from None
        except BrokenPipeError as error:  # not of an output stream (see `streams`); click would exit silently
            raise RuntimeError("a child process ended unexpectedly") from error
