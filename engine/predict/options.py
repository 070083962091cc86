"""The options, callbacks and summary of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..images.levels import White
from ..train.options import Precision
from ..train.progress import Meter

Scores = dict[str, dict[str, float | int | None]]
"""Measures, by split."""


@dataclass(frozen=True)
class RunOptions:
    """The options of a run.

    Attributes:
        model: SHA-256 of the checkpoint, or another identifier of the computation; part of each result's key.
        checkpoint: name of the checkpoint, for messages.
        resume: continue in a folder with results of this model.
        overwrite: remove a run of the same kind from the folder, whatever its model, and start again.
        retry_failed: retry images of the quarantine.
        max_failures: fraction of the images that may fail; None ends the run at the first, which is not recorded.
        shard: (i, n): the i-th of n parts of the images, from 1.
        devices: computing processes; 1 computes in this process.
        device: "cpu", or "cuda" for a GPU per process.
        workers: reading processes per device; None chooses a number.
        engine: "embedded" computes on this machine, "ray" with `devices` actors of a Ray cluster.
        address: of the cluster; None takes RAY_ADDRESS, or starts a cluster on this machine.
        flips: names of mirror images over which the opened network averages; stored in the folder.
        precision: of the computation; "bf16" and "fp16" use autocast. Stored in the folder.
        store: URL of the DICOMweb store that gets the results at the end; empty for none.
        white: default white level for images whose table has none, for messages and notes.
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
        """Whether this process does the computation."""
        return self.engine == "embedded" and self.devices == 1

    @property
    def shard_name(self) -> str:
        return f"{self.shard[0]}-of-{self.shard[1]}"


@dataclass
class Summary:
    """The summary of a run.

    Attributes:
        images: number of images in the shard.
        done: images with a result, including earlier runs.
        failed: images in quarantine.
        complete: whether all images of all shards have a result or have failed, and the tables are written.
        computed, seconds: images and duration of this run.
        waited: idle seconds, summed over the devices.
        devices: number of devices.
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
        """Fraction of the time that devices waited for images."""
        return self.waited / max(self.seconds * self.devices, 1e-9)


@dataclass(frozen=True)
class Watch:
    """The callbacks of a run.

    Attributes:
        meter: reports progress; counts an image when its result is durable.
        warn: called with each warning.
        failed: called with an image's name and the reason.
        looked: called before any work with the network, which opens images, and sample records of the table.
    """

    meter: Meter = field(default_factory=lambda: Meter(None))
    warn: Callable[[str], object] = lambda text: None
    failed: Callable[[str, str], object] = lambda image, reason: None
    looked: Callable[..., object] = lambda classifier, records: None
