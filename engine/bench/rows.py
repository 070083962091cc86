"""The declared list: rows to show on given machines. A row runs if the machine allows it, otherwise it says why not.

Networks and sizes are those of mammography and pathology, and the largest that others have published.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from ..tiling.memory import available_bytes
from .results import FAILED, NOT_RUN, OK, BenchTask, DeclaredRow, StepRow
from .step import StepOptions, measure

GIB = 2**30
_ALL = ("stock", "compile", "checkpoint", "gigamorph")
_STREAMING = ("stock", "checkpoint", "lightstream", "gigamorph")
_EXACT = ("stock", "checkpoint", "gigamorph")
_BOTH, _OURS = ("stock", "gigamorph"), ("gigamorph",)


@dataclass(frozen=True)
class Declared:
    """One row of the list.

    Attributes:
        tasks: each is measured with each cap.
        caps: GiB of memory; None: all memory.
        gpu: GiB of GPU memory that it needs; 0: it runs on the CPU.
        host: GiB of memory that it needs on the CPU.
        tile: gigamorph's tile in pixels.
    """

    number: int
    text: str
    aim: str
    peers: tuple[str, ...]
    tasks: tuple[BenchTask, ...]
    caps: tuple[float | None, ...] = (None,)
    gpu: int = 0
    host: int = 4
    tile: int | None = None


def _gpu(model: str, *image: int, norm: str = "live", training: bool = True) -> tuple[BenchTask, ...]:
    return (BenchTask(model, image, training, norm, "bf16", "cuda"),)  # pyright: ignore[reportArgumentType]


def _cpu(model: str, *image: int, norm: str = "frozen") -> tuple[BenchTask, ...]:
    return (BenchTask(model, image, True, norm, "fp64", "cpu"),)  # pyright: ignore[reportArgumentType]


ROWS = (
    Declared(
        1,
        "ResNet-18, 3328 x 2560 x 1, batch 1 and 4, bf16, live BatchNorm",
        "as fast as torch.compile in 0.56 of stock's memory",
        _ALL,
        _gpu("resnet18", 1, 1, 3328, 2560) + _gpu("resnet18", 4, 1, 3328, 2560),
        gpu=24,
    ),
    Declared(
        2,
        "ResNet-50, 4 views of 4096 x 3328, live BatchNorm",
        "runs in 24 GiB, 1.3 times as fast as checkpoint",
        _ALL,
        _gpu("resnet50", 4, 1, 4096, 3328),
        (24,),
        24,
    ),
    Declared(
        3, "VGG16-BN, 4096 x 3328", "570 bytes per pixel", _ALL, _gpu("timm:vgg16_bn", 1, 1, 4096, 3328), (24, None), 24
    ),
    Declared(
        4,
        "ResNet-18 and -34, 8192 x 8192",
        "twice lightstream's speed at the same cap",
        _STREAMING,
        _gpu("resnet18", 1, 3, 8192, 8192, norm="frozen") + _gpu("resnet34", 1, 3, 8192, 8192, norm="frozen"),
        (4, 8, 24),
        24,
    ),
    Declared(
        5,
        "ResNet-34, 16384 x 16384",
        "no overlap computed twice",
        _STREAMING,
        _gpu("resnet34", 1, 3, 16384, 16384, norm="frozen"),
        (11, 24, None),
        24,
    ),
    Declared(
        6,
        "ResNet-50, 21504 x 21504, live BatchNorm",
        "runs without paging",
        _OURS,
        _gpu("resnet50", 1, 3, 21504, 21504),
        gpu=130,
    ),
    Declared(
        7, "ResNet-18, 32768 x 32768", "40 GiB, 0.77 s", _OURS, _gpu("resnet18", 1, 3, 32768, 32768), (40, None), 130
    ),
    Declared(
        8,
        "ResNet-34, 65536 x 65536, live BatchNorm",
        "one exact step",
        _OURS,
        _gpu("resnet34", 1, 1, 65536, 65536),
        gpu=130,
    ),
    Declared(
        9,
        "a map of more than 2^31 elements: ResNet-18 at 11616 x 11616",
        "right, where stock fails",
        _BOTH,
        _gpu("resnet18", 1, 1, 11616, 11616, norm="frozen"),
        gpu=80,
    ),
    Declared(
        10,
        "exactness: sizes that are odd, prime, not square, smaller than a tile; batch 1 and 2; float64",
        "1e-12",
        _EXACT,
        (
            *_cpu("resnet18", 1, 3, 128, 128),
            *_cpu("resnet18", 1, 3, 113, 97),
            *_cpu("resnet18", 2, 3, 96, 161),
            *_cpu("resnet18", 1, 3, 40, 48),
        ),
        tile=64,
    ),
    Declared(
        11,
        "live BatchNorm: running statistics and all gradients after a step, float64",
        "1e-12, updated once",
        _EXACT,
        _cpu("resnet18", 2, 3, 113, 97, norm="live"),
        tile=64,
    ),
    Declared(
        12,
        "inference of ResNet-50: 2944 x 1920, 8192 x 8192",
        "exact, as fast as stock",
        ("stock", "compile", "lightstream", "gigamorph"),
        (
            *_gpu("resnet50", 1, 1, 2944, 1920, training=False, norm="frozen"),
            *_gpu("resnet50", 1, 1, 8192, 8192, training=False, norm="frozen"),
        ),
        (8,),
        24,
    ),
    Declared(
        13,
        "ResNet-50, 4096 x 4096 in 8 GiB",
        "four times stock's pixels at 1.5 times its time per pixel",
        _ALL,
        _gpu("resnet50", 1, 3, 4096, 4096, norm="frozen"),
        (8, None),
        24,
    ),
    Declared(
        14,
        "start-up: seconds to the first step",
        "1 s more than the step",
        _BOTH,
        (BenchTask("resnet18", (1, 3, 512, 512)),),
    ),
    Declared(
        15,
        "lines changed to convert ResNet-18: one, and a plain loss.backward()",
        "1",
        _BOTH,
        _cpu("resnet18", 1, 3, 64, 64),
        tile=32,
    ),
)


@dataclass
class RowOutcome:
    """Outcome of a row, and the steps that were measured for it."""

    row: DeclaredRow
    steps: list[StepRow] = field(default_factory=list)


def missing(declared: Declared) -> str | None:
    """Return what this machine lacks for a row, or None."""
    if declared.gpu:
        if not torch.cuda.is_available():
            return f"needs a GPU of {declared.gpu} GiB; none found"
        has = torch.cuda.mem_get_info()[1] / GIB
        return None if has >= declared.gpu else f"needs a GPU of {declared.gpu} GiB; this one has {has:.0f}"
    free = available_bytes("cpu") / GIB
    return None if free >= declared.host else f"needs {declared.host} GiB of free memory; {free:.1f} are free"


def run(
    ceilings: dict[str, float], numbers: tuple[int, ...] = (), say: Callable[[StepRow], None] = lambda row: None
) -> Iterator[RowOutcome]:
    """Run each row, or only those with the given numbers."""
    for declared in ROWS:
        if numbers and declared.number not in numbers:
            continue
        row = DeclaredRow(declared.number, declared.text, declared.aim, NOT_RUN, missing(declared))
        outcome = RowOutcome(row)
        if row.reason is None:
            for task, cap in itertools.product(declared.tasks, declared.caps):
                options = StepOptions(declared.peers, 3, 20.0, tile=declared.tile)
                if cap is not None:
                    options = replace(options, cap=int(cap * GIB), budget=0.9 * cap * GIB)
                outcome.steps += measure(task, options, ceilings, say)
            ours = [step for step in outcome.steps if step.peer == "gigamorph"]
            bad = next((step for step in ours if step.status != OK), None)
            row.status, row.reason = (OK, None) if bad is None else (bad.status or FAILED, bad.reason)
            row.found = summarise(outcome.steps)
        yield outcome


def summarise(steps: list[StepRow]) -> str:
    """Summarise gigamorph's results and the failures of other peers in one line."""
    parts = []
    for step in steps:
        if step.peer == "gigamorph":
            error = ""
            if step.check is not None and step.check.gradients is not None:
                error = f", gradients differ from {step.check.against}'s by {step.check.gradients:.0e}"
                if step.check.buffers:
                    error += f", running statistics by {step.check.buffers:.0e}"
            first = f", first step after {step.first_seconds:.1f} s" if step.first_seconds else ""
            speed = f"{step.mpx_per_s:.3g} Mpx/s" if step.mpx_per_s else step.status
            parts.append(f"{step.task.image[2]} x {step.task.image[3]}: {speed}{error}{first}")
        elif step.status != OK:
            parts.append(f"{step.peer}: {step.status} ({step.reason})")
    return "; ".join(parts)
