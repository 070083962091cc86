"""Run by test_dense in its own process: prints the bytes of a map, and the extra peak memory of writing it to
each of some files and of a loss on it."""

import sys
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.dense import dense_loss, write_map
from gigamorph.engine.tiling.memory import peak_bytes, reset_peak, used_bytes

HEIGHT, WIDTH, CLASSES = 6000, 500, 8


class Image:
    """Pixels that are computed where they are read."""

    name = "computed"

    def __init__(self, height: int):
        self.shape = (1, height, WIDTH)

    def read(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        rows, cols = torch.arange(top, bottom)[:, None], torch.arange(left, right)
        return torch.sin(rows * 0.01 + cols * 0.02)[None].float()


class Labels:
    def __init__(self, height: int):
        self.shape = (1, height, WIDTH)

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        return (np.arange(top, bottom)[:, None] // 100 + np.arange(left, right) // 100)[None] % CLASSES


def write(path: str, height: int) -> None:
    write_map(net, Image(height), path)


def loss(height: int) -> None:
    dense_loss(net, Image(height), Labels(height), F.cross_entropy).backward()


net = accelerate(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, CLASSES, 3, padding=1)), tile=256)
print(CLASSES * HEIGHT * WIDTH * 4)
for run in (*(partial(write, path) for path in sys.argv[1:]), loss):
    run(1000)  # libraries and their kernels are loaded,
    run(1100)  # and the graph for all sizes is recorded
    start = used_bytes()
    reset_peak()
    run(HEIGHT)
    print(peak_bytes() - start)
