"""`gigamorph explain` from a checkpoint to maps, marks and their free-response ROC."""

import csv
import json

import highdicom
import numpy as np
import pytest
import tifffile
import torch
from commands import SMALL_TRAINING, run

from gigamorph import accelerate
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import Normalize
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.models import create_model


def files(folder):
    """What people look at."""
    return [path for path in folder.iterdir() if path.is_file() and path.name != "run.json"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("p"), patients=6, height=160, width=128, seed=1)


@pytest.fixture(scope="module")
def checkpoint(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("t") / "run"
    assert run("train", table, "--out", out, *SMALL_TRAINING) == 0
    return out / "best.ckpt"


def stock_gradient(checkpoint, path):
    """Of the log-odds of the second class, in the file's geometry."""
    net = create_model("lesionnet?stages=1", weights=checkpoint).eval()
    source = open_pixels(path, normalize=Normalize((0.3,), (0.1,)))
    _, height, width = source.shape
    x = source.read(0, height, 0, width)[None].requires_grad_()
    logits = net(x)[0]
    [gradient] = torch.autograd.grad(logits[1] - logits[0], x)
    found = gradient[0].abs().amax(0).numpy()
    return found[:, ::-1] if source.to_original.xx < 0 else found


def test_all_formats_are_the_same_map_on_the_pixels_of_the_file(table, checkpoint, tmp_path, capsys):
    images = sorted((table.parent / "images").iterdir())[:4]
    formats = [part for one in ("png", "tif", "seg", "binary-seg") for part in ("--format", one)]
    out = tmp_path / "out"
    assert run("explain", checkpoint, *images, "--out", out, "--method", "gradient", *formats) == 0
    assert "4 images explained, 0 skipped" in capsys.readouterr().out
    assert len(files(out)) == 17 and (out / "exams.csv").exists()  # of gradients no marks
    sides = set()
    for path in images:
        values = tifffile.imread(out / f"{path.stem}.map.tif")
        expected = stock_gradient(checkpoint, path)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5 * expected.max())
        seg = highdicom.seg.segread(out / f"{path.stem}.seg.dcm")
        assert seg.pixel_array.shape[-2:] == values.shape == (160, 128)
        assert np.unravel_index(seg.pixel_array.squeeze().argmax(), values.shape) == np.unravel_index(
            values.argmax(), values.shape
        )
        sides.add(path.stem.split("_")[1])
    assert sides == {"L", "R"}


def test_marks_lead_to_a_free_response_roc(table, checkpoint, tmp_path, capsys):
    assert run("predict", checkpoint, table, "--out", tmp_path / "p") == 0
    assert run("explain", checkpoint, table, "--out", tmp_path / "e") == 0
    assert sorted(path.suffix for path in files(tmp_path / "e")) == [".csv", ".csv", *[".png"] * 12]
    with (tmp_path / "e" / "marks.csv").open() as file:
        marks = list(csv.DictReader(file))
    assert marks and {mark["class"] for mark in marks} == {"1"}
    assert all(0 <= float(m["row"]) < 160 and 0 <= float(m["column"]) < 128 for m in marks)
    path = sorted((table.parent / "images").iterdir())[0]
    net = accelerate(create_model("lesionnet?stages=1", weights=checkpoint), tile=64).eval()
    image = open_pixels(path, normalize=Normalize((0.3,), (0.1,)))
    evidence = net.evidence(image, output=1) - net.evidence(image, output=0)
    own = [float(mark["score"]) for mark in marks if mark["image_path"] == str(path)]
    assert own == sorted(own, reverse=True) and own[0] == pytest.approx(evidence.max().item(), rel=1e-4)
    capsys.readouterr()
    options = ["--table", table, "--split", "train,val,test", "--level", "image", "--resamples", "50"]
    marked = ["--marks", tmp_path / "e" / "marks.csv", "--out", tmp_path / "v"]
    assert run("eval", tmp_path / "p" / "predictions.csv", *options, *marked) == 0
    froc = json.loads((tmp_path / "v" / "metrics.json").read_text())["froc"]
    assert froc["images"] == 12 and froc["marks"] == len(marks) and froc["lesions"] > 0


