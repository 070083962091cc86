"""Targets of images: one of several classes, ordered classes, any of several labels, or numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..datasets.dataset import exam_of
from ..datasets.tables import Record
from ..errors import DataError
from ..evaluate import odds
from ..evaluate.cases import Array, Cases
from ..evaluate.class_names import positive_number
from ..models.outputs import Activation, Head, Outputs, Views
from .options import Kind, Loss

_ACTIVATIONS: dict[Kind, Activation] = {
    "classes": "softmax",
    "labels": "sigmoid",
    "ordinal": "ordinal",
    "numbers": "number",
}
_REGRESSION = {"squared": F.mse_loss, "absolute": F.l1_loss, "huber": F.huber_loss}


@dataclass(frozen=True)
class Target:
    """The quantity that a network predicts for an image.

    Attributes:
        names: of the classes, labels (columns ``label_NAME``) or numbers (columns ``label_NAME``).
        kind: "classes": one of them, with a logit each. "ordinal": ordered classes; output k is the logit of exceeding
            class k for images that are not below it (continuation ratios; as in Shi, Cao and Raschka, 2021), so there
            is one output less than classes. "labels": any of them, with a logit each. "numbers": one output each, in
            units of ``spread`` around ``center``.
        center, spread: mean and standard deviation of each number over the training images.
        views: how views of an exam are combined, see `gigamorph.engine.models.outputs`; None for single images.
    """

    names: tuple[str, ...]
    kind: Kind = "classes"
    center: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    views: Views | None = None

    @property
    def columns(self) -> int:
        """Number of logits or numbers per sample."""
        return len(self.names) - (self.kind == "ordinal")

    @property
    def positive(self) -> int | None:
        """Index of the positive one of two classes; otherwise None."""
        exclusive = self.kind in ("classes", "ordinal")
        return positive_number(self.names) if exclusive and len(self.names) == 2 else None

    @property
    def width(self) -> int:
        """Number of outputs of the network, including the attention logit of a view."""
        return self.columns if self.outputs is None else self.outputs.width

    @property
    def outputs(self) -> Outputs | None:
        """The meaning of the network's outputs; None for softmax logits of single images."""
        if self.kind == "classes" and self.views is None:
            return None
        activation = _ACTIVATIONS[self.kind]
        head = Head(self.names, activation, self.columns, center=self.center, spread=self.spread)
        return Outputs((head,), views=self.views)

    def to_plain(self) -> dict[str, Any]:
        """Plain values for a checkpoint, which `from_plain` reads."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Target:
        """The inverse of `to_plain`."""
        center, spread = tuple(values.get("center") or ()), tuple(values.get("spread") or ())
        return cls(tuple(values["names"]), values["kind"], center, spread, values.get("views"))

    def measured_on(self, records: Sequence[Record]) -> Target:
        """The target with mean and standard deviation of numbers over these images; other kinds are unchanged.

        Raises:
            DataError: if a number is the same for all images.
        """
        if self.kind != "numbers":
            return self
        values = self.truth(records)
        center, spread = np.nanmean(values, 0), np.nanstd(values, 0)
        for name, width in zip(self.names, spread, strict=True):
            if not width > 0:
                raise DataError(f"label_{name} is the same for all {len(records)} training images: nothing to learn")
        return replace(self, center=tuple(center.tolist()), spread=tuple(spread.tolist()))

    def truth(self, records: Iterable[Record]) -> Array:
        """The truth (images, names): 1, 0 or the number, NaN where unknown."""
        if self.kind in ("labels", "numbers"):
            rows = [[r.labels.get(name, np.nan) for name in self.names] for r in records]
            return np.array(rows, np.float64).reshape(len(rows), len(self.names))
        numbers = [r.label for r in records]
        rows = np.array([np.eye(len(self.names))[n] if n >= 0 else np.full(len(self.names), np.nan) for n in numbers])
        return rows.reshape(len(numbers), len(self.names))

    def knows(self, record: Record) -> bool:
        """Whether an image has a label."""
        return not np.isnan(self.truth([record])).all()

    def known(self, records: Sequence[Record]) -> list[Record]:
        """The images with labels; with `views`, all views of exams of which one view has a label."""
        found = [record for record in records if self.knows(record)]
        if self.views is None:
            return found
        exams = set(map(exam_of, found))
        return [record for record in records if exam_of(record) in exams]

    def weights(self, records: Sequence[Record]) -> tuple[float, ...]:
        """Weights that give all classes the same total, with mean 1 over the images; for labels, those of positives."""
        truth = self.truth(records)
        known, positive = (~np.isnan(truth)).sum(0), np.nansum(truth, 0)
        if self.kind == "labels":
            return tuple(float((n - p) / p) if 0 < p < n else 1.0 for n, p in zip(known, positive, strict=True))
        present = int((positive > 0).sum())
        return tuple(float(len(records) / (present * n)) if n else 0.0 for n in positive)

    def rarity(self, records: Sequence[Record]) -> Array:
        """Sampling probabilities (images,) that make all classes, or the positives of all labels, equally frequent.

        Raises:
            DataError: for numbers, which have no classes.
        """
        if self.kind == "numbers":
            raise DataError("sampling 'balanced' applies only to classes and labels, not to numbers")
        truth = np.nan_to_num(self.truth(records))
        if self.kind == "labels":  # images without positives form an additional class
            truth = np.concatenate([truth, truth.sum(1, keepdims=True) == 0], 1)
        share = truth / np.maximum(truth.sum(0), 1)
        drawn = share.max(1)
        return drawn / drawn.sum()

    def losses(self, logits: Tensor, truth: Array, settings: Loss, weights: Sequence[float] | None = None) -> Tensor:
        """The loss (images,) of each image, float32.

        Cross-entropy (binary for labels and for steps between ordered classes) with the smoothing, weights and focal
        exponent of the settings, averaged over the known labels. The loss of numbers is in units of their spread.

        Args:
            logits: (images, columns).
            truth: the result of `truth`.
            settings: of the loss.
            weights: the result of `weights`.
        """
        logits = logits.float()
        known = torch.from_numpy(~np.isnan(truth)).to(logits.device)
        wanted = torch.from_numpy(np.nan_to_num(truth)).to(logits)
        if self.kind == "classes":
            return _classes_loss(logits, wanted, settings, weights)
        if self.kind == "numbers":
            return _mean_of_known(self._number_losses(logits, wanted, settings), known)
        if self.kind == "ordinal":
            at = torch.cumsum(wanted.flip(1), 1).flip(1)  # 1 up to the image's class, 0 above
            # Step k counts for images in class k or above.
            steps = _binary_losses(logits, at[:, 1:], settings, None) * at[:, :-1]
            losses = steps.sum(1) * known.all(1)
            return losses if weights is None else losses * (wanted @ logits.new_tensor(weights))
        return _mean_of_known(_binary_losses(logits, wanted, settings, weights), known)

    def _number_losses(self, values: Tensor, wanted: Tensor, settings: Loss) -> Tensor:
        center, spread = values.new_tensor(self.center), values.new_tensor(self.spread)
        wanted = (wanted - center) / spread
        return _REGRESSION[settings.regression](values, wanted, reduction="none")

    def loss(self, logits: Tensor, truth: Array, *, balanced: bool = False) -> Tensor:
        """The mean of `losses` for recipes; for labels, the mean over all known ones.

        Args:
            logits: (images, columns).
            truth: the result of `truth`.
            balanced: weight images so that all classes of the batch have the same total weight; only for classes.
        """
        if self.kind == "labels":
            known = torch.from_numpy(~np.isnan(truth)).to(logits.device)
            wanted = torch.from_numpy(np.nan_to_num(truth)).to(logits).float()
            losses = F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none")
            return (losses * known).sum() / known.sum().clamp(min=1)
        losses = self.losses(logits, truth, Loss())
        labels = torch.from_numpy(np.nan_to_num(truth)).argmax(1)
        return (losses * batch_weights(labels).to(losses)).mean() if balanced else losses.mean()

    def log_odds(self, logits: Tensor) -> Array:
        """Outputs (images, columns) -> (images, names), float64: log-odds of each class or label, or the numbers."""
        values = logits.detach().double().cpu()
        return odds.of_logits(values.numpy()) if self.outputs is None else self.outputs.log_odds(values).numpy()

    def cases(self, records: Sequence[Record], scores: Array) -> Cases:
        """Predictions with the truth of the images, for `engine.evaluate`; of two classes only the positive one."""
        truth, names = self.truth(records), self.names
        classes, number = self.kind in ("classes", "ordinal"), self.positive
        if number is not None:
            truth, scores, names = truth[:, [number]], scores[:, [number]], (names[number],)
        binary = classes and len(names) == 1
        return Cases(
            outputs=names,
            truth=truth,
            scores=scores,
            names=tuple(str(r.path) for r in records),
            patients=tuple(r.patient_id for r in records),
            exams=tuple(r.exam_id or "" for r in records),
            sides=tuple(r.laterality or "" for r in records),
            kind="binary" if binary else "classes" if classes else "numbers" if self.kind == "numbers" else "labels",
            probable=self.kind != "numbers",
        )


def batch_weights(labels: Tensor) -> Tensor:
    """Weights (n,) with mean 1 that give every class of a batch (labels, int64) the same total (Shen et al., 2019)."""
    _, place, counts = labels.unique(return_inverse=True, return_counts=True)
    return len(labels) / (len(counts) * counts[place]).float()


def _classes_loss(logits: Tensor, wanted: Tensor, settings: Loss, weights: Sequence[float] | None) -> Tensor:
    """Losses (images,). ``F.cross_entropy(weight=…)`` divides by the sum of weights, which cancels at batch size 1."""
    labels = wanted.argmax(1)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=settings.label_smoothing)
    if settings.focal:
        own = F.log_softmax(logits, 1).gather(1, labels[:, None])[:, 0]
        losses = losses * (1 - own.exp()).clamp(min=0) ** settings.focal
    return losses if weights is None else losses * logits.new_tensor(weights)[labels]


def _binary_losses(logits: Tensor, wanted: Tensor, settings: Loss, weights: Sequence[float] | None) -> Tensor:
    smoothed = wanted * (1 - settings.label_smoothing) + settings.label_smoothing / 2
    positive = None if weights is None else logits.new_tensor(weights)
    losses = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none", pos_weight=positive)
    if settings.focal:
        right = torch.sigmoid(torch.where(wanted > 0.5, logits, -logits))
        losses = losses * (1 - right) ** settings.focal
    return losses


def _mean_of_known(losses: Tensor, known: Tensor) -> Tensor:
    return (losses * known).sum(1) / known.sum(1).clamp(min=1)
