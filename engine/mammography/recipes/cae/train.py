"""Training of the recipe on images: maps of the frozen backbone, auto-encoders on them, an SVM on the codes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ....datasets.tables import SPLITS, Record, read_table
from ....datasets.tables.folders import LeftOutMasks
from ....errors import DataError
from ....evaluate.cases import Cases
from ....evaluate.read import write_cases
from ....files import write_atomically
from ....train.loop import run_stages
from ....train.option_checks import check_stages
from ....train.run import Run, seed_of
from ....train.target import Target
from ....train.task import Task
from ..classify import ClassifierTask
from ..features import Features, UpTo, frozen_features
from ..recipe import begin, finish, recipe_card
from ..sized import Size, open_images
from ..splits import split_records
from ..tensors import accuracy
from ..weights import build_pretrained, find_weights
from .autoencoder import Stack
from .config import CaeConfig
from .svm import fit_svm, measure_scores, measure_svm, svm_scores

Maps = Sequence[NDArray[Any]] | NDArray[Any]
_BATCH = 64  # maps per encoding step


class Reconstruction(Task):
    """Training of a stack to reconstruct maps: all layers, or one on the output of those below.

    The epoch with the smallest training error is kept.
    """

    best_by_loss = True

    def __init__(self, stack: Stack, maps: Maps, device: str = "cpu", layer: int | None = None) -> None:
        self.module, self.maps, self.device, self.layer = stack, maps, device, layer

    def examples(self, epoch: int) -> Sequence[int]:
        return range(len(self.maps))

    def loss(self, batch: Sequence[int]) -> Tensor:
        maps = torch.from_numpy(np.stack([self.maps[index] for index in batch])).to(self.device)
        stack: Stack = self.module  # pyright: ignore[reportAssignmentType]
        return stack.joint_loss(maps) if self.layer is None else stack.layer_loss(maps, self.layer)


def fit_stack(maps: Maps, config: CaeConfig, run: Run) -> Stack:
    """Train a stack of auto-encoders on maps (C, h, w) without labels; its files are in ``run.out``."""
    torch.manual_seed(seed_of(run.seed, 1))
    stage = config.stage("joint", momentum=config.momentum)
    settings = {name: getattr(config, name) for name in ("feature", "kernel", "mode", "theta", "tied", "pool")}
    stack = Stack(maps[0].shape[0], config.code_channels, **settings)
    if config.training == "joint":
        run_stages(Reconstruction(stack, maps, run.device), [stage], run)
        return stack
    for layer in range(len(config.code_channels)):
        own = replace(stage, name=f"layer {layer + 1}", trainable=(f"layers.{layer}",))
        run_stages(Reconstruction(stack, maps, run.device, layer), [own], run.part(f"layer_{layer + 1}"))
    return stack


@torch.no_grad()
def vectors(maps: Maps, pyramid: Sequence[int], stack: Stack | None = None) -> NDArray[np.float32]:
    """Return features (n, d) of maps, or of the stack's output for them; flattened, or averaged over pyramid cells."""
    device = torch.device("cpu") if stack is None else next(stack.parameters()).device
    # Native images have maps of different sizes, so each is computed separately.
    step = 1 if pyramid else _BATCH
    found = []
    for first in range(0, len(maps), step):
        x = torch.from_numpy(np.stack(list(maps[first : first + step]))).to(device)
        if stack is not None:
            x = stack(x)
        parts = [F.adaptive_avg_pool2d(x, side).flatten(1) for side in pyramid] if pyramid else [x.flatten(1)]
        found.append(torch.cat(parts, 1).float().cpu().numpy())
    return np.concatenate(found)


def train(table: Path, config: CaeConfig, run: Run) -> dict[str, Any]:
    """Train on a table's images, and measure on its val and test splits, also with the backbone's raw features.

    Writes the stack's checkpoints, ``metrics.json``, predictions of val and test by each SVM (``test_rbf.csv``, for
    `gigamorph eval`) and, for all images of the table, ``features.npz`` with the arrays features, labels, splits
    and paths.

    Raises:
        DataError: a patient is in two splits, training images have only one class, or images cannot be read.
    """
    read = read_table(table)
    records = split_records(read.records, config, run, table=table, validation=False)
    parts = {name: [i for i, r in enumerate(records) if r.split == name] for name in SPLITS}
    if len({records[i].label for i in parts["train"]}) < 2:
        raise DataError(f"{table}: the training images have only one class; an SVM needs at least two")
    pool = _pool(config, records, run)
    weights = find_weights(config.weights, config.mean, config.std, run)
    network = _network(config, len(read.classes), weights, run)
    check_stages([config.stage("joint", momentum=config.momentum)], run.group.at_once)
    check_stages(config.finetune, run.group.at_once, network)
    backbone = UpTo(network, config.layer)
    begin(run, "cae", config, [*records, *pool])
    maps = _maps(backbone, records, config, run)
    stack = fit_stack(_maps(backbone, pool, config, run) if pool else maps.take(parts["train"]), config, run)
    features = {"raw": vectors(maps, config.pyramid), "cae": vectors(maps, config.pyramid, stack)}
    measured, predictions = _classify(features, records, parts, read.classes, config)
    if config.finetune:
        network = _network(config, len(read.classes), weights, run)
        measured["finetuned"] = _finetuned(network, records, parts, read.classes, config, run)
    images = {name: len(own) for name, own in parts.items()}
    metrics: dict[str, Any] = {"classes": read.classes, "images": images, **measured}
    exported = {
        "features": features["cae"],
        "labels": np.array([r.label for r in records]),
        "splits": np.array([r.split for r in records]),
        "paths": np.array([r.path.as_posix() for r in records]),
    }
    write_atomically(run.out / "features.npz", lambda path: np.savez(path, **exported), "features")
    for (part, kernel), cases in predictions.items():
        write_cases(run.out / f"{part}_{kernel}.csv", cases)
    recipe_card(
        run,
        "cae",
        config,
        parameters=sum(p.numel() for own in (backbone, stack) for p in own.parameters()),
        records={name: [records[i] for i in own] for name, own in parts.items()},
        classes=read.classes,
        predictions={f"{part}, {kernel} SVM": cases for (part, kernel), cases in predictions.items()},
    )
    return finish(run, metrics)


