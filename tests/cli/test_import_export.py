"""A folder of `gigamorph import` wherever a model is taken: predict, explain, train, morph, plan, bench, export."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from commands import rows, run
from forked import command as forked
from PIL import Image
from torch import nn

from gigamorph import create_model, load
from gigamorph.cli.import_ import _listed
from gigamorph.engine.bench.results import BenchTask
from gigamorph.engine.bench.work import build
from gigamorph.engine.explain.write import METHODS
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import Normalize
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.models.registry import load_weights
from gigamorph.engine.published.export import open_source
from gigamorph.engine.published.importing import Wishes, import_ensemble, import_network
from gigamorph.engine.train.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("undrawn", "untiled_imports")
NET = "lesionnet?stages=1"
GREY = {"mean": (0.3,), "std": (0.1,)}


def make(folder, outputs, seed=0, net=NET, **wishes):
    torch.manual_seed(seed)
    network = create_model(net, outputs, 1)
    nn.init.normal_(network.fc.weight, std=0.5)
    path = folder.with_suffix(".pt")
    torch.save({"state_dict": network.state_dict()}, path)
    import_network(net, folder, Wishes(str(path), size=(72, 64), preprocessing=GREY, **wishes), str)
    return network.eval()


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), patients=6, height=128, width=96, seed=1)


def seen(path, **options):
    source = open_pixels(path, normalize=Normalize((0.3,), (0.1,)), **options)
    return source.read(0, source.shape[1], 0, source.shape[2])[None]


def test_predict_and_explain_labels_of_their_own(tmp_path, phantoms, capsys):
    """Sigmoids, not a softmax: each probability, each breast's mean and each exam's highest is a label's."""
    network = make(tmp_path / "net", 2, activation="sigmoid", classes=("mass", "calcification"))
    images = sorted((phantoms.parent / "images").iterdir())[:4]
    assert run("predict", tmp_path / "net", *images, "--heatmaps", "--out", tmp_path / "out") == 0
    found = rows(tmp_path / "out" / "predictions.csv")
    for row, path in zip(found, images, strict=True):
        with torch.no_grad():
            wanted = network(seen(path))[0].sigmoid()
        assert float(row["p_mass"]) == pytest.approx(float(wanted[0]), abs=1e-5)
        assert float(row["p_calcification"]) == pytest.approx(float(wanted[1]), abs=1e-5)
    breasts, exams = rows(tmp_path / "out" / "breasts.csv"), rows(tmp_path / "out" / "exams.csv")
    for name in ("p_mass", "p_calcification"):
        for breast in breasts:
            views = [float(r[name]) for r in found if r["patient_id"] == breast["patient_id"]
                     and r["laterality"] == breast["laterality"]]  # fmt: skip
            assert float(breast[name]) == pytest.approx(np.mean(views), abs=1e-5)
        for exam in exams:
            highest = max(float(b[name]) for b in breasts if b["patient_id"] == exam["patient_id"])
            assert float(exam[name]) == pytest.approx(highest, abs=1e-5)
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["checkpoint"] == "net"
    assert run("explain", tmp_path / "net", images[0], "--class", "mass", "--out", tmp_path / "maps") == 0
    assert (tmp_path / "maps" / f"{images[0].stem}.png").exists()
    assert {row["class"] for row in rows(tmp_path / "maps" / "marks.csv")} <= {"mass"}
    gradient = ("--method", "gradient", "--format", "tif")
    assert run("explain", tmp_path / "net", images[0], *gradient, "--out", tmp_path / "gradient") == 0
    capsys.readouterr()


