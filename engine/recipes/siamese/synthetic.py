"""The recipe's claims on mirrored phantoms with lesions on one side.

Both breasts of a phantom woman share outline, normal masses, lines and most of their texture. One pair of patches in
ten has a mass or an asymmetry in one of the two. The networks see no label; the soft labels are then compared with
the truth. One of the networks becomes the start of a classifier of single patches, trained on few labelled patches of
other women, and is compared with the same classifier from scratch, and from networks that have learnt from the same
patches by SimCLR and BYOL.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...datasets.phantom import PhantomImage
from ...datasets.phantom.image import Kind
from ...evaluate.roc import auc
from ...train.loop import run_stages
from ...train.run import Run, seed_of
from ...train.stages import Stage
from ..recipe import Claim
from .config import SiameseConfig
from .network import Embedding
from .probe import fine_tuned, probed
from .starts import self_supervised
from .task import SiameseTask

_HEIGHT, _WIDTH, _SIDE, _SYMMETRY = 256, 192, 32, 0.97
_KINDS: tuple[Kind, ...] = ("mass", "asymmetry")
_PAIRS, _LESIONS, _LABELLED, _DRAWS, _TEST = 2000, 0.1, (8, 20, 60), 3, 500
_FEW = _LABELLED[:2]
_SETTINGS = SiameseConfig(
    patch=_SIDE,
    dim=32,
    warm_up=1,
    epochs=15,
    batch_size=32,
    lr=2e-3,
    mean=(0.3,),
    std=(0.1,),
    probe_epochs=30,
    hidden=256,
)


def synthetic(run: Run, seeds: Sequence[int]) -> Claim:
    """Soft labels against the truth, and the start that the networks are for a classifier."""
    began = time.monotonic()
    rows = [_one(run.part(f"seed_{seed}"), seed) for seed in seeds]

    def mean(column: str) -> float:
        return float(np.mean([row[column] for row in rows]))

    better = all(
        mean(f"fine_tuned_{n}") > mean(f"scratch_{n}") and mean(f"probe_{n}") > mean(f"untrained_probe_{n}")
        for n in _LABELLED
    ) and all(mean(f"probe_{n}") > mean(f"scratch_{n}") for n in _FEW)
    return Claim(
        claim="Without labels, two networks that compare contralateral patches find the pairs of which one has a "
        "lesion, and are a better start for a patch classifier with few labels than none.",
        rule="AUC of the soft labels above 0.9 for every seed; averaged over the seeds, for each number of labelled "
        f"patches ({', '.join(map(str, _LABELLED))}; mean of {_DRAWS} draws) the AUC on {_TEST} test patches after "
        "fine-tuning is greater than after training from scratch, and that of a linear probe on the frozen network "
        f"than on an untrained one; with {' and '.join(map(str, _FEW))} labelled patches the probe's is also greater "
        "than after training all layers from scratch.",
        rows=rows,
        holds=all(row["soft_label_auc"] > 0.9 for row in rows) and better,
        seconds=time.monotonic() - began,
    )


def _one(run: Run, seed: int) -> dict[str, Any]:
    pairs, truth, _ = phantom_pairs(_PAIRS, (seed, 1), _LESIONS)
    networks = [_network((seed, number)) for number in range(2)]
    task = SiameseTask(networks, pairs, [str(i) for i in range(_PAIRS)], _SETTINGS, run.device)
    stage = Stage(
        "pairs", _SETTINGS.epochs, _SETTINGS.lr, weight_decay=_SETTINGS.weight_decay, batch_size=_SETTINGS.batch_size
    )
    run_stages(task, [stage], Run(run.out / "pairs", seed, run.device, report=run.report))
    measured = [task.measure(network) for network in networks]
    labels = torch.stack([labels for labels, _ in measured]).mean(0).numpy()
    distances = np.mean([task.distances(network)[0] for network in networks], 0)
    row: dict[str, Any] = {
        "seed": seed,
        "soft_label_auc": round(auc(truth, labels) or 0.0, 4),
        "distance_auc": round(auc(truth, distances) or 0.0, 4),
        "share": round(measured[0][1]["share"], 3),
        "embedding_std": round(min(told["embedding_std"] for _, told in measured), 3),
    }
    x, y = _patches(_DRAWS * max(_LABELLED), (seed, 2))
    test, test_y = _patches(_TEST, (seed, 3))
    # Prefixes of the columns: of the probe, and of fine-tuning.
    starts = {("probe", "fine_tuned"): networks[0], ("untrained_probe", "scratch"): _network((seed, 2))}
    for name in ("simclr", "byol"):
        part = Run(run.out / name, seed, run.device, report=run.report)
        starts[f"{name}_probe", name] = self_supervised(name, _network((seed, 0)), pairs, _SETTINGS, part)
    for count in _LABELLED:
        found: dict[str, list[float]] = {}
        for draw in range(_DRAWS):
            few, labels = x[draw * count : (draw + 1) * count], y[draw * count : (draw + 1) * count]
            for (probe, tuned), start in starts.items():
                own = Run(run.out / f"{tuned}_{count}_{draw}", seed, run.device, report=run.report)
                found.setdefault(probe, []).append(_auc(test_y, probed(start, few, labels, test)))
                found.setdefault(tuned, []).append(_auc(test_y, fine_tuned(start, few, labels, test, _SETTINGS, own)))
        row |= {f"{name}_{count}": round(float(np.mean(values)), 4) for name, values in found.items()}
    run.say("  ".join(f"{key} {value}" for key, value in row.items()))
    return row


def _auc(truth: Tensor, scores: np.ndarray) -> float:
    return auc(truth.numpy(), scores) or 0.0


def phantom_pairs(count: int, seed: Sequence[int], lesions: float) -> tuple[Tensor, np.ndarray, Tensor]:
    """Patches (count, 2, 1, side, side) of one place in both breasts, mirrored to one geometry and normalised; and
    whether one of them has a lesion, and which it would be."""
    pairs = np.empty((count, 2, 1, _SIDE, _SIDE), np.float32)
    truth, sides = np.zeros(count, np.int64), torch.zeros(count, dtype=torch.int64)
    for index in range(count):
        own = (*seed, index)
        rng = np.random.default_rng([*own, 9])
        truth[index] = rng.random() < lesions
        kind, side = _KINDS[int(rng.integers(len(_KINDS)))], int(rng.integers(2))
        sides[index] = side
        # The place of the lesion, or where it would have been.
        top, bottom, left, right = (
            PhantomImage(_HEIGHT, _WIDTH, seed=own, side=(*own, side), lesions=(kind,), symmetry=_SYMMETRY)
            .lesions[0]
            .box
        )
        shift = rng.integers(-_SIDE // 8, _SIDE // 8 + 1, 2)
        y = int(np.clip((top + bottom - _SIDE) // 2 + shift[0], 0, _HEIGHT - _SIDE))
        x = int(np.clip((left + right - _SIDE) // 2 + shift[1], 0, _WIDTH - _SIDE))
        for number in range(2):
            has = (kind,) if truth[index] and number == side else ()
            image = PhantomImage(_HEIGHT, _WIDTH, seed=own, side=(*own, number), lesions=has, symmetry=_SYMMETRY)
            pairs[index, number, 0] = image.read(y, y + _SIDE, x, x + _SIDE) / np.float32(4095)
    return (torch.from_numpy(pairs) - _SETTINGS.mean[0]) / _SETTINGS.std[0], truth, sides


def _patches(count: int, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Single patches, every other one with a lesion."""
    normal, _, _ = phantom_pairs(count // 2, (*seed, 0), 0.0)
    lesion, _, side = phantom_pairs(count // 2, (*seed, 1), 1.0)
    both = torch.stack([normal[:, 0], lesion[torch.arange(count // 2), side]], 1)
    return both.flatten(0, 1), torch.arange(count) % 2


def _network(seed: Sequence[int]) -> Embedding:
    torch.manual_seed(seed_of(*seed))
    layers: list[nn.Module] = []
    for before, after in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, 2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return Embedding(nn.Sequential(*layers), "", _SETTINGS.dim, 1, _SIDE)
