"""The recipe's claims on mirrored phantoms with lesions on one side.

Both breasts of a phantom woman share outline, normal masses, lines and most of their texture. One pair of patches in
ten has a mass or an asymmetry in one of the two. The networks see no label; the soft labels are then compared with
the truth. One of the networks becomes the start of a classifier of single patches, trained on few labelled patches of
other women, and is compared with the same classifier from scratch, from networks that have learnt from the same
patches by SimCLR and BYOL, and from Siamese networks without soft labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....evaluate.roc import auc
from ....train.loop import run_stages
from ....train.run import Run, seed_of
from ....train.stages import Stage
from ...phantom import PhantomImage
from ...phantom.image import Kind
from ..claims import Effect, Rule, Synthetic
from .config import SiameseConfig
from .network import Embedding
from .probe import fine_tuned, probed
from .starts import self_supervised
from .task import SiameseTask

_HEIGHT, _WIDTH, _SIDE, _SYMMETRY = 256, 192, 32, 0.97
_KINDS: tuple[Kind, ...] = ("mass", "asymmetry")
_PAIRS, _LESIONS, _LABELLED, _DRAWS, _TEST = 2000, 0.1, (8, 20, 60), 3, 500
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


def rows(run: Run) -> list[dict[str, Any]]:
    """One row of a seed."""
    seed = run.seed
    pairs, truth, _ = phantom_pairs(_PAIRS, (seed, 1), _LESIONS)
    row: dict[str, Any] = {"seed": seed}
    trained = {}
    # "hard": the warm-up never ends, so that every contralateral pair counts as alike.
    for name, config in (("soft", _SETTINGS), ("hard", replace(_SETTINGS, warm_up=_SETTINGS.epochs))):
        networks = [_network((seed, number)) for number in range(2)]
        task = SiameseTask(networks, pairs, [str(i) for i in range(_PAIRS)], config, run.device)
        stage = Stage("pairs", config.epochs, config.lr, weight_decay=config.weight_decay, batch_size=config.batch_size)
        run_stages(task, [stage], run.part(f"pairs_{name}"))
        distances = np.mean([task.distances(network)[0] for network in networks], 0)
        row[f"distance_{name}"] = round(auc(truth, distances) or 0.0, 4)
        trained[name] = networks[0]
        if name == "soft":
            measured = [task.measure(network) for network in networks]
            labels = torch.stack([labels for labels, _ in measured]).mean(0).numpy()
            row["soft_labels"] = round(auc(truth, labels) or 0.0, 4)
    # Prefixes of the columns: of the probe, and of fine-tuning.
    starts = {("probe", "tuned"): trained["soft"], ("probe_hard", "tuned_hard"): trained["hard"]}
    starts["probe_untrained", "scratch"] = _network((seed, 2))
    for name in ("simclr", "byol"):
        start = self_supervised(name, _network((seed, 0)), pairs, _SETTINGS, run.part(name))
        starts[f"probe_{name}", f"tuned_{name}"] = start
    row |= _classified(starts, run)
    run.say("  ".join(f"{key} {value}" for key, value in row.items()))
    return [row]


def _classified(starts: Mapping[tuple[str, str], Embedding], run: Run) -> dict[str, float]:
    """AUC of classifiers of single patches from each start, by the names of probe and fine-tuning and the labels."""
    x, y = _patches(_DRAWS * max(_LABELLED), (run.seed, 2))
    test, test_y = _patches(_TEST, (run.seed, 3))
    row = {}
    for count in _LABELLED:
        found: dict[str, list[float]] = {}
        for draw in range(_DRAWS):
            few, labels = x[draw * count : (draw + 1) * count], y[draw * count : (draw + 1) * count]
            for (probe, tuned), start in starts.items():
                own = run.part(f"{tuned}_{count}_{draw}")
                found.setdefault(probe, []).append(_auc(test_y, probed(start, few, labels, test)))
                found.setdefault(tuned, []).append(_auc(test_y, fine_tuned(start, few, labels, test, _SETTINGS, own)))
        row |= {f"{name}_{count}": round(float(np.mean(values)), 4) for name, values in found.items()}
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


SYNTHETIC = Synthetic(
    "Without labels, two networks that compare contralateral patches find the pairs of which one has a lesion, for "
    "which they need the soft labels, and are a better start for a patch classifier with few labels than none. (AUC; "
    "2000 pairs, 500 test patches, mean of three draws of 8, 20 and 60 labelled patches.)",
    Rule(
        effects=(
            Effect("distance_soft", "distance_hard"),
            *(Effect(f"tuned_{n}", f"scratch_{n}") for n in _LABELLED),
            *(Effect(f"probe_{n}", f"probe_untrained_{n}") for n in _LABELLED),
        ),
        floors=(("soft_labels", 0.85), *((f"probe_{n}", 0.8) for n in _LABELLED)),
        beside=(
            *(Effect(f"probe_{n}", f"probe_hard_{n}") for n in _LABELLED),
            *(Effect(f"probe_{n}", f"scratch_{n}") for n in _LABELLED),
            *(Effect(f"probe_{n}", f"probe_{name}_{n}") for name in ("simclr", "byol") for n in _LABELLED),
            *(Effect(f"tuned_{n}", f"tuned_{name}_{n}") for name in ("simclr", "byol") for n in _LABELLED),
        ),
    ),
    rows,
)