def test_an_ensemble_with_mirror_images_is_the_mean_of_probabilities(tmp_path, phantoms, capsys):
    networks = [make(tmp_path / name, 2, seed) for seed, name in enumerate("ab")]
    import_ensemble([tmp_path / "a", tmp_path / "b"], tmp_path / "both", [(True, False)])
    path = sorted((phantoms.parent / "images").iterdir())[0]
    assert run("predict", tmp_path / "both", path, "--out", tmp_path / "out") == 0
    (row,) = rows(tmp_path / "out" / "predictions.csv")
    image = seen(path)
    with torch.no_grad():
        each = [net(x).softmax(1)[0, 1] for net in networks for x in (image, image.flip(3))]
    assert float(row["p_1"]) == pytest.approx(float(sum(each) / 4), abs=1e-5)
    for method in ("activation", "gradient"):
        assert run("explain", tmp_path / "both", path, "--method", method, "--out", tmp_path / method) == 0
        assert (tmp_path / method / f"{path.stem}.png").exists()
    assert run("predict", tmp_path / "both", path, "--heatmaps", "--out", tmp_path / "maps") == 0
    assert [one.name for one in (tmp_path / "maps" / "heatmaps").iterdir()] == [f"{path.stem}.png"]


def test_fine_tuning_starts_there_and_freezes_and_has_rates_of_its_own(tmp_path, phantoms, capsys):
    deeper = "lesionnet?stages=2"
    network = make(tmp_path / "net", 2, net=deeper)
    command = ["train", phantoms, "--init", tmp_path / "net", "--epochs", 1, "--accumulate", 4, "--seed", 3]
    options = ["--freeze", "stem", "--freeze", "stages.0.0", "--lr", 1e-5, "--lr-of", "fc=1e-2"]
    assert run(*command, *options, "--out", tmp_path / "run") == 0
    stored = load_checkpoint(tmp_path / "run" / "last.ckpt")
    record, before = stored["gigamorph"], network.state_dict()
    assert record["options"]["model"] == deeper and record["preprocessing"]["normalize"]["mean"] == [0.3]
    moved = {n.removeprefix("net."): float((v - before[n.removeprefix("net.")]).abs().max())
             for n, v in stored["state_dict"].items()}  # fmt: skip
    assert all(moved[name] == 0 for name in moved if name.startswith(("stem.", "stages.0.0.")))
    assert 1e-3 < moved["fc.weight"] < 0.1 and 0 < moved["stages.0.2.conv2.weight"] < 1e-3
    shutil.rmtree(tmp_path / "net")  # a checkpoint is whole without it
    image, checkpoint = sorted((phantoms.parent / "images").iterdir())[0], tmp_path / "run" / "best.ckpt"
    assert run("predict", checkpoint, image, "--out", tmp_path / "out") == 0
    # And becomes a folder again, as for an ensemble of folds.
    assert run("import", checkpoint, "--size", "72x64", "--out", tmp_path / "again") == 0
    assert run("predict", tmp_path / "again", image, "--out", tmp_path / "same") == 0
    one, other = (rows(tmp_path / name / "predictions.csv")[0] for name in ("out", "same"))
    assert float(one["log_odds_1"]) == pytest.approx(float(other["log_odds_1"]), abs=1e-5)
    exported = open_source(checkpoint)
    assert exported.description.preprocessing.mean == (0.3,) and exported.description.outputs.names == ["0", "1"]
    with torch.no_grad():
        logits = exported.network(seen(image))[0]
    assert float(one["log_odds_1"]) == pytest.approx(float(logits[1] - logits[0]), abs=1e-5)
    capsys.readouterr()


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_flips_average_over_mirror_images_and_belong_to_the_run(tmp_path, phantoms, capsys, kind):
    """The same of a checkpoint and of a folder, in every command and in Python, as an import with the same flips."""
    paths = [str(path) for path in sorted((phantoms.parent / "images").iterdir())[:2]]
    if kind == "folder":
        make(tmp_path / "net", 2)
        model = tmp_path / "net"
    else:
        command = ["train", phantoms, "--model", NET, "--epochs", 1, "--accumulate", 4]
        assert run(*command, "--out", tmp_path / "run") == 0
        model = tmp_path / "run" / "best.ckpt"
    plain = load(model)
    sources = [plain.open(path) for path in paths]
    images = [source.read(0, source.shape[1], 0, source.shape[2])[None] for source in sources]
    with torch.no_grad():
        each = [torch.cat([plain.net(x), plain.net(x.flip(3)), plain.net(x.flip(2))]) for x in images]
    wanted = torch.stack([logits.double().softmax(1).mean(0) for logits in each])
    flips = ["--flip", "up-down", "--flip", "left-right"]
    out = tmp_path / "out"
    assert run("predict", model, *paths, *flips, "--out", out) == 0
    found = [[float(row[f"p_{name}"]) for name in plain.classes] for row in rows(out / "predictions.csv")]
    torch.testing.assert_close(torch.tensor(found).double(), wanted, atol=1e-6, rtol=0)
    assert (wanted - torch.stack([logits[0].double().softmax(0) for logits in each])).abs().max() > 1e-5
    averaged = load(model, flips=["left-right", "up-down"])
    torch.testing.assert_close(averaged.predict(paths), wanted, atol=1e-6, rtol=0)
    # The run's own record, and who goes by it.
    assert json.loads((out / "predictions.json").read_text())["flip"] == ["left-right", "up-down"]
    assert json.loads((out / "run.json").read_text())["flip"] == ["left-right", "up-down"]
    assert run("predict", model, *paths, *flips, "--out", out, "--resume") == 0
    capsys.readouterr()
    assert run("predict", model, *paths, "--flip", "both", "--out", out, "--resume") == 2
    assert "was started with --flip left-right --flip up-down; continue with it" in capsys.readouterr().err
    # A map of what is predicted.
    for method in ("activation", "gradient"):
        where = tmp_path / method
        assert run("explain", model, paths[0], *flips, "--method", method, "--format", "tif", "--out", where) == 0
        one, _, _ = METHODS[method](averaged.net, averaged.open(paths[0]), None)
        height, width = one.size
        np.testing.assert_allclose(tifffile.imread(next(where.glob("*.map.tif"))), one.read(0, height, 0, width))
    capsys.readouterr()
    assert run("explain", model, paths[0], "--format", "tif", "--out", where, "--resume", "--method", "gradient") == 2
    assert "was started with --flip left-right --flip up-down; continue with it" in capsys.readouterr().err


