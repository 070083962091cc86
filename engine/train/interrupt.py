"""Ctrl-C, or SIGTERM, as a request: the first lets the work under way finish, a second one stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedTraining(Exception):
    """Training stopped at Ctrl-C, after the checkpoint was written."""


class Interrupt:
    """Whether a Ctrl-C has come, or SIGTERM. In threads other than the main one none can be waited for."""

    def __init__(self) -> None:
        self.asked = False
        self._former: dict[int, Any] = {}

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside, a first Ctrl-C only sets `asked`.

        Raises:
            KeyboardInterrupt: in the place of `InterruptedTraining`, and of the exit that Lightning makes of a second
                Ctrl-C.
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
            self._give_back()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._give_back()

    def _give_back(self) -> None:
        for one, handler in self._former.items():
            signal.signal(one, handler)
