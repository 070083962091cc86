"""Small archives and small classifiers for the runner of predictions; picklable, for processes."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.predict.predictor import Classifier

CLASSES = ["0", "1"]


def make_archive(folder: Path, count: int, *, side: int = 24) -> Path:
    """A table of `count` images in .npy files, of sizes around `side`."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    lines = ["image_path,patient_id,laterality,view,label,rows,columns"]
    for number in range(count):
        height, width = side + number % 5, side + 3 * (number % 3)
        np.save(folder / f"{number:04d}.npy", random.random((height, width), np.float32))
        view = "CC" if number % 2 else "MLO"
        lines.append(f"{number:04d}.npy,P{number // 2},{'LR'[number // 2 % 2]},{view},{number % 2},{height},{width}")
    table = folder / "table.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


class Sum(nn.Module):
    """A stand-in for a network: its output tells images apart, bit for bit."""

    on_tile = None

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, source):
        time.sleep(self.seconds)
        _, height, width = source.shape
        return torch.tensor([[0.0, float(source.read(0, height, 0, width).double().sum())]])


def stub(*, device: str, seconds: float = 0.0) -> Classifier:
    return Classifier(Sum(seconds), CLASSES, functools.partial(ImageDataset, channels=1, flip=False))


def tiny(*, device: str) -> Classifier:
    """A small real network, computed by tiles."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = accelerate(nn.Sequential(*layers, nn.Linear(4, 2)), tile=16)
    return Classifier(net, CLASSES, functools.partial(ImageDataset, channels=1, flip=False))


def slow(*, device: str, seconds: float) -> Classifier:
    """The same, in a time that lets others be killed meanwhile."""
    found = tiny(device=device)
    real = found.net.forward

    def forward(*args, **kwargs):
        time.sleep(seconds)
        return real(*args, **kwargs)

    found.net.forward = forward
    return found


class _Deadly(Sum):
    def forward(self, source):
        if source.name.endswith("0003.npy"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(source)


def deadly(*, device: str) -> Classifier:
    """Ends the process that computes an image."""
    return Classifier(_Deadly(), CLASSES, functools.partial(ImageDataset, channels=1, flip=False))


def ray_actors() -> list[int]:
    """Process ids of the actors on this machine that hold a network for Ray."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text = path.read_bytes()
            if text.startswith(b"ray::") and b"_Actor" in text:
                found.append(int(path.parent.name))
    return found