def test_overwrite_takes_away_what_a_run_of_the_command_wrote_and_nothing_else(tmp_path, phantoms, capsys):
    images = sorted((phantoms.parent / "images").iterdir())[:2]
    first, second = make(tmp_path / "a", 2) and tmp_path / "a", make(tmp_path / "b", 2, 1) and tmp_path / "b"
    for command, options in (("predict", ["--heatmaps"]), ("explain", ["--format", "png", "--format", "tif"])):
        out = tmp_path / command
        assert run(command, first, *images, *options, "--out", out) == 0
        (out / "notes.txt").write_text("mine")
        capsys.readouterr()
        for given in ([first], [second]):
            assert run(command, *given, images[0], "--out", out) == 2
            error = capsys.readouterr().err
            assert error.endswith("name another --out, or give --overwrite\n") and error.count("\n") == 1
        other = "explain" if command == "predict" else "predict"
        assert run(other, second, images[0], "--out", out, "--overwrite") == 2
        assert f"belongs to gigamorph {command}; name another --out" in capsys.readouterr().err
        assert run(command, second, images[0], "--out", out, "--overwrite", "--resume") == 2
        assert run(command, second, images[0], "--out", out, "--overwrite") == 0
        assert run(command, second, images[0], "--out", tmp_path / f"{command}-new") == 0
        left, new = (
            {p.relative_to(root) for root in [at] for p in root.rglob("*")} for at in (out, tmp_path / f"{command}-new")
        )
        assert left == new | {Path("notes.txt")}
    assert len(rows(tmp_path / "predict" / "predictions.csv")) == 1
    capsys.readouterr()


