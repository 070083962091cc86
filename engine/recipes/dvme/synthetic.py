"""The recipe's claim on phantoms: three extractors that each know one kind of lesion.

Each of three small networks has learnt to tell one kind of lesion from normal tissue, on patches of its own, and is
frozen. The task is to tell all four classes apart. No extractor was trained for it, and each lacks what the others
know.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...datasets.phantom.image import LESIONS, Kind
from ...train.loop import run_stages
from ...train.run import Run, seed_of
from ...train.stages import Stage
from ..phantom_patches import CLASSES, phantom_patches
from ..recipe import Claim
from ..tensors import TensorTask, logits_of
from .compare import compare_heads, summarise
from .config import DvmeConfig, ExtractorConfig

_SIDE, _WIDTH = 48, 8
_PRETRAIN, _IMAGES = 500, {"train": 400, "val": 200, "test": 600}
_SETTINGS = DvmeConfig(
    extractors=tuple(ExtractorConfig(name, "") for name in LESIONS),
    protocols=("linear", "no_attention", "dvme"),
    subsets=(40, 120, 0),
    folds=3,
    p=16,
    hidden=64,
    epochs=30,
)


def synthetic(run: Run, seeds: Sequence[int]) -> Claim:
    """A DVME head against the best of its extractors."""
    began = time.monotonic()
    rows = [row for seed in seeds for row in _one(run.part(f"seed_{seed}"), seed)]
    return Claim(
        claim="A head that fuses the embeddings of complementary frozen extractors by attention is better than the "
        "best of them alone.",
        rule="AUC (one class against the rest) on 600 test images, mean of three repeats: in every row dvme is greater "
        "than that of the best linear probe, chosen on the test images.",
        rows=rows,
        holds=all(row["dvme"] > row["best_single"] for row in rows),
        seconds=time.monotonic() - began,
    )


def _one(run: Run, seed: int) -> list[dict[str, Any]]:
    bodies = {kind: _pretrained(run.part(f"extractors/{kind}"), kind, seed) for kind in LESIONS}
    parts: dict[str, tuple[dict[str, Tensor], Tensor]] = {}
    for number, (part, count) in enumerate(_IMAGES.items()):
        images, labels = _standardised(*phantom_patches(count, _SIDE, (seed, 2, number)))
        parts[part] = {name: logits_of(body, images) for name, body in bodies.items()}, labels
    found, _ = compare_heads(parts, len(CLASSES), _SETTINGS, Run(run.out, seed, run.device, report=run.report))
    summary = {(row["subset"], row["protocol"], row["extractor"]): row["mean"] for row in summarise(found)}
    rows = []
    for size in _SETTINGS.subsets:
        singles = {name: round(summary[size, "linear", name], 4) for name in bodies}
        row: dict[str, Any] = {"seed": seed, "labelled": size or _IMAGES["train"], **singles}
        row["best_single"] = max(singles.values())
        row["no_attention"] = round(summary[size, "no_attention", "all"], 4)
        row["dvme"] = round(summary[size, "dvme", "all"], 4)
        rows.append(row)
        run.say("  ".join(f"{key} {value}" for key, value in row.items()))
    return rows


def _pretrained(run: Run, kind: Kind, seed: int) -> nn.Module:
    """A network that has learnt to tell one kind of lesion from normal tissue: images -> (n, 32)."""
    number = LESIONS.index(kind)
    images, labels = _standardised(*phantom_patches(_PRETRAIN, _SIDE, (seed, 1, number), [kind]))
    torch.manual_seed(seed_of(seed, number))
    body = _body()
    task = TensorTask(nn.Sequential(body, nn.Linear(4 * _WIDTH, 2)), images, labels)
    stage = Stage("pretrain", 8, 0.05, optimizer="sgd", weight_decay=1e-4, batch_size=32, schedule="cosine")
    run_stages(task, [stage], Run(run.out, seed, run.device, report=run.report))
    return body


def _body() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, _WIDTH), (_WIDTH, 2 * _WIDTH), (2 * _WIDTH, 4 * _WIDTH)):
        layers += [nn.Conv2d(before, after, 3, 2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _standardised(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return (images - images.mean()) / images.std(), labels
