"""What a long job tells its caller while it runs; the command line draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """A state of the work. ``pixels`` counts the finished part of the image under way."""

    stage: str
    """"validate", "test", "predict", or the name of a stage of training."""
    epoch: int
    epochs: int
    image: int
    """Images that are complete in this stage."""
    images: int
    pixels: float
    """Pixels done in this stage."""
    part: float = 0.0
    """Share of the image under way that is done."""
    note: str = ""
    """A line that is worth keeping: the result of an epoch, an image that was skipped."""
    failed: int = 0
    """Images of this stage that were skipped."""


Report = Callable[[Progress], None]


class Meter:
    """Counts images and pixels of a stage and reports them; its `on_tile` is hung on the accelerated network.

    Args:
        at_once: images that are computed at a time, one by each of as many processes; they are counted as if all were
            as large as this process's.
    """

    # Share of a training step's arithmetic that lies in the first pass: 1 of forward 1, recompute 1, backward 2.
    _FORWARD = 0.25

    def __init__(self, report: Report | None, at_once: int = 1) -> None:
        self._report, self._at_once = report, at_once
        self._stage, self._epoch, self._epochs, self._images = "", 0, 1, 0
        self._image, self._pixels, self._current, self._training = 0, 0.0, 0.0, False
        self._failed = 0

    @property
    def pixels(self) -> float:
        """Of the stage's images that are complete, in all processes."""
        return self._pixels

    def start(
        self, stage: str, images: int, epoch: int = 0, epochs: int = 1, done: int = 0, *, training: bool = False
    ) -> None:
        """Begin a stage of ``images`` images, ``done`` of which were done before."""
        self._training = training
        self._stage, self._images, self._epoch, self._epochs = stage, images, epoch, epochs
        self._image, self._pixels, self._current, self._failed = done, 0.0, 0.0, 0
        self._send()

    def image(self, pixels: int) -> None:
        """The next image begins, of ``pixels`` pixels; or several, of this many together."""
        self._current = float(pixels * self._at_once)

    def on_tile(self, event: Any) -> None:
        """Take the engine's ``TileEvent``."""
        share = event.done / max(event.total, 1)
        if self._training:
            first = self._FORWARD
            share = share * first if event.phase == "forward" else first + (1 - first) * share
        self._send(share)

    def image_done(self) -> None:
        self._image = min(self._image + self._at_once, self._images)
        self._pixels += self._current
        self._current = 0.0
        self._send()

    def note(self, text: str) -> None:
        self._send(note=text)

    def failed(self, text: str) -> None:
        """An image is skipped, and why."""
        self._failed += 1
        self._send(note=text)

    def _send(self, part: float = 0.0, note: str = "") -> None:
        if self._report is not None:
            pixels = self._pixels + part * self._current
            done = self._image, self._images, pixels, part, note, self._failed
            self._report(Progress(self._stage, self._epoch, self._epochs, *done))
