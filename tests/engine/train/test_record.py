"""What a run says of the checkpoint that it begins from, or goes on from."""

from pathlib import Path

import pytest
import torch

from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.train.record import require_same, scale_warning


@pytest.mark.parametrize(
    ("mean", "std", "another"),
    [
        ([0.16], [0.15], False),
        ([0.1], [0.2], False),
        ([0.0], [1.0], True),
        ([0.3], [0.16], True),
        ([0.1] * 3, [1.0], False),
    ],
)
def test_another_grey_scale_than_that_of_the_weights_is_told(tmp_path, mean, std, another):
    """Not one that is measured on other images, nor one of colours."""
    path = tmp_path / "best.ckpt"
    record = {"preprocessing": {"normalize": {"mean": [0.157], "std": [0.163]}}}
    torch.save({"state_dict": {"net.w": torch.zeros(1)}, "gigamorph": record}, path)
    told = scale_warning(path, {"normalize": {"mean": mean, "std": std}})
    assert (told is not None) == another
    if told is not None:
        assert "was trained with mean [0.157] and std [0.163], but this run has" in told
    assert scale_warning("timm:resnet18", {"normalize": {"mean": mean, "std": std}}) is None


def test_a_run_of_an_older_version_whose_optimizer_took_no_momentum_goes_on():
    def record(momentum):
        options = {"optimizer": {"name": "adamw", "momentum": momentum}}
        hashes = {"sha256": "", "truth_sha256": "", "reading_sha256": ""}
        return {"split": hashes, "options": {"seed": 0, **options}, "preprocessing": {}, "weights_sha256": None}

    now = {**record(None), "target": {"kind": "classes"}, "images_at_once": 1}
    require_same(record(0.9), now, Path("last.ckpt"))
    with pytest.raises(GigamorphError, match=r"was started with optimizer.momentum=0.9, not 0.8"):
        require_same(record(0.9), {**now, **record(0.8)}, Path("last.ckpt"))


def test_another_seed_is_told_before_the_split_that_it_draws():
    def record(seed):
        return {"split": {"sha256": str(seed)}, "options": {"seed": seed}}

    with pytest.raises(GigamorphError, match="was started with seed=0, not 3; resume with the same"):
        require_same(record(0), record(3), Path("last.ckpt"))
