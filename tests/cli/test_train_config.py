"""`gigamorph train` by configurations, folds, logs and looks at the images: what a file says and what is refused."""

import csv
import functools
import json
import logging
import os
import re
import runpy
import signal
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import rich_click as click
import torch
import yaml
from commands import SMALL_TRAINING, rows, run

from gigamorph import load
from gigamorph.cli.train import scores_line
from gigamorph.cli.train import train as command
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.train.checkpoint import load_checkpoint
from gigamorph.engine.train.config import TrainConfig
from gigamorph.engine.train.inputs import training_data

pytestmark = pytest.mark.usefixtures("undrawn")
FAST = [*SMALL_TRAINING, "--accumulate", "4"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), patients=6, height=160, width=128, seed=1)


def options_of(folder):
    return load_checkpoint(folder / "best.ckpt")["gigamorph"]["options"]


def test_where_no_run_can_be_written_is_told_before_images_are_read(phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gigamorph.engine.train.inputs.training_data", lambda *args, **options: pytest.fail("read"))
    (tmp_path / "file").write_text("")
    assert run("train", phantoms, "--out", tmp_path / "file" / "run") == 2
    assert "run/config.toml: the configuration cannot be written: Not a directory" in capsys.readouterr().err


def test_the_command_line_and_the_file_have_the_same_defaults(phantoms, capsys):
    assert run("train", "--print-config") == 0
    plain = capsys.readouterr().out
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "all_keys.py"))["on_page_markdown"]((docs / "training.md").read_text())
    assert f"```toml\n{plain.strip()}\n```" in page
    told = tomllib.loads(plain)
    assert told["optimizer"]["lr"] == 1e-3 and "# patience =" in plain and told["data"]["mean"] == 0.0
    every = [p for p in command.params if p.name in told and isinstance(p, click.Option) and not p.multiple]
    valued = [p for p in every if p.default is not None and not p.is_flag and p.name != "device"]
    given = [part for p in valued for part in (p.opts[0], str(p.default))]
    assert len(given) >= 10
    assert run("train", phantoms, "--print-config", *given) == 0
    assert tomllib.loads(capsys.readouterr().out) == told
    more = ["--mean", "0", "--std", "1", "--voi", "auto", "--lr", "1e-3", "--weight-decay", "1e-4", "--task", "classes"]
    assert run("train", phantoms, "--print-config", *more) == 0
    again = tomllib.loads(capsys.readouterr().out)
    assert {**again["data"], "mean": 0.0, "std": 1.0} == told["data"] and again["optimizer"] == told["optimizer"]


def test_every_option_has_a_help():
    assert not [p.name for p in command.params if isinstance(p, click.Option) and not p.help]


