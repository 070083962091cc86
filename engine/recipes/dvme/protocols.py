"""What is trained on a subset: a linear layer on an extractor, a DVME head on all, or the networks themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...accelerate import accelerate
from ...datasets.dataset import ImageDataset
from ...evaluate import odds
from ...evaluate.measures import quadratic_kappa
from ...evaluate.roc import macro_auc
from ...train.loop import run_stages
from ...train.run import Run, seed_of
from ...train.stages import Stage
from ...train.task import Task
from ..sized import Size, read_sized
from ..tensors import Measure, TensorTask
from .config import DvmeConfig
from .extractors import Fused
from .head import DVMEHead


class Linear(nn.Module):
    """A linear layer on embeddings side by side: linear evaluation, of one or of all."""

    def __init__(self, dims: Sequence[int], classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(sum(dims), classes)

    def forward(self, embeddings: Sequence[Tensor]) -> Tensor:
        return self.fc(torch.cat(list(embeddings), 1))


class OnEmbeddings(nn.Module):
    """A head on embeddings that are kept side by side: (N, sum of dims) -> logits."""

    def __init__(self, dims: Sequence[int], head: nn.Module) -> None:
        super().__init__()
        self.dims, self.head = list(dims), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.split(self.dims, 1))


def make_head(protocol: str, dims: Sequence[int], classes: int, config: DvmeConfig) -> nn.Module:
    """The head of a protocol on embeddings of these sizes."""
    if protocol in ("linear", "concat", "finetune"):
        return Linear(dims, classes)
    tokens = "none" if protocol in ("no_attention", "single") else config.tokens
    return DVMEHead(
        dims, classes, p=config.p, hidden=config.hidden, dropout=config.dropout, tokens=tokens, heads=config.heads
    )


def measure(metric: str, classes: int) -> Measure:
    """ "auc": the macro area under the ROC curves, one class against the rest; "kappa": Cohen's, quadratic."""

    def auc(labels: Tensor, logits: Tensor) -> float | None:
        return macro_auc(labels.numpy(), odds.of_logits(logits.double().numpy()))

    def kappa(labels: Tensor, logits: Tensor) -> float | None:
        return quadratic_kappa(labels.numpy(), logits.argmax(1).numpy(), classes)

    return kappa if metric == "kappa" else auc


def fit_head(
    protocol: str,
    embeddings: Sequence[Tensor],
    labels: Tensor,
    val: tuple[Sequence[Tensor], Tensor],
    classes: int,
    config: DvmeConfig,
    run: Run,
) -> OnEmbeddings:
    """Train a head on embeddings (n, dims[i]) of frozen extractors; the best epoch on the validation images is kept."""
    dims = [embedding.shape[1] for embedding in embeddings]
    torch.manual_seed(seed_of(run.seed, 1))
    module = OnEmbeddings(dims, make_head(protocol, dims, classes, config))
    task = TensorTask(
        module,
        torch.cat(list(embeddings), 1),
        labels,
        (torch.cat(list(val[0]), 1), val[1]),
        measure(config.metric, classes),
    )
    run_stages(task, [_stage(protocol, config)], run)
    return module


def _stage(name: str, config: DvmeConfig, transformer: bool = False) -> Stage:
    return Stage(
        name,
        config.epochs,
        config.transformer_lr if transformer else config.lr,
        plateau=config.plateau,
        patience=config.patience,
        batch_size=config.transformer_batch if transformer else config.batch_size,
    )


class Finetuning(Task):
    """All layers learn, on images.

    Args:
        module: (N, C, H, W) -> (N, classes).
        images: a subset's training images; told which epoch it is.
        val: validation images, which choose the best epoch.
        record: what checkpoints say of the network.
    """

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
        self.module, self.images, self.val, self.size, self.measure = module, images, val, size, score
        self.record = record
        self.batch, self.device = batch, run.device
        self.net = accelerate(module, run.memory_budget, fallback="whole")
        self.net.on_tile = lambda event: self.meter.on_tile(event)

    def examples(self, epoch: int) -> ImageDataset:
        self.images.set_epoch(epoch)
        return self.images

    def loss(self, batch: Sequence[dict]) -> Tensor:
        labels = torch.tensor([item["label"] for item in batch], device=self.device)
        return nn.functional.cross_entropy(self._logits([item["image"] for item in batch]).float(), labels)

    def score(self) -> float | None:
        return self.measure(torch.tensor([record.label for record in self.val.records]), self.predict(self.val))

    @torch.no_grad()
    def predict(self, images: ImageDataset) -> Tensor:
        """Logits (n, classes) on the CPU; the module is to be in evaluation mode."""
        places = range(0, len(images), self.batch)
        batches = [[images[i]["image"] for i in range(p, min(p + self.batch, len(images)))] for p in places]
        return torch.cat([self._logits(batch).float().cpu() for batch in batches])

    def _logits(self, sources: Sequence) -> Tensor:
        self.meter.image(sum(source.shape[1] * source.shape[2] for source in sources))
        if self.size.native:
            return self.net(sources)
        return self.net(torch.stack([read_sized(source, self.size) for source in sources]).to(self.device))


def fit_networks(
    protocol: str,
    extractors: Sequence[nn.Module],
    dims: Sequence[int],
    images: ImageDataset,
    val: ImageDataset,
    classes: int,
    config: DvmeConfig,
    run: Run,
    transformer: bool,
    record: Mapping[str, Any],
) -> Finetuning:
    """Fine-tune extractors with a head on them; `transformer`: with the rate and batch for one."""
    torch.manual_seed(seed_of(run.seed, 1))
    module = Fused(extractors, make_head(protocol, dims, classes, config))
    stage = _stage(protocol, config, transformer)
    size = Size(config.resize, config.crop)
    task = Finetuning(module, images, val, size, measure(config.metric, classes), run, stage.batch_size, record)
    run_stages(task, [stage], run)
    return task
