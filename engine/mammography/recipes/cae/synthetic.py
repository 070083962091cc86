"""The recipe's claim on phantoms: a backbone of one scanner, images of another, and few labels.

A small network learns to tell lesions apart on the phantoms of scanner A and is frozen. Scanner B has another grey
curve, is less sharp and much noisier. Of its images most have no label. The auto-encoder learns on the backbone's maps
of those; support vector machines are trained on the few labelled ones. Its codes are compared with the maps
themselves, with the maps pooled as the codes are, and with the codes of an encoder that was not trained, so that
neither pooling nor the number of features can pass for learning.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ....train.loop import run_stages
from ....train.run import Run, seed_of
from ....train.stages import Stage
from ..claims import Effect, Rule, Synthetic
from ..phantom_patches import CLASSES, phantom_patches
from ..tensors import TensorTask, accuracy, logits_of
from .autoencoder import Stack
from .config import CaeConfig
from .svm import fit_svm, measure_svm
from .train import fit_stack, vectors

_SIDE, _SOURCE, _UNLABELLED, _TEST = 48, 1000, 2000, 1000
_LABELLED, _DRAWS = (40, 160), 5
_SETTINGS = CaeConfig(code_channels=(128,), epochs=8, optimizer="adam", lr=2e-3, plateau=None, svm=("linear", "rbf"))
_CONTROLS = ("raw", "pooled", "untrained")


def rows(run: Run) -> list[dict[str, Any]]:
    """Accuracies of a seed, a row for each kind of SVM and number of labels."""
    maps, labels = _maps(run)
    stack = fit_stack(maps[:_UNLABELLED], _SETTINGS, run.part("cae"))
    untrained = Stack(maps.shape[1], _SETTINGS.code_channels, feature="code")
    features = {
        "raw": maps.reshape(len(maps), -1),
        "pooled": F.max_pool2d(torch.from_numpy(maps), _SETTINGS.pool).flatten(1).numpy(),
        "untrained": vectors(maps, (), untrained.to(run.device)),
        "cae": vectors(maps, (), stack),
    }
    found = []
    for svm in _SETTINGS.svm:
        for count in _LABELLED:
            row: dict[str, Any] = {"seed": run.seed, "svm": svm, "labelled": count}
            for name, values in features.items():
                row[name] = round(float(np.mean([_accuracy(values, labels, svm, count, d) for d in range(_DRAWS)])), 4)
            found.append(row)
            run.say("  ".join(f"{key} {value}" for key, value in row.items()))
    return found


def _accuracy(features: NDArray[Any], labels: NDArray[Any], svm: str, count: int, draw: int) -> float:
    chosen = np.random.default_rng(draw).permutation(_UNLABELLED)[:count]
    model = fit_svm(features[chosen], labels[chosen], chosen, kernel=svm, c=_SETTINGS.c)
    return measure_svm(model, features[_UNLABELLED:], labels[_UNLABELLED:])["accuracy"]


def _maps(run: Run) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The frozen backbone's maps (n, 32, 6, 6) of scanner B's images, those without labels first; and the labels."""
    seed = run.seed
    images, labels = phantom_patches(_SOURCE + _TEST // 2, _SIDE, (seed, 1))
    images = (images - images.mean()) / images.std()
    torch.manual_seed(seed_of(seed, 2))
    body, head = _body(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, len(CLASSES)))
    task = TensorTask(nn.Sequential(body, head), images[:_SOURCE], labels[:_SOURCE])
    stage = Stage("backbone", 8, 0.05, optimizer="sgd", weight_decay=1e-4, batch_size=32, schedule="cosine")
    run_stages(task, [stage], run.part("backbone"))
    own = accuracy(labels[_SOURCE:], logits_of(task.module, images[_SOURCE:]))
    images, labels = phantom_patches(_UNLABELLED + _TEST, _SIDE, (seed, 3))
    images = _scanner_b(images, seed)
    other = accuracy(labels, logits_of(task.module, images))
    run.say(f"seed {seed}: the backbone's own accuracy is {own:.3f} on scanner A, {other:.3f} on scanner B")
    return logits_of(body, images).numpy(), labels.numpy()


def _body() -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 8, 2), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)


def _scanner_b(images: Tensor, seed: int) -> Tensor:
    """Another grey curve, a blur of 0.7 pixels, noise of 6 % of the grey range, and the mean and deviation of A."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed_of(seed, 4)))
    steps = torch.arange(-3.0, 4.0)
    kernel = torch.exp(-0.5 * (steps / 0.7) ** 2)
    kernel /= kernel.sum()
    images = F.conv2d(images**1.8, kernel.view(1, 1, 1, -1), padding=(0, 3))
    images = F.conv2d(images, kernel.view(1, 1, -1, 1), padding=(3, 0)) + 0.06 * noise
    return (images - images.mean()) / images.std()


SYNTHETIC = Synthetic(
    "Features that auto-encoders have learnt without labels on the maps of a frozen network are better than the "
    "network's own maps, as they are or pooled, and than codes that were not learnt, on images of another domain than "
    "its own. (Accuracy on 1000 test images, mean of five draws of 40 and of 160 labelled ones.)",
    Rule(
        effects=tuple(Effect("cae", name, {"svm": svm}) for svm in _SETTINGS.svm for name in _CONTROLS),
        floors=(("cae", 0.45),),
    ),
    rows,
)