def test_files_options_and_keys_in_their_order_and_the_saved_file_again(phantoms, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        "\ufeff"  # as editors of Windows begin a file
        + yaml.safe_dump(
            {
                "model": "lesionnet?stages=1",
                "epochs": 7,
                "memory_budget": "64MiB",
                "average": 0.9,
                "optimizer": {"name": "NAdam", "lr": 0.1, "rates": {"fc": 0.02}, "options": {"betas": [0.8, 0.99]}},
                "schedule": {"name": "StepLR", "options": {"step_size": 1}},
                "loss": {"label_smoothing": 0.1},
                "data": {"mean": 0.3, "std": 0.1, "augment": "flip"},
            }
        )
    )
    given = ["--config", tmp_path / "c.yaml", "--epochs", "1", "--lr", "5e-3", "-o", "optimizer.lr=1e-4"]
    assert run("train", phantoms, *given, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "largest of " in said and "160 x 128" in said and "of 64.0 MiB" in said
    assert "4 images per optimizer step (accumulate), 1 steps per epoch, 1 in 1 epoch" in said
    options = options_of(tmp_path / "run")
    assert options["optimizer"]["lr"] == 1e-4 and options["epochs"] == 1 and options["memory_budget"] == 64 * 2**20
    assert options["optimizer"]["options"] == {"betas": [0.8, 0.99]} and options["average"] == 0.9
    rates = {
        group["base"]
        for group in load_checkpoint(tmp_path / "run" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    }
    assert rates == {1e-4, 0.02}
    saved = tmp_path / "run" / "config.toml"
    assert tomllib.loads(saved.read_text())["device"] == "auto"  # a file is taken elsewhere
    assert run("train", phantoms, "--config", saved, "--out", tmp_path / "again") == 0
    assert options_of(tmp_path / "again") == options
    weights = [load_checkpoint(tmp_path / name / "best.ckpt")["state_dict"] for name in ("run", "again")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    # A run that goes on needs no more than its folder, also of a version that gave every optimizer a momentum.
    saved.write_text(saved.read_text().replace("# momentum =", "momentum = 0.9"))
    assert run("train", phantoms, "--resume", "--epochs", "2", "--out", tmp_path / "run") == 0
    assert len(rows(tmp_path / "run" / "log.csv")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "optimizer.lrr=1"], "unknown key 'optimizer.lrr'; known keys: name, lr"),
        (["-o", "optimizer.lr=fast"], "key 'optimizer.lr' is 'fast', not a number"),
        (["-o", "lr=1"], "unknown key 'lr' (did you mean optimizer.lr?); known keys: model, weights"),
        (["-o", "optimizer=sgd"], "key 'optimizer' is 'sgd', not a table; optimizer.name is a key of it"),
        (
            ["--batch_size", "8"],
            "No such option '--batch_size': images are processed one by one; --accumulate N uses N per",
        ),
        (["--model-ema"], "No such option '--model-ema': -o average=0.999 sets it"),
        (["--dropout", "1"], "No such option '--dropout'. Did you mean '--out'? (gigamorph train --help)"),
        (["-o", "optimizer.options.betas=[0.9]"], "cannot make optimizer 'adamw' with betas=(0.9,): tuple index"),
        (["-o", "optimizer.lr"], "is not a setting; write KEY=VALUE"),
        (["-o", "model.depth=2", "--model", "x"], "'model' is a value, not a table"),
        (["-o", "optimizer.name=nothing"], "unknown optimizer 'nothing'"),
        (["-o", "schedule.name=nothing"], "unknown schedule 'nothing'"),
        (
            ["-o", "schedule.name=OneCycleLR", "-o", "schedule.options.total_steps=2", "-o", "epochs=3"],
            "schedule 'OneCycleLR': total_steps is 2, but the run has 3; omit it",
        ),
        (["-o", "schedule.name=ReduceLROnPlateau"], "'ReduceLROnPlateau'; set schedule.plateau = EPOCHS instead"),
        (["-o", "loss.focal=-1"], "loss.focal must be 0 or more, not -1"),
        (["--epochs", "3", "--config", "stages.toml"], "epochs is 3, but each stage has its own epochs; leave it out"),
        (
            ["--epochs", "20", "--config", "stages.toml"],
            "--epochs cannot be used with stages; set the epochs of each stage in",
        ),
        (["-o", "epochs=0"], "epochs must be 1 or more, not 0"),
        (["--mean", "auto", "--std", "1"], "must both be auto"),
        (["--config", "absent.toml"], "absent.toml: cannot be read"),
        (["--quiet", "--verbose"], "exclude each other"),
        (["--std", "0"], "std [0.0] must be finite numbers, std above 0"),
        (["--model", "unet?width=a"], "model 'unet?width=a': width must be a whole number, not 'a'"),
        (["--log", "paper"], "unknown log 'paper'; use csv"),
        (["--callback", "nowhere:Thing"], "callback 'nowhere:Thing' cannot be imported: no module 'nowhere'"),
        (["--folds", "50"], "cannot make 50 folds of 4 patients; use 2 to 4"),
        (
            ["--task", "labels", "--label", "mass"],
            "phantoms.csv: has no column label_mass; it has image_path, label, patient_id",
        ),
    ],
)
def test_what_cannot_be_is_one_line(phantoms, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("stages.toml").write_text("[[stages]]\nepochs = 2\n")
    assert run("train", phantoms, *FAST, *options, "--out", tmp_path / "run") == 2
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in told and "Traceback" not in told
    assert not (tmp_path / "run" / "config.toml").exists()


def test_verbose_says_plan_kernels_and_what_learns_at_which_rates(phantoms, tmp_path, capsys, monkeypatch):
    log = logging.getLogger("gigamorph")
    monkeypatch.setattr(log, "handlers", log.handlers)
    monkeypatch.setattr(log, "level", log.level)
    given = [*FAST, "--freeze", "stem.bias", "--lr-of", "fc=0.02", "--verbose", "--out", tmp_path / "run"]
    assert run("train", phantoms, *given) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "plan of the largest image" in told and "one tile" in told and "kernels: " in told
    assert re.search(r"stage train: \d+ of \d+ parameters learn .* by AdamW: .* at 0.001 .* at 0.02 with", told)


@pytest.mark.parametrize(
    "setting", ["device=gpu", "device=cuda", "memory_budget=12x", "data.augment=foo=1", "data.folds=1"]
)
def test_print_config_refuses_what_a_run_would(capsys, setting):
    if setting == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run("train", "--print-config", "-o", setting) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and told.out == ""


def test_mean_and_std_of_the_training_images(phantoms, tmp_path, capsys):
    data = training_data(phantoms, normalize="auto")
    normalize = data.preprocessing["normalize"]
    plain = training_data(phantoms)
    pixels = [plain.train[i]["image"].read(0, 160, 0, 128).double() for i in range(len(plain.train))]
    mean = np.mean([float(p.mean()) for p in pixels])
    std = np.sqrt(np.mean([float((p**2).mean()) for p in pixels]) - mean**2)
    assert normalize["mean"] == pytest.approx([mean], abs=1e-5) and normalize["std"] == pytest.approx([std], abs=1e-5)
    assert run("train", phantoms, *FAST, "--mean", "auto", "--std", "auto", "--quiet", "--out", tmp_path / "run") == 0
    assert capsys.readouterr().out == ""
    stored = load_checkpoint(tmp_path / "run" / "best.ckpt")["gigamorph"]["preprocessing"]
    assert stored["normalize"] == normalize


def test_images_that_cannot_be_read_are_left_out_if_asked(phantoms, tmp_path, capsys):
    for name in ("images", phantoms.name):
        (tmp_path / name).symlink_to(phantoms.parent / name)
    table = tmp_path / "bad.csv"
    lines = phantoms.read_text().splitlines()
    (tmp_path / "cut.dcm").write_bytes((phantoms.parent / "images" / "PHANTOM0000_R_CC.dcm").read_bytes()[:3000])
    lines[1] = lines[1].replace("images/PHANTOM0000_R_CC.dcm", "cut.dcm")
    lines[2] = lines[2].replace("images/PHANTOM0000_R_MLO.dcm", "absent.dcm")
    np.save(tmp_path / "nan.npy", np.where(np.eye(160, 128) > 0, np.nan, 0.5).astype(np.float32))
    lines[3] = re.sub("images/[^,]*", "nan.npy", lines[3])
    np.save(tmp_path / "flat.npy", np.full((160, 128), 0.5, np.float32))
    lines[4] = re.sub("images/[^,]*", "flat.npy", lines[4])
    table.write_text("\n".join(line.replace(",test,", ",train,") for line in lines) + "\n")
    assert run("train", table, *FAST, "--out", tmp_path / "none") == 2
    lines[1], lines[2] = phantoms.read_text().splitlines()[1:3]
    (tmp_path / "nan.csv").write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    for count, (part, scale) in enumerate((("train", "auto"), ("train", "0.5"), ("val", "0.5"), ("test", "0.5"))):
        cells = [next(csv.reader([line])) for line in lines[1:]]
        named = [[row[0], row[1], row[2], part if number in (2, 3) else "train"] for number, row in enumerate(cells)]
        written = [["image_path", "label", "patient_id", "split"], *named]
        (tmp_path / "nan.csv").write_text("\n".join(map(",".join, written)) + "\n")
        out = tmp_path / f"none{count}"
        assert run("train", tmp_path / "nan.csv", *FAST, "--std", scale, "--mean", scale, "--out", out) == 2
        assert "nan.npy: contains NaN or infinite pixels" in capsys.readouterr().err
    assert run("train", table, *FAST, "--skip-bad", "--folds", "2", "--out", tmp_path / "run") == 0
    told = capsys.readouterr()
    named = [line.split(": ") for line in told.err.splitlines() if "left out: " in line]
    assert [Path(path).name for _, _, path, *_ in named] == ["cut.dcm", "absent.dcm", "nan.npy"]  # for all folds
    [flat] = [line for line in told.err.splitlines() if "pixels are equal" in line]
    assert flat.startswith("warning: ") and "flat.npy: all its pixels are equal" in flat
    for fold in ("fold1", "fold2"):
        found = rows(tmp_path / "run" / fold / "quarantine.csv")
        assert [Path(row["image_path"]).name for row in found] == ["cut.dcm", "absent.dcm", "nan.npy"]
        assert "nan.npy: contains NaN or infinite pixels" in found[2]["reason"]
    assert told.out.count("quarantine.csv (3 images left out)") == 2
    assert json.loads((tmp_path / "run" / "fold1" / "metrics.json").read_text())["best_epoch"] == 1


def test_folds_by_patient_and_their_predictions(phantoms, tmp_path, capsys):
    table = phantoms.parent / "unsplit.csv"
    with table.open("w") as file:
        file.write("\n".join(",".join(line.split(",")[:3]) for line in phantoms.read_text().splitlines()) + "\n")
    given = [*FAST, "--folds", "2", "--log", "csv", "--out", tmp_path / "cv"]
    assert run("train", table, *given) == 0
    said = capsys.readouterr().out
    assert "fold 2 of 2" in said and "val_auc_image: " in said
    found = rows(tmp_path / "cv" / "out_of_fold.csv")
    assert len(found) == 12 and len({row["image_path"] for row in found}) == 12
    folds = {row["patient_id"]: row["fold"] for row in found}
    assert all(folds[row["patient_id"]] == row["fold"] for row in found) and len(folds) == 6
    assert json.loads((tmp_path / "cv" / "folds.json").read_text())["folds"] == 2
    logged = rows(tmp_path / "cv" / "fold1" / "csv" / "metrics.csv")
    assert float(logged[0]["val_loss"]) == pytest.approx(
        float(rows(tmp_path / "cv" / "fold1" / "log.csv")[0]["val_loss"])
    )
    assert run("train", table, *given) == 2 and "already holds a run" in capsys.readouterr().err
    for other, told in (
        (["--folds", "3"], "was started with 2 folds, not 3"),
        (
            ["--weights", tmp_path / "cv" / "fold1" / "best.ckpt"],
            "fold1/last.ckpt: was started from other weights than",
        ),
    ):
        assert run("train", table, *given, "--resume", *other) == 2
        assert told in "".join(capsys.readouterr().err.split("\n"))
    assert run("train", table, *given, "--resume") == 0
    capsys.readouterr()
    assert run("train", table, "--out", tmp_path / "cv", "--resume") == 0  # no more than its folder
    assert "fold 2 of 2" in capsys.readouterr().out
    (tmp_path / "cv" / "config.toml").unlink()
    assert run("train", table, "--out", tmp_path / "cv", "--resume") == 2
    assert "holds a cross-validation; give --folds" in capsys.readouterr().err
    assert run("import", tmp_path / "cv", "--out", tmp_path / "ensemble") == 2
    assert "here use the checkpoint of one" in capsys.readouterr().err
    evaluated = ["eval", tmp_path / "cv" / "out_of_fold.csv", "--split", "all", "--resamples", "20"]
    assert run(*evaluated, "--out", tmp_path / "measured") == 0


def test_names_are_looked_up_before_images_are_read(tmp_path, capsys):
    """These cannot be read, which is said last."""
    lines = ["image_path,label,patient_id,split"]
    for number in range(4):
        (tmp_path / f"{number}.png").write_text("no image")
        lines.append(f"{number}.png,{number % 2},p{number},{'train' if number < 2 else 'val'}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    for options, message in (
        (["-o", "optimizer.name=nothing"], "unknown optimizer 'nothing'"),
        (["-o", "optimizer.options.speed=3"], "cannot make optimizer 'adamw' with speed=3"),
        (["-o", "schedule.name=nothing"], "unknown schedule 'nothing'"),
        (["--log", "nothing"], "unknown log 'nothing'"),
        (["--callback", "nowhere:Thing"], "callback 'nowhere:Thing' cannot be imported"),
        (["--freeze", "nothing"], "'nothing' matches no parameter of the network"),
        (["--lr-of", "nothing=1"], "'nothing' matches no parameter of the network"),
        (["-o", "data.classes=['no', 'yes']"], "unknown label '0'; the classes are no, yes"),
        ([], "none of the 4 images can be read"),
    ):
        assert run("train", tmp_path / "t.csv", *FAST, "--skip-bad", *options, "--out", tmp_path / "run") == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
        if message.startswith(("unknown optimizer", "cannot make optimizer", "unknown schedule")):
            assert run("train", "--print-config", *options) == 2 and message in capsys.readouterr().err


def test_classes_that_are_absent_are_told(phantoms, tmp_path, capsys):
    lines = phantoms.read_text().splitlines()
    table, at = phantoms.with_name("absent.csv"), lines[0].split(",").index("split")
    for number, line in enumerate(lines[1:], 1):
        cells = line.split(",")
        cells[at] = "train" if number > 4 else "val" if cells[1] == lines[1].split(",")[1] else "test"
        lines[number] = ",".join(cells)
    table.write_text("\n".join(lines) + "\n")
    given = ["train", table, *FAST, "-o", 'data.classes=["0", "1", "2"]', "--out", tmp_path / "run"]
    assert run(*given) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "no training image has label 2" in told
    assert "validation images have label" in told and "the loss selects the best epoch" in told


def test_names_of_labels_are_looked_at(phantoms, tmp_path, capsys):
    """One label in two spellings is no second class; the order of grades is told where sorting has made it."""
    with phantoms.open(newline="") as file:
        table = list(csv.DictReader(file))

    def written(names):
        for number, row in enumerate(table):
            row["label"] = names[number // 2 % len(names)]
        with (phantoms.parent / "named.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
        return phantoms.parent / "named.csv"

    assert run("train", written(["malignant", "Malignant"]), *FAST, "--out", tmp_path / "spelt") == 2
    assert "differ only in case or blanks" in capsys.readouterr().err
    assert run("train", written(["small", "large"]), *FAST, "--task", "ordinal", "--out", tmp_path / "grades") == 0
    assert "the assumed order is large < small" in capsys.readouterr().err


def test_labels_of_a_table_are_learnt_predicted_and_measured(phantoms, tmp_path, capsys):
    with phantoms.open(newline="") as file:
        table = list(csv.DictReader(file))
    for number, row in enumerate(table):
        row |= {"label_mass": str(number // 2 % 2), "label_calc": row["label"], "label_age": str(40 + number)}
        row["image_path"] = str(phantoms.parent / row["image_path"])

    def write(table):
        with (tmp_path / "t.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)

    write(table)
    given = [*FAST, "--task", "labels", "--label", "mass", "--label", "calc"]
    assert run("train", tmp_path / "t.csv", *given, "--out", tmp_path / "run") == 0
    assert "labels mass, calc" in capsys.readouterr().out
    assert run("predict", tmp_path / "run" / "best.ckpt", tmp_path / "t.csv", "--out", tmp_path / "p") == 0
    found = rows(tmp_path / "p" / "predictions.csv")
    assert {"p_mass", "p_calc", "log_odds_mass"} <= found[0].keys() and len(found) == 12
    assert [row["label_mass"] for row in found] == [str(number // 2 % 2) for number in range(12)]
    assert "AUC per image" in capsys.readouterr().out
    measured = ["eval", tmp_path / "p" / "exams.csv", "--split", "all"]
    assert run(*measured, "--resamples", "20", "--out", tmp_path / "exams") == 0
    measured = ["eval", tmp_path / "p", "--split", "all"]
    assert run(*measured, "--resamples", "20", "--out", tmp_path / "e") == 0
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert metrics["kind"] == "labels" and metrics["outputs"] == ["mass", "calc"]
    for row in table:
        row["label_all"] = "1"
    write(table)
    given = [*FAST, "--task", "labels", "--label", "all"]
    assert run("train", tmp_path / "t.csv", *given, "--out", tmp_path / "x") == 2
    assert "label_all is 1 for all training images that have one; there is nothing to learn" in capsys.readouterr().err
    assert run("train", tmp_path / "t.csv", *given, "--label", "calc", "--out", tmp_path / "y") == 0
    assert "label_all is 1 for all training images that have one; nothing is learnt" in capsys.readouterr().err
    assert run("train", tmp_path / "t.csv", *FAST, "--task", "labels", "--label", "age", "--out", tmp_path / "x") == 2
    assert "label_age of PHANTOM" in capsys.readouterr().err
    given = [*FAST, "--task", "numbers", "--label", "age"]
    assert run("train", tmp_path / "t.csv", *given, "--out", tmp_path / "n") == 0
    assert "test: MAE per image" in capsys.readouterr().out
    assert run("predict", tmp_path / "n" / "best.ckpt", tmp_path / "t.csv", "--out", tmp_path / "m") == 0
    told = capsys.readouterr()
    assert "MAE per image" in told.out and "unknown" not in told.err  # the column label is none of numbers
    assert (
        run("eval", tmp_path / "m" / "exams.csv", "--split", "all", "--resamples", "20", "--out", tmp_path / "f") == 0
    )
    assert "exam level, age: MAE" in capsys.readouterr().out
    image = table[0]["image_path"]
    predicted = ["predict", tmp_path / "n" / "best.ckpt", image, "--heatmaps", "--out", tmp_path / "q"]
    assert run(*predicted) == 0
    (found,) = rows(tmp_path / "q" / "predictions.csv")
    assert 20 < float(found["value_age"]) < 80 and "p_age" not in found
    assert len(list((tmp_path / "q" / "heatmaps").iterdir())) == 1
    trained = load(tmp_path / "n" / "best.ckpt")
    assert float(trained.predict(image)[0, 0]) == pytest.approx(float(found["value_age"]), rel=1e-6)
    card = (tmp_path / "n" / "model_card.md").read_text()
    assert "- test, image level, age: MAE " in card and "AUC" not in card


def test_own_callbacks_see_the_training(phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "looking.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Look(Callback):\n"
        "    def on_train_end(self, trainer, module):\n"
        "        open('seen', 'w').write(str(trainer.global_step))\n"
    )
    assert run("train", phantoms, *FAST, "--callback", "looking:Look", "--out", "run") == 0
    assert (tmp_path / "seen").read_text() == "1"


def test_ctrl_c_before_the_first_checkpoint_is_one_line(phantoms, tmp_path, monkeypatch, capsys):
    ends = iter([signal.SIGINT, signal.SIGTERM])  # the second is a scheduler's

    def press(*_, **__):
        os.kill(os.getpid(), next(ends))
        time.sleep(30)

    # A shell that runs tests in the background has switched Ctrl-C off for all that they start.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for place in ("fit.run_stages", "inputs.training_data"):
            with monkeypatch.context() as patched:
                patched.setattr(f"gigamorph.engine.train.{place}", press)
                assert run("train", phantoms, *FAST, "--quiet", "--out", tmp_path / "run") == 130
            told = "stopped before the first checkpoint; the same command starts again\n"
            assert capsys.readouterr().err == told
    finally:
        signal.signal(signal.SIGINT, former)
    assert run("train", phantoms, *FAST, "--quiet", "--out", tmp_path / "run") == 0


def test_a_timer_stops_in_the_middle_of_an_epoch(phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clock.py").write_text(
        "from lightning.pytorch.callbacks import Timer\n"
        "class Clock(Timer):\n"
        "    batches = 0\n"
        "    def __init__(self):\n"
        "        super().__init__({'seconds': 3})\n"
        "    def on_train_batch_end(self, *args, **kwargs):\n"
        "        self.batches += 1\n"
        "        super().on_train_batch_end(*args, **kwargs)\n"
        "        print('batch', self.batches)\n"
        "    def time_elapsed(self, stage='train'):\n"
        "        return self.batches // 2\n"  # the sixth batch is the second one of four in the second epoch
    )
    command = ["train", phantoms, *FAST, "--accumulate", "1", "--epochs", "3", "--callback", "clock:Clock"]
    assert run(*command, "--out", "run") == 0
    told = capsys.readouterr().out
    assert "stopped by a callback after epoch 2 of 3" in told and told.count("batch ") == 6
    assert len(rows(tmp_path / "run" / "log.csv")) == 2


def test_lightnings_checkpoints_lie_in_the_run_and_predict(phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.py").write_text(
        "from lightning.pytorch.callbacks import ModelCheckpoint\n"
        "def every():\n"
        "    return ModelCheckpoint(monitor='val_loss', save_top_k=-1)\n"
    )
    assert run("train", phantoms, *FAST, "--epochs", "2", "--callback", "kept:every", "--out", "run") == 0
    found = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in found] == ["epoch=1-step=1.ckpt", "epoch=2-step=2.ckpt"]  # as in log.csv
    assert run("predict", found[0], phantoms, "--out", "predictions") == 0


def test_what_a_callback_knows_and_decides_outlives_the_run(phantoms, tmp_path, monkeypatch, capsys):
    """Resumed, it stops where it would have stopped; a run that it has stopped is finished."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "patient.py").write_text(
        "from lightning.pytorch.callbacks import EarlyStopping\n"
        "def patient():\n"
        "    return EarlyStopping('train_loss', min_delta=1e9, patience=2)\n"
    )
    command = ["train", phantoms, *FAST, "--callback", "patient:patient", "--out", "run"]
    assert run(*command, "--epochs", "2") == 0 and run(*command, "--epochs", "6", "--resume") == 0
    assert "train: stopped by a callback after epoch 3 of 6" in capsys.readouterr().out
    log = (tmp_path / "run" / "log.csv").read_text()
    assert log.count("\n") == 4  # the first epoch is the best, and two are waited for
    assert run(*command, "--epochs", "6", "--resume") == 0
    assert "train: nothing left to do, stopped by a callback after epoch 3 of 6" in capsys.readouterr().out
    assert (tmp_path / "run" / "log.csv").read_text() == log


def test_lightnings_own_callbacks_see_the_scores(phantoms, tmp_path, monkeypatch, capsys):
    """What stands in log.csv can be monitored; what cannot be used is one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stopping.py").write_text(
        "from lightning.pytorch.callbacks import EarlyStopping\n"
        "def early():\n"
        "    return EarlyStopping('train_loss', stopping_threshold=1e9, patience=9)\n"
    )
    callbacks = ["--callback", "stopping:early", "--callback", "lightning.pytorch.callbacks:LearningRateMonitor"]
    assert run("train", phantoms, *FAST, "--epochs", "3", *callbacks, "--log", "csv", "--out", "run") == 0
    assert len(rows("run/log.csv")) == 1
    assert run("train", phantoms, *FAST, *callbacks[2:], "--out", "other") == 2
    error = capsys.readouterr().err
    assert "no logger" in error and "--log csv" in error and error.count("\n") == 1


def test_every_key_is_said_what_it_is():
    assert TrainConfig().options().optimizer.name == "adamw"


def test_fine_tuning_from_files_and_from_timms_weights(phantoms, tmp_path, monkeypatch, capsys):
    import timm

    from gigamorph.engine.train.config import make_config

    said = []
    file = make_config({"init": "weights.pt", "model": "lesionnet"}, "options", said.append)
    assert (file.model, file.weights, file.init) == ("lesionnet", "weights.pt", None)
    config = make_config({"init": "timm:resnet18.a1_in1k"}, "options", said.append)
    assert config.model == config.weights == "timm:resnet18.a1_in1k" and config.data.channels == 1
    assert config.data.mean == pytest.approx((0.449,), abs=1e-3) and config.data.std == pytest.approx(
        (0.226,), abs=1e-3
    )
    assert run("train", phantoms, "--init", "timm:nothing_at_all", "--out", tmp_path / "no") == 2
    assert "timm has no pretrained weights for it" in capsys.readouterr().err
    # What timm would fetch, made here: the trained network begins as it, its colours summed.
    make = functools.partial(timm.create_model, layers=(1, 1, 1, 1))  # half of its blocks
    fetched = make("resnet18", num_classes=1000)
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **more: fetched if pretrained else make(name, **more)
    )
    given = ["--init", "timm:resnet18.a1_in1k", "--epochs", 1, "--batch-norm", "frozen", "--lr", "1e-12"]
    assert run("train", phantoms, *given, "--out", tmp_path / "run") == 0
    state = load_checkpoint(tmp_path / "run" / "last.ckpt")["state_dict"]
    summed = fetched.conv1.weight.sum(1, keepdim=True)
    assert torch.allclose(state["net.conv1.weight"], summed, atol=1e-6) and state["net.fc.weight"].shape == (2, 512)


def test_classes_in_their_order_go_through_all_commands(phantoms, tmp_path, capsys):
    """Densities a < b < c: probabilities that add up to 1, in every table."""
    found, table = rows(phantoms), phantoms.with_name("density.csv")
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows({**row, "label": "abc"[number % 3]} for number, row in enumerate(found))
    run_of, out = tmp_path / "run", tmp_path / "out"
    assert run("train", table, "--task", "ordinal", "--out", run_of, *FAST) == 0
    assert "classes in their order" in (run_of / "model_card.md").read_text()
    assert run("predict", run_of / "best.ckpt", table, "--out", out) == 0
    for name in ("predictions.csv", "breasts.csv", "exams.csv"):
        for row in rows(out / name):
            assert abs(sum(float(row[f"p_{one}"]) for one in "abc") - 1) < 1e-5, name
    assert run("eval", out / "predictions.csv", "--split", "all", "--out", tmp_path / "eval") == 0
    assert run("explain", run_of / "best.ckpt", table.parent / found[0]["image_path"], "--out", tmp_path / "maps") == 0
    assert list((tmp_path / "maps").glob("*.png"))


def test_breasts_are_told_where_they_are_not_the_images():
    """Where no side is known each image stands for itself, and there are no breasts to speak of."""
    found = {"images": 4, "auc_image": 0.5, "breasts": 4, "auc_breast": 0.5}
    assert scores_line(found) == "AUC per image 0.5000 (4 images)"
    assert scores_line(found | {"breasts": 2}) == "AUC per image 0.5000 (4 images), AUC per breast 0.5000 (2 breasts)"
