"""`gigamorph train` and `gigamorph predict` from table to csv, and every bad input."""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import SMALL_TRAINING, rows, run
from forked import command as forked

from gigamorph import GigamorphError, load
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.predict.parts import read_parts
from gigamorph.engine.train.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("undrawn")
FAST = [*SMALL_TRAINING, "--accumulate", "4"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), patients=8, height=160, width=128, seed=1)


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run("train", phantoms, "--out", out, *FAST) == 0
    return out


def test_train_leaves_checkpoints_log_curves_and_metrics(trained):
    written = {"last.ckpt", "best.ckpt", "log.csv", "curves.png", "metrics.json", "model_card.md", "config.toml"}
    assert {p.name for p in trained.iterdir()} == written


def test_predict_writes_images_breasts_and_heat_maps(trained, phantoms, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("predict", trained / "best.ckpt", phantoms, "--heatmaps", "--out", out) == 0
    images, breasts = rows(out / "predictions.csv"), rows(out / "breasts.csv")
    assert len(images) == 16 and len(breasts) == 8
    assert {r["view"] for r in images} == {"CC", "MLO"} and {r["view"] for r in breasts} == {"CC+MLO"}
    for breast in breasts:
        views = [float(r["p_1"]) for r in images if r["patient_id"] == breast["patient_id"]]
        assert float(breast["p_1"]) == pytest.approx(np.mean(views), abs=1e-5)
    for row in (*images, *breasts):
        z = float(row["log_odds_1"])
        assert float(row["p_1"]) == pytest.approx(1 / (1 + np.exp(-z)), rel=1e-5) and float(row["log_odds_0"]) == -z
    maps = sorted((out / "heatmaps").iterdir())
    assert len(maps) == 16 and all(m.read_bytes().startswith(b"\x89PNG") for m in maps)
    assert "16 images predicted, 0 skipped" in capsys.readouterr().out
    assert json.loads((out / "predictions.json").read_text())["checkpoint"] == "best.ckpt"


def test_load_gives_in_python_what_predict_writes(trained, phantoms, tmp_path):
    out = tmp_path / "out"
    assert run("predict", trained / "best.ckpt", phantoms, "--out", out) == 0
    images = rows(out / "predictions.csv")
    paths = [phantoms.parent / row["image_path"] for row in images]
    opened = load(trained / "best.ckpt", memory_budget="64MiB", device="cpu")
    found = opened.predict(paths)
    assert opened.classes == ("0", "1") and found.dtype == torch.float64
    assert found[:, 1].tolist() == pytest.approx([float(row["p_1"]) for row in images], rel=1e-5)
    log_odds = torch.tensor([float(row["log_odds_1"]) for row in images], dtype=torch.float64)
    assert torch.allclose(found[:, 1], log_odds.sigmoid(), rtol=1e-12, atol=0)
    assert opened.predict(paths[3]).tolist() == found[3:4].tolist()
    assert opened.predict([opened.open(paths[3]), paths[3]]).tolist() == found[3:4].tolist() * 2
    with torch.no_grad():
        logits = opened.net(opened.open(paths[3]))
    assert torch.allclose(logits.double().softmax(-1), found[3:4])
    with pytest.raises(GigamorphError, match="path of a file"):
        opened.predict([torch.zeros(1, 8, 8)])
    with pytest.raises(GigamorphError, match="unknown device 'gpu'; use cpu or cuda"):
        load(trained / "best.ckpt", device="gpu")


def test_predictions_say_their_split_and_are_measured_by_split(trained, phantoms, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("predict", trained / "best.ckpt", phantoms, "--out", out) == 0
    of_table = {os.path.basename(r["image_path"]): r for r in rows(phantoms)}
    images = rows(out / "predictions.csv")
    assert {r["split"] for r in images} == {"train", "val", "test"}
    assert all(r["split"] == of_table[os.path.basename(r["image_path"])]["split"] for r in images)
    assert {r["split"] for r in rows(out / "breasts.csv")} == {"train", "val", "test"}
    said = capsys.readouterr().out
    assert "train (learnt from these, so this measures nothing): AUC per image" in said
    own = [r for r in images if r["split"] == "train"]
    (told,) = (line for line in said.splitlines() if line.startswith("train"))
    assert f"({len(own)} images), AUC per breast" in told
    # A table of the same images that does not say the split.
    table = phantoms.parent / "labels.csv"
    with table.open("w") as file:
        for row in csv.reader(phantoms.open()):
            file.write(",".join(row[:3]) + "\n")
    assert rows(table)[0].keys() == {"image_path", "label", "patient_id"}
    assert run("predict", trained / "best.ckpt", table, "--out", tmp_path / "again") == 0
    assert "\nsplit not known (may hold images of the training): AUC" in capsys.readouterr().out
    assert {r["split"] for r in rows(tmp_path / "again" / "predictions.csv")} == {""}


def test_a_calibration_is_applied_to_probabilities_calls_and_pictures(trained, phantoms, tmp_path, capsys):
    digest = hashlib.sha256((trained / "best.ckpt").read_bytes()).hexdigest()
    stored = {"output": "1", "slope": 0.5, "intercept": -1.0, "images": 40, "split": "val", "sha256": digest}
    images = sorted((phantoms.parent / "images").iterdir())[:4]
    assert run("predict", trained / "best.ckpt", *images, "--out", tmp_path / "plain") == 0
    plain = rows(tmp_path / "plain" / "predictions.csv")
    stored["threshold"] = float(plain[2]["log_odds_1"])
    (tmp_path / "calibration.json").write_text(json.dumps(stored))
    command = ["predict", trained / "best.ckpt", *images, "--calibration", tmp_path / "calibration.json"]
    assert run(*command, "--out", tmp_path / "out") == 0
    for before, after in zip(plain, rows(tmp_path / "out" / "predictions.csv"), strict=True):
        z = float(before["log_odds_1"])
        assert float(after["log_odds_1"]) == pytest.approx(0.5 * z - 1, rel=1e-12)
        assert float(after["p_1"]) == pytest.approx(1 / (1 + np.exp(1 - 0.5 * z)), rel=1e-5)
        assert after["called"] == str(int(z >= stored["threshold"])) and "called" not in before
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["calibrated_on"] == "40 images, split val"
    (tmp_path / "calibration.json").write_text(json.dumps(stored | {"sha256": "0"}))
    assert run(*command, "--out", tmp_path / "other") == 2
    error = capsys.readouterr().err
    assert "was measured on another checkpoint" in error and error.count("\n") == 1
    (tmp_path / "calibration.json").write_text(json.dumps(stored | {"flips": ["both"]}))
    assert run(*command, "--out", tmp_path / "other") == 2
    error = capsys.readouterr().err
    assert "was measured with --flip both; predict with the same flips" in error and error.count("\n") == 1


def test_predictions_are_those_of_the_stock_network(trained, phantoms, tmp_path):
    from gigamorph import open_pixels
    from gigamorph.engine.images.pixels import Normalize
    from gigamorph.engine.models import create_model

    image = sorted((phantoms.parent / "images").iterdir())[3]
    assert run("predict", trained / "best.ckpt", image, "--out", tmp_path / "out") == 0
    source = open_pixels(image, normalize=Normalize((0.3,), (0.1,)))
    model = create_model("lesionnet?stages=1", weights=trained / "best.ckpt").eval()
    with torch.no_grad():
        expected = model(source.read(0, 160, 0, 128)[None]).softmax(-1)[0, 1].item()
    [row] = rows(tmp_path / "out" / "predictions.csv")
    assert float(row["p_1"]) == pytest.approx(expected, rel=1e-5)
    # Without a table, patient, side and view are those of the DICOM header; the patient is only named if asked for.
    assert (row["patient_id"], row["view"]) == ("P00001", image.stem.split("_")[2])
    assert run("predict", trained / "best.ckpt", image, "--identifiers", "--out", tmp_path / "named") == 0
    assert rows(tmp_path / "named" / "predictions.csv")[0]["patient_id"] == image.stem.split("_")[0]


def test_resume_takes_the_epochs_of_the_run_and_more_extend_it(trained, phantoms, tmp_path, capsys):
    out, others = tmp_path / "run", [option for option in FAST if option not in ("--epochs", "1")]
    shutil.copytree(trained, out)
    assert run("train", phantoms, "--out", out, *others, "--resume") == 0
    assert "train: nothing left to do, complete after epoch 1" in capsys.readouterr().out
    assert run("train", phantoms, "--out", out, *others, "--resume", "--epochs", "2") == 0
    assert [row["epoch"] for row in rows(out / "log.csv")] == ["1", "2"]


def test_a_network_that_is_no_classifier_of_these_images(phantoms, tmp_path, monkeypatch, capsys):
    """Said before anything is written; a module is looked for in the folder that the command runs in."""
    (tmp_path / "one_output.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))\n"
    )
    for folder, message in (
        (tmp_path, "outputs 1 x 1 for 1 image and 2 classes"),
        (phantoms.parent, "no module 'one_out"),
    ):
        monkeypatch.chdir(folder)
        sys.modules.pop("one_output", None)
        assert run("train", phantoms, "--model", "one_output:net", "--out", tmp_path / "run") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_an_image_that_the_network_itself_refuses_is_one_line(phantoms, tmp_path, monkeypatch, capsys):
    (tmp_path / "picky.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__()\n"
        "        self.conv, self.last = nn.Conv2d(in_channels, 4, 3, 2), nn.Linear(4, num_classes)\n"
        "    def forward(self, x):\n"
        "        if x.shape[-1] < 100:\n"
        "            raise ValueError('images of 100 columns at least')\n"
        "        return self.last(self.conv(x).mean((2, 3)))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "picky", raising=False)
    assert run("train", phantoms, "--out", "run", *FAST, "--model", "picky:Net") == 0
    np.save("small.npy", np.zeros((64, 64), np.uint16))
    capsys.readouterr()
    assert run("predict", "run/best.ckpt", "small.npy", "--out", "out") == 2
    error = capsys.readouterr().err
    assert "small.npy" in error and "images of 100 columns at least" in error and "Traceback" not in error


@pytest.fixture
def damaged(phantoms, tmp_path):
    """A copy of the phantoms whose sixth file is cut short."""
    folder = tmp_path / "damaged"
    shutil.copytree(phantoms.parent, folder)
    table = folder / "phantoms.csv"
    victim = folder / rows(table)[5]["image_path"]
    os.truncate(victim, victim.stat().st_size // 2)
    return table, victim


def test_a_truncated_file_is_named_and_what_was_computed_stays(trained, damaged, tmp_path, capsys):
    table, victim = damaged
    assert run("predict", trained / "best.ckpt", table, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and victim.name in error
    assert len(rows(tmp_path / "out" / "predictions.csv")) == 5
    assert len(rows(tmp_path / "out" / "breasts.csv")) == 3


def test_skip_bad_reports_and_goes_on(trained, damaged, tmp_path, capsys):
    table, victim = damaged
    assert run("predict", trained / "best.ckpt", table, "--skip-bad", "--out", tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "15 images predicted, 1 skipped" in output and f"skipped: {victim}" in output
    assert victim.name not in {os.path.basename(r["image_path"]) for r in rows(tmp_path / "out" / "predictions.csv")}


def test_training_names_a_truncated_file(damaged, tmp_path, capsys):
    table, victim = damaged
    assert run("train", table, "--out", tmp_path / "run", *FAST) == 2
    error = capsys.readouterr().err
    assert victim.name in error and error.count("\n") == 1


def test_wrong_column(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("file,label,patient_id\na.dcm,0,p\n")
    assert run("train", tmp_path / "t.csv", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "t.csv" in error and "image_path" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_wrong_augmentation(phantoms, tmp_path, capsys):
    assert run("train", phantoms, "--augment", "flip,rotate=400", "--out", tmp_path / "run", *FAST) == 2
    assert "augmentation rotate=400: must be between 0 and 180" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_missing_file_among_a_thousand_is_found_before_any_work(phantoms, tmp_path, capsys):
    image = next((phantoms.parent / "images").iterdir())
    for i in range(1000):
        os.link(image, tmp_path / f"{i}.dcm")
    lines = ["image_path,label,patient_id", *(f"{i}.dcm,{i % 2},p{i}" for i in range(1000))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    (tmp_path / "777.dcm").unlink()
    assert run("train", tmp_path / "t.csv", "--out", tmp_path / "run", *FAST) == 2
    error = capsys.readouterr().err
    assert "777.dcm" in error and "776.dcm" not in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def normed(tmp_path, monkeypatch):
    """Make `normed:net`, a network of the user's own with the given second layer."""

    def write(layer: str) -> str:
        (tmp_path / "normed.py").write_text(
            "from torch import nn\n"
            "def net(num_classes, in_channels):\n"
            f"    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, 2), {layer}, nn.ReLU(),\n"
            "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(sys.modules, "normed", raising=False)
        return "normed:net"

    return write


def test_unsupported_module_is_named_with_the_remedy(phantoms, tmp_path, normed, capsys):
    model = normed("nn.LPPool2d(2, 2)")
    assert run("train", phantoms, "--model", model, "--epochs", "1", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: module '1'") and "lp_pool2d" in error and error.count("\n") == 1


@pytest.mark.parametrize("more", [[], ["--batch-norm", "frozen"]], ids=["live", "frozen"])
def test_a_network_with_batch_norm_trains(phantoms, tmp_path, normed, more):
    model = normed("nn.BatchNorm2d(4)")
    assert run("train", phantoms, "--model", model, "--epochs", "1", "--out", tmp_path / "run", *more) == 0


def test_budget_too_small_for_any_tile(trained, phantoms, tmp_path, capsys):
    small = ["--memory-budget", "0.5KB", "--out", tmp_path / "out"]
    # What fits for no image costs none of them: it ends the command, whatever may be left out.
    for command in (["train", phantoms, *FAST], ["predict", trained / "best.ckpt", phantoms, "--skip-bad"]):
        assert run(*command, *small) == 2
        error = capsys.readouterr().err
        assert "no tile fits" in error and "the budget is 500 B" in error and error.count("\n") == 1


def test_a_run_that_skips_all_images_fails(trained, phantoms, tmp_path, capsys):
    command = ["predict", trained / "best.ckpt", phantoms, "--skip-bad", "--out", tmp_path / "out"]
    assert run(*command, "--memory-budget", "2KB") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: none of ") and error.endswith("quarantine.csv lists the reasons")
    reasons = (tmp_path / "out" / "quarantine.csv").read_text().splitlines()
    assert len(reasons) > 2 and all("no tile fits" in line for line in reasons[1:])


def test_full_disk_while_saving_a_checkpoint(phantoms, tmp_path, monkeypatch, capsys):
    def full(checkpoint, path, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    assert run("train", phantoms, "--out", tmp_path / "run", *FAST) == 2
    error = capsys.readouterr().err
    assert "best.ckpt" in error and "No space left on device" in error and error.count("\n") == 1


def test_full_disk_in_the_middle_of_a_training_keeps_what_stands(trained, phantoms, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    before = (out / "last.ckpt").read_bytes()
    more = ["train", phantoms, "--out", out, *FAST, "--epochs", 2, "--resume"]
    done = forked(*more, "--quiet", limit=6_000)
    assert done.wait() == 2, done.error
    assert re.fullmatch(
        r"error: \S+/run/(last|best)\.ckpt: the checkpoint cannot be written: File too large; "
        r"the existing file is unchanged; raise the limit .*; "
        r"\S+/run/last\.ckpt is complete; continue from it with --resume .*\n",
        done.error,
    )
    assert (out / "last.ckpt").read_bytes() == before
    assert not list(out.glob(".*"))
    assert run(*more) == 0
    assert load_checkpoint(out / "last.ckpt")["gigamorph"]["state"]["epoch"] == 2
    new = forked("train", phantoms, "--out", tmp_path / "new", *FAST, "--quiet", limit=6_000)
    assert new.wait() == 2
    assert "no checkpoint was written before; start the run again" in new.error and new.error.count("\n") == 1


def test_full_disk_while_predicting_keeps_the_results_before(trained, phantoms, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["predict", trained / "best.ckpt", phantoms, "--out", out]
    done = forked(*command, limit=2000)
    assert done.wait() == 2, done.error
    assert "cannot be written: File too large" in done.error and done.error.count("\n") == 1
    before = [row for some in read_parts(out / "parts") for row in some]
    assert 2 <= len(before) < 16
    assert run(*command, "--resume") == 0
    assert "16 images predicted" in capsys.readouterr().out
    after = pq.read_table(out / "parts").to_pylist()
    assert after[: len(before)] == before and len({row["key"] for row in after}) == len(after) == 16
    assert len(rows(out / "predictions.csv")) == 16


def _press_ctrl_c():
    raise KeyboardInterrupt


def _terminate():
    """As a scheduler does."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)


@pytest.fixture
def survives_sigterm():
    """Else it would end the tests."""
    former = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM would have ended the process"))
    yield
    signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize("end", [_press_ctrl_c, _terminate])
def test_ctrl_c_and_sigterm_keep_the_results_before(
    end, survives_sigterm, trained, phantoms, tmp_path, monkeypatch, capsys
):
    from gigamorph.cli.progress import ProgressView

    def press(self, progress):
        if progress.image == 3:
            end()

    with monkeypatch.context() as patched:
        patched.setattr(ProgressView, "__call__", press)
        # Each row is made durable by itself, else with a slow disk all 16 become so together.
        patched.setattr("gigamorph.engine.predict.parts._SHARE", 1e9)
        assert run("predict", trained / "best.ckpt", phantoms, "--out", tmp_path / "out") == 130
    told = capsys.readouterr().err.strip("\n")
    assert told == "stopped; finished work is stored, and the same command with --resume continues"
    computed = len(rows(tmp_path / "out" / "predictions.csv"))
    assert computed == 3
    assert len(rows(tmp_path / "out" / "breasts.csv")) == (computed + 1) // 2
    again = ["predict", trained / "best.ckpt", phantoms, "--out", tmp_path / "out", "--resume", "--json"]
    capsys.readouterr()
    assert run(*again) == 0
    end = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (end["computed"], end["done"]) == (16 - computed, 16)
    assert run("predict", trained / "best.ckpt", phantoms, "--out", tmp_path / "whole") == 0
    for name in ("predictions.csv", "breasts.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shard", "3/2", "'3/2' is not a shard; write 1/4"),
        ("--max-failures", "120%", "'120%' is not a share; write 2%"),
    ],
)
def test_a_shard_or_share_that_is_none(tmp_path, capsys, option, value, message):
    assert run("predict", tmp_path / "x.ckpt", tmp_path, option, value, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_predictions_are_not_overwritten(trained, phantoms, tmp_path, capsys):
    (tmp_path / "predictions.csv").write_text("dear\n")
    assert run("predict", trained / "best.ckpt", phantoms, "--out", tmp_path) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "predictions.csv").read_text() == "dear\n"


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_the_folder_of_a_training_takes_no_predictions(command, trained, phantoms, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "quarantine.csv").write_text("dear\n")
    before = {path.name for path in (tmp_path / "run").iterdir()}
    assert run(command, trained / "best.ckpt", phantoms, "--skip-bad", "--out", tmp_path / "run") == 2
    told = f"error: {tmp_path / 'run'}: holds a run of gigamorph train (last.ckpt); name another --out\n"
    assert capsys.readouterr().err == told
    assert (tmp_path / "run" / "quarantine.csv").read_text() == "dear\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} == before


def test_a_file_that_is_no_checkpoint(trained, phantoms, tmp_path, capsys):
    (tmp_path / "x.ckpt").write_bytes(b"nothing")
    (tmp_path / "cut.ckpt").write_bytes((trained / "best.ckpt").read_bytes()[:-999])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "y.ckpt")
    for name, message in (
        ("x", "not a readable checkpoint"),
        ("y", "not a checkpoint of gigamorph train"),
        ("cut", "is truncated (full disk, or interrupted copy)"),
        ("z", "no such"),
    ):
        assert run("predict", tmp_path / f"{name}.ckpt", phantoms, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err


def test_sigterm_leaves_a_checkpoint_from_which_the_run_goes_on_bit_for_bit(phantoms, tmp_path):
    command = ["train", phantoms, *FAST, "--epochs", "5", "--out"]
    assert run(*command, tmp_path / "whole") == 0
    child = forked(*command, tmp_path / "cut")
    while not (tmp_path / "cut" / "last.ckpt").exists():
        assert child.poll() is None, child.error
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGTERM)  # as a scheduler does
    assert child.wait() == 130, child.error
    assert "--resume continues from" in child.error and not (tmp_path / "cut" / "metrics.json").exists()
    assert run(*command, tmp_path / "cut", "--resume") == 0
    a, b = (torch.load(tmp_path / n / "last.ckpt", weights_only=True) for n in ("whole", "cut"))
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key


def test_real_mammograms_from_index_to_report_at_native_resolution(real_data, tmp_path, capsys):
    """Of a folder of two files, a mammogram and a frame of a tomosynthesis; labels are what a user adds."""
    (tmp_path / "dicom").mkdir()
    for name in ("mg_ge_jpeg_lossless.dcm", "dbt_4frames_jpeg2000.dcm"):
        (tmp_path / "dicom" / name).symlink_to(real_data / "dicom" / name)
    assert run("data", "index", tmp_path / "dicom", "--out", tmp_path / "index.csv") == 0
    assert "2 images of 2 patients, 0 files skipped" in capsys.readouterr().out
    indexed = rows(tmp_path / "index.csv")
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*indexed[0], "split", "frame"])
        writer.writeheader()
        for row in indexed:
            told = {"label": int(row["manufacturer"].startswith("GE")), "frame": "1" if row["frames"] == "4" else ""}
            writer.writerow({**row, **told, "split": "train"})
    fast = ["--model", "lesionnet?stages=1", "--epochs", "1", "--accumulate", "1", "--memory-budget", "300MiB"]
    assert run("train", tmp_path / "t.csv", *fast, "--out", tmp_path / "run") == 0
    stored = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 2
    given = [tmp_path / "run" / "last.ckpt", tmp_path / "t.csv", "--heatmaps"]
    assert run("predict", *given, "--out", tmp_path / "out") == 0
    assert len(rows(tmp_path / "out" / "predictions.csv")) == 2
    measured = ["--split", "train", "--resamples", "20", "--out", tmp_path / "measured"]
    assert run("eval", tmp_path / "out", "--table", tmp_path / "t.csv", *measured) == 0
    assert "2 images, 1 positive, 2 patients" in capsys.readouterr().out
    assert (tmp_path / "measured" / "report.html").is_file()
    assert run("view", tmp_path / "out", "--static", "--no-browser", "--most", "1") == 0
    assert len(list((tmp_path / "out" / "view" / "tiles").glob("*/0/*.png"))) >= 30
    from PIL import Image

    with Image.open(tmp_path / "out" / "heatmaps" / "mg_ge_jpeg_lossless.png") as picture:
        assert picture.size == (2394, 3062)


# -- what strangers do ------------------------------------------------------------------------------------------------


def one_line(capsys):
    """The error of the last command, without the word."""
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: ") and len([line for line in told if not line.startswith("warning: ")]) == 1
    return told[-1].removeprefix("error: ")


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_the_folder_of_a_run_is_no_network_but_holds_one(command, trained, phantoms, tmp_path, capsys):
    assert run(command, trained, phantoms, "--out", tmp_path / "out") == 2
    assert f"use its checkpoint, {trained / 'best.ckpt'}" in one_line(capsys)
    (tmp_path / "other").mkdir()
    assert run(command, tmp_path / "other", phantoms, "--out", tmp_path / "out") == 2
    assert "gigamorph import" in one_line(capsys) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_pixels_that_are_no_numbers_cost_their_image_alone(command, trained, phantoms, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.full((160, 128), np.nan, np.float32))
    images = [tmp_path / "a.npy", phantoms.parent / "images"]
    assert run(command, trained / "best.ckpt", *images, "--out", tmp_path / "one") == 2
    assert "a.npy: the network's output is not finite" in one_line(capsys)
    assert run(command, trained / "best.ckpt", *images, "--skip-bad", "--out", tmp_path / "all") == 0
    assert "16 images" in capsys.readouterr().out
    assert [row["image_path"] for row in rows(tmp_path / "all" / "quarantine.csv")] == [str(tmp_path / "a.npy")]
    assert not list((tmp_path / "all").rglob("a.png"))


def test_a_text_is_neither_checkpoint_nor_weights(trained, phantoms, tmp_path, capsys):
    assert run("predict", trained / "config.toml", phantoms, "--out", tmp_path / "out") == 2
    told = one_line(capsys)
    assert "config.toml: not a readable checkpoint" in told and "weights_only" not in told
    assert run("train", phantoms, "--weights", phantoms, "--out", tmp_path / "run", *FAST) == 2
    told = one_line(capsys)
    assert "phantoms.csv: not a readable weights file" in told and "weights_only" not in told


def test_a_folder_of_images_is_told_how_it_becomes_a_table(phantoms, tmp_path, capsys):
    assert run("train", phantoms.parent / "images", "--out", tmp_path / "run", *FAST) == 2
    told = one_line(capsys)
    assert "contains no images in a sub-folder per class" in told and "gigamorph data index" in told


def test_a_colour_image_is_told_of_channels(trained, tmp_path, capsys):
    np.save(tmp_path / "c.npy", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    assert run("predict", trained / "best.ckpt", tmp_path / "c.npy", "--out", tmp_path / "out") == 2
    assert "three channels" in one_line(capsys)


def test_a_cell_without_a_label_is_told_what_to_do(phantoms, tmp_path, capsys):
    table = tmp_path / "t.csv"
    table.write_text("image_path,label,patient_id\na.dcm,,p\n")
    assert run("train", table, "--out", tmp_path / "run", *FAST) == 2
    assert "line 2: label is empty; fill it in, or remove the row" in one_line(capsys)


def test_a_run_without_validation_says_so(phantoms, tmp_path, caplog):
    table = phantoms.parent / "train_only.csv"
    table.write_text(re.sub(r",(val|test),", ",train,", phantoms.read_text()))
    assert run("train", table, "--out", tmp_path / "run", *FAST) == 0
    assert "no validation images: the last epoch is saved as the best" in caplog.text
