"""Runs of training: squares of noise whose mean tells the class, and runs that several processes make together."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gigamorph.engine.datasets.augment import Augment
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.mammography.recipes.classify import ClassifierTask
from gigamorph.engine.parallel.process_group import ProcessGroup
from gigamorph.engine.train.data import Data
from gigamorph.engine.train.fit import fit
from gigamorph.engine.train.inputs import training_data
from gigamorph.engine.train.loop import run_stages
from gigamorph.engine.train.options import TrainOptions
from gigamorph.engine.train.progress import Progress, Report
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage
from gigamorph.engine.train.target import Target


@dataclass(frozen=True)
class Source:
    """A square of noise whose mean tells the class."""

    name: str
    seed: int
    label: int
    shape: tuple[int, int, int] = (1, 40, 33)

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        image = torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed)) * 0.5
        image[:, 10:14, 20:24] += 3.0 * self.label
        return image[:, top:bottom, left:right]


class Images:
    """Images of so many widths: with one a run is recorded once, not for all sizes as well."""

    def __init__(self, records: list[Record], widths: int = 1):
        self.records, self.widths = records, widths

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        number = int(record.path.stem)
        source = Source(record.path.name, number, record.label, (1, 40, 33 + number % self.widths))
        return {"image": source, "label": record.label, "index": index, "record": record}


def images(count: int, first: int = 0, widths: int = 1) -> Images:
    records = [Record(Path(f"{i}.png"), i % 2, f"p{i}", laterality="L") for i in range(first, first + count)]
    return Images(records, widths)


def make_data(widths: int = 1) -> Data:
    parts = (images(count, first, widths) for count, first in ((7, 0), (4, 100), (4, 200)))
    return Data(*parts, ("normal", "finding"), 1, {"mean": 0.5})


def network(num_classes: int, in_channels: int, live: bool) -> nn.Sequential:
    norm = nn.BatchNorm2d(8) if live else nn.GroupNorm(2, 8)
    net = nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, 2),
        norm,
        nn.ReLU(),
        nn.Dropout2d(0.3),
        nn.Conv2d(8, 8, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(8, num_classes),
    ).double()
    net.register_parameter("unreached", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    return net


def live(num_classes: int, in_channels: int) -> nn.Sequential:
    """Statistics of the image, dropout, and a parameter that no image reaches; in float64."""
    return network(num_classes, in_channels, True)


def normed(num_classes: int, in_channels: int) -> nn.Module:
    """As `live`, without statistics of the batch."""
    return network(num_classes, in_channels, False)


def uneven() -> Data:
    parts = (images(count, first, 3) for count, first in ((13, 0), (5, 100), (3, 200)))
    return Data(*parts, ("normal", "finding"), 1, {})


def press_at(stage: str, image: int) -> Report:
    """A report that presses Ctrl-C when so many images of a stage are complete, once."""
    pressed: list[Progress] = []

    def report(progress: Progress) -> None:
        if not pressed and (progress.stage, progress.image) == (stage, image):
            pressed.append(progress)
            os.kill(os.getpid(), signal.SIGINT)

    return report


def run(out: Path, options: TrainOptions, resume: bool = False, press: int | None = None) -> Any:
    """The metrics of a run, or what it ended with; `press` is when the first process gets a Ctrl-C."""
    report = None if press is None else press_at("train", press)
    try:
        return fit(uneven(), options, out, resume=resume, report=report).metrics
    except (GigamorphError, KeyboardInterrupt) as error:
        return repr(error)


def run_augmented(table: Path, augment: str, out: Path, options: TrainOptions) -> dict[str, Any]:
    """The metrics of a run on a table of images that are varied."""
    return fit(training_data(table, augment=Augment.parse(augment), seed=5), options, out).metrics


def run_stage(out: Path, split: bool, batch: int, accumulate: int) -> Any:
    """The rows of a recipe's stage on whole images, or what it ended with."""
    torch.manual_seed(3)
    net = live(2, 1)
    net.insert(5, nn.BatchNorm2d(8, momentum=None).double())  # which has means over all batches
    stages = [Stage("all", 2, 3e-3, batch_size=batch, accumulate=accumulate)]
    own = Run(out, seed=5, group=ProcessGroup.here(split))
    # Of three batches the last step has one, which is of one image, and the other process has none.
    task = ClassifierTask(net, images(5, 0, 2), images(3, 100, 2), Target(("normal", "finding")), own, stages)
    try:
        rows = run_stages(task, stages, own).rows
    except GigamorphError as error:
        return repr(error)
    return [{name: row[name] for name in ("stage", "epoch", "score", "lr")} for row in rows]