def test_predict_and_explain_draw_the_same_and_predict_says_the_same_with_heat_maps(table, checkpoint, tmp_path):
    images = sorted((table.parent / "images").iterdir())[:3]
    assert run("predict", checkpoint, *images, "--heatmaps", "--out", tmp_path / "p") == 0
    assert run("predict", checkpoint, *images, "--out", tmp_path / "plain") == 0
    assert run("explain", checkpoint, *images, "--out", tmp_path / "e") == 0
    for name in ("predictions.csv", "breasts.csv"):
        assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    for path in images:
        drawn = (tmp_path / "p" / "heatmaps" / f"{path.stem}.png").read_bytes()
        assert drawn == (tmp_path / "e" / f"{path.stem}.png").read_bytes()


def test_bad_input_is_one_line(table, checkpoint, tmp_path, capsys):
    path = sorted((table.parent / "images").iterdir())[0]
    np.save(tmp_path / "a.npy", np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64))
    cases = [
        ([path, "--class", "cancer"], "unknown class 'cancer'; it has 0, 1"),
        ([tmp_path / "a.npy", "--format", "seg"], "is not a DICOM file"),
        ([tmp_path / "none.dcm"], "no such file"),
    ]
    for arguments, message in cases:
        assert run("explain", checkpoint, *arguments, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
        assert not (tmp_path / "out").exists()  # nothing was done, and nothing is left of it
    both = [tmp_path / "a.npy", path, "--format", "seg", "--skip-bad", "--out", tmp_path / "skip"]
    assert run("explain", checkpoint, *both) == 0
    assert "1 image explained, 1 skipped" in capsys.readouterr().out
    assert run("explain", checkpoint, path, "--out", tmp_path / "skip") == 2
    assert "already holds explanations" in capsys.readouterr().err


def test_explanations_go_on_where_they_were_and_are_shared_out(table, checkpoint, tmp_path, capsys):
    """As predictions do: a damaged image, another run, a second shard, both rows of an image that stands twice."""
    images = sorted((table.parent / "images").iterdir())[:4]
    bad = tmp_path / "bad.dcm"
    bad.write_bytes(images[0].read_bytes()[:3000])
    listed = tmp_path / "t.csv"
    listed.write_text("image_path\n" + "".join(f"{path}\n" for path in [*images[:3], bad, images[0]]))
    command = ["explain", checkpoint, "--workers", "0", "--out"]
    assert run(*command, tmp_path / "whole", *images[:3], images[0]) == 0
    out = tmp_path / "out"
    assert run(*command, out, listed) == 2
    assert "bad.dcm" in capsys.readouterr().err
    assert not (out / "bad.png").exists() and len(list(out.glob("*.png"))) == 3
    drawn = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert run(*command, out, listed, "--skip-bad") == 2
    assert "already holds explanations; continue with --resume" in capsys.readouterr().err
    assert run(*command, out, listed, "--skip-bad", "--resume", "--method", "gradient") == 2
    assert "was started with --method activation; continue with it" in capsys.readouterr().err
    assert run("predict", checkpoint, listed, "--resume", "--out", out) == 2
    assert "belongs to gigamorph explain" in capsys.readouterr().err
    assert run(*command, out, listed, "--skip-bad", "--resume") == 0
    assert "3 images explained, 1 skipped" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.png")} == drawn
    assert (out / "marks.csv").read_bytes() == (tmp_path / "whole" / "marks.csv").read_bytes()
    assert "bad.dcm" in (out / "quarantine.csv").read_text()
    for number in (1, 2):
        assert run(*command, tmp_path / "shards", *images[:3], images[0], "--shard", f"{number}/2", "--json") == 0
    end = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert end["event"] == "end" and end["complete"]
    assert (tmp_path / "shards" / "marks.csv").read_bytes() == (out / "marks.csv").read_bytes()


def test_an_image_without_an_exam_makes_no_further_exam(table, checkpoint, tmp_path, caplog):
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        row |= {"image_path": str(table.parent / row["image_path"]), "exam_id": "" if number == 2 else "e"}
        row |= {"patient_id": f"p{number // 6}"}
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for command in ("predict", "explain"):
        caplog.clear()
        assert run(command, checkpoint, tmp_path / "t.csv", "--out", tmp_path / command) == 0
        assert "1 image without an exam" in caplog.text
    found = []
    for command in ("predict", "explain"):
        with (tmp_path / command / "exams.csv").open(newline="") as file:
            found.append([row for row in csv.DictReader(file) if row["exam_id"]])
    assert [float(row["log_odds_1"]) for row in found[0]] == [float(row["log_odds"]) for row in found[1]]
    assert [row["patient_id"] for row in found[1]] == ["p0", "p1"]
