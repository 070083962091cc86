"""The training loop: resuming, Ctrl-C, full disks, what the checkpoint holds."""

import errno
import json
import multiprocessing
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training import Images, images, make_data

from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.parallel.lock import hold
from gigamorph.engine.train.checkpoint import load_checkpoint
from gigamorph.engine.train.fit import FitWatch, fit
from gigamorph.engine.train.network import restore_network
from gigamorph.engine.train.options import Loss, Optimizer, Schedule, TrainOptions
from gigamorph.engine.train.target import Target


@pytest.fixture
def data():
    return make_data()


OPTIONS = TrainOptions(model="nets:small", epochs=3, accumulate=3, optimizer=Optimizer(lr=3e-3), seed=5)


@pytest.fixture(scope="module", autouse=True)
def dropout_net(tmp_path_factory):
    """A network with dropout, so that the state of the random numbers matters."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "nets.py").write_text(
        "from torch import nn\n"
        "def small(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 8, 3, 2), nn.ReLU(), nn.Dropout(0.3),\n"
        "                         nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    sys.modules.pop("nets", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert fit(make_data(), OPTIONS, out).metrics == json.loads((out / "metrics.json").read_text())
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The parameters after two epochs in float32."""
    net = fit(make_data(), replace(OPTIONS, epochs=2), tmp_path_factory.mktemp("plain") / "run").net
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def interrupt_at(stage, epoch, image):
    """A report that presses Ctrl-C once, when the given image of a stage is complete."""
    pressed = []

    def report(progress):
        if not pressed and (progress.stage, progress.epoch, progress.image) == (stage, epoch, image):
            pressed.append(progress)
            os.kill(os.getpid(), signal.SIGINT)

    return report


def assert_same_run(first, second):
    a, b = load_checkpoint(first / "last.ckpt"), load_checkpoint(second / "last.ckpt")
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    states = [c["optimizer_states"][0]["state"] for c in (a, b)]
    for index, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(value, states[1][index][key]), (index, key)
    logs = [(f / "log.csv").read_text().splitlines() for f in (first, second)]
    drop = {"seconds", "megapixels_per_second", "peak_bytes"}
    keep = [i for i, name in enumerate(logs[0][0].split(",")) if name not in drop]
    rows = [[[line.split(",")[i] for i in keep] for line in log] for log in logs]
    assert rows[0] == rows[1]
    metrics = [json.loads((f / "metrics.json").read_text()) for f in (first, second)]
    for key in ("val", "test", "best_epoch", "split_sha256"):
        assert metrics[0][key] == metrics[1][key], key


