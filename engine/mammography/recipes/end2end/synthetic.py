"""The claim on phantoms: image labels suffice from the patch network on, and five class maps let too little through.

Masses are smooth (benign) or have spicules (malignant), and are annotated. Half of the cancers have spicules only, an
architectural distortion, which no one has annotated: to the patch network it is background, and a heat map of the patch
classes does not show it, though the features before it do.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from ....datasets.tables import Finding, Record, write_table
from ....models.lesionnet import LesionNet
from ....train.run import Run
from ....train.stages import Stage
from ...phantom import PhantomImage
from ..claims import Effect, Rule, Synthetic
from .config import End2EndConfig, Model, Sampling, TopBlock
from .train import train

HEIGHT, WIDTH = 128, 96
IMAGES = {"train": 120, "val": 48, "test": 160}
_FULL = 65535
_MASS, _SPICULES = 0.2, (0.1, 0.2)  # of the full grey range; those of rays are drawn: some are too faint to see
_NET = f"{__name__}:SmallNet"
_BLOCKS = (TopBlock("residual", 16, 1, 2), TopBlock("residual", 16, 1, 2))

CONFIG = End2EndConfig(
    resize=(),
    channels=1,
    mean=(0.3,),
    std=(0.1,),
    sampling=Sampling(side=32, per_lesion=4, background=3),
    models=(
        Model("features", _NET, "random", blocks=_BLOCKS),
        Model("heatmap", _NET, "random", blocks=_BLOCKS, heatmap=True, heatmap_pool=(3, 2)),
    ),
    augment="",
    flips=False,
    patch=(
        Stage("head", 1, 1e-2, trainable=("head",), optimizer="adamw", batch_size=32),
        Stage("top", 1, 3e-3, trainable=("features.net.stages.1", "head"), optimizer="adamw", batch_size=32),
        Stage("all", 8, 3e-3, optimizer="adamw", batch_size=32, schedule="cosine", clip=1.0),
    ),
    whole=(
        Stage("top", 4, 3e-3, trainable=("top", "head"), optimizer="adamw", batch_size=8, clip=1.0),
        Stage("all", 3, 3e-4, optimizer="adamw", batch_size=8, clip=1.0),
    ),
)


class SmallNet(LesionNet):
    """LesionNet up to its last maps."""

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 32, H / 8, W / 8)."""
        return self.stages(F.relu(self.stem(x)))


def phantom(seed: tuple[int, ...], *, mass: bool, spicules: bool) -> tuple[np.ndarray, Any]:
    """uint16 (HEIGHT, WIDTH), and the mass's box (top, bottom, left, right) or None: tissue, a disc, rays around it."""
    rng = np.random.default_rng([*seed, 9])
    image = PhantomImage(HEIGHT, WIDTH, seed=seed).read(0, HEIGHT, 0, WIDTH).astype(np.float64) / 4095
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    inside = np.argwhere((image > 0.1)[16:-16, 16:-16]) + 16
    places = inside[rng.integers(len(inside), size=2)]
    radius = rng.uniform(5, 7)
    box = None
    if mass:
        row, column = places[0]
        image += _MASS * np.clip(1.5 * (1 - np.hypot(y - row, x - column) / radius), 0, 1)
        reach = math.ceil(radius)
        box = int(row - reach), int(row + reach + 1), int(column - reach), int(column + reach + 1)
    if spicules:
        row, column = places[0] if mass else places[1]
        first, bright = rng.uniform(0, math.pi), rng.uniform(*_SPICULES)
        for ray in range(6):
            angle = first + ray * math.pi / 3
            along = (y - row) * math.sin(angle) + (x - column) * math.cos(angle)
            across = np.abs((y - row) * math.cos(angle) - (x - column) * math.sin(angle))
            image += bright * np.clip(1.2 - across, 0, 1) * ((along > 3) & (along < 14))
    return np.rint(np.clip(image, 0, 1) * _FULL).astype(np.uint16), box


def write_images(folder: Path, seed: int) -> Path:
    """Write the phantoms as ``.npy`` files and their table; returns the table's path."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (split, count) in enumerate(IMAGES.items()):
        for i in range(count):
            # In turn: a benign mass, a spiculated mass, nothing or a benign mass, a distortion without a mass.
            mass, spicules = [(True, False), (True, True), (i % 8 == 2, False), (False, True)][i % 4]
            image, box = phantom((seed, number, i), mass=mass, spicules=spicules)
            path = folder / f"{split}{i:03d}.npy"
            np.save(path, image)
            pathology = "malignant" if spicules else "benign"
            findings = (Finding("mass", box, pathology=pathology),) if box else ()
            records.append(Record(path, int(spicules), path.stem, split, findings=findings))
    return write_table(folder / "table.csv", records, ["0", "1"])


def rows(run: Run) -> list[dict[str, Any]]:
    """One row of a seed."""
    metrics = train(write_images(run.out / "data", run.seed), CONFIG, run.part("run"))
    found = metrics["features"]
    scores = list(zip(found["stages"], found["val_auc"], strict=True))
    top, both = ([score for stage, score in scores if stage == name] for name in ("top", "all"))
    return [
        {
            "seed": run.seed,
            "patch_accuracy": metrics["patch_accuracy_features"],
            "val_after_top": max(top),
            "val_after_all": max(both),
            "features": found["auc"],
            "heatmap": metrics["heatmap"]["auc"],
            "ensemble": metrics["auc"],
        }
    ]


SYNTHETIC = Synthetic(
    "From the patch network on, image labels suffice for a whole-image classifier, and without the heat map of patch "
    "classes it is better. (AUC on 160 test images. What training all layers adds, and the mean of both networks, are "
    "measured beside.)",
    Rule(
        effects=(Effect("features", "heatmap"),),
        floors=(("features", 0.75),),
        beside=(Effect("val_after_all", "val_after_top"), Effect("ensemble", "features")),
    ),
    rows,
)
