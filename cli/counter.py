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
        self._what, self._total, self._done = what, total, 0
        self._console = console or Console(stderr=True)
        self._interval, self._shown = interval, time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Count:
        if self._console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task(self._what, total=self._total or None)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int) -> None:
        """Set the total."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=total)

    def add(self, count: int = 1) -> None:
        """Add `count` finished items."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif time.monotonic() - self._shown >= self._interval:
            self._shown = time.monotonic()
            self._console.print(f"{self._what}: {self._done} of {self._total}", highlight=False, soft_wrap=True)