def test_an_ensemble_of_folds_knows_what_its_networks_have_learnt_from(tmp_path, phantoms, capsys):
    """Each image that is not of the test split was one of training in one of two folds, whatever the table says."""
    command = ["train", phantoms, "--model", NET, "--epochs", 1, "--accumulate", 4, "--folds", 2]
    assert run(*command, "--mean", "auto", "--std", "auto", "--out", tmp_path / "folds") == 0
    capsys.readouterr()
    for n in (1, 2):
        checkpoint = tmp_path / "folds" / f"fold{n}" / "best.ckpt"
        assert run("import", checkpoint, "--size", "72x64", "--out", tmp_path / f"{n}") == 0
    assert run("import", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "both") == 0
    given = [row["split"] for row in rows(phantoms)]
    given_images = [phantoms.parent / row["image_path"] for row in rows(phantoms)]
    assert set(given) == {"train", "val", "test"}
    splits = {}
    found = {}
    for name in ("1", "both", "folds"):
        capsys.readouterr()
        assert run("predict", tmp_path / name, phantoms, "--out", tmp_path / f"out{name}") == 0
        found[name] = rows(tmp_path / f"out{name}" / "predictions.csv")
        splits[name] = [row["split"] for row in found[name]]
    assert splits["both"] == splits["folds"] == ["test" if split == "test" else "train" for split in given]
    # The folder of the folds is that ensemble, without any import.
    assert "folds: the mean of 2 networks, each with its own mean and std" in capsys.readouterr().out
    for own, other in zip(found["folds"], found["both"], strict=True):
        assert float(own["log_odds_1"]) == pytest.approx(float(other["log_odds_1"]), rel=1e-12)
    image = given_images[0]
    log_odds = torch.tensor(float(found["folds"][0]["log_odds_1"]), dtype=torch.float64)
    opened = load(tmp_path / "folds", device="cpu")
    assert opened.predict(image)[0, 1].item() == pytest.approx(torch.sigmoid(log_odds).item(), rel=1e-12)
    for name in ("both", "folds"):
        assert run("explain", tmp_path / name, image, "--out", tmp_path / f"map{name}", "--format", "tif") == 0
    assert rows(tmp_path / "mapfolds" / "marks.csv") == rows(tmp_path / "mapboth" / "marks.csv")
    assert run("export", tmp_path / "folds", "--to", "onnx", "--out", tmp_path / "net.onnx") == 2
    assert "contains the runs of a cross-validation" in capsys.readouterr().err
    one = tmp_path / "folds" / "fold1"
    assert run("predict", one, image, "--out", tmp_path / "none") == 2
    assert f"is the folder of a run; use its checkpoint, {one / 'best.ckpt'}" in capsys.readouterr().err
    assert run("train", phantoms, "--folds", 2, "--out", one) == 2
    assert "holds a run without folds, or one fold; name another folder" in capsys.readouterr().err
    (tmp_path / "folds" / "fold2" / "metrics.json").unlink()
    assert run("predict", tmp_path / "folds", image, "--out", tmp_path / "none") == 2
    assert "fold 2 of 2 is not finished" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert [split == "test" for split in splits["1"]] == [split == "test" for split in given]
    assert {"train", "val"} < set(splits["1"])


