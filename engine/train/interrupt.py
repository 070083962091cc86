"""Ctrl-C as a request: the first lets the work under way finish, a second one stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class InterruptedTraining(Exception):
    """Training stopped at Ctrl-C, after the checkpoint was written."""


class Interrupt:
    """Whether a Ctrl-C has come. In threads other than the main one none can be waited for."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside, a first Ctrl-C only sets `asked`.

        Raises:
            KeyboardInterrupt: in the place of `InterruptedTraining`, and of the exit that Lightning makes of a second
                Ctrl-C.
        """
        here = threading.current_thread() is threading.main_thread()
        former = signal.getsignal(signal.SIGINT)

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, former)

        if here:
            signal.signal(signal.SIGINT, ask)
        try:
            yield
        except (InterruptedTraining, SystemExit) as error:
            raise KeyboardInterrupt from error
        finally:
            if here:  # Lightning leaves Ctrl-C ignored after an interruption
                signal.signal(signal.SIGINT, former)
