"""Of two classes the positive one is so by its name: exchanged outputs say the same of each class."""

import functools
import hashlib
import json

import archives
import numpy as np
import pytest
import torch
from commands import rows
from torch import nn

from gigamorph import accelerate, open_pixels
from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.errors import DataError
from gigamorph.engine.evaluate.recalibration import Calibration, read_calibration
from gigamorph.engine.explain import ExplainOptions, explain
from gigamorph.engine.mammography.view import evidence
from gigamorph.engine.mammography.view.exams import ExamImage
from gigamorph.engine.models.outputs import Outputs
from gigamorph.engine.predict.predictor import Classifier
from gigamorph.engine.predict.run import PredictOptions, predict
from gigamorph.engine.predict.tables import combined
from gigamorph.engine.train.metrics import Prediction

MADE = {"model": "sha", "checkpoint": "net", "device": "cpu", "workers": 0}
ORDERS = (["normal", "cancer"], ["cancer", "normal"])
STORED = {"output": "cancer", "slope": 0.5, "intercept": -1.0, "threshold": 0.2, "images": 40, "split": "val"}


def net(classes, *, device):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    last = nn.Linear(4, 2)
    if classes[0] == "cancer":
        for parameter in last.parameters():
            parameter.data = parameter.data.flip(0)
    found = accelerate(nn.Sequential(*layers, last), tile=16)
    return Classifier(found, classes, functools.partial(ImageDataset, channels=1, flip=False))


def calibration(folder, classes, **more):
    path = folder / "calibration.json"
    path.write_text(json.dumps({**STORED, "sha256": "sha", **more}))
    return read_calibration(path, classes, "sha")


@pytest.fixture
def table(tmp_path):
    table = archives.make_archive(tmp_path / "images", 6)
    text = table.read_text().replace(",0,", ",normal,").replace(",1,", ",cancer,")
    lines = [f"{line},{'exam_id' if n == 0 else 'E'}" for n, line in enumerate(text.splitlines())]
    table.write_text("\n".join(lines) + "\n")
    return table


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.png")}


def by_name(table):
    """Numbers by their columns, whose order is that of the network."""
    return [
        {key: pytest.approx(float(cell), abs=1e-5) for key, cell in row.items() if key[:2] in ("p_", "lo")}
        for row in table
    ]


def test_calibration_is_of_the_class_that_it_names(table, tmp_path):
    written = []
    for number, classes in enumerate(ORDERS):
        out = tmp_path / str(number)
        options = PredictOptions(**MADE, heatmaps=True, calibration=calibration(tmp_path, classes))
        predict(functools.partial(net, classes), [table], out, options)
        written.append({name: rows(out / name) for name in ("predictions.csv", "breasts.csv", "exams.csv")})
    plain = predict(functools.partial(net, ORDERS[1]), [table], tmp_path / "plain", PredictOptions(**MADE))
    assert plain.done == 6
    for before, after in zip(rows(tmp_path / "plain" / "predictions.csv"), written[1]["predictions.csv"], strict=True):
        z = float(before["log_odds_cancer"])
        assert float(after["log_odds_cancer"]) == pytest.approx(0.5 * z - 1, rel=1e-12)
        assert float(after["log_odds_normal"]) == -float(after["log_odds_cancer"])
        assert after["called"] == str(int(z >= STORED["threshold"]))
    for name, first in written[0].items():
        second = written[1][name]
        assert [row.get("called") for row in first] == [row.get("called") for row in second]
        assert by_name(first) == [
            {key: float(row[key]) for key in own} for own, row in zip(by_name(first), second, strict=True)
        ]
    assert len(digests(tmp_path / "0" / "heatmaps")) == 6
    assert digests(tmp_path / "0" / "heatmaps") == digests(tmp_path / "1" / "heatmaps")


@pytest.mark.parametrize("method", ["activation", "gradient"])
def test_the_positive_class_is_explained(table, tmp_path, method):
    for number, classes in enumerate(ORDERS):
        explain(functools.partial(net, classes), [table], tmp_path / str(number), ExplainOptions(**MADE, method=method))
    assert len(digests(tmp_path / "0")) == 6 and digests(tmp_path / "0") == digests(tmp_path / "1")
    first, second = (rows(tmp_path / name / "exams.csv") for name in "01")
    assert {row["class"] for row in first} == {"cancer"} and len(first) == 3
    assert [{**row, "adds": "", "log_odds": ""} for row in first] == [
        {**row, "adds": "", "log_odds": ""} for row in second
    ]


def test_evidence_in_the_viewer_is_of_the_positive_class(table, monkeypatch, tmp_path):
    checkpoint = tmp_path / "net.ckpt"
    checkpoint.write_bytes(b"")
    path, found = table.parent / "0000.npy", []
    for classes in ORDERS:
        one = net(classes, device="cpu")
        monkeypatch.setattr(evidence, "open_classifier", lambda *a, one=one, **k: one)
        maps = evidence.MapServer(checkpoint, memory_budget=None, device="cpu")
        found.append(maps.of(ExamImage(Record(path, -1, "p"), {}), open_pixels(path)))
    assert found[0].any() and (np.abs(found[0].astype(int) - found[1]) <= 1).all()


def test_views_of_an_exam_are_calibrated_by_the_name(tmp_path):
    z = []
    for classes in ORDERS:
        raw = [(0.0, 1.5), (0.0, 0.3)] if classes[1] == "cancer" else [(1.5, 0.0), (0.3, 0.0)]
        views = [Prediction(str(n), (r[0] - r[1], r[1] - r[0]), None, "p", "L", row=r) for n, r in enumerate(raw)]
        outputs = Outputs.of("softmax", 2, tuple(classes))
        outputs = Outputs(outputs.heads, views="mean")
        one = combined(outputs, classes, calibration(tmp_path, classes), "breast", views)
        z.append(one.log_odds[classes.index("cancer")])
    assert z[0] == pytest.approx(z[1]) and z[0] == pytest.approx(0.5 * (1.5 + 0.3) / 2 - 1, abs=0.05)


def test_a_calibration_of_the_negative_class_is_one_line(tmp_path):
    with pytest.raises(DataError, match="is for class normal; the positive class of this checkpoint is cancer"):
        calibration(tmp_path, ["cancer", "normal"], output="normal")
    assert isinstance(calibration(tmp_path, ["cancer", "normal"]), Calibration)
