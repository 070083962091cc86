"""Handles Ctrl-C and SIGTERM: the first lets the current work finish, a second one stops immediately."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedTraining(Exception):
    """Training was stopped by Ctrl-C, after the checkpoint was written."""


class Interrupt:
    """Whether Ctrl-C or SIGTERM has been received; only the main thread can handle them."""

    def __init__(self) -> None:
        self.asked = False
        self._former: dict[int, Any] = {}

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Context in which a first Ctrl-C only sets `asked`.

        Raises:
            KeyboardInterrupt: instead of `InterruptedTraining`, or of Lightning's `SystemExit` at a second Ctrl-C.
        """
        if threading.current_thread() is threading.main_thread():
            self._former = {one: signal.getsignal(one) or signal.SIG_DFL for one in _SIGNALS}
        for one in self._former:
            signal.signal(one, self._ask)
        try:
            yield
        except (InterruptedTraining, SystemExit) as error:
            raise KeyboardInterrupt from error
        finally:  # Lightning leaves Ctrl-C ignored after an interruption
            self._restore_handlers()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for one, handler in self._former.items():
            signal.signal(one, handler)
