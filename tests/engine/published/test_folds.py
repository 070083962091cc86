"""Which networks of a cross-validation are averaged: of finished folds that learnt the same of the same images."""

import pytest
import torch

from gigamorph.engine.errors import DataError
from gigamorph.engine.models.folder import digest_of, fold_checkpoints
from gigamorph.engine.published.classifier import look_at_folds
from gigamorph.engine.train.mask_target import MaskTarget
from gigamorph.engine.train.target import Target


def write(folder, *changes, target=None):
    """A cross-validation of as many folds as there are changes of what is on record."""
    text = f"[data]\nfolds = {len(changes)}\n"
    for number, change in enumerate(changes, 1):
        target = target or Target(("a", "b"), "classes")
        scale = {"normalize": {"mean": [0.1], "std": [0.2]}, "voi": "auto", "flip": "auto", "downsample": 1}
        record = {"classes": list(target.names), "target": target.to_plain(), "channels": 1, "preprocessing": scale}
        record |= {"options": {"model": "lesionnet", "device": "cpu", "seed": 0}, "versions": {}}
        record |= {"split": {"sha256": "", "train": 1, "val": 1, "test": 1}}
        fold = folder / f"fold{number}"
        fold.mkdir(parents=True)
        torch.save({"gigamorph": record | change, "state_dict": {}}, fold / "best.ckpt")
        (fold / "metrics.json").write_text("{}")
        (fold / "config.toml").write_text(text)
    (folder / "config.toml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("target", "change", "said"),
    [
        (
            None,
            {"classes": ["a", "c"], "target": Target(("a", "c")).to_plain()},
            "fold2/best.ckpt: predicts classes a, c, not classes a, b like fold 1",
        ),
        (None, {"channels": 3}, "takes images with another channels than fold 1"),
        (MaskTarget(("a", "b")), {}, "fold1/best.ckpt: predicts masks"),
        (
            None,
            {"target": Target(("a", "b"), "classes", views="mean").to_plain()},
            r"fold2/best.ckpt: predicts classes a, b of exams \(mean of their views\), not classes a, b like fold 1",
        ),
        (None, {"target": Target(("a", "b"), "ordinal").to_plain()}, "predicts ordinal a, b, not classes a, b"),
    ],
)
def test_others_are_refused(tmp_path, target, change, said):
    with pytest.raises(DataError, match=said):
        look_at_folds(write(tmp_path / "run", {}, change, target=target))


def test_folds_of_one_run_are_finished_together(tmp_path):
    run = write(tmp_path / "run", {}, {}, {})
    assert len(fold_checkpoints(run)) == 3
    assert look_at_folds(run).endswith("run: the mean of 3 networks")
    before = digest_of(run)
    torch.save({}, run / "fold3" / "best.ckpt")
    assert digest_of(run) != before
    # One that has gone on with more epochs leaves the others behind.
    for folder in (run, run / "fold1"):
        (folder / "config.toml").write_text("epochs = 9\n[data]\nfolds = 3\n")
    with pytest.raises(DataError, match=r"fold 2 of 3 is not finished.*; or use .*fold1/best.ckpt"):
        fold_checkpoints(run)
