"""The classification task of `gigamorph train`: a prediction per image of any size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets.tables import Record, reading_of
from ..errors import BudgetError
from ..evaluate import odds
from ..images.pixels import header_of
from ..models.outputs import Outputs
from .image_task import TargetTask
from .metrics import Prediction, scores
from .pixels import sources_of


class Classification(TargetTask[Prediction]):
    """Trains a network (N, C, H, W) or pixel sources -> (N, width of the target).

    The score is the target's measure, such as the AUC, per image; per exam if the views of an exam are one sample.
    """

    def loss(self, batch: Sequence[dict[str, Any]]) -> Tensor:
        self.meter.image(sum(map(pixels_of, batch)))
        logits = logits_of_items(self.module, batch, self.target.outputs)
        self.look(batch)
        truth = self.target.truth([item["record"] for item in batch])
        return self.target.losses(logits, truth, self.settings, self.weights).mean()

    def find(self, item: dict[str, Any]) -> Prediction:
        self.meter.image(pixels_of(item))
        logits = logits_of_items(self.module, [item], self.target.outputs)
        return prediction(item, logits[0], self.target.outputs)

    def measures(self, found: Sequence[Prediction]) -> dict[str, float | int | None]:
        return scores(found, self.target.names)

    def loss_of(self, found: Prediction) -> float:
        """The loss of a prediction, weighted as in training: -log p = log(1 + exp(-z)) for the log-odds z of the true
        class; for numbers the squared error in units of their spread."""
        if self.target.kind in ("classes", "ordinal"):
            label = found.label or 0
            return (self.weights or [1.0] * len(found.log_odds))[label] * np.logaddexp(0.0, -found.log_odds[label])
        truth, values = np.array(found.truth), np.array(found.log_odds)
        if self.target.kind == "numbers":
            return float(np.nanmean(((values - truth) / np.array(self.target.spread)) ** 2))
        weights = np.where(truth > 0.5, self.weights or 1.0, 1.0)  # only positives are weighted, see `Target.weights`
        return float(np.nanmean(weights * np.logaddexp(0.0, np.where(truth > 0.5, -values, values)) + 0 * truth))


def logits_of_items(net: nn.Module, items: Sequence[dict[str, Any]], outputs: Outputs | None = None) -> Tensor:
    """Logits (items, outputs) of a data set's items: images, or exams whose views pass the network one by one.

    Args:
        outputs: how views are combined; None if the items are images.

    Raises:
        BudgetError: naming the first image's file.
    """
    sources = [source for item in items for source in sources_of(item)]
    try:
        rows = net(sources[0] if len(sources) == 1 else sources)
    except BudgetError as error:  # the larger images of a set may not fit
        raise BudgetError(f"{items[0]['record'].path}: {error}", error.needed_bytes) from error
    if outputs is None or outputs.views is None:
        return rows
    return torch.cat([outputs.together(part) for part in rows.split([len(sources_of(item)) for item in items])])


def pixels_of(item: Mapping[str, Any]) -> int:
    """The number of pixels of an item, over all its views."""
    return sum(source.shape[-2] * source.shape[-1] for source in sources_of(item))


def truth_of(record: Record, names: Sequence[str]) -> tuple[float, ...] | None:
    """The table's values of these labels or numbers, NaN where unknown; None if all are unknown."""
    found = tuple(record.labels.get(name, math.nan) for name in names)
    return None if all(math.isnan(value) for value in found) else found


def prediction(item: dict[str, Any], logits: Tensor, outputs: Outputs | None = None) -> Prediction:
    """The prediction of one image, or of an exam of several views, from its logits (classes,).

    Patient, exam (the study), laterality and view come from the table, else from the DICOM header. If the header has no
    patient, its study groups the images of a patient.

    Args:
        outputs: the meaning of the logits if they are not one softmax, see `outputs_of`.
    """
    record: Record = item["record"]
    together = "views" in item
    header = None if together else header_of(item["image"])
    # In a table without patients the image's file name is its patient.
    patient = record.patient_id
    exam = record.exam_id or ""
    if Path(patient).name == record.path.name:
        study = getattr(header, "study_uid", None) or ""
        patient = getattr(header, "patient_id", None) or study or patient
        exam = exam or study
    values = logits.detach().double().cpu()
    log_odds = odds.of_logits(values.numpy()) if outputs is None else outputs.log_odds(values[None])[0].numpy()
    return Prediction(
        image="_".join(filter(None, (record.patient_id, record.exam_id))) if together else str(record.path),
        log_odds=tuple(log_odds.tolist()),
        exclusive=outputs is None or outputs.exclusive,
        numbers=outputs is not None and outputs.numbers,
        truth=None if outputs is None or outputs.exclusive else truth_of(record, outputs.names),
        label=None if record.label < 0 else record.label,
        patient=patient,
        laterality=record.laterality or getattr(header, "laterality", None) or "",
        view=record.view or getattr(header, "view", None) or "",
        exam=exam,
        split=record.split or "",
        level="exam" if together else "image",
        reading={} if together else reading_of(record),
    )