def _network(config: CaeConfig, classes: int, weights: Path | None, run: Run) -> nn.Module:
    torch.manual_seed(seed_of(run.seed, 0))  # random weights if there is no file
    return build_pretrained(config.model, max(2, classes), config.channels, weights)


def _finetuned(
    network: nn.Module,
    records: Sequence[Record],
    parts: dict[str, list[int]],
    classes: Sequence[str],
    config: CaeConfig,
    run: Run,
) -> dict[str, Any]:
    """Fine-tune the whole backbone on the labels, and return its measures on val and test."""
    view = Size(config.resize, config.crop).view
    images = {
        part: open_images([records[i] for i in own], config, view=view, augment=config.augment * (part == "train"))
        for part, own in parts.items()
    }
    target = Target(tuple(classes))
    task = ClassifierTask(
        network, images["train"], images["val"], target, run, config.finetune, measure=accuracy, fallback="untiled"
    )
    run_stages(task, config.finetune, run.part("finetuned"))
    found = {}
    for part, own in parts.items():
        if own and part != "train":
            scores = task.log_odds(images[part])
            found[part] = measure_scores([records[i].label for i in own], scores.argmax(1), scores)
    return found


def _classify(
    features: dict[str, NDArray[Any]],
    records: Sequence[Record],
    parts: dict[str, list[int]],
    classes: Sequence[str],
    config: CaeConfig,
) -> tuple[dict[str, Any], dict[tuple[str, str], Cases]]:
    """Return the measures of val and test by features and kernel, and the SVM's cases on codes by (split, kernel)."""
    labels, patients = np.array([r.label for r in records]), np.array([r.patient_id for r in records])
    train, held_out = parts["train"], {part: own for part, own in parts.items() if own and part != "train"}
    metrics, predictions = {}, {}
    settings = {"c": config.c, "folds": config.folds, "standardise": config.standardise}
    for name, values in features.items():
        for kernel in config.svm:
            model = fit_svm(values[train], labels[train], patients[train], kernel=kernel, **settings)
            found = {part: measure_svm(model, values[own], labels[own]) for part, own in held_out.items()}
            metrics[f"{name}_{kernel}"] = found
            if name == "cae":
                for part, own in held_out.items():
                    predictions[part, kernel] = _cases(model, values[own], [records[i] for i in own], classes)
    return metrics, predictions


def _cases(model: Any, features: NDArray[Any], records: Sequence[Record], classes: Sequence[str]) -> Cases:
    """Return an SVM's predictions: scores that rank images but are not probabilities."""
    found = Target(tuple(classes)).cases(records, svm_scores(model, features, len(classes)))
    return replace(found, probable=False)


def _pool(config: CaeConfig, records: Sequence[Record], run: Run) -> list[Record]:
    """Read the images without labels; refuse those of patients in the val or test split."""
    if config.unlabelled is None:
        return []
    table = read_table(config.unlabelled, labels=False)
    pool = table.records
    if table.masks:
        run.say(f"{config.unlabelled}: {LeftOutMasks(len(table.masks), table.masks[0])}")
    own = [record for record in records if record.split != "train"]
    measured, images = {record.patient_id for record in own}, {os.path.realpath(record.path) for record in own}
    for record in pool:
        if record.patient_id in measured:
            raise DataError(
                f"{config.unlabelled}: patient {record.patient_id} is in the val or test split of the labelled table; "
                "remove that patient"
            )
        if os.path.realpath(record.path) in images:  # from a folder, which has no patient names
            raise DataError(
                f"{config.unlabelled}: {record.path} is in the val or test split of the labelled table; remove it"
            )
    return pool


def _maps(backbone: UpTo, records: Sequence[Record], config: CaeConfig, run: Run) -> Features:
    return frozen_features(
        backbone,
        open_images(records, config),
        run.out / "maps",
        size=Size(config.resize, config.crop),
        batch_size=config.batch_size,
        run=run,
    )
