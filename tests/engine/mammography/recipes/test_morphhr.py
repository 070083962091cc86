"""MorphHR: the front's equality and memory, the ablation, the 14-label task, kills, bad tables, real images."""

import json
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import torch
from killed import killed_at
from torch import nn
from torch.nn import functional as F

from gigamorph.engine.datasets.tables import Record, read_table, write_table
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import as_stored, to_original
from gigamorph.engine.mammography.data_sets.chestxray14 import FINDINGS
from gigamorph.engine.mammography.phantom import PhantomImage
from gigamorph.engine.mammography.recipes.classify import (
    PLAIN,
    ClassifierTask,
    mirrorings,
    read_target,
    select_examples,
)
from gigamorph.engine.mammography.recipes.morphhr.config import MorphHRConfig
from gigamorph.engine.mammography.recipes.morphhr.grow import grow, without_decay
from gigamorph.engine.mammography.recipes.morphhr.images import WholeCells
from gigamorph.engine.mammography.recipes.morphhr.synthetic import FACTOR, FAINT, HEIGHT, WIDTH, phantom
from gigamorph.engine.mammography.recipes.morphhr.train import train
from gigamorph.engine.models import create_model
from gigamorph.engine.models.lesionnet import LesionNet
from gigamorph.engine.morph.activation import PAct
from gigamorph.engine.morph.files import Grown, open_network
from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.stem import activation_bytes
from gigamorph.engine.published.classifier import open_classifier
from gigamorph.engine.train.explanation import explain_class
from gigamorph.engine.train.optimizers import make_optimizer
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage, freeze
from gigamorph.engine.train.target import Target, batch_weights

NET = "lesionnet?stages=1"
SMALL = MorphHRConfig(
    model=NET,
    weights="random",
    channels=1,
    mean=(0.5,),
    std=(0.2,),
    factor=2,
    filters=4,
    augment="flip",
    arms=("finetune", "direct", "scratch", "morph"),
    low=(Stage("low", 1, 1e-3, batch_size=4),),
    high=(Stage("high", 2, 1e-3, batch_size=2, accumulate=2),),
)


def write(folder, labels, sizes=((33, 40),), columns=None, splits=None):
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i, label in enumerate(labels):
        path = folder / f"{i}.npy"
        height, width = sizes[i % len(sizes)]
        np.save(path, np.random.default_rng(i).integers(0, 65535, (height, width), dtype=np.uint16))
        split = (splits or ["train", "train", "train", "train", "val", "val", "test", "test"])[i % 8]
        own = {} if columns is None else {name: float((i + n) % 2) for n, name in enumerate(columns)}
        records.append(Record(path, label, f"p{i}", split, labels=own))
    return write_table(folder / "table.csv", records, ["no", "yes"])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"), [0, 1] * 8)  # of one size; the real images below have several


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, train(table, SMALL, Run(out, seed=2))


# ----------------------------------------------------------------------------------------------------------- the front


@pytest.mark.parametrize("model", ["lesionnet", "tiny_nets:resnet"])
def test_child_is_parent_on_shrunk_images_and_new_front_is_not(model):
    torch.manual_seed(0)
    parent = create_model(model, 2, 1).double().eval()
    config = MorphHRConfig(model=model, channels=1, factor=4, filters=5)
    child, _ = grow(Grown(parent), config, seed=1)
    fresh, _ = grow(Grown(parent), config, seed=1, renew=True)
    x = torch.randn(2, 1, 96, 72, dtype=torch.float64)
    with torch.no_grad():
        want = parent(F.avg_pool2d(x, 4))
        assert (child.network(x) - want).abs().max() < 1e-12
        assert (fresh.network(x) - want).abs().max() > 1e-3
    shapes = [{k: v.shape for k, v in net.network.state_dict().items()} for net in (child, fresh)]
    assert shapes[0] == shapes[1]


def test_widen_and_deepen_with_p_activations_keep_the_function():
    torch.manual_seed(0)
    parent = LesionNet(2, 1, width=4).double().eval()
    config = MorphHRConfig(
        model="lesionnet", channels=1, factor=2, filters=4, act="GELU", widen=1.5, deepen=("stages.0.0",)
    )
    child, reports = grow(Grown(parent), config, seed=1)
    x = torch.randn(1, 1, 48, 64, dtype=torch.float64)
    assert (child.network(x) - parent(F.avg_pool2d(x, 2))).abs().max() < 1e-10
    assert [r.transform for r in reports] == ["identity", "activation", "front", "widen"]
    learnt = [m for m in child.network.modules() if isinstance(m, PAct)]
    assert len(learnt) == 2
    child.network(x).sum().backward()
    assert all(m.a.grad is not None and m.a.grad.abs().sum() > 0 for m in learnt)


