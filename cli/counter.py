"""Progress of a command with a known amount of work: a bar on a terminal, otherwise a line at intervals."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Count:
    """Context manager that counts finished work with `add`, up to the total that `start` sets.

    Without a terminal, it prints a line every `interval` seconds, so that logs stay short.
    """

    def __init__(self, what: str, total: int = 0, console: Console | None = None, interval: float = 10.0) -> None:
        self._what, self._total, self.done = what, total, 0
        self._console = console or Console(stderr=True)
        self._interval, self._shown = interval, time.monotonic()
        columns = TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(what, total=total or None)

    def __enter__(self) -> Count:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.stop()

    def start(self, total: int) -> None:
        """Set the total."""
        self._total = total
        self._bar.update(self._task, total=total)

    def add(self, count: int = 1) -> None:
        """Add `count` finished items."""
        self.done += count
        self._bar.update(self._task, completed=self.done)
        if not self._console.is_terminal and time.monotonic() - self._shown >= self._interval:
            self._shown = time.monotonic()
            self._console.print(f"{self._what}: {self.done} of {self._total}", highlight=False, soft_wrap=True)
