"""The LightningModule: a classifier whose images are pixel sources of any size."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..datasets.tables import Record
from ..errors import BudgetError
from ..evaluate import odds
from ..models.compat import make_torchvision_importable
from ..parallel.process_group import ProcessGroup
from .metrics import Prediction, scores
from .progress import Meter

make_torchvision_importable()

import lightning.pytorch as pl  # noqa: E402


class Classifier(pl.LightningModule):
    """Cross-entropy over a network that takes pixel sources.

    Every random number of a step (dropout, stochastic depth) follows from the seed, the epoch and the step's place in
    the epoch, so that a resumed run repeats an uninterrupted one.

    Args:
        net: an accelerated network, (N, C, H, W) or pixel sources -> (N, classes).
        record: what the checkpoint says of the run: plain containers, numbers and texts only.
        class_weights: (classes,) or None; weights of the loss.
        steps: optimizer steps of the whole run, for the cosine schedule.
        group: the processes that train together. If each has images of its own, gradients are averaged over them at
            each optimizer step.
    """

    _averaged: nn.parallel.DistributedDataParallel | None

    def __init__(
        self,
        net: nn.Module,
        record: dict[str, Any],
        *,
        seed: int = 0,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        steps: int = 1,
        class_weights: Sequence[float] | None = None,
        meter: Meter | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self._group = group or ProcessGroup()
        # Not one of this module's children, among whose parameters those of the network would be twice.
        self.__dict__["_averaged"] = _averaged(net) if self._group.at_once > 1 else None
        self.record = record
        self.seed, self.lr, self.weight_decay, self.steps = seed, lr, weight_decay, steps
        self._class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self._meter = meter or Meter(None)
        self.validated: list[Prediction] = []
        self.validation_losses: list[float] = []
        self.training_losses: list[float] = []
        self.position = (0, 0)
        """Epoch, and examples of it that are done, by all processes."""
        self._gradients: dict[str, Tensor] | None = None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean of the weighted cross-entropy, float32.

        ``F.cross_entropy(weight=…)`` divides by the sum of the weights, which cancels them at batch size 1; here the
        divisor is the number of images.
        """
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        if self._class_weights is not None:
            losses = losses * self._class_weights.to(losses.device)[labels]
        return losses.mean()

    def _logits(self, batch: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        sources = [item["image"] for item in batch]
        self._meter.image(sum(s.shape[-2] * s.shape[-1] for s in sources))
        labels = torch.tensor([item["label"] for item in batch], device=self.device)
        net = self.net if self._averaged is None or not self.training else self._averaged
        try:
            return net(sources[0] if len(sources) == 1 else sources), labels
        except BudgetError as error:  # the larger images of a set may not fit
            raise BudgetError(f"{batch[0]['record'].path}: {error}") from error

    def training_step(self, batch: Sequence[dict[str, Any]], batch_idx: int) -> Tensor:
        number = batch_idx * self._group.at_once + self._group.turn
        seed = np.random.SeedSequence([self.seed, self.current_epoch, number]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        with self._accumulating(batch_idx):
            logits, labels = self._logits(batch)
        loss = self.loss(logits, labels)
        if not self._group.counts(batch_idx, len(self.trainer.train_dataloader.dataset)):  # pyright: ignore
            return loss * 0  # an image that this process repeats while others have their last
        self.training_losses.append(loss.item())
        return loss

    def _accumulating(self, batch_idx: int) -> contextlib.AbstractContextManager[Any]:
        """Processes average their gradients when an optimizer step follows, not after each image."""
        done = batch_idx + 1
        last = done % self.trainer.accumulate_grad_batches == 0 or done == self.trainer.num_training_batches
        return contextlib.nullcontext() if self._averaged is None or last else self._averaged.no_sync()

    def on_validation_start(self) -> None:
        if self._group.at_once > 1:  # each process has statistics of its own images; the first one's are stored
            for buffer in self.net.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: Sequence[dict[str, Any]], batch_idx: int) -> None:
        if not self._group.counts(batch_idx, len(self.trainer.val_dataloaders.dataset)):  # pyright: ignore
            return
        logits, labels = self._logits(batch)
        for item, row, label in zip(batch, logits, labels, strict=True):
            found = prediction(item, row)
            self.validated.append(found)
            self.validation_losses.append(self.loss(row[None], label[None]).item())

    def on_validation_epoch_end(self) -> None:
        found = scores(self._group.in_order(self.validated))
        losses = self._group.in_order(self.validation_losses)
        loss = float(np.mean(losses)) if losses else math.nan
        score = -loss if found["auc_image"] is None else float(found["auc_image"])
        # One class alone has no AUC; the loss then decides which epoch was best.
        self.log_dict({"val_loss": loss, "val_score": score})
        for name in ("auc_image", "auc_breast"):
            value = found[name]
            self.log("val_" + name, math.nan if value is None else float(value))
        self.validated, self.validation_losses = [], []

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # pixel sources are read, and uploaded, tile by tile

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.net.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.net.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        per_step = self.trainer.accumulate_grad_batches * self._group.at_once
        checkpoint["gigamorph"] = {
            **self.record,
            "position": list(self.position),
            "training_losses": self._group.in_order(self.training_losses),
            # Inside an accumulation the gradients so far are part of the state.
            "gradients": {
                name: self._group.mean(p.grad.detach()).cpu()
                for name, p in self.net.named_parameters()
                if p.grad is not None and self.position[1] % per_step
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint["gigamorph"]
        self.position = (stored["position"][0], stored["position"][1])
        self.training_losses = list(stored["training_losses"][self._group.turn :: self._group.at_once])
        self._gradients = stored["gradients"]

    def on_train_start(self) -> None:
        for name, parameter in self.net.named_parameters():
            if self._gradients and name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter.device)
        self._gradients = None


def _averaged(net: nn.Module) -> nn.parallel.DistributedDataParallel:
    # A network may have parameters that an image does not reach; DDP must not wait for their gradients.
    return nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True, find_unused_parameters=True)


def prediction(item: dict[str, Any], logits: Tensor) -> Prediction:
    """One image's prediction from its logits (classes,).

    Patient, laterality and view come from the table, else from the DICOM header.
    """
    record: Record = item["record"]
    header = getattr(getattr(item["image"], "stored", None), "info", None)
    # Tables without patients stand each image for itself.
    patient = record.patient_id
    if Path(patient).name == record.path.name:
        patient = getattr(header, "patient_id", None) or patient
    return Prediction(
        image=str(record.path),
        log_odds=tuple(odds.of_logits(logits.detach().double().cpu().numpy()).tolist()),
        label=None if record.label < 0 else record.label,
        patient=patient,
        laterality=record.laterality or getattr(header, "laterality", None) or "",
        view=record.view or getattr(header, "view", None) or "",
        exam=record.exam_id or "",
    )


def cosine_with_warmup(steps: int) -> Any:
    """The factor of the learning rate at each step: linear over the first tenth, then a cosine down to zero."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return factor


def balanced_weights(labels: Sequence[int], classes: int) -> list[float]:
    """Weights of the classes, inverse to their frequency, with mean 1 over the images given."""
    counts = np.bincount(np.asarray(labels), minlength=classes)
    present = int((counts > 0).sum())
    return [float(len(labels) / (present * n)) if n else 0.0 for n in counts]