@pytest.mark.parametrize(("model", "stem"), [("lesionnet", "stem"), ("tiny_nets:resnet", "conv1")])
def test_deepening_as_by_netmorph_keeps_the_function_and_is_dense(model, stem):
    torch.manual_seed(0)
    parent = create_model(model, 2, 1).double().eval()
    config = MorphHRConfig(model=model, channels=1, factor=2, filters=4, deepen=(stem,), deepen_by="netmorph")
    child, reports = grow(Grown(parent), config, seed=1)
    x = torch.randn(1, 1, 96, 128, dtype=torch.float64)
    assert (child.network(x) - parent(F.avg_pool2d(x, 2))).abs().max() < 1e-10
    assert [r.transform for r in reports] == ["decompose", "front"]
    deeper = child.network.get_submodule(stem)
    assert [type(m) for m in deeper.children()][-2:] == [PAct, nn.Conv2d]
    assert (deeper[-1].weight != 0).double().mean() > 0.9


def test_a_child_is_explained_on_its_file_as_stored():
    """Mirrored and cut to whole cells for the network, not for those who read its maps."""
    image = np.random.default_rng(0).random((33, 22), np.float32)
    seen = WholeCells(open_pixels(image, flip=True), 4)
    stored = as_stored(seen)
    assert seen.shape == (1, 32, 20) and to_original(seen).points([0.0, 0.0]).tolist() == [22.0, 0.0]
    np.testing.assert_array_equal(stored.read(0, 33, 0, 22)[0], image)


def test_new_filters_see_detail_not_grey_level():
    child, _ = grow(Grown(LesionNet(2, 1).eval()), MorphHRConfig(channels=1, factor=4, filters=8), seed=0)
    first = next(m for m in child.network.modules() if isinstance(m, nn.Conv2d))
    assert first.weight[1:].mean((2, 3)).abs().max() < 1e-6 < first.weight[1:].abs().mean()


def test_receptive_field_stride_and_memory_of_the_resnet_50_front():
    """In parent pixels the field is unchanged; 16 channels at stride 2 replace 64 at the same stride of the image."""
    parent = create_model("resnet18", 2, 1).eval()
    _, report = front(parent, torch.zeros(1, 1, 32, 32), 4, filters=16)
    assert report.after.stride == (4 * report.before.stride[0], 4 * report.before.stride[1]) == (128, 128)
    assert report.before.size == (32, 32) and report.after.size == (128, 128)
    # Two stages of 3x3/2 before the stem: k1 + (k2 - 1) s1 with strides 2 and 4.
    assert report.after.field[0] == 1 + 2 + 2 * 2 + 4 * (report.before.field[0] - 1)
    stock = create_model("resnet18", 2, 1).eval()
    large = (1, 1, 128, 128)
    assert report.after.activation_bytes < 0.3 * activation_bytes(stock, large, torch.zeros(1, 1, 32, 32))


# -------------------------------------------------------------------------------------------------------------- targets


def test_losses_and_weights():
    logits = torch.randn(4, 3, dtype=torch.float64)
    truth = Target(("a", "b", "c")).truth([Record("x", n, "p") for n in (0, 2, 2, 2)])
    got = Target(("a", "b", "c")).loss(logits, truth)
    assert got.item() == pytest.approx(F.cross_entropy(logits.float(), torch.tensor([0, 2, 2, 2])).item(), abs=1e-6)
    weights = batch_weights(torch.tensor([0, 2, 2, 2]))
    assert weights.tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3]) and weights.mean().item() == pytest.approx(1)
    balanced = Target(("a", "b", "c")).loss(logits, truth, balanced=True)
    each = F.cross_entropy(logits.float(), torch.tensor([0, 2, 2, 2]), reduction="none")
    assert balanced.item() == pytest.approx((each[0] / 2 + each[1:].mean() / 2).item(), abs=1e-6)

    several = Target(("a", "b"), "labels")
    truth = several.truth([Record("x", -1, "p", labels={"a": 1.0}), Record("y", -1, "p", labels={"a": 0.0, "b": 1.0})])
    assert np.isnan(truth[0, 1])
    logits = torch.tensor([[2.0, 5.0], [1.0, -1.0]])
    want = (F.softplus(torch.tensor([-2.0, 1.0, 1.0]))).mean()
    assert several.loss(logits, truth).item() == pytest.approx(want.item(), abs=1e-6)


