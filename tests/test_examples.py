"""Each of examples/ runs, and shows what it says."""

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "examples"


def example(name):
    """The main function of an example; importable by processes that it starts."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name).main


def test_every_example_is_run_here_and_told_of():
    names = {path.stem for path in FOLDER.glob("*.py")}
    text = Path(__file__).read_text()
    assert all(f'example("{name}")' in text for name in names)
    assert all(f"`{name}.py`" in (FOLDER / "README.md").read_text() for name in names)


def test_a_dicom_folder_from_index_to_report(tmp_path, capsys):
    example("dicom_folder")(tmp_path)
    assert (tmp_path / "evaluation" / "report.html").exists()
    assert (tmp_path / "predictions" / "view" / "index.html").exists()
    assert "2 exams" in capsys.readouterr().out


def test_plain_loop_and_lightning_learn_from_the_same_first_loss(tmp_path):
    losses = example("plain_loop")(tmp_path / "plain")
    assert np.mean(losses[8:]) < np.mean(losses[:8])
    assert len(example("lightning_module")(tmp_path / "lightning")) == 4


def test_growing_midway_goes_on_from_the_same_loss(tmp_path):
    before, after = example("grow_midway")(tmp_path)
    assert after == pytest.approx(before, rel=1e-5)


def test_a_slide_trains_and_writes_its_map(tmp_path):
    losses = example("whole_slide")(tmp_path)
    assert losses[-1] < 0.8 * losses[0]
    assert np.load(tmp_path / "logits.npy", mmap_mode="r").shape == (1, 1, 900, 700)


def test_own_layers_are_exact(tmp_path):
    assert example("own_layer")(tmp_path) < 1e-10


@pytest.mark.slow
def test_two_devices_give_the_gradient_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]))
    assert example("two_devices")(tmp_path) < 1e-10
