"""Each of examples/ runs, and shows what it says."""

import asyncio
import importlib
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from forked import Forked, with_forked_devices

import gigamorph

FOLDER = Path(__file__).parents[1] / "examples"


def example(name):
    """The main function of an example; importable by processes that it starts."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    main = importlib.import_module(name).main
    return getattr(main, "callback", main)


def test_every_example_is_run_here_and_told_of():
    names = {path.stem for path in FOLDER.glob("*.py")}
    text = Path(__file__).read_text()
    assert all(f'example("{name}")' in text for name in names)
    assert all(f"`{name}.py`" in (FOLDER / "README.md").read_text() for name in names)


def test_a_folder_that_is_missing_or_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    named = {path.stem for path in FOLDER.glob("*.py")} - {"own_layer", "ray_serve"}
    for name in named:
        example(name)
        main = sys.modules[name].main
        for args, told in ((), "Missing argument 'FOLDER'"), ([str(tmp_path / "file")], "is a file"):
            found = CliRunner().invoke(main, args)
            assert found.exit_code == 2 and told in found.output


def test_a_dicom_folder_from_index_to_report(tmp_path, capsys):
    example("dicom_folder")(tmp_path)
    assert (tmp_path / "evaluation" / "report.html").exists()
    assert (tmp_path / "predictions" / "view" / "index.html").exists()
    assert "2 exams" in capsys.readouterr().out


def test_plain_loop_and_lightning_learn_from_the_same_first_loss(tmp_path):
    losses = example("plain_loop")(tmp_path / "plain")
    assert np.mean(losses[8:]) < np.mean(losses[:8])
    assert len(example("lightning_module")(tmp_path / "lightning")) == 12


def test_growing_midway_goes_on_from_the_same_loss(tmp_path):
    before, after = example("grow_midway")(tmp_path / "new" / "grown")
    assert after == pytest.approx(before, rel=1e-5)


def test_a_slide_trains_and_writes_its_map(tmp_path):
    losses = example("whole_slide")(tmp_path)
    assert losses[-1] < 0.8 * losses[0]
    assert np.load(tmp_path / "logits.npy", mmap_mode="r").shape == (1, 1, 900, 700)


def test_own_layers_are_exact():
    assert example("own_layer")() < 1e-10


def test_ray_serve_answers_what_load_predicts(tmp_path):
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    found = example("ray_serve")(tmp_path)
    trained = gigamorph.load(tmp_path / "run" / "best.ckpt", memory_budget="1GiB")
    expected = trained.predict(sorted((tmp_path / "dicom" / "images").iterdir())[:2]).tolist()
    assert [list(one) for one in found] == [["0", "1"]] * 2
    assert [list(one.values()) for one in found] == expected
    request = importlib.import_module("starlette.requests").Request
    served = sys.modules["ray_serve"].Mammograms.func_or_class(str(tmp_path / "run" / "best.ckpt"))

    def answer(body):
        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        found = asyncio.run(served(request({"type": "http", "method": "POST", "headers": []}, receive)))
        return found.status_code, json.loads(found.body)

    image = sorted((tmp_path / "dicom" / "images").iterdir())[0]
    assert answer(image.read_bytes()) == (200, dict(zip(["0", "1"], expected[0], strict=True)))
    status, told = answer(image.read_bytes()[:5000])
    assert status == 422 and "is truncated" in told["error"] and len(told["error"].splitlines()) == 1


def test_two_devices_give_the_gradient_of_one(tmp_path, monkeypatch):
    main = example("two_devices")
    if torch.cuda.is_available():
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]))
        assert main(tmp_path) < 1e-10
        return
    step = sys.modules["two_devices"].step
    assert pickle.loads(pickle.dumps(step)) is step  # as new processes get it; here they are forked
    process = Forked(with_forked_devices, str(FOLDER), "two_devices", str(tmp_path))
    assert process.wait() == 0, process.error
    assert float(process.output.split()[-1]) < 1e-10
