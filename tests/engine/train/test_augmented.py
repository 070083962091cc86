"""Training on varied images: which are varied, what is recorded, and that a resumed run sees the same ones."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exactness import errors
from processes import in_processes
from training import run_augmented

from gigamorph.engine.datasets import dataset
from gigamorph.engine.datasets.augment import Augment
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.images.pixels import steps_of
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.train.checkpoint import load_checkpoint
from gigamorph.engine.train.fit import fit
from gigamorph.engine.train.inputs import images, training_data
from gigamorph.engine.train.options import TrainOptions
from gigamorph.engine.train.progress import Progress

AUGMENT = Augment.parse("flip,rotate=10,elastic=3,gamma=0.2,noise=0.02")
OPTIONS = TrainOptions(model="lesionnet?stages=1", epochs=2, accumulate=2, seed=5)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("p"), patients=4, height=136, width=104, fractions=(0.5, 0.25, 0.25))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(seed, epoch, index) of all that is drawn."""
    calls = []
    real = dataset.augmented

    def record(source: Any, augment: Augment, *, seed: int, epoch: int, index: int) -> Any:
        calls.append((seed, epoch, index))
        return real(source, augment, seed=seed, epoch=epoch, index=index)

    monkeypatch.setattr(dataset, "augmented", record)
    return calls


def test_training_images_alone_are_varied_and_it_is_recorded(table: Path, tmp_path: Path, drawn: list) -> None:
    data = training_data(table, augment=AUGMENT, seed=5)
    metrics = fit(data, OPTIONS, tmp_path / "run").metrics
    # The first for its size, before; then each image once an epoch, and none of val and test.
    assert drawn.pop(0) == (5, 0, 0)
    assert sorted(drawn) == [(5, epoch, index) for epoch in range(2) for index in range(len(data.train))]
    stored = load_checkpoint(tmp_path / "run" / "best.ckpt")["gigamorph"]["preprocessing"]
    assert stored["augment"] == "flip,rotate=10,elastic=3,gamma=0.2,noise=0.02"
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["preprocessing"] == metrics["preprocessing"] == stored
    # What predicts with the checkpoint sees images as they are.
    seen = images(data.val.records, 1, stored)[0]["image"]
    assert steps_of(seen) == steps_of(data.val[0]["image"]) and not any("turned" in step for step in steps_of(seen))
    assert any("turned" in step for step in steps_of(data.train[0]["image"]))
    with pytest.raises(GigamorphError, match="was started with another preprocessing"):
        fit(training_data(table, seed=5), OPTIONS, tmp_path / "run", resume=True)


@pytest.mark.parametrize(("epoch", "image"), [(0, 2), (1, 1)])
def test_a_resumed_run_sees_the_images_of_an_uninterrupted_one(
    table: Path, tmp_path: Path, drawn: list, epoch: int, image: int
) -> None:
    data = training_data(table, augment=AUGMENT, seed=5)
    fit(data, OPTIONS, tmp_path / "whole")
    once = set(drawn)
    drawn.clear()
    pressed = []

    def press(progress: Progress) -> None:
        if not pressed and (progress.stage, progress.epoch, progress.image) == ("train", epoch, image):
            pressed.append(progress)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(data, OPTIONS, tmp_path / "parts", report=press)
    assert set(drawn) < once
    fit(training_data(table, augment=AUGMENT, seed=5), OPTIONS, tmp_path / "parts", resume=True)
    assert set(drawn) == once
    first, second = (load_checkpoint(tmp_path / run / "last.ckpt")["state_dict"] for run in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    plain = fit(training_data(table, seed=5), OPTIONS, tmp_path / "plain").net.state_dict()
    assert any(not np.array_equal(first["net." + key].numpy(), plain[key].numpy()) for key in plain)


def test_processes_vary_images_as_one_alone_does(table: Path, tmp_path: Path) -> None:
    """Each with an image of its own, or with its rows of one: what is drawn depends on seed, epoch and image alone."""
    own = replace(OPTIONS, model="training:normed")
    split = replace(own, model="training:live", split_image=True)
    runs = {"own": own, "split": split}
    (tmp_path / "meeting").mkdir()
    tasks = [(run_augmented, table, str(AUGMENT), tmp_path / name, options) for name, options in runs.items()]
    ends = in_processes(2, tmp_path / "meeting", tasks)
    for (name, options), found in zip(runs.items(), ends, strict=True):
        wanted = run_augmented(table, str(AUGMENT), tmp_path / f"{name} alone", replace(options, split_image=False))
        assert [(end["best_epoch"], end["val"]) for end in found] == [(wanted["best_epoch"], wanted["val"])] * 2
        states = (load_checkpoint(tmp_path / folder / "last.ckpt")["state_dict"] for folder in (f"{name} alone", name))
        worst = errors(*states)
        assert max(worst.values()) < 1e-9, (name, worst)
