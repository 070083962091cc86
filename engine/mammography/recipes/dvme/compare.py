"""Runs all protocols on all subsets and repeats, on embeddings: each extractor alone, and all fused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ....errors import DataError
from ....evaluate.measures import quadratic_kappa
from ....evaluate.roc import macro_auc
from ....train.loop import run_stages
from ....train.run import Run, seed_of
from ....train.stages import Stage
from ..tensors import Measure, TensorTask, log_odds_of
from .config import DvmeConfig
from .network import DVMEHead


def draw_subset(labels: Sequence[int], classes: int, size: int, fold: int, seed: int) -> list[int]:
    """Return the indices of the images of one repeat ("fold").

    Args:
        labels: of the images of the training split.
        size: number of images to draw, equal per class (the first classes get the remainder), without replacement.
            Classes with too few images repeat them (oversampling). 0 returns all images once.
        fold: number of the repeat; repeats are independent. A smaller subset is part of a larger one.

    Raises:
        DataError: a class has no images, or size is smaller than the number of classes.
    """
    truth = np.asarray(labels)
    for number in range(classes):
        if not (truth == number).any():
            raise DataError(f"class {number} has no training images, so a fold cannot be balanced; remove the class")
    if size == 0:
        return list(range(len(truth)))
    if size < classes:
        raise DataError(f"a subset of {size} images is too small for {classes} classes; use {classes} or more")
    found: list[int] = []
    for number in range(classes):
        own = np.flatnonzero(truth == number)
        order = own[np.random.default_rng(seed_of(seed, fold, number)).permutation(len(own))]
        wanted = size // classes + (number < size % classes)
        found += [int(order[i % len(order)]) for i in range(wanted)]
    return found


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

    def auc(labels: ArrayLike, log_odds: ArrayLike) -> float | None:
        return macro_auc(np.asarray(labels), np.asarray(log_odds))

    def kappa(labels: ArrayLike, log_odds: ArrayLike) -> float | None:
        return quadratic_kappa(np.asarray(labels), np.asarray(log_odds).argmax(1), classes)

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
    validation = torch.cat(list(val[0]), 1), val[1], measure(config.metric, classes)
    task = TensorTask(module, torch.cat(list(embeddings), 1), labels, validation)
    run_stages(task, [make_stage(protocol, config)], run.undealt())
    return module


def make_stage(name: str, config: DvmeConfig, transformer: bool = False) -> Stage:
    """Return the stage of a protocol; `transformer` selects the rate and batch for transformers."""
    own = {"lr": config.transformer_lr, "batch_size": config.transformer_batch} if transformer else {}
    return config.stage(name, **own)


Embeddings = Mapping[str, Tensor]
"""(n, dim) per extractor, by name."""


@dataclass(frozen=True)
class Training:
    """One training of the comparison.

    Attributes:
        row: its subset, fold, protocol, extractor ("all" for all that are fused) and number of training images.
        names: of its extractors.
        images: indices of its training images.
        run: its folder and seed.
    """

    row: dict[str, Any]
    names: list[str]
    images: list[int]
    run: Run


def trainings(labels: Sequence[int], classes: int, config: DvmeConfig, run: Run, kind: str) -> Iterator[Training]:
    """Yield the trainings of all subsets, folds and protocols: those on "embeddings", or on "images"."""
    names = [extractor.name for extractor in config.extractors]
    fused = [extractor.name for extractor in config.extractors if extractor.fused]
    protocols = [name for name in config.protocols if name.startswith("finetune") == (kind == "images")]
    for size, fold in itertools.product(config.subsets, range(config.folds)):
        chosen = draw_subset(labels, classes, size, fold, run.seed)
        for protocol in protocols:
            for group in [[name] for name in names] if protocol in ("linear", "single", "finetune") else [fused]:
                what = group[0] if protocol in ("linear", "single", "finetune") else "all"
                row = {"subset": size, "fold": fold, "protocol": protocol, "extractor": what, "train": len(chosen)}
                own = replace(run.part(folder(protocol, what, size, fold)), seed=run.seed + fold)
                yield Training(row, group, chosen, own)


def compare_heads(
    parts: Mapping[str, tuple[Embeddings, Tensor]], classes: int, config: DvmeConfig, run: Run
) -> tuple[list[dict[str, Any]], dict[tuple[int, int], OnEmbeddings]]:
    """Train and test the protocols of `config` that need no images.

    Args:
        parts: "train", "val" and "test": embeddings of their images, and labels int64 (n,).

    Returns:
        One row per head with subset, fold, protocol, extractor, train (number of images) and test (the measure); and
        the DVME heads by (subset, fold).
    """
    rows, heads = [], {}
    labels = parts["train"][1]
    for own in trainings(labels.tolist(), classes, config, run, "embeddings"):
        train, val, test = ([parts[part][0][n] for n in own.names] for part in ("train", "val", "test"))
        few = [embedding[own.images] for embedding in train]
        protocol = own.row["protocol"]
        head = fit_head(protocol, few, labels[own.images], (val, parts["val"][1]), classes, config, own.run)
        found = measure(config.metric, classes)(parts["test"][1], log_odds_of(head, torch.cat(test, 1)))
        rows.append({**own.row, "test": found})
        if protocol == "dvme":
            heads[own.row["subset"], own.row["fold"]] = head
    return rows, heads


def folder(protocol: str, extractor: str, size: int, fold: int) -> str:
    """Return the folder of one training, relative to the run's."""
    return f"{protocol}/{extractor}/{size or 'all'}_{fold}"


def check_parts(labels: Mapping[str, Sequence[int]], classes: int) -> None:
    """Refuse splits on which nothing can be measured, before any work.

    Raises:
        DataError: val or test has no images, or only one class; or see `draw_subset`.
    """
    for part in ("val", "test"):
        if len(set(labels[part])) < 2:
            what = "no images" if not labels[part] else "images of only one class"
            raise DataError(f"split {part} has {what}; it needs images of at least two classes")
    draw_subset(labels["train"], classes, 0, 0, 0)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over the folds of each subset, protocol and extractor."""
    groups: dict[tuple[int, str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["subset"], row["protocol"], row["extractor"]), []).append(row["test"])
    return [
        {
            "subset": subset,
            "protocol": protocol,
            "extractor": extractor,
            "mean": float(np.mean(values)),
            "std": float(np.std(values)),
            "folds": len(values),
        }
        for (subset, protocol, extractor), values in groups.items()
    ]