@pytest.mark.parametrize(
    ("stage", "epoch", "image"),
    [("train", 0, 1), ("train", 1, 3), ("train", 1, 7), ("validate", 0, 2)],
)
def test_interrupted_and_resumed_run_is_bitwise_the_uninterrupted_one(data, whole, tmp_path, stage, epoch, image):
    with pytest.raises(KeyboardInterrupt):
        fit(data, OPTIONS, tmp_path / "parts", report=interrupt_at(stage, epoch, image))
    assert not (tmp_path / "parts" / "metrics.json").exists()
    fit(data, OPTIONS, tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts")


def test_a_network_that_is_built_otherwise_today(whole):
    stored = load_checkpoint(whole / "best.ckpt")
    stored["gigamorph"]["options"]["model"] = "lesionnet"
    with pytest.raises(DataError, match="weights do not fit 'lesionnet' as it is built now"):
        restore_network(stored, "best.ckpt", memory_budget=None, device="cpu")


def hold_folder(out, ready):
    with hold(out / "_lock", out):
        ready.set()
        signal.pause()


def test_a_second_run_in_the_same_folder_says_which_process_trains_there(data, tmp_path):
    """Each wrote its checkpoints over those of the other."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold_folder, args=(tmp_path, ready))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(GigamorphError, match=rf"process {other.pid} on .* writes to it; wait for it"):
            fit(data, OPTIONS, tmp_path)
    finally:
        other.kill()
        other.join()
    assert [path.name for path in tmp_path.iterdir()] == ["_lock"]


def test_other_seed_gives_another_run(data, whole, tmp_path):
    fit(data, replace(OPTIONS, seed=6), tmp_path / "run")
    a, b = (load_checkpoint(run / "last.ckpt")["state_dict"] for run in (whole, tmp_path / "run"))
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_checkpoint_holds_what_repeats_the_run(data, whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    stored = load_checkpoint(whole / "best.ckpt")["gigamorph"]
    assert stored["options"]["model"] == "nets:small" and stored["options"]["seed"] == 5
    assert stored["preprocessing"] == {"mean": 0.5} and stored["classes"] == ["normal", "finding"]
    assert stored["split"]["val"] == len(data.val.records)
    assert stored["split"]["sha256"] == metrics["split_sha256"] and len(metrics["split_sha256"]) == 64
    assert {"torch", "lightning", "python"} <= set(stored["versions"])
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_best_checkpoint_is_of_the_best_validation_score_then_loss(data, tmp_path):
    fit(data, replace(OPTIONS, epochs=6, optimizer=Optimizer(lr=1e-2)), tmp_path / "run")
    rows = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    score, loss = rows[0].index("val_score"), rows[0].index("val_loss")
    keys = [(float(row[score]), -float(row[loss])) for row in rows[1:]]
    best = load_checkpoint(tmp_path / "run" / "best.ckpt")["gigamorph"]["state"]["epoch"]
    assert best == 1 + keys.index(max(keys))


def test_learns_and_scores_per_image_and_breast(tmp_path):
    options = replace(OPTIONS, epochs=15, optimizer=Optimizer(lr=2e-2))
    metrics = fit(make_data(widths=3), options, tmp_path / "run").metrics
    assert metrics["test"]["auc_image"] == 1.0 and metrics["test"]["breasts"] == 4


def test_early_stop_ends_the_run_for_good(data, tmp_path):
    # A learning rate of nothing never improves: the first epoch is the best, two more pass.
    options = replace(OPTIONS, epochs=9, optimizer=Optimizer(lr=0.0), patience=2)
    notes = []
    first = fit(data, options, tmp_path / "run", report=lambda p: notes.append(p.note)).metrics
    assert "train: stopped early after epoch 3 of 9: no better score in 2 epochs" in notes
    log = (tmp_path / "run" / "log.csv").read_text()
    assert len(log.splitlines()) == 1 + 3
    again = fit(data, options, tmp_path / "run", resume=True).metrics
    assert (tmp_path / "run" / "log.csv").read_text() == log
    assert all(again[name] == first[name] for name in ("test", "peak_bytes", "seconds"))


def test_more_epochs_extend_a_run(data, tmp_path):
    """Also one that was complete; its log goes on, and what was trained is where it goes on from."""
    notes = []
    fit(data, replace(OPTIONS, epochs=2), tmp_path / "run")
    short = load_checkpoint(tmp_path / "run" / "last.ckpt")
    log = (tmp_path / "run" / "log.csv").read_text()
    fit(data, replace(OPTIONS, epochs=4), tmp_path / "run", resume=True)
    rows = (tmp_path / "run" / "log.csv").read_text()
    assert rows.startswith(log) and len(rows.splitlines()) == 1 + 4
    long = load_checkpoint(tmp_path / "run" / "last.ckpt")
    assert long["gigamorph"]["options"]["epochs"] == 4 and long["gigamorph"]["state"]["epoch"] == 4
    steps = [max(float(s["step"]) for s in c["optimizer_states"][0]["state"].values()) for c in (short, long)]
    assert steps[1] == 2 * steps[0]
    with pytest.raises(GigamorphError, match="was started with epochs=4, not 3; resume with the same value or more"):
        fit(data, OPTIONS, tmp_path / "run", resume=True)
    fit(data, replace(OPTIONS, epochs=4), tmp_path / "run", resume=True, report=lambda p: notes.append(p.note))
    assert "train: nothing left to do, complete after epoch 4" in notes


def test_a_diverged_run_keeps_what_it_had(data, tmp_path):
    """The best epoch so far serves prediction, and the message names it."""
    run, calls = tmp_path / "run", []

    def spoil(progress):
        if progress.note:
            calls.append(progress.note)

    real = torch.nn.functional.cross_entropy

    def diverging(*args, **kwargs):
        return real(*args, **kwargs) * (float("nan") if len(calls) == 2 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.cross_entropy", diverging)
        message = r"epoch 3, step 1: the loss is nan; .*last\.ckpt is .* and .*best\.ckpt is the best epoch, .*lower lr"
        with pytest.raises(GigamorphError, match=message):
            fit(data, OPTIONS, run, report=spoil)
    assert load_checkpoint(run / "best.ckpt")["gigamorph"]["state"]["epoch"] <= 2
    assert len((run / "log.csv").read_text().splitlines()) == 1 + 2 and (run / "curves.png").exists()
    fit(data, OPTIONS, run, resume=True)  # what had spoilt it is gone


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(data, plain, tmp_path, precision):
    options = replace(OPTIONS, epochs=2, precision=precision)
    fitted = fit(data, options, tmp_path / "run")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in fitted.net.parameters())
    ours = torch.cat([p.flatten() for p in fitted.net.parameters()])
    assert 0 < (ours - plain).abs().max() < 0.05


def test_runs_without_validation_images(data, tmp_path, caplog):
    options = replace(OPTIONS, epochs=2, patience=1, schedule=Schedule(plateau=1), batch_norm="frozen")
    metrics = fit(replace(data, val=Images([]), test=Images([])), options, tmp_path / "run").metrics
    assert "val" not in metrics and metrics["best_epoch"] == 2
    for name in ("patience", "schedule.plateau", "batch_norm"):
        assert f"{name} has no effect" in caplog.text


def test_validation_of_one_class_falls_back_on_the_loss(data, tmp_path):
    metrics = fit(
        replace(data, val=Images([r for r in data.val.records if r.label])), OPTIONS, tmp_path / "run"
    ).metrics
    assert metrics["val"]["auc_image"] is None


@pytest.mark.parametrize("failing", ["torch.save", "os.replace"])
def test_full_disk_keeps_the_former_checkpoint(data, whole, tmp_path, monkeypatch, failing):
    module, name = failing.split(".")
    real = getattr(__import__(module), name)
    calls = []

    def full(first, *args, **kwargs):
        target = str(getattr(args[0], "name", args[0]))
        if target.endswith(".ckpt"):
            calls.append(target)
            if len(calls) > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(first, *args, **kwargs)

    monkeypatch.setattr(failing, full)
    with pytest.raises(
        GigamorphError, match=r"(last|best)\.ckpt: .* No space left on device; the existing file is unchanged; .*resume"
    ):
        fit(data, OPTIONS, tmp_path / "run")
    monkeypatch.undo()
    state = load_checkpoint(tmp_path / "run" / "last.ckpt")["gigamorph"]["state"]
    assert (state["epoch"], state["batch"]) == (1, 0)
    assert not list((tmp_path / "run").glob(".*"))  # no half-written file is left to fill the disk
    fit(data, OPTIONS, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_a_memory_budget_as_a_text(data, tmp_path):
    """As `accelerate` takes it; the checkpoint and the model card have it too."""
    fit(data, replace(OPTIONS, epochs=1, memory_budget="96MiB"), tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "best.ckpt")["gigamorph"]["options"]["memory_budget"] == 96 * 2**20
    assert "96.0 MiB" in (tmp_path / "run" / "model_card.md").read_text()
    for wrong in ("12x", 0, True):
        with pytest.raises(GigamorphError, match="memory size"):
            replace(OPTIONS, memory_budget=wrong)


def test_class_weights_act_at_batch_size_one():
    target, one = Target(("a", "b")), np.array([[0.0, 1.0]])
    weights = target.weights([Record(Path("i"), label, "p") for label in (0, 0, 0, 1)])
    assert weights == pytest.approx([4 / 6, 2.0])
    logits = torch.tensor([[0.3, -0.2]])
    plain, weighted = (target.losses(logits, one, Loss(), w).mean() for w in (None, weights))
    assert weighted.item() == pytest.approx(2 * plain.item())


def test_refusals_name_the_culprit(data, tmp_path):
    with pytest.raises(DataError, match="patient p0 is in both train and val"):
        fit(replace(data, val=images(1)), OPTIONS, tmp_path / "run")
    unlabelled = [*data.train.records, Record(Path("9.png"), -1, "p9")]
    with pytest.raises(DataError, match=r"9\.png: has no label"):
        fit(replace(data, train=Images(unlabelled)), OPTIONS, tmp_path / "run")
    with pytest.raises(DataError, match="no training images"):
        fit(replace(data, train=Images([])), OPTIONS, tmp_path / "run")
    said = []
    fit(data, replace(OPTIONS, epochs=1), tmp_path / "run", resume=True, watch=FitWatch(say=said.append))
    assert f"{tmp_path / 'run' / 'last.ckpt'}: not found, so the run starts from the beginning" in said
    with pytest.raises(GigamorphError, match="already holds a run; continue it with --resume"):
        fit(data, replace(OPTIONS, epochs=1), tmp_path / "run")
    with pytest.raises(GigamorphError, match=r"was started with accumulate=3, not 1; resume with the same value$"):
        fit(data, replace(OPTIONS, accumulate=1), tmp_path / "run", resume=True)
    with pytest.raises(DataError, match="another split"):
        fit(replace(data, test=Images([])), replace(OPTIONS, epochs=1), tmp_path / "run", resume=True)
