"""A task of training that takes milliseconds: bright and dark squares."""

import os
import signal

import torch
from torch import nn
from torch.nn import functional as F

from gigamorph.engine.train.loop import run_stages
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.task import Task


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3), nn.BatchNorm1d(3))

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Squares(Task):
    """Noise with a bright or dark middle; the state counts epochs, and the loss depends on it."""

    def __init__(self, fail_at=None, scores=None):
        torch.manual_seed(3)
        self.module = Net()
        self.began, self.calls, self.fail_at, self.scores = [], 0, fail_at, scores
        self.noise = 0.0

    def examples(self, epoch):
        rng = torch.Generator().manual_seed(1000 + epoch)
        return [(torch.randn(1, 8, 8, generator=rng) + i % 3, i % 3) for i in range(8)]

    def begin_epoch(self, epoch):
        self.began.append(epoch)
        self.noise = float(torch.rand(()))

    def state(self):
        return {"noise": self.noise}

    def load_state(self, state):
        self.noise = state["noise"]

    def loss(self, batch):
        self.calls += 1
        if self.fail_at is not None and self.calls == self.fail_at:
            raise RuntimeError("killed")
        x = torch.stack([image for image, _ in batch]) + self.noise
        return F.cross_entropy(self.module(x), torch.tensor([label for _, label in batch]))

    def score(self):
        x = torch.stack([torch.full((1, 8, 8), float(i)) for i in range(3)])
        return -F.cross_entropy(self.module(x), torch.arange(3)).item()


class Killed(Squares):
    """Ends its process at the tenth batch by a signal that cannot be caught."""

    def loss(self, batch):
        if self.calls == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(batch)


def run_killed(stages, out, seed, threads):
    """Stages that end so."""
    torch.set_num_threads(threads)  # the order of sums follows it
    run_stages(Killed(), stages, Run(out, seed=seed))