def test_labels_of_chestxray14(tmp_path):
    """Its 14 findings; the fifteenth column, whether there is any, only if it is named; no upside-down chests."""
    table = write(tmp_path / "data", [0] * 16, columns=("finding", *FINDINGS))
    config = replace(SMALL, task="labels", augment="flip=left-right")
    run = Run(tmp_path / "out")
    assert read_target(table, "labels", (), config, run)[1].names == FINDINGS
    assert read_target(table, "labels", ("finding", "Mass"), config, run)[1].names == ("finding", "Mass")
    with pytest.raises(
        DataError, match=r"has no column label_Fracture; it has image_path, .*label_finding, label_Atelectasis"
    ):
        train(table, replace(config, labels=("Fracture",)), run)
    with pytest.raises(GigamorphError, match="which are never upside down; set flip=left-right"):
        train(table, replace(config, augment="flip"), run)
    assert not (tmp_path / "out").exists()


def test_only_mirrorings_of_the_augmentation_are_averaged_over():
    assert mirrorings("flip=left-right,rotate=5") == ((False, False), (True, False))
    every = (*PLAIN, (True, False), (False, True), (True, True))
    assert mirrorings("") == PLAIN and mirrorings("rotate=5,flip") == every
    assert mirrorings("flip=up-down") == every[::2] and mirrorings("flip=left-right") == every[:2]


def test_slopes_of_p_activations_do_not_decay():
    child, _ = grow(Grown(LesionNet(2, 1).eval()), MorphHRConfig(channels=1, factor=4, filters=8), seed=0)
    slopes = [m.a for m in child.network.modules() if isinstance(m, PAct)]
    [stage] = without_decay([Stage("s", 1, 1e-3, weight_decay=0.1)], child.network)
    freeze(child.network, stage)
    decayed, _ = make_optimizer(child.network, stage).param_groups
    assert slopes and decayed["weight_decay"] == 0.1
    assert not any(slope is parameter for slope in slopes for parameter in decayed["params"])


# ------------------------------------------------------------------------------------------------------------- the runs


def test_ablation_of_one_command(whole):
    out, metrics = whole
    assert metrics["auc"] == metrics["morph"]["auc"] and 0 <= metrics["auc"] <= 1
    for arm in ("finetune", "direct", "scratch", "morph"):
        assert 0 <= metrics[arm]["auc"] <= 1 and "interval" in metrics[arm]
    assert metrics["difference"] < 1e-5
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    child = open_network(NET, out / "morph" / "model.safetensors", 2, 1)
    assert child.shrink == 2 and child.network(torch.zeros(1, 1, 32, 48)).shape == (1, 2)


def test_every_network_is_shown_on_the_same_images(whole, table):
    """Over the files as stored; as `gigamorph explain` draws them, of the last class."""
    out, metrics = whole
    records = [record for record in read_table(table).records if record.split == "test"]
    shown = [record for record in records if record.label == 1]
    assert select_examples(records, Target(("no", "yes"))) == [(records.index(record), 1) for record in shown] and shown
    for name, arm in (("finetune", "parent"), ("morph", "morph")):
        opened = open_classifier(out / arm / "best.ckpt", memory_budget=None, device="cpu")
        assert len(metrics[name]["evidence"]) == len(shown)
        for line, record in zip(metrics[name]["evidence"], shown, strict=True):
            file, told = line.split(": ", 1)
            found, logits, _ = explain_class(opened.net.eval(), opened.open_images([record])[0]["image"], 1)
            assert told == f"yes: probability {logits.softmax(0)[1]:.3f}, log-odds {found.log_odds:+.2f}"
            assert imagecodecs.imread(str(out / arm / file)).shape == (*np.load(record.path).shape, 3)
            assert f"- {line}" in (out / arm / "model_card.md").read_text()


def test_labels_are_shown_where_they_are_there():
    records = [Record(Path(f"{n}.png"), -1, f"p{n}", labels={"a": n % 2, "b": float(n == 2)}) for n in range(6)]
    assert select_examples(records, Target(("a", "b"), "labels"), 3) == [(1, 0), (3, 0), (5, 0)]
    assert select_examples(records[::2], Target(("a", "b"), "labels")) == [(1, 1)]
    assert select_examples(records[:1], Target(("a", "b"), "labels")) == []


