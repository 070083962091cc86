"""Views of `Progress` reports and of a logger's messages: live on a terminal, otherwise plain lines."""

from __future__ import annotations

import logging
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..engine.tiling.memory import format_bytes, peak_bytes, used_bytes
from ..engine.train.progress import Progress
from .counter import ProgressLine

_REFRESH_INTERVAL = 0.1
"""Seconds between updates of the bar; its values take time to measure."""


class ProgressView(ProgressLine):
    """Context manager that displays the progress reports of the engine.

    On a terminal: one bar per stage with megapixels per second, memory in use and time left. Otherwise: a line every
    ``interval`` seconds and one for each note. Prints nothing if ``quiet``.
    """

    def __init__(
        self, console: Console | None = None, device: str = "cpu", interval: float = 10.0, quiet: bool = False
    ) -> None:
        texts = TextColumn("{task.description:<14}"), TextColumn("{task.fields[detail]}")
        columns = texts[0], BarColumn(bar_width=None), texts[1], TimeElapsedColumn()
        super().__init__(console or Console(quiet=quiet), interval, *columns)
        self._device, self._began, self._first = device, time.monotonic(), 0
        self._key: tuple[str, int] | None = None

    def __call__(self, progress: Progress) -> None:
        key, shown = (progress.stage, progress.epoch), self._key
        now = time.monotonic()
        if key != self._key:
            self._key, self._began, self._shown, self._first = key, now, now, progress.image
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(_title(progress), total=max(progress.images, 1), detail="")
        if progress.note:
            self.say(progress.note)
        if self._console.is_terminal:
            if key != shown or now - self._shown >= _REFRESH_INTERVAL or progress.image == progress.images:
                self._shown = now
                for task in self._bar.task_ids:
                    self._bar.update(task, completed=progress.image + progress.part, detail=self._detail(progress, now))
        elif not progress.note and self.due():
            self.say(f"{_title(progress)}: image {progress.image}/{progress.images}, {self._detail(progress, now)}")

    def _detail(self, progress: Progress, now: float) -> str:
        seconds = max(now - self._began, 1e-6)
        done = progress.image + progress.part - self._first
        parts = [f"{progress.image}/{progress.images}", f"{progress.pixels / 1e6 / seconds:.1f} Mpx/s"]
        if done / seconds > 1:
            parts.append(f"{done / seconds:.3g} images/s")
        if progress.failed:
            parts.append(f"{progress.failed} failed")
        parts.append(f"{format_bytes(used_bytes(self._device))} (peak {format_bytes(peak_bytes(self._device))})")
        if done > 0:
            left = seconds / done * (progress.images - progress.image - progress.part)
            parts.append(f"{_clock(left)} left in this stage")
        return ", ".join(parts if self._console.is_terminal else parts[1:])


class StageView(logging.Handler, ProgressLine):
    """Context manager that shows the latest info message of a logger as the current stage, on standard error.

    On a terminal: one line with the stage, memory in use and time. Otherwise: at most one line every ``interval``
    seconds.
    """

    def __init__(self, logger: str, console: Console | None = None, interval: float = 10.0) -> None:
        logging.Handler.__init__(self, logging.INFO)
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        ProgressLine.__init__(self, console or Console(stderr=True), interval, *columns)
        self._log = logging.getLogger(logger)
        self._level = self._log.level
        self._task = self._bar.add_task("")

    def __enter__(self) -> Self:
        self._log.setLevel(min(self._log.getEffectiveLevel(), logging.INFO))
        self._log.addHandler(self)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._log.removeHandler(self)
        self._log.setLevel(self._level)

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.getMessage()} ({format_bytes(used_bytes('cpu'))})"
        self._bar.update(self._task, description=text)
        if self.due():
            self.say(text)


def _title(progress: Progress) -> str:
    return f"{progress.stage} {progress.epoch + 1}/{progress.epochs}" if progress.epochs > 1 else progress.stage


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
