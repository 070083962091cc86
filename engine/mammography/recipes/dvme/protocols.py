"""Protocols on a subset: a linear layer on an extractor, a DVME head on all, or fine-tuning of the networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....datasets.dataset import ImageDataset
from ....evaluate import odds
from ....evaluate.measures import quadratic_kappa
from ....evaluate.roc import macro_auc
from ....train.loop import run_stages
from ....train.run import Run, seed_of
from ....train.stages import Stage
from ..finetuning import Finetuning
from ..sized import Size
from ..tensors import Measure, TensorTask
from .config import DvmeConfig
from .extractors import Fused
from .head import DVMEHead


class Linear(nn.Module):
    """A linear layer on concatenated embeddings: linear evaluation of one or of all."""

    def __init__(self, dims: Sequence[int], classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(sum(dims), classes)

    def forward(self, embeddings: Sequence[Tensor]) -> Tensor:
        return self.fc(torch.cat(list(embeddings), 1))


class OnEmbeddings(nn.Module):
    """A head on concatenated embeddings: (N, sum of dims) -> logits."""

    def __init__(self, dims: Sequence[int], head: nn.Module) -> None:
        super().__init__()
        self.dims, self.head = list(dims), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.split(self.dims, 1))


def make_head(protocol: str, dims: Sequence[int], classes: int, config: DvmeConfig) -> nn.Module:
    """Build the head of a protocol for embeddings of these sizes."""
    if protocol in ("linear", "concat", "finetune"):
        return Linear(dims, classes)
    tokens = "none" if protocol in ("no_attention", "single") else config.tokens
    return DVMEHead(
        dims, classes, p=config.p, hidden=config.hidden, dropout=config.dropout, tokens=tokens, heads=config.heads
    )


def measure(metric: str, classes: int) -> Measure:
    """Return "auc" (macro area under the ROC curves, one against the rest) or "kappa" (Cohen's quadratic)."""

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
    """Train a head on embeddings (n, dims[i]) of frozen extractors; keep the best epoch on validation images."""
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
    run_stages(task, [make_stage(protocol, config)], run.undealt())
    return module


def make_stage(name: str, config: DvmeConfig, transformer: bool = False) -> Stage:
    """Return the stage of a protocol; `transformer` selects the rate and batch for transformers."""
    return Stage(
        name,
        config.epochs,
        config.transformer_lr if transformer else config.lr,
        plateau=config.plateau,
        patience=config.patience,
        batch_size=config.transformer_batch if transformer else config.batch_size,
        accumulate=config.accumulate,
    )


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
    """Fine-tune extractors with a head; `transformer` selects the rate and batch for transformers."""
    torch.manual_seed(seed_of(run.seed, 1))
    module = Fused(extractors, make_head(protocol, dims, classes, config))
    stage = make_stage(protocol, config, transformer)
    size = Size(config.resize, config.crop)
    task = Finetuning(module, images, val, size, measure(config.metric, classes), run, stage.batch_size, record)
    run_stages(task, [stage], run)
    return task
