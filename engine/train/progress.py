"""Progress reports of long jobs, which the command line displays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Progress:
    """A progress report. ``pixels`` includes the finished part of the current image."""

    stage: str
    """"validate", "test", "predict", or the name of a stage of training."""
    epoch: int
    epochs: int
    image: int
    """Completed images of this stage."""
    images: int
    pixels: float
    """Completed pixels of this stage."""
    part: float = 0.0
    """Completed fraction of the current image."""
    note: str = ""
    """A line to print: the result of an epoch, or a skipped image."""
    failed: int = 0
    """Skipped images of this stage."""


Report = Callable[[Progress], None]


class Meter:
    """Counts and reports images and pixels of a stage; the accelerated network calls `on_tile`.

    Args:
        report: called with each `Progress`.
        at_once: images that are computed concurrently; they are counted as if all had the size of this process's image.
    """

    # Fraction of a training step's arithmetic in the first pass: 1 of forward 1, recompute 1, backward 2.
    _FORWARD = 0.25

    def __init__(self, report: Report | None, at_once: int = 1) -> None:
        self._report, self._at_once = report, at_once
        self._now, self._current, self._training = Progress("", 0, 1, 0, 0, 0.0), 0.0, False

    @property
    def pixels(self) -> float:
        """Pixels of the stage's completed images, in all processes."""
        return self._now.pixels

    def start(
        self, stage: str, images: int, epoch: int = 0, epochs: int = 1, done: int = 0, *, training: bool = False
    ) -> None:
        """Begin a stage of ``images`` images, of which ``done`` are already complete."""
        self._now, self._current, self._training = Progress(stage, epoch, epochs, done, images, 0.0), 0.0, training
        self._send()

    def image(self, pixels: int) -> None:
        """Begin the next image, or several, with ``pixels`` pixels in total."""
        self._current = float(pixels * self._at_once)

    def on_tile(self, event: Any) -> None:
        """Report the engine's ``TileEvent``."""
        share = event.done / max(event.total, 1)
        if self._training:
            first = self._FORWARD
            share = share * first if event.phase == "forward" else first + (1 - first) * share
        self._send(share)

    def image_done(self) -> None:
        done = min(self._now.image + self._at_once, self._now.images)
        self._now, self._current = replace(self._now, image=done, pixels=self._now.pixels + self._current), 0.0
        self._send()

    def note(self, text: str) -> None:
        self._send(note=text)

    def failed(self, text: str) -> None:
        """Count a skipped image, and report the reason."""
        self._now = replace(self._now, failed=self._now.failed + 1)
        self._send(note=text)

    def _send(self, part: float = 0.0, note: str = "") -> None:
        if self._report is not None:
            pixels = self._now.pixels + part * self._current
            self._report(replace(self._now, pixels=pixels, part=part, note=note))
