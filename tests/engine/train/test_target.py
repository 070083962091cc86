"""What is learnt: losses beside PyTorch's own, what the outputs mean, and how they are measured."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from training import Images, Source, make_data

from gigamorph.engine.config import parse_config, to_toml
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.models.outputs import Outputs
from gigamorph.engine.published.ensemble import Ensemble, Member
from gigamorph.engine.train.checkpoint import load_checkpoint
from gigamorph.engine.train.fit import fit
from gigamorph.engine.train.network import restore_network
from gigamorph.engine.train.options import Loss, Optimizer, StageOptions, TrainOptions
from gigamorph.engine.train.target import Target

LOGITS = torch.tensor([[0.3, -0.2, 1.1], [2.0, 0.1, -0.4]])
CLASSES = np.eye(3)[[2, 1]]
LABELS = np.array([[1.0, 0.0, np.nan], [0.0, 0.0, 1.0]])


def record(number, label=-1, **labels):
    return Record(Path(f"{number}.png"), label, f"p{number}", laterality="L", labels=labels)


def test_classes_are_cross_entropy_smoothed_weighted_and_focal():
    target, labels = Target(("a", "b", "c")), torch.tensor([2, 1])
    for smoothing in (0.0, 0.1):
        losses = target.losses(LOGITS, CLASSES, Loss(label_smoothing=smoothing))
        stock = F.cross_entropy(LOGITS, labels, reduction="none", label_smoothing=smoothing)
        assert torch.equal(losses, stock)
    weighted = target.losses(LOGITS, CLASSES, Loss(), (1.0, 2.0, 0.5))
    assert torch.allclose(weighted, F.cross_entropy(LOGITS, labels, reduction="none") * torch.tensor([0.5, 2.0]))
    p = LOGITS.softmax(1)[torch.arange(2), labels]
    assert torch.allclose(target.losses(LOGITS, CLASSES, Loss(focal=2)), -((1 - p) ** 2) * p.log())


def test_labels_are_binary_cross_entropies_of_what_is_known():
    target = Target(("a", "b", "c"), "labels")
    each = F.binary_cross_entropy_with_logits(LOGITS, torch.tensor([[1.0, 0, 0], [0, 0, 1]]), reduction="none")
    expected = torch.stack([each[0, :2].mean(), each[1].mean()])
    assert torch.allclose(target.losses(LOGITS, LABELS, Loss()), expected)
    weights = target.weights([record(i, a=float(i == 0), b=0.0) for i in range(4)])
    assert weights == (3.0, 1.0, 1.0)
    heavier = target.losses(LOGITS, LABELS, Loss(), weights)
    assert heavier[0].item() == pytest.approx((3 * each[0, 0] + each[0, 1]).item() / 2)
    focal = target.losses(LOGITS[1:], LABELS[1:], Loss(focal=1.0))
    right = torch.sigmoid(torch.tensor([-2.0, -0.1, -0.4]))
    assert focal.item() == pytest.approx(((1 - right) * -right.log()).mean().item())


def test_an_order_is_the_likelihood_of_its_classes():
    target, steps = Target(("a", "b", "c", "d"), "ordinal"), torch.tensor([[0.3, -0.2, 1.1]]).repeat(4, 1)
    assert target.columns == 3 and target.outputs is not None and target.outputs.exclusive
    up = torch.sigmoid(steps[0].double())
    p = torch.stack([1 - up[0], up[0] * (1 - up[1]), up[0] * up[1] * (1 - up[2]), up.prod()])
    assert torch.allclose(target.losses(steps, np.eye(4), Loss()).double(), -p.log(), rtol=1e-6)
    assert np.allclose(target.log_odds(steps)[0], torch.logit(p).numpy(), rtol=1e-12)
    assert np.isfinite(target.log_odds(torch.full((1, 3), 900.0))).all()


def test_numbers_are_in_units_of_their_spread():
    records = [record(i, age=float(40 + 10 * i)) for i in range(3)]
    target = Target(("age",), "numbers").measured_on(records)
    assert target.center == (50.0,) and target.spread == pytest.approx((np.sqrt(200 / 3),))
    ones = torch.tensor([[1.0]])
    for name, expected in (("squared", 1.0), ("absolute", 1.0), ("huber", 0.5)):
        found = target.losses(ones, np.array([[50.0]]), Loss(regression=name))
        assert found.item() == pytest.approx(expected)
    assert target.log_odds(ones)[0, 0] == pytest.approx(50 + np.sqrt(200 / 3))
    assert Outputs.from_json(target.outputs.to_json()) == target.outputs
    with pytest.raises(DataError, match="label_age is the same for all 1 training images"):
        target.measured_on(records[:1])
    with pytest.raises(DataError, match="applies only to classes and labels, not to numbers"):
        target.rarity(records)


def test_numbers_are_no_probabilities_where_networks_are_averaged():
    outputs = Target(("age",), "numbers", (50.0,), (10.0,)).outputs
    preprocessing = SimpleNamespace(channels=1)
    members: Any = [
        Member(lambda image, value=value: torch.tensor([[value]]), preprocessing, outputs)  # pyright: ignore
        for value in (-1.0, 1.0)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gigamorph.engine.published.ensemble.PreparedSource", lambda source, wanted: source)
        patch.setattr("gigamorph.engine.published.ensemble.MirroredSource", lambda source, **mirrored: source)
        found = Ensemble(members, outputs, [(False, False)])("image")
    assert found.tolist() == [[50.0]]


def test_balanced_drawing_makes_classes_equally_frequent():
    drawn = Target(("a", "b")).rarity([record(i, int(i == 0)) for i in range(5)])
    assert drawn == pytest.approx([0.5] + [0.125] * 4)
    drawn = Target(("a", "b"), "labels").rarity([record(0, a=1.0, b=0.0), *(record(i, a=0.0, b=0.0) for i in (1, 2))])
    assert drawn == pytest.approx([0.5, 0.25, 0.25])


def test_what_no_loss_has_is_one_line():
    with pytest.raises(GigamorphError, match=r"file: loss.label_smoothing must be at least 0 and below 1, not 1.0"):
        parse_config("[loss]\nlabel_smoothing = 1.0", TrainOptions, "file")
    text = to_toml(TrainOptions(stages=(StageOptions(2, "head", freeze=("body",)),), optimizer=Optimizer(lr=0.5)))
    assert "# patience =" in text and "\nlr = 0.5\n" in text
    assert to_toml(parse_config(text, TrainOptions, "file")) == text


class Marked(Images):
    """Squares whose brightness is a number, two labels, and a class."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        one = item["record"]
        return {**item, "image": Source(one.path.name, int(one.path.stem), round(one.labels["bright"]), (1, 40, 33))}


