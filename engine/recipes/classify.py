"""Classifying whole images: what is predicted, the loss, the score, and the training of a network of any backbone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..accelerate import accelerate
from ..datasets.splits import assign_splits
from ..datasets.tables import SPLITS, Record, read_table
from ..errors import BudgetError, DataError
from ..evaluate.cases import Array, Cases
from ..evaluate.roc import labelwise_auc
from ..train.fit import Images
from .loop import Task
from .tta import PLAIN, predict


@dataclass(frozen=True)
class Target:
    """What a network says of an image: one of several classes, or any of several labels, a logit for each."""

    names: tuple[str, ...]
    kind: Literal["classes", "labels"] = "classes"

    def truth(self, records: Iterable[Record]) -> Array:
        """(images, outputs): 1, 0, or NaN where it is not known."""
        if self.kind == "labels":
            return np.array([[r.labels.get(name, np.nan) for name in self.names] for r in records])
        numbers = [r.label for r in records]
        rows = np.array([np.eye(len(self.names))[n] if n >= 0 else np.full(len(self.names), np.nan) for n in numbers])
        return rows.reshape(len(numbers), len(self.names))

    def loss(self, logits: Tensor, truth: Array, *, balanced: bool = False) -> Tensor:
        """Mean cross-entropy of the images, or mean binary cross-entropy of the labels that are known.

        Args:
            logits: (images, outputs).
            truth: as from `truth`.
            balanced: weigh images so that all classes of the batch count the same; of classes only.
        """
        known = torch.from_numpy(~np.isnan(truth)).to(logits.device)
        wanted = torch.from_numpy(np.nan_to_num(truth)).to(logits)
        if self.kind == "labels":
            losses = F.binary_cross_entropy_with_logits(logits.float(), wanted.float(), reduction="none")
            return (losses * known).sum() / known.sum().clamp(min=1)
        losses = F.cross_entropy(logits.float(), wanted.argmax(1), reduction="none")
        return (losses * batch_weights(wanted.argmax(1))).mean() if balanced else losses.mean()

    def cases(self, records: Sequence[Record], log_odds: Array) -> Cases:
        """Predictions with what is known of the images, for `gigamorph.engine.evaluate`; of two classes the second."""
        truth, names, kind = self.truth(records), self.names, self.kind
        if kind == "classes" and len(names) == 2:
            truth, log_odds, names = truth[:, 1:], log_odds[:, 1:], names[1:]
        return Cases(
            outputs=names,
            truth=truth,
            scores=log_odds,
            names=tuple(str(r.path) for r in records),
            patients=tuple(r.patient_id for r in records),
            exams=tuple(r.exam_id or "" for r in records),
            sides=tuple(r.laterality or "" for r in records),
            kind="binary" if kind == "classes" and len(names) == 1 else kind,
        )


def batch_weights(labels: Tensor) -> Tensor:
    """Weights (n,) with mean 1 that give every class of a batch (labels, int64) the same sum (Shen et al., 2019)."""
    _, place, counts = labels.unique(return_inverse=True, return_counts=True)
    return len(labels) / (len(counts) * counts[place]).float()


def auc_of(cases: Cases) -> tuple[float | None, dict[str, float | None]]:
    """The mean of the areas under the ROC curves, and that of each output; None where it is not defined."""
    mean, each = labelwise_auc(cases.truth, cases.scores)
    return mean, dict(zip(cases.outputs, each, strict=True))


def read_target(
    table: str | Path, kind: Literal["classes", "labels"], labels: Sequence[str], seed: int
) -> tuple[dict[str, list[Record]], Target]:
    """Records by split, and the target, of a table.

    Args:
        labels: names of label columns (``label_NAME``), for ``kind="labels"``; all of them where none is named.

    Raises:
        DataError: if the table is wrong, a patient is in two splits, a label does not exist, or training or validation
            images are of one class only.
    """
    read = read_table(table, labels=kind == "classes")
    if kind == "classes":
        target = Target(tuple(read.classes))
    else:
        there = list(dict.fromkeys(name for record in read.records for name in record.labels))
        absent = [name for name in labels if name not in there]
        if absent or not there:
            raise DataError(f"{table}: has no column label_{(absent or ['NAME'])[0]}; there are {', '.join(there)}")
        target = Target(tuple(labels) or tuple(there), "labels")
    records = assign_splits(read.records, seed=seed)
    parts = {name: [r for r in records if r.split == name] for name in SPLITS}
    require_both(parts, target)
    return parts, target


def require_both(parts: dict[str, list[Record]], target: Target) -> None:
    """Refuse to train on, or to choose the best epoch by, images of which some output has one value only."""
    for split in ("train", "val"):
        truth = target.truth(parts[split])
        for name, column in zip(target.names, truth.T if len(truth) else np.empty((len(target.names), 0)), strict=True):
            values = np.unique(column[~np.isnan(column)])
            if len(values) < 2:
                what = "has no images" if not len(values) else f"has only images with {name} = {values[0]:g}"
                raise DataError(f"split {split} {what}; give it patients of both kinds, or leave the column split out")


class ImageTask(Task):
    """A network trained on whole images of any size, inside a memory budget.

    Args:
        module: (N, C, H, W) -> (N, outputs).
        train: images of the epochs; told which one it is where they have a ``set_epoch``.
        val: images that choose the best epoch, by the mean area under the ROC curves.
        balanced: see `Target.loss`.
        batch: images that are predicted at a time.
    """

    def __init__(
        self,
        module: nn.Module,
        train: Images,
        val: Images,
        target: Target,
        *,
        memory_budget: int | None = None,
        balanced: bool = False,
        batch: int = 1,
    ) -> None:
        self.module, self.train, self.val, self.target = module, train, val, target
        self.balanced, self.batch = balanced, batch
        self.net = accelerate(module, memory_budget=memory_budget)
        self.net.on_tile = lambda event: self.meter.on_tile(event)

    def examples(self, epoch: int) -> Any:
        tell = getattr(self.train, "set_epoch", None)
        if tell is not None:
            tell(epoch)
        return self.train

    def loss(self, batch: Sequence[Any]) -> Tensor:
        images = [item["image"] for item in batch]
        self.meter.image(sum(image.shape[-2] * image.shape[-1] for image in images) // len(images))
        try:
            logits = self.net(images)
        except BudgetError as error:  # the larger images of a set may not fit
            raise BudgetError(f"{batch[0]['record'].path}: {error}") from error
        truth = self.target.truth([item["record"] for item in batch])
        return self.target.loss(logits, truth, balanced=self.balanced)

    def score(self) -> float | None:
        return auc_of(self.predict(self.val))[0]

    def predict(self, images: Images, flips: Sequence[tuple[bool, bool]] = PLAIN) -> Cases:
        """What the network says of images, averaged over mirrored ones; it must be in evaluation mode."""
        labels = self.target.kind == "labels"
        return self.target.cases(images.records, predict(self.net, images, flips, labels=labels, batch=self.batch))
