"""Progress of a command with a known amount of work: a bar on a terminal, otherwise a line at intervals."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


class ProgressLine:
    """Context manager with a bar on a terminal; elsewhere, lines at intervals keep logs short."""

    def __init__(self, console: Console, interval: float, *columns: ProgressColumn) -> None:
        self._console, self._interval, self._shown = console, interval, time.monotonic()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def due(self) -> bool:
        """Whether to print a line: the output is not a terminal, and the interval since the last line is over."""
        now = time.monotonic()
        if self._console.is_terminal or now - self._shown < self._interval:
            return False
        self._shown = now
        return True


class Count(ProgressLine):
    """Context manager that counts finished work with `add`, up to the total that `start` sets."""

    def __init__(self, what: str, total: int = 0, console: Console | None = None, interval: float = 10.0) -> None:
        columns = TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn()
        super().__init__(console or Console(stderr=True), interval, *columns)
        self._what, self._total, self.done = what, total, 0
        self._task = self._bar.add_task(what, total=total or None)

    def start(self, total: int) -> None:
        """Set the total."""
        self._total = total
        self._bar.update(self._task, total=total)

    def add(self, count: int = 1) -> None:
        """Add `count` finished items."""
        self.done += count
        self._bar.update(self._task, completed=self.done)
        if self.due():
            self.say(f"{self._what}: {self.done} of {self._total}")
