"""The claim on phantoms: a label that full resolution shows well and shrunk images show faintly.

Every image has a row of specks, upright or across; the label is which. For the parent's first training, on shrunk
images, each speck fills a cell of r x r pixels. In the task each speck is a single pixel, and its cell is only a little
brighter in the mean: that is what the parent, fine-tuned on shrunk images, has to go by. Few images are there to learn
from. The morphed child begins as the parent, so that its gradients show its front where rows are; a child with a new
front has to learn what rows look like through it.

In an earlier task shrinking removed all of the row. The parent's features were then silent where the label is and gave
the front no gradient: networks learnt the training images by heart, or put out one number for all. At the rate of 1e-2
that the front had, Adam moves the stem's sums by (rate x inputs of a filter) in a step, more than their spread, and
within 80 steps all filters of the stem were below zero on all images, where ReLU has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ....datasets.tables import Record, write_table
from ....models.lesionnet import LesionNet
from ....train.loop import run_stages
from ....train.run import Run
from ....train.stages import Stage
from ....train.target import Target
from ...phantom import PhantomImage
from ..claims import Effect, Rule, Synthetic
from ..classify import ClassifierTask
from .config import MorphHRConfig
from .images import parent_images
from .train import train

HEIGHT, WIDTH, FACTOR = 128, 96, 4
IMAGES = {"source": 600, "train": 400, "val": 60, "test": 160}
_ROW = 8  # specks
_COARSE, _FINE = 0.4, 0.4  # of the full grey range
FAINT = 0.1  # what a cell of the task is brighter than the tissue, in the mean
_BLANK = 0.3  # share of the images of the task that show no row, so that no network can be perfect
_FULL = 65535

CONFIG = MorphHRConfig(
    model=f"{__name__}:SmallNet",
    channels=1,
    mean=(0.3,),
    std=(0.1,),
    factor=FACTOR,
    filters=16,
    arms=("finetune", "direct", "scratch", "morph"),
    augment="flip",
    flips=False,
    low=(Stage("finetune", 3, 1e-3, optimizer="adamw", batch_size=8, schedule="cosine", clip=1.0),),
    high=(Stage("all", 8, 1e-3, optimizer="adamw", batch_size=8, schedule="cosine", clip=1.0),),
)
_PARENT = (Stage("source", 4, 3e-3, optimizer="adamw", batch_size=8, schedule="cosine", clip=1.0),)


class MeanPooledNet(LesionNet):
    """LesionNet with mean pooling, so that every place of the image has a gradient from the first step on."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.stem(x)))
        return self.fc(10 * x.mean((2, 3)))


def phantom(seed: tuple[int, ...], *, upright: bool, fine: bool) -> np.ndarray:
    """uint16 (HEIGHT, WIDTH): tissue with a row of specks, which fill their cells or are fine: single pixels."""
    rng = np.random.default_rng([*seed, 9])
    image = PhantomImage(HEIGHT, WIDTH, seed=seed).read(0, HEIGHT, 0, WIDTH).astype(np.float64) / 4095
    r, (rows, columns) = FACTOR, (_ROW, 1) if upright else (1, _ROW)
    for _ in range(200):  # inside the breast, if such a place is found
        y, x = int(rng.integers(HEIGHT // r - rows + 1)) * r, int(rng.integers(WIDTH // r - columns + 1)) * r
        if (image[y : y + rows * r, x : x + columns * r] > 0.1).all():
            break
    blank = fine and rng.random() < _BLANK
    for i in range(0 if blank else _ROW):
        cell = np.full((r, r), _COARSE)
        if fine:
            cell = np.full((r, r), FAINT - _FINE / (r * r - 1))
            cell[int(rng.integers(r)), int(rng.integers(r))] = FAINT + _FINE
        top, left = (y + i * r, x) if upright else (y, x + i * r)
        image[top : top + r, left : left + r] += cell
    return np.rint(np.clip(image, 0, 1) * _FULL).astype(np.uint16)


def rows(run: Run) -> list[dict[str, Any]]:
    """One row of a seed."""
    table = write_images(run.out / "data", run.seed)
    config = replace(CONFIG, weights=str(_first_training(run)))
    metrics = train(table, config, run.part("run"))
    deeper = replace(config, arms=("morph",), deepen=("stem",), deepen_by="netmorph")
    parent, deepened = metrics["finetune"], train(table, deeper, run.part("deeper"))["morph"]
    return [
        {
            "seed": run.seed,
            "parent": parent["auc"],
            "direct": metrics["direct"]["auc"],
            "new_front": metrics["scratch"]["auc"],
            "morph": metrics["morph"]["auc"],
            "deepened": deepened["auc"],
            "epochs_direct": _epochs_to(0.8, metrics["direct"]["val_auc"]),
            "epochs_new_front": _epochs_to(0.8, metrics["scratch"]["val_auc"]),
            "epochs_morph": _epochs_to(0.8, metrics["morph"]["val_auc"]),
            "difference": metrics["difference"],
        }
    ]


def write_images(folder: Path, seed: int) -> Path:
    """Write the images of the task as ``.npy`` files and their table; returns the table's path."""
    records = [
        record
        for split, number in IMAGES.items()
        if split != "source"
        for record in _write(folder, seed, split, number)
    ]
    return write_table(folder / "table.csv", records, ["across", "upright"])


def _write(folder: Path, seed: int, split: str, number: int) -> list[Record]:
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(number):
        own = (seed, list(IMAGES).index(split), i)
        path = folder / f"{split}{i:03d}.npy"
        np.save(path, phantom(own, upright=bool(i % 2), fine=split != "source"))
        records.append(Record(path, i % 2, path.stem, None if split == "source" else split))
    return records


def _first_training(run: Run) -> Path:
    """The parent's weights: it knows rows of specks that shrunk images show."""
    records = _write(run.out / "source", run.seed, "source", IMAGES["source"])
    torch.manual_seed(run.seed)
    images = parent_images(records, CONFIG)
    task = ClassifierTask(MeanPooledNet(), images, images, Target(("across", "upright")), run, _PARENT)
    task.score = lambda: None  # all of its images are training images
    run_stages(task, _PARENT, run.part("source-run"))
    path = run.out / "parent.pt"
    torch.save(task.module.state_dict(), path)
    return path


def _epochs_to(wanted: float, scores: Sequence[float]) -> int | None:
    return next((number for number, score in enumerate(scores, 1) if score >= wanted), None)


SYNTHETIC = Synthetic(
    "A label that shrunk images show faintly is learnt at full resolution: the morphed child is better than its "
    "parent, fine-tuned on shrunk images, and than the child with a new front. (AUC on 160 test images. The parent "
    "itself, trained on at full resolution, and the child whose stem is deepened as by NetMorph are measured beside.)",
    Rule(
        effects=(Effect("morph", "parent"), Effect("morph", "new_front")),
        floors=(("morph", 0.85),),
        beside=(Effect("morph", "direct"), Effect("deepened", "morph")),
    ),
    rows,
    seen=(),
    held_out=tuple(range(40, 50)),
)