def test_a_network_grown_from_a_folder_learns_on_the_folders_images(tmp_path, phantoms, monkeypatch, capsys):
    """The grown weights are a file beside a recipe: channels, mean, std and what builds the parent are the folder's."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "net", 2)
    grown = ["--factor", 1.5, "--size", "64x64", "--out", "wide.safetensors"]
    assert run("morph", "widen", "--model", "net", *grown) == 0
    short = ["--epochs", 1, "--accumulate", 4, "--lr", 1e-12, "--out", "run"]
    assert run("train", phantoms, "--model", "net", "--init", "wide.safetensors", *short) == 0
    record = load_checkpoint(Path("run") / "last.ckpt")["gigamorph"]
    assert record["options"]["model"] == NET and record["preprocessing"]["normalize"]["mean"] == [0.3]
    shutil.rmtree("net")
    image = sorted((phantoms.parent / "images").iterdir())[0]
    assert run("predict", Path("run") / "best.ckpt", image, "--out", "out") == 0
    capsys.readouterr()


@pytest.mark.usefixtures("forked_peers")
def test_a_step_of_a_folder_is_measured(tmp_path, capsys):
    make(tmp_path / "net", 2)
    short = ["--size", "96x80", "--peer", "gigamorph", "--rounds", 1, "--box", 1]
    assert run("bench", "step", "--model", tmp_path / "net", *short, "--json", tmp_path / "step.json") == 0
    steps = json.loads((tmp_path / "step.json").read_text())["steps"]
    assert {(row["peer"], row["status"]) for row in steps} == {("gigamorph", "ok")}
    capsys.readouterr()


def test_init_and_freeze_refuse_what_cannot_be(tmp_path, phantoms, capsys):
    make(tmp_path / "net", 2)
    cases = {
        "--init determines the model; omit --model": ["--init", tmp_path / "net", "--model", "resnet18"],
        "has its own weights; omit them": ["--init", tmp_path / "net", "--weights", "w.pt"],
        "has no model.json": ["--init", tmp_path],
        "'layer9' matches no parameter of the network": ["--init", tmp_path / "net", "--freeze", "layer9"],
        "all parameters are frozen": ["--init", tmp_path / "net", "--freeze", "*"],
        "write PATTERN=RATE": ["--init", tmp_path / "net", "--lr-of", "fc"],
    }
    for message, options in cases.items():
        assert run("train", phantoms, *options, "--epochs", 1, "--out", tmp_path / "run") == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split()), message
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_one_sigmoid_begins_as_two_classes_with_the_same_probabilities(tmp_path):
    network = make(tmp_path / "net", 1)
    started = create_model(NET, 2, 1).eval()
    assert load_weights(started, tmp_path / "net") == []
    image = torch.randn(2, 1, 70, 60)
    with torch.no_grad():
        torch.testing.assert_close(started(image).softmax(1)[:, 1], network(image)[:, 0].sigmoid())


def test_plan_bench_and_morph_take_it_as_a_model(tmp_path, named_rates, capsys):
    make(tmp_path / "net", 3)
    net = str(tmp_path / "net")
    assert run("plan", "--model", net, "--size", "256x256", "--memory-budget", "64MiB", "--device", "cpu") == 0
    assert "1 x 1 x 256 x 256" in capsys.readouterr().out
    task = BenchTask(net, (1, 1, 64, 64), False, "live", "fp32", "cpu")
    assert torch.equal(build(task).fc.weight, create_model(net).fc.weight)
    wider = tmp_path / "wider.safetensors"
    assert run("morph", "widen", "--model", net, "--factor", 1.5, "--out", wider) == 0
    assert run("morph", "verify", net + "/model.safetensors", wider, "--model", net) == 0
    assert "equal" in capsys.readouterr().out


def test_an_image_that_is_too_small_is_named_and_can_be_skipped(tmp_path, capsys, monkeypatch):
    (tmp_path / "small_nets.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels=1):\n"
        "    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 4, 33, 8), nn.ReLU(), pool, nn.Linear(4, num_classes))\n"
        "def tiles(num_classes, in_channels=1):\n"
        "    from gigamorph import tilewise\n"
        "    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    return nn.Sequential(tilewise(net(4, in_channels), 40), pool, nn.Linear(4, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.save(create_model("small_nets:net").state_dict(), tmp_path / "w.pt")
    assert run("import", "small_nets:net", "--weights", "w.pt", "--size", "80x72", "--out", "net") == 0
    for name, size in (("small", (20, 50)), ("large", (60, 50))):
        Image.fromarray(np.full(size, 100, np.uint8)).save(tmp_path / f"{name}.png")
    assert run("predict", "net", "small.png", "--out", "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: small.png: model 'net' cannot take an image of 1 x 20 x 50")
    assert run("predict", "net", "small.png", "large.png", "--skip-bad", "--out", "other") == 0
    assert [row["image_path"] for row in rows(tmp_path / "other" / "predictions.csv")] == ["large.png"]
    torch.save(create_model("small_nets:tiles").state_dict(), tmp_path / "w.pt")
    assert run("import", "small_nets:tiles", "--weights", "w.pt", "--size", "80x72", "--out", "tiles") == 0
    assert run("predict", "tiles", "small.png", "large.png", "--skip-bad", "--out", "more") == 0
    assert [row["image_path"] for row in rows(tmp_path / "more" / "predictions.csv")] == ["large.png"]
    (skipped,) = rows(tmp_path / "more" / "quarantine.csv")
    assert skipped["reason"].startswith("small.png: an image of 20 x 50 pixels is smaller than one tile of 40 x 40")


def test_import_tells_what_it_wrote_and_export_what_it_checked(tmp_path, capsys):
    torch.save(create_model("resnet18?width=4", 2, 1).state_dict(), tmp_path / "w.pt")
    command = ["import", "resnet18?width=4", "--weights", tmp_path / "w.pt", "--classes", "no,yes", "--mean", "0.5"]
    assert run(*command, "--size", "96x64", "--out", tmp_path / "net") == 0
    said = capsys.readouterr().out
    assert "outputs: no, yes" in said and "1 channel, every pixel, mean [0.5]" in said
    assert "licence not stated" in said
    assert _listed([str(i) for i in range(1000)]) == "0, 1, 2, ..., 999 (1000 in total)"
    assert run("export", tmp_path / "net", "--to", "huggingface", "--out", tmp_path / "hub") == 2
    assert "is not one of timm's; export it with --to onnx" in capsys.readouterr().err
    assert run("export", tmp_path / "net", "--to", "huggingface", "--size", "64x64", "--out", tmp_path / "hub") == 2
    assert run("import", tmp_path / "net", tmp_path / "w.pt", "--out", tmp_path / "both") == 2
    assert "w.pt: ensembles and --flip need folders of gigamorph import; make one first" in capsys.readouterr().err


def test_the_views_of_an_exam_are_explained_together(tmp_path, phantoms, capsys):
    """The exam's log-odds are those that predict combines; the place adds what its view's slope makes of its mark."""
    make(tmp_path / "net", 2)
    table = list(csv.DictReader(phantoms.open()))
    patient = table[0]["patient_id"]
    path = phantoms.parent / "exam.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(row for row in table if row["patient_id"] == patient)
    assert run("predict", tmp_path / "net", path, "--out", tmp_path / "out") == 0
    assert run("explain", tmp_path / "net", path, "--out", tmp_path / "maps") == 0
    (exam,), (wanted,) = rows(tmp_path / "maps" / "exams.csv"), rows(tmp_path / "out" / "exams.csv")
    name = exam["class"]
    assert exam["patient_id"] == patient and f"log_odds_{name}" in wanted
    assert float(exam["log_odds"]) == pytest.approx(float(wanted[f"log_odds_{name}"]), abs=1e-9)
    images = {row["image_path"]: row for row in rows(tmp_path / "out" / "predictions.csv")}
    views = [row for row in images.values() if row["laterality"] == exam["laterality"]]
    assert len(views) == int(exam["views"]) == 2 and exam["image_path"] in {row["image_path"] for row in views}
    p = np.array([float(row[f"p_{name}"]) for row in views])
    own = float(images[exam["image_path"]][f"p_{name}"])
    marks = [row for row in rows(tmp_path / "maps" / "marks.csv") if row["image_path"].endswith(exam["image_path"])]
    slope = own * (1 - own) / (len(p) * p.mean() * (1 - p.mean()))
    assert float(exam["adds"]) == pytest.approx(float(marks[0]["score"]) * slope, rel=1e-4)
    assert (exam["row"], exam["column"]) == (marks[0]["row"], marks[0]["column"])
    capsys.readouterr()


def test_full_disk_leaves_nothing_of_an_import_or_export(tmp_path):
    torch.save(create_model("lesionnet", 2, 1).state_dict(), tmp_path / "w.pt")
    torch.save(create_model("timm:test_resnet", 2, 1).state_dict(), tmp_path / "r.pt")
    import_network("timm:test_resnet", tmp_path / "net", Wishes(str(tmp_path / "r.pt"), size=(72, 64)), str)
    import_network("lesionnet", tmp_path / "small", Wishes(str(tmp_path / "w.pt"), size=(72, 64)), str)
    for number, command in enumerate(
        (
            ["import", "lesionnet", "--weights", tmp_path / "w.pt", "--size", "72x64"],
            ["export", tmp_path / "net", "--to", "huggingface"],
            ["export", tmp_path / "small", "--to", "onnx"],
        )
    ):
        before = set(tmp_path.iterdir())
        done = forked(*command, "--out", tmp_path / f"out{number}", limit=20_000)
        assert done.wait() == 2, done.error
        assert "cannot be written: File too large; raise the limit" in done.error and done.error.count("\n") == 1
        assert set(tmp_path.iterdir()) == before
