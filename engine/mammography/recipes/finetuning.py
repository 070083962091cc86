"""Fine-tuning of whole networks, on images of one size or of any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...accelerate import accelerate
from ...datasets.dataset import ImageDataset
from ...train.image_task import ImageTask
from ...train.run import Run
from .sized import Size, read_sized
from .tensors import Measure


class Finetuning(ImageTask):
    """Training of all layers, on images resized to one size or at their native resolution.

    Args:
        module: (N, C, H, W) -> (N, classes).
        images: training images of a subset.
        val: validation images, which select the best epoch; if empty, the training loss does.
        record: see `ImageTask`.
    """

    images: ImageDataset
    val: ImageDataset

    def __init__(
        self,
        module: nn.Module,
        images: ImageDataset,
        val: ImageDataset,
        size: Size,
        score: Measure,
        run: Run,
        batch: int,
        record: Mapping[str, Any],
    ) -> None:
        super().__init__(module, accelerate(module, run.memory_budget, fallback="untiled"), images, val, record)
        self.size, self.measure, self.best_by_loss = size, score, not len(val)
        self.batch, self.device = batch, run.device

    def loss(self, batch: Sequence[dict]) -> Tensor:
        labels = torch.tensor([item["label"] for item in batch], device=self.device)
        return nn.functional.cross_entropy(self._logits([item["image"] for item in batch]).float(), labels)

    def score(self) -> float | None:
        if not len(self.val):
            return None
        return self.measure(torch.tensor([record.label for record in self.val.records]), self.predict(self.val))

    @torch.no_grad()
    def predict(self, images: ImageDataset) -> Tensor:
        """Return logits (n, classes) on the CPU; the module must be in evaluation mode."""
        starts = range(0, len(images), self.batch)
        batches = [[images[i]["image"] for i in range(p, min(p + self.batch, len(images)))] for p in starts]
        return torch.cat([self._logits(batch).float().cpu() for batch in batches])

    def _logits(self, sources: Sequence) -> Tensor:
        self.meter.image(sum(source.shape[1] * source.shape[2] for source in sources))
        if self.size.native:
            return self.net(sources)
        return self.net(torch.stack([read_sized(source, self.size) for source in sources]).to(self.device))
