"""A recipe's stage in several processes, against one."""

from __future__ import annotations

from pathlib import Path

from exactness import errors
from processes import in_processes
from training import run_stage

from gigamorph.engine.train.checkpoint import load_checkpoint


def test_batches_are_dealt_whole_and_images_are_split(tmp_path: Path):
    tasks = [(run_stage, tmp_path / "own", False, 2, 2), (run_stage, tmp_path / "bands", True, 1, 2)]
    *ends, odd = in_processes(2, tmp_path, [*tasks, (run_stage, tmp_path / "odd", False, 2, 3)])
    for (_, folder, _, batch, accumulate), found in zip(tasks, ends, strict=True):
        alone = tmp_path / "alone" / folder.name
        assert found == [run_stage(alone, False, batch, accumulate)] * 2
        for name in ("last.ckpt", "best.ckpt"):
            states = [load_checkpoint(place / name)["state_dict"] for place in (alone, folder)]
            assert max(errors(*states).values()) < 1e-9
    assert all("6 images per optimizer step, 2 at a time, cannot be distributed to 2 processes" in text for text in odd)
    assert not (tmp_path / "odd").exists()
