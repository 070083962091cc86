"""The common format of benchmark results; `read.py` reads it.

A file of results is a JSON object: `format`, `what` (the command), `provenance` (machine, versions, commit, date),
`ceilings` (measured in the same run) and lists of rows: `steps`, `limits`, `kernels`. Rows hold
measurements, from which rates and shares follow. A row that could not be measured has its status and the reason.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_json

FORMAT = "gigamorph-bench 1"
OK, OUT_OF_MEMORY, WRONG, REFUSED, FAILED, NOT_RUN = ("ok", "out of memory", "wrong", "refused", "failed", "not run")
EQUAL_MEMORY = "lightstream, gigamorph's memory"  # a second row of lightstream, capped at gigamorph's memory


@dataclass(frozen=True)
class BenchTask:
    """One step for all peers.

    Attributes:
        model: see `create_model`.
        image: (N, C, H, W).
        training: with a backward; otherwise inference.
        batch_norm: "frozen" (evaluation mode) or "live".
        precision: "fp32", "fp64", or "bf16" (autocast over float32 parameters).
        device: "cpu" or "cuda".
    """

    model: str
    image: tuple[int, int, int, int]
    training: bool = True
    batch_norm: str = "frozen"
    precision: str = "fp32"
    device: str = "cpu"

    @property
    def megapixels(self) -> float:
        n, _, height, width = self.image
        return n * height * width / 1e6

    @property
    def mode(self) -> str:
        return "training" if self.training else "inference"

    def __str__(self) -> str:
        n, _, height, width = self.image
        batch = f"{n} x " if n > 1 else ""
        return f"{self.model} {self.mode} {batch}{height} x {width}"


@dataclass(frozen=True)
class Check:
    """Differences of a step's results from those of another peer: relative L2 norms.

    Attributes:
        against: that peer.
        outputs: difference of the outputs.
        gradients: difference over all gradients; None for inference.
        worst: name and difference of the parameter that differs most.
        buffers: difference of the running statistics; None if they do not change.
        missing: trained parameters that got no gradient.
    """

    against: str
    outputs: float
    gradients: float | None = None
    worst: tuple[str, float] | None = None
    buffers: float | None = None
    missing: int = 0


@dataclass
class StepRow:
    """Time and memory of one peer's steps, in seconds and bytes.

    Attributes:
        peer: a name in `PEERS`, or such a name, a comma and how it was run.
        settings: settings of the peer: tile, memory budget, ...
        cap_bytes: maximal bytes of a step; None: free memory.
        seconds: per timed step.
        cpu_seconds: of all threads of the process, per timed step (CPU); least affected by other load on the machine.
        first_seconds: preparation of the network plus the first step: recording, compiling, planning.
        peak_bytes: parameters plus the maximum that the steps added, without the image.
        process_bytes: peak of the whole process, including Python and libraries (CPU).
        nvml_bytes: growth of the GPU's memory in use since before the network was created, by NVML.
        predicted_bytes: `peak_bytes` as predicted by `plan`.
        flops: of one step in stock PyTorch.
        roofline_seconds: of one step in stock PyTorch: the sum over its ops of max(flops / rate, bytes / bandwidth).
    """

    task: BenchTask
    peer: str
    status: str = OK
    reason: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    cap_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    peak_bytes: int | None = None
    process_bytes: int | None = None
    nvml_bytes: int | None = None
    predicted_bytes: int | None = None
    flops: float | None = None
    roofline_seconds: float | None = None
    check: Check | None = None

    @property
    def base_peer(self) -> str:
        """Name of the peer in `PEERS`."""
        return self.peer.partition(",")[0]

    @property
    def median_seconds(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def median_cpu_seconds(self) -> float | None:
        return statistics.median(self.cpu_seconds) if self.cpu_seconds else None

    @property
    def spread(self) -> float | None:
        """Largest minus smallest time, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / statistics.median(self.seconds) if self.seconds else None

    @property
    def mpx_per_s(self) -> float | None:
        return self.task.megapixels / self.median_seconds if self.median_seconds else None

    @property
    def bytes_per_pixel(self) -> float | None:
        return None if self.peak_bytes is None else self.peak_bytes / self.task.megapixels / 1e6

    @property
    def roofline_share(self) -> float | None:
        """Share of stock's roofline: above 1 only if ops are fused or maps stay in cache."""
        return self.roofline_seconds / self.median_seconds if self.roofline_seconds and self.median_seconds else None


@dataclass
class Try:
    """Result for one size: its status, the peak in bytes and the seconds of its step."""

    side: int
    status: str
    peak_bytes: int | None = None
    seconds: float | None = None
    reason: str | None = None

    def __str__(self) -> str:
        peak = "" if self.peak_bytes is None else f"  {self.peak_bytes / 1e9:.2f} GB"
        time = "" if self.seconds is None else f"  {self.seconds:.2f} s"
        return f"{self.side} x {self.side}: {self.status}{peak}{time}  {self.reason or ''}".rstrip()


@dataclass
class LimitRow:
    """Largest square image of one peer under a cap.

    Attributes:
        task: the step; the image's height and width are those of `side`.
        side: largest side in pixels that fitted; None if none did.
        too_large: smallest side that did not fit; None if none was found.
        predicted_side: the prediction of `plan`.
        tries: in order.
    """

    task: BenchTask
    peer: str
    cap_bytes: int
    status: str = OK
    reason: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    side: int | None = None
    too_large: int | None = None
    predicted_side: int | None = None
    tries: list[Try] = field(default_factory=list)

    @property
    def agreement(self) -> float | None:
        """Pixels found divided by pixels predicted."""
        return (self.side / self.predicted_side) ** 2 if self.side and self.predicted_side else None


@dataclass
class KernelRow:
    """One op and shape on a GPU: milliseconds of each candidate, and counts for the roofline bound.

    Attributes:
        ms: medians by candidate: "ours", "cudnn", "eager", "compile", ...
    """

    op: str
    dtype: str
    flops: float
    bytes: float
    ms: dict[str, float]
    status: str = OK
    reason: str | None = None

    def floor_ms(self, ceilings: dict[str, float]) -> float:
        """Return the minimal time by arithmetic and by traffic."""
        return max(self.flops / ceilings["tflop_per_s"] / 1e9, self.bytes / ceilings["gb_per_s"] / 1e6)


ROWS: dict[str, type] = {"steps": StepRow, "limits": LimitRow, "kernels": KernelRow}


@dataclass
class Results:
    """Measurements of one command, or of several that a report joins."""

    what: str
    provenance: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    steps: list[StepRow] = field(default_factory=list)
    limits: list[LimitRow] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the JSON atomically.

        Raises:
            GigamorphError: it cannot be written.
        """
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self)}, "results")
