"""How a run goes, who is told of it, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..images.levels import White
from ..train.precision import Precision
from ..train.progress import Meter

Scores = dict[str, dict[str, float | int | None]]
"""Measures, by split."""


@dataclass(frozen=True)
class RunOptions:
    """How a run goes.

    Attributes:
        model: SHA-256 of the checkpoint, or what else stands for what is done; results are of image and model.
        checkpoint: its name, for messages.
        resume: go on in a folder that holds results of this model.
        overwrite: begin anew in a folder that holds a run of the same kind, whatever its model; it is removed.
        retry_failed: try images of the quarantine again.
        max_failures: share of the images that may fail; None ends the run at the first, and keeps none of them.
        shard: (i, n): the i-th of n parts of the images, from 1.
        devices: processes that compute; 1 computes in this process.
        device: "cpu", or "cuda" for a GPU each.
        workers: processes that read ahead, for each device; None takes some.
        engine: "embedded" computes on this machine, "ray" with `devices` actors of a Ray cluster.
        address: of that; None takes RAY_ADDRESS, or starts one on this machine.
        flips: mirror images that the opened network averages over, by name; the folder keeps them.
        precision: of what is computed; "bf16" and "fp16" are autocast's, and the folder keeps it.
        white: the white level with which images are opened of which the table does not say, for messages and notes.
        store: DICOMweb store to which results go when all is done, as a URL; empty if they go nowhere.
    """

    model: str
    checkpoint: str = ""
    resume: bool = False
    overwrite: bool = False
    retry_failed: bool = False
    max_failures: float | None = None
    shard: tuple[int, int] = (1, 1)
    devices: int = 1
    device: str = "cpu"
    workers: int | None = None
    engine: Literal["embedded", "ray"] = "embedded"
    address: str | None = None
    flips: tuple[str, ...] = ()
    precision: Precision = "fp32"
    store: str = ""
    white: White | None = None

    @property
    def here(self) -> bool:
        """Whether this process computes."""
        return self.engine == "embedded" and self.devices == 1

    @property
    def shard_name(self) -> str:
        return f"{self.shard[0]}-of-{self.shard[1]}"


@dataclass
class Summary:
    """How a run ended.

    Attributes:
        images: of the shard.
        done: of them, with a result, also of earlier runs.
        failed: of them, in quarantine.
        complete: all images of all shards have a result or have failed, and the tables are written.
        computed, seconds, waited: of this run; how long the devices had nothing to compute, summed over them.
        scores: measures of each split's labelled images.
        stored: instances that this run has stored in a DICOMweb store.
    """

    images: int = 0
    done: int = 0
    failed: int = 0
    complete: bool = False
    computed: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    devices: int = 1
    scores: Scores = field(default_factory=dict)
    stored: int = 0

    @property
    def idle(self) -> float:
        """Share of the time that devices waited for images."""
        return self.waited / max(self.seconds * self.devices, 1e-9)


@dataclass(frozen=True)
class Watch:
    """Who is told of a run as it goes.

    Attributes:
        meter: of progress; counts an image when its result is durable.
        warn: called with a line.
        failed: called with an image's name and the reason.
        looked: called with what opens images and some records, spread over the table, before any work.
    """

    meter: Meter = field(default_factory=lambda: Meter(None))
    warn: Callable[[str], object] = lambda text: None
    failed: Callable[[str, str], object] = lambda image, reason: None
    looked: Callable[..., object] = lambda classifier, records: None
