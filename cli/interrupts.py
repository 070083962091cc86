"""A Ctrl-C of which the user has been told."""

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

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Stopped(KeyboardInterrupt):
    """Raised by a command that has said in a line how it goes on."""


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Whether a Ctrl-C has come inside.

    One that comes while a library is imported is put off until it is: libraries swallow it just then, and fail later or
    not at all, and PyTorch's compiled part ends the process. A second one is not put off.
    """
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        first, pressed = not pressed, True
        if first and _libraries(frame) > before and sys.getprofile() is None:
            sys.setprofile(imported)
        else:
            sys.setprofile(None)
            signal.default_int_handler(number, frame)

    def imported(frame: FrameType, event: str, arg: object) -> None:
        if event == "return" and frame.f_code.co_name == "<module>" and _libraries(frame.f_back) <= before:
            sys.setprofile(None)
            raise KeyboardInterrupt

    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    own = plain and threading.current_thread() is threading.main_thread()
    before = _libraries(sys._getframe())
    if own:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _libraries(frame: FrameType | None) -> int:
    """How many modules that are not ours are being imported, one by the other."""
    count = 0
    while frame is not None:
        code = frame.f_code
        count += code.co_name == "<module>" and not code.co_filename.startswith(_OURS)
        frame = frame.f_back
    return count


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
        except BrokenPipeError as error:  # of no output (see `streams`): click would end without a word
            raise RuntimeError("a process that this one has started has ended") from error
