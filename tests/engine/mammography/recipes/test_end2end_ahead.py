"""end2end: patches of the next batch are read and varied while the network computes, and it is the same training."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from gigamorph.engine.mammography.recipes.end2end.train import PatchTask
from gigamorph.engine.train.loop import run_stages
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage
from gigamorph.engine.train.task import Task

COUNT, BATCH = 11, 3


class Noted:
    """Patches that note how many of them were read; another variation in each epoch."""

    def __init__(self) -> None:
        self.epoch, self.read, self.changed = 0, 0, threading.Condition()

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        pixels = torch.full((1, 4, 4), float(number + 100 * self.epoch)).cos()
        with self.changed:
            self.read += 1
            self.changed.notify_all()
        return pixels, number % 3


class Waiting(nn.Module):
    """Goes on when the next batch is there, too; a minute is for ever."""

    def __init__(self, patches: Noted, wait: bool) -> None:
        super().__init__()
        self.fc, self.patches, self.wait, self.calls = nn.Linear(16, 5), patches, wait, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        of_epoch, epoch = self.calls % -(-COUNT // BATCH), (self.calls - 1) // -(-COUNT // BATCH)
        if self.wait:
            wanted = COUNT * (epoch + 1) if of_epoch == 0 else COUNT * epoch + min(COUNT, (of_epoch + 1) * BATCH)
            with self.patches.changed:
                assert self.patches.changed.wait_for(lambda: self.patches.read >= wanted, 60), "not read ahead"
        return self.fc(x.flatten(1))


def trained(folder, wait: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    patches = Noted()
    net = Waiting(patches, wait)
    run_stages(PatchTask(net, patches, [], BATCH), [Stage("patches", 2, 0.1, batch_size=BATCH)], Run(folder))
    assert patches.read == 2 * COUNT  # each once an epoch
    return net.state_dict()


def test_the_next_batch_is_read_while_the_network_computes(tmp_path, monkeypatch: pytest.MonkeyPatch):
    found = trained(tmp_path / "ahead", wait=True)
    monkeypatch.setattr(PatchTask, "ahead", Task.ahead)
    for name, value in trained(tmp_path / "plain", wait=False).items():
        assert torch.equal(found[name], value), name