@pytest.mark.parametrize("arm", ["parent", "direct", "morph"])
def test_checkpoints_are_classifiers_for_predict_and_explain(whole, table, arm):
    opened = open_classifier(whole[0] / arm / "best.ckpt", memory_budget=None, device="cpu")
    [first, *_] = opened.open_images(read_table(table).records)
    source = first["image"]
    assert opened.classes == ["no", "yes"] and source.shape == ((1, 16, 20) if arm == "parent" else (1, 32, 40))
    state = torch.load(whole[0] / arm / "best.ckpt", weights_only=True)["state_dict"]
    network = create_model(NET, 2, 1)
    if arm == "morph":
        network = open_network(NET, whole[0] / arm / "model.safetensors", 2, 1).network
    network.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    with torch.no_grad():
        want = network.eval()(source.read(0, source.shape[1], 0, source.shape[2])[None])
        assert (opened.net.eval()(source) - want).abs().max() < 1e-5


def test_killed_and_resumed_is_bitwise_the_same(whole, table, tmp_path):
    for nth in (8, 14):  # in the second epoch of the arm `direct`, and in the arm `morph`
        with killed_at(ClassifierTask, nth):
            train(table, SMALL, Run(tmp_path, seed=2, resume=nth > 8))
    metrics = train(table, SMALL, Run(tmp_path, seed=2, resume=True))
    assert metrics == whole[1]
    for arm in ("direct", "scratch", "morph"):
        assert (tmp_path / arm / "model.safetensors").read_bytes() == (
            whole[0] / arm / "model.safetensors"
        ).read_bytes()


def test_bad_tables_and_settings(tmp_path):
    kinds = [0, 0, 0, 0, 1, 0, 1, 0]
    with pytest.raises(DataError, match="split train has only images of class no; add patients of both kinds"):
        train(write(tmp_path / "a", kinds), SMALL, Run(tmp_path / "ao"))
    with pytest.raises(DataError, match="split val has only"):
        train(write(tmp_path / "b", [0, 1, 0, 1, 1, 1, 1, 0]), SMALL, Run(tmp_path / "bo"))
    folder = tmp_path / "c"
    table = write(folder, [0, 1] * 4)
    table.write_text(table.read_text().replace("p5", "p1"))
    with pytest.raises(DataError, match="patient p1 is in train and val"):
        train(table, SMALL, Run(tmp_path / "co"))
    assert not any((tmp_path / f"{name}o").exists() for name in "abc")
    with pytest.raises(GigamorphError, match="factor = 1"):
        MorphHRConfig(factor=1)
    with pytest.raises(GigamorphError, match="arms must have"):
        MorphHRConfig(arms=("morph", "morph"))


def test_loss_that_is_no_number_keeps_the_state(table, tmp_path, monkeypatch):
    calls, loss = [], ClassifierTask.loss

    def bad(task, batch):
        calls.append(1)
        return loss(task, batch) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(ClassifierTask, "loss", bad)
    with pytest.raises(GigamorphError, match="the loss is nan"):
        train(table, SMALL, Run(tmp_path, seed=2))
    assert (tmp_path / "parent" / "last.ckpt").exists()


def test_phantoms_show_their_label_to_shrunk_images_only_faintly():
    """The mean of each cell is that of the image without specks, or brighter by FAINT, but for rounding to 16 bits."""
    plain = PhantomImage(HEIGHT, WIDTH, seed=(3, 1, 2)).read(0, HEIGHT, 0, WIDTH) / 4095
    found = phantom((3, 1, 2), upright=True, fine=True) / 65535
    cells = F.avg_pool2d(torch.from_numpy(found - plain)[None], FACTOR)
    faint = cells[cells.abs() > 1 / 65535]
    assert len(faint) == 8 and (faint - FAINT).abs().max() < 1 / 65535 and np.abs(found - plain).max() > 0.4


def test_two_steps_on_real_images(real_data, tmp_path):
    names = ["mg_film_jpeg2000", "mg_film_jpeg_extended_12bit", "mg_ge_jpeg_lossless"]
    records = []
    for i, split in enumerate(["train", "train", "val", "val"]):
        path = real_data / "dicom" / f"{names[i]}.dcm" if i < 3 else real_data / "nih_chest_xray.png"
        records.append(Record(path, i % 2, f"p{i}", split))
    table = write_table(tmp_path / "table.csv", records, ["0", "1"])
    high = (Stage("high", 1, 1e-4, accumulate=1),)
    config = replace(SMALL, factor=4, arms=("morph",), low=(Stage("low", 1, 1e-4),), high=high, flips=False)
    metrics = train(table, config, Run(tmp_path / "out", memory_budget=400 * 2**20))
    assert metrics["difference"] < 1e-4
    assert len((tmp_path / "out" / "morph" / "log.csv").read_text().splitlines()) == 2
