"""Exams of several views as one sample: gradients beside ordinary PyTorch, and a run from table to tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from commands import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gigamorph import accelerate, load
from gigamorph.engine.datasets.dataset import ExamDataset
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.datasets.views import MirroredSource
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.evaluate.read import read_cases
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.models.outputs import VIEWS, Views
from gigamorph.engine.train.classify import logits_of_items
from gigamorph.engine.train.target import Target


class Pixels:
    """An image in memory as a pixel source."""

    def __init__(self, image: torch.Tensor) -> None:
        self.image, self.shape, self.name = image, tuple(image.shape), "noise"

    def read(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        return self.image[:, top:bottom, left:right]


class Images:
    def __init__(self, sizes: list[tuple[int, int]], exams: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pixels = [torch.randn(1, *size, generator=generator) for size in sizes]
        self.records = [Record(Path(f"{i}.png"), exam % 3, f"p{exam}") for i, exam in enumerate(exams)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Pixels(self.pixels[index]), "record": self.records[index]}


def network(columns: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, 1, 1),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, columns),
    ).double()


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.tuples(st.integers(17, 40), st.integers(17, 40)), min_size=2, max_size=5),
    st.sampled_from(VIEWS),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_the_gradient_of_an_exam_is_that_of_ordinary_pytorch(
    sizes: list[tuple[int, int]], views: Views, live: bool, seed: int
) -> None:
    sizes = sizes[:1] * len(sizes) if live else sizes  # stock's statistics of several sizes are not those of a batch
    exams = ExamDataset(Images(sizes, [0] + [1] * (len(sizes) - 1), seed))  # type: ignore[arg-type]
    target = Target(("a", "b", "c"), views=views)
    stock, ours = network(target.width), network(target.width)
    stock.train(live)
    ours.train(live)
    net, outputs = accelerate(ours, tile=16), target.outputs
    assert outputs is not None
    found = F.cross_entropy(logits_of_items(net, [exams[0], exams[1]], outputs), torch.tensor([0, 1]))
    found.backward()
    images = [image.double() for image in exams._images.pixels]  # type: ignore[attr-defined]
    given = stock(torch.stack(images)) if live else torch.cat([stock(image[None]) for image in images])
    together = torch.cat([outputs.together(given[:1]), outputs.together(given[1:])])
    expected = F.cross_entropy(together, torch.tensor([0, 1]))
    expected.backward()
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    for (name, own), other in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None, name
        assert float((own.grad - other.grad).abs().max()) <= 1e-12 * max(float(own.grad.abs().max()), 1e-3), name


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of two images a patient, which are an exam; a label is of one of them alone."""
    table = write_phantoms(tmp_path_factory.mktemp("phantoms"), patients=8, height=128, width=96, seed=1)
    found = rows(table)
    positive: set[str] = set()
    for row in found:  # one view of an exam at most shows it
        if row["label"] == "1" and row["patient_id"] in positive:
            row["label"] = "0"
        positive |= {row["patient_id"]} if row["label"] == "1" else set()
        row["exam_id"] = "e1"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    return table


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations draw no pictures, which tests/engine/evaluate looks at."""
    monkeypatch.setattr("gigamorph.engine.evaluate.report.png", lambda figure: b"\x89PNG")


FAST = ["--model", "lesionnet?stages=2", "--mean", "0.3", "--std", "0.1", "--epochs", "1", "--accumulate", "2"]


@pytest.mark.parametrize("views", ["attention", "max"])
def test_a_run_from_table_to_tables(
    views: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, checkpoint = tmp_path / "run", tmp_path / "run" / "best.ckpt"
    assert commands.run("train", table, "--views", views, "--out", out, *FAST) == 0
    told = capsys.readouterr().out
    assert f"exams ({views} of their views)" in told and "per exam" in told and "per image" not in told
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["val"]) == {"exams", "auc_exam"} and "views = " in (out / "config.toml").read_text()

    assert commands.run("predict", checkpoint, table, "--out", tmp_path / "p") == 0
    assert "per exam" in capsys.readouterr().out
    exams = read_cases(tmp_path / "p" / "exams.csv", split="train,val,test")
    assert exams.level == "exam" and len(exams) == 8
    trained, paths = load(checkpoint), rows(table)
    own = {row["patient_id"]: [table.parent / r["image_path"] for r in paths if r["patient_id"] == row["patient_id"]]
           for row in paths}  # fmt: skip
    for patient, z in zip(exams.patients, exams.scores[:, 0], strict=True):
        together = trained.predict_exam(own[patient])
        assert float(torch.logit(together)[1]) == pytest.approx(float(z), rel=1e-5, abs=1e-6)
    assert trained.predict(own[exams.patients[0]]).shape == (2, 2)
    alone = own[exams.patients[0]][0]
    assert trained.predict_exam(alone).equal(trained.predict_exam([alone]))
    with pytest.raises(GigamorphError, match="at least one view"):
        trained.predict_exam([])
    logits = torch.cat([trained.net(trained.open(path)) for path in own[exams.patients[0]]]).double().detach()
    if views == "attention":
        shares = torch.softmax(logits[:, 2], 0)
        by_hand = float((shares * (logits[:, 1] - logits[:, 0])).sum())
    else:
        by_hand = float((logits[:, 1] - logits[:, 0]).max())
    assert by_hand == pytest.approx(float(exams.scores[0, 0]), rel=1e-5, abs=1e-6)

    # The folder's samples are its exams, with the columns that all their images share.
    lines = table.read_text().splitlines()
    graded = table.with_name("graded.csv")
    graded.write_text(
        "\n".join([f"{lines[0]},grade", *(f"{line},{'ab'[i % 8 > 3]}" for i, line in enumerate(lines[1:]))])
    )
    evaluated = [
        "eval",
        tmp_path / "p",
        "--table",
        graded,
        "--by",
        "grade",
        "--split",
        "train,val,test",
        "--resamples",
        "20",
    ]
    assert commands.run(*evaluated, "--out", tmp_path / "e") == 0
    measured = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert measured["levels"].keys() == {"exam"} and "grade" in json.dumps(measured)
    capsys.readouterr()
    named = ["eval", tmp_path / "p" / "predictions.csv", "--split", "train,val,test", "--resamples", "20"]
    assert commands.run(*named, "--out", tmp_path / "images") == 0
    assert f"combines the views of an exam ({views}), as in exams.csv" in " ".join(capsys.readouterr().err.split())
    assert commands.run(*named, "--level", "image", "--overwrite", "--out", tmp_path / "images") == 0
    assert "combines the views" not in capsys.readouterr().err
    assert commands.run("explain", checkpoint, own[exams.patients[0]][0], "--out", tmp_path / "x") == 0
    assert not (tmp_path / "x" / "exams.csv").exists()
    capsys.readouterr()
    assert commands.run("export", checkpoint, "--to", "onnx", "--out", tmp_path / "hub") == 2
    assert "cannot export a network of exams with several views" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folds(table: Path) -> Path:
    """A cross-validation of exams."""
    unsplit = table.with_name("unsplit.csv")
    found = [{key: value for key, value in row.items() if key != "split"} for row in rows(table)]
    with unsplit.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    out = table.parent / "folds"
    given = [*FAST, "--views", "attention", "--folds", "2", "--epochs", "1", "--quiet", "--out", out]
    assert commands.run("train", unsplit, *given) == 0
    return out


@pytest.mark.parametrize("flips", [[], ["left-right"]])
def test_folds_of_exams_predict_the_mean_of_their_probabilities_of_an_exam(
    flips: list[str], folds: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [part for flip in flips for part in ("--flip", flip)]
    assert commands.run("predict", folds, table, *given, "--heatmaps", "--out", tmp_path / "p") == 0
    assert "the mean of 2 networks" in capsys.readouterr().out
    exams = rows(tmp_path / "p" / "exams.csv")
    own = [table.parent / row["image_path"] for row in rows(table) if row["patient_id"] == exams[0]["patient_id"]]
    every = [load(folds / fold / "best.ckpt") for fold in ("fold1", "fold2")]
    seen = [[one.open(path) for path in own] for one in every]
    with torch.no_grad():
        each = [_attended(one.net, images) for one, images in zip(every, seen, strict=True)]
        for _ in flips:
            mirrored = [[MirroredSource(image, left_right=True, up_down=False) for image in part] for part in seen]
            each += [_attended(one.net, images) for one, images in zip(every, mirrored, strict=True)]
            one = load(folds / "fold1" / "best.ckpt", flips=flips)  # of a single network as well
            assert one.predict_exam(own).allclose((each[0] + each[2]) / 2, atol=1e-6)
    wanted = torch.stack(each).mean(0)
    odds = torch.tensor([float(exams[0][f"log_odds_{name}"]) for name in "01"], dtype=torch.float64)
    assert (torch.sigmoid(odds) - wanted).abs().max() < 1e-6
    assert load(folds, flips=flips).predict_exam(own).allclose(torch.sigmoid(odds), atol=1e-6)
    # Of an image alone it is the mean of what they say of that.
    alone = torch.stack([one.predict(own[0])[0] for one in every]).mean(0)
    if not flips:
        assert float(rows(tmp_path / "p" / "predictions.csv")[0]["p_1"]) == pytest.approx(float(alone[1]), abs=1e-5)
    assert len(list((tmp_path / "p" / "heatmaps").iterdir())) == len(rows(table))
    assert (
        commands.run("eval", tmp_path / "p", "--split", "train,val,test", "--resamples", "20", "--out", tmp_path / "e")
        == 0
    )
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["levels"].keys() == {"exam"}


def _attended(net: Any, images: Sequence[Any]) -> torch.Tensor:
    """Probabilities of an exam of two classes by attention over its views, by hand."""
    found = torch.cat([net(image) for image in images]).double()
    return torch.softmax((torch.softmax(found[:, 2:], 0) * found[:, :2]).sum(0), 0)


def test_what_was_trained_on_images_knows_no_exams(tmp_path: Path) -> None:
    from gigamorph.engine.trained import Trained

    with pytest.raises(GigamorphError, match="trained on single images"):
        Trained(nn.Identity(), ("a", "b"), lambda records: []).predict_exam([])  # type: ignore[arg-type, return-value]


def test_views_of_unknown_name_are_a_line(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run("train", table, "-o", "data.views=median", "--out", tmp_path / "r") == 2
    assert "median" in capsys.readouterr().err
