"""siamese: patches of the next batch are read while the networks compute, and it is the same training."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from gigamorph.engine.mammography.recipes.siamese.config import SiameseConfig
from gigamorph.engine.mammography.recipes.siamese.network import Embedding
from gigamorph.engine.mammography.recipes.siamese.starts import SimCLRTask
from gigamorph.engine.mammography.recipes.siamese.task import SiameseTask
from gigamorph.engine.mammography.recipes.tensors import ReadAhead
from gigamorph.engine.train.loop import run_stages
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage

CONFIG = SiameseConfig(dim=4, warm_up=1, patch=8)
STAGE = Stage("pairs", 2, 0.01, batch_size=4, accumulate=2)


class Noting:
    """Pairs that note by which thread they were read."""

    def __init__(self, pairs):
        self.pairs, self.read = pairs, set()

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        self.read.add(threading.current_thread().name.partition("_")[0])
        return self.pairs[index]


def trained(made, folder):
    torch.manual_seed(0)
    pairs = Noting(torch.rand(14, 2, 1, 8, 8))
    net = [Embedding(nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.Dropout(0.2)), "", 4, 1, 8) for _ in range(2)]
    task = SiameseTask(net, pairs, [str(i) for i in range(14)], CONFIG) if made is None else made(net[0], pairs, CONFIG)
    run_stages(task, [STAGE], Run(folder, seed=3))
    return task.module.state_dict(), pairs.read


@pytest.mark.parametrize("made", [None, SimCLRTask], ids=["siamese", "simclr"])
def test_it_is_the_training_of_one_that_reads_when_it_needs_to(made, tmp_path, monkeypatch):
    """Its random numbers, and those that follow (partners of other patients, dropout), are the same ones."""
    ahead, read = trained(made, tmp_path / "ahead")
    assert "gigamorph-patches" in read
    if made is None:  # SimCLR looks at some patches between epochs
        assert read == {"gigamorph-patches"}
    monkeypatch.setattr(ReadAhead, "announce", lambda self, batch: None)
    plain, _ = trained(made, tmp_path / "plain")
    assert all(torch.equal(ahead[name], plain[name]) for name in plain)


def test_batches_are_in_order_and_read_once():
    read = []
    ahead = ReadAhead(lambda batch: read.append(list(batch)) or list(batch))
    ahead.announce([5, 6])
    assert ahead.take([5, 6]) == [5, 6] and ahead.take([7]) == [7] and read == [[5, 6], [7]]
    assert list(ahead.each([[1], [2, 3], [4]])) == [[1], [2, 3], [4]] and list(ahead.each([])) == []