def marked(count, first=0):
    def one(i):
        return record(i, i % 3, bright=float(i % 3), other=float(i % 2))

    return Marked([one(i) for i in range(first, first + count)])


@pytest.mark.parametrize(
    ("target", "columns", "measure"),
    [
        (Target(("bright", "other"), "numbers", (1.0, 0.5), (1.0, 0.5)), 2, "mae_image"),
        (Target(("other",), "labels"), 1, "auc_image"),
        (Target(("a", "b", "c"), "ordinal"), 2, "auc_image"),
    ],
)
def test_a_run_of_each_kind_learns_and_is_opened_again(target, columns, measure, tmp_path, monkeypatch):
    data = replace(make_data(), train=marked(9), val=marked(6, 100), test=marked(6, 200), target=target)
    data = replace(data, classes=target.names)
    options = TrainOptions(model="training:normed", epochs=1, accumulate=3, sampling="all", device="cpu")
    found = fit(data, options, tmp_path / "run")
    assert found.metrics["test"]["images"] == 6 and found.metrics["test"][measure] is not None
    assert f"val_{measure}" in (tmp_path / "run" / "log.csv").read_text()
    best = tmp_path / "run" / "best.ckpt"
    net = restore_network(load_checkpoint(best), best, memory_budget=None, device="cpu")
    assert net.gigamorph_outputs == target.outputs
    image = data.test[0]["image"]
    with torch.no_grad():
        values = net.eval()(image)
    assert values.shape == (1, columns)
    assert found.predictions["test"][0].log_odds == pytest.approx(target.log_odds(values)[0].tolist())


def test_balanced_sampling_and_stages_in_a_run(tmp_path):
    data = replace(make_data(), train=marked(9), classes=("a", "b", "c"))
    data = replace(data, target=Target(data.classes), val=Images([]), test=Images([]))
    options = TrainOptions(
        model="training:normed",
        sampling="balanced",
        average=0.9,
        accumulate=3,
        stages=(StageOptions(1, "head", 1e-2, freeze=("0",)), StageOptions(2)),
    )
    fit(data, options, tmp_path / "run")
    rows = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    assert [row[0] for row in rows[1:]] == ["head", "stage2", "stage2"]
    with pytest.raises(GigamorphError, match=r"started with average=0.9, not 0.5"):
        fit(data, replace(options, average=0.5), tmp_path / "run", resume=True)
    with pytest.raises(GigamorphError, match=r"started with optimizer.lr=0.001, not 0.5"):
        fit(data, replace(options, optimizer=Optimizer(lr=0.5)), tmp_path / "run", resume=True)
