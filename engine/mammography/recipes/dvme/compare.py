"""Runs all protocols on all subsets and repeats, on embeddings: each extractor alone, and all fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....errors import DataError
from ....train.run import Run
from ..tensors import logits_of
from .config import DvmeConfig
from .protocols import OnEmbeddings, fit_head, measure
from .subsets import draw_subset

Embeddings = Mapping[str, Tensor]
"""(n, dim) per extractor, by name."""


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
    score = measure(config.metric, classes)
    rows, heads = [], {}
    labels, names = parts["train"][1], list(parts["train"][0])
    fused = [extractor.name for extractor in config.extractors if extractor.fused]
    for size in config.subsets:
        for fold in range(config.folds):
            subset = draw_subset(labels.tolist(), classes, size, fold, run.seed)
            for protocol in [p for p in config.protocols if not p.startswith("finetune")]:
                per_extractor = protocol in ("linear", "single")
                for group in [[name] for name in names] if per_extractor else [fused]:
                    what = group[0] if per_extractor else "all"
                    own = replace(run.part(folder(protocol, what, size, fold)), seed=run.seed + fold)
                    train, val, test = ([parts[part][0][n] for n in group] for part in ("train", "val", "test"))
                    head = fit_head(
                        protocol,
                        [e[subset] for e in train],
                        labels[subset],
                        (val, parts["val"][1]),
                        classes,
                        config,
                        own,
                    )
                    found = score(parts["test"][1], logits_of(head, torch.cat(test, 1)))
                    rows.append(_row(size, fold, protocol, what, len(subset), found))
                    if protocol == "dvme":
                        heads[size, fold] = head
    return rows, heads


def _row(size: int, fold: int, protocol: str, what: str, images: int, found: float | None) -> dict[str, Any]:
    return {"subset": size, "fold": fold, "protocol": protocol, "extractor": what, "train": images, "test": found}


def folder(protocol: str, extractor: str, size: int, fold: int) -> str:
    """Return the folder of one training, relative to the run's."""
    return f"{protocol}/{extractor}/{size or 'all'}_{fold}"


def check_parts(labels: Mapping[str, Sequence[int]], classes: int) -> None:
    """Refuse splits on which nothing can be measured, before any work.

    Raises:
        DataError: val or test has no images, or only one class.
    """
    for part in ("val", "test"):
        if len(set(labels[part])) < 2:
            what = "no images" if not labels[part] else "images of only one class"
            raise DataError(f"split {part} has {what}; it needs images of at least two classes")
    for number in range(classes):
        if number not in labels["train"]:
            raise DataError(f"class {number} has no training images, so a fold cannot be balanced; remove the class")


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
