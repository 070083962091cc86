"""Images of any size, each of one class: the task of `gigamorph train`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..accelerate import Accelerated
from ..datasets.tables import Record
from ..errors import BudgetError
from ..evaluate import odds
from ..models.outputs import Outputs
from .curves import write_curves
from .metrics import Prediction, scores
from .task import Score, Task


class Images(Protocol):
    """What `gigamorph.engine.datasets.dataset.ImageDataset` offers: records, and items that open their file."""

    records: list[Record]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class Classification(Task):
    """Cross-entropy over a network that takes pixel sources; the score is the AUC per image.

    Args:
        net: an accelerated network, (N, C, H, W) or pixel sources -> (N, classes).
        train: images of the epochs; told which one it is where they have a ``set_epoch``.
        val: images that choose the best epoch; where one class alone has no AUC, by the loss.
        record: what checkpoints say of the network.
        class_weights: (classes,) or None; weights of the loss.
    """

    def __init__(
        self,
        net: Accelerated,
        train: Images,
        val: Images,
        record: Mapping[str, Any],
        class_weights: Sequence[float] | None,
    ) -> None:
        self.module, self.images, self.val, self.record, self.weights = net, train, val, record, class_weights
        net.on_tile = lambda event: self.meter.on_tile(event)

    def examples(self, epoch: int) -> Any:
        tell_epoch(self.images, epoch)
        return self.images

    def loss(self, batch: Sequence[dict[str, Any]]) -> Tensor:
        self.meter.image(sum(item["image"].shape[-2] * item["image"].shape[-1] for item in batch))
        logits = logits_of_items(self.module, batch)
        labels = torch.tensor([item["label"] for item in batch], device=logits.device)
        return weighted_loss(logits, labels, self.weights)

    def score(self) -> Score | None:
        if not len(self.val):
            return None
        predictions = self.predict(self.val, "validate")
        found = scores(predictions)
        weights = self.weights or [1.0] * len(predictions[0].log_odds)
        # -log p of the label's probability p, whose log-odds are z: log(1 + exp(-z)). In float32, as in training, so
        # that sums that processes round otherwise are equal.
        losses = [weights[p.label or 0] * np.logaddexp(0.0, -p.log_odds[p.label or 0]) for p in predictions]
        loss = float(np.mean(np.array(losses, np.float32), dtype=np.float64))
        value = -loss if found["auc_image"] is None else float(found["auc_image"])
        areas = {f"val_{name}": found[name] for name in ("auc_image", "auc_breast")}
        columns = {name: math.nan if area is None else float(area) for name, area in areas.items()}
        # Few images make many equal scores: the loss decides between them.
        shown = {"val loss": loss, "val AUC": columns["val_auc_image"]}
        return Score(value, -loss, {"val_loss": loss, "val_score": value, **columns}, shown)

    def end_epoch(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        write_curves(folder, rows)

    def predict(self, images: Images, stage: str) -> list[Prediction]:
        """Predictions of the images, in order; a collective of the process group."""
        self.module.eval()
        self.meter.start(stage, len(images))
        found = []
        with torch.no_grad():
            for index in range(self.group.turn, len(images), self.group.at_once):
                item = images[index]
                self.meter.image(item["image"].shape[-2] * item["image"].shape[-1])
                found.append(prediction(item, logits_of_items(self.module, [item])[0]))
                self.meter.image_done()
        return self.group.in_order(found)


def tell_epoch(images: Any, epoch: int) -> None:
    """Images that vary from epoch to epoch are told which one it is."""
    tell = getattr(images, "set_epoch", None)
    if tell is not None:
        tell(epoch)


def logits_of_items(net: nn.Module, items: Sequence[dict[str, Any]]) -> Tensor:
    """(images, outputs) of a data set's items.

    Raises:
        BudgetError: naming the first image's file.
    """
    sources = [item["image"] for item in items]
    try:
        return net(sources[0] if len(sources) == 1 else sources)
    except BudgetError as error:  # the larger images of a set may not fit
        raise BudgetError(f"{items[0]['record'].path}: {error}") from error


def weighted_loss(logits: Tensor, labels: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Mean of the cross-entropy, float32, of logits (N, classes), weighted by class.

    ``F.cross_entropy(weight=…)`` divides by the sum of the weights, which cancels them at batch size 1; here the
    divisor is the number of images.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    if weights is not None:
        losses = losses * torch.tensor(weights, dtype=torch.float32, device=losses.device)[labels]
    return losses.mean()


def prediction(item: dict[str, Any], logits: Tensor, outputs: Outputs | None = None) -> Prediction:
    """One image's prediction from its logits (classes,).

    Patient, laterality and view come from the table, else from the DICOM header.

    Args:
        outputs: what the logits are, where they are not those of one softmax, see `outputs_of`.
    """
    record: Record = item["record"]
    header = getattr(getattr(item["image"], "stored", None), "info", None)
    # Tables without patients stand each image for itself.
    patient = record.patient_id
    if Path(patient).name == record.path.name:
        patient = getattr(header, "patient_id", None) or patient
    values = logits.detach().double().cpu()
    log_odds = odds.of_logits(values.numpy()) if outputs is None else outputs.log_odds(values[None])[0].numpy()
    return Prediction(
        image=str(record.path),
        log_odds=tuple(log_odds.tolist()),
        exclusive=outputs is None or outputs.exclusive,
        label=None if record.label < 0 else record.label,
        patient=patient,
        laterality=record.laterality or getattr(header, "laterality", None) or "",
        view=record.view or getattr(header, "view", None) or "",
        exam=record.exam_id or "",
        split=record.split or "",
    )


def balanced_weights(labels: Sequence[int], classes: int) -> list[float]:
    """Weights of the classes, inverse to their frequency, with mean 1 over the images given."""
    counts = np.bincount(np.asarray(labels), minlength=classes)
    present = int((counts > 0).sum())
    return [float(len(labels) / (present * n)) if n else 0.0 for n in counts]
