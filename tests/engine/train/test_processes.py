"""Several processes that train together, against one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exactness import errors
from processes import in_processes
from training import run

from gigamorph.engine.parallel.process_group import ProcessGroup
from gigamorph.engine.train.checkpoint import load_checkpoint
from gigamorph.engine.train.module import Batches
from gigamorph.engine.train.options import Optimizer, TrainOptions
from gigamorph.engine.train.progress import Meter
from gigamorph.engine.train.stages import Stage
from gigamorph.engine.train.state import State
from gigamorph.engine.train.task import Task

LR = Optimizer(lr=3e-3)
SPLIT = TrainOptions(model="training:live", epochs=2, accumulate=3, optimizer=LR, seed=5, split_image=True)
OWN = replace(SPLIT, accumulate=8, split_image=False)
PAIRS = replace(OWN, split_image=2)


class Numbers(Task):
    """Examples that are their numbers."""

    def examples(self, epoch: int) -> range:
        return range(13)


def batches(group: ProcessGroup, done: int) -> Batches:
    task = Numbers()
    task.group = group
    return Batches(task, Stage("train", 9, 0.1), State(epoch=3, batch=done), seed=5)


def test_the_shares_of_an_epoch_go_on_where_it_was_interrupted():
    whole = [example for [example] in batches(ProcessGroup(), 0)]
    parts = [[example for [example] in batches(ProcessGroup(rank, 4), 8)] for rank in range(4)]
    assert [image for turn in zip(*parts, strict=True) for image in turn][:5] == whole[8:]
    assert len(batches(ProcessGroup(1, 4), 0)) == 4


def test_progress_counts_the_images_of_all():
    seen = []
    meter = Meter(seen.append, at_once=4)
    meter.start("train", 6)
    for _ in range(2):
        meter.image(100)
        meter.image_done()
    assert [p.image for p in seen] == [0, 4, 6] and seen[-1].pixels == 800


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> tuple[list[Any], Path]:
    """What four processes end with, and the folder of their runs."""
    folder = tmp_path_factory.mktemp("four")
    tasks = [
        (run, folder / "split", SPLIT),
        (run, folder / "split", replace(SPLIT, accumulate=8, split_image=False), True),
        (run, folder / "own", OWN, False, 4),
        (run, folder / "own", OWN, True),
        (run, folder / "odd", replace(OWN, accumulate=6)),
        (run, folder / "pairs", PAIRS),
    ]
    return in_processes(4, tmp_path_factory.mktemp("meeting"), tasks), folder


def assert_like_one_process(options: TrainOptions, ends: list[Any], folder: Path, alone: Path) -> None:
    wanted, metrics = run(alone, replace(options, split_image=False)), ends[0]
    assert all(other == metrics | {"seconds": other["seconds"]} for other in ends), "the same in all processes"
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    for name in ("best_epoch", "val", "test"):
        assert metrics[name] == wanted[name]
    for name in ("last.ckpt", "best.ckpt"):
        first, second = (load_checkpoint(f / name) for f in (alone, folder))
        both = first["state_dict"], second["state_dict"]
        # A float32 loss of float64 logits and AdamW's quotients: rounding of sums, a few times amplified.
        worst = errors(*both)
        assert max(worst.values()) < 1e-9, worst
        states = [stored["gigamorph"]["state"] for stored in (first, second)]
        assert all(states[0][name] == states[1][name] for name in ("stage", "within", "epoch", "batch", "best_epoch"))
    rows = [row.split(",")[:5] for f in (alone, folder) for row in (f / "log.csv").read_text().splitlines()]
    assert rows[:3] == rows[3:]


def test_an_image_over_four_processes(four, tmp_path):
    ends, folder = four
    assert_like_one_process(SPLIT, ends[0], folder / "split", tmp_path / "alone")


def test_an_image_for_each_of_four_processes_interrupted_and_resumed(four, tmp_path):
    """A Ctrl-C to one process, in the middle of an optimizer step; the last images are fewer than processes."""
    ends, folder = four
    assert ends[2] == ["KeyboardInterrupt()"] * 4
    assert_like_one_process(OWN, ends[3], folder / "own", tmp_path / "alone")


def test_images_that_pairs_of_four_processes_share(four, tmp_path):
    ends, folder = four
    assert_like_one_process(PAIRS, ends[5], folder / "pairs", tmp_path / "alone")


@pytest.mark.slow
def test_refusals(four):
    assert all("started with 1 images at a time" in text for text in four[0][1])
    assert all("6 images per optimizer step cannot be distributed to 4 processes" in text for text in four[0][4])
    assert not (four[1] / "odd").exists()


def test_no_image_is_split_in_a_process_alone(tmp_path):
    assert "init_process_group" in run(tmp_path / "run", SPLIT)
