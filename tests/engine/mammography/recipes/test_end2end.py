"""end2end: the runs, kills, transfer, bad tables, real images."""

import json
from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
import torch
from killed import killed_at
from torch.nn import functional as F

from gigamorph.cli.main import main
from gigamorph.engine.accelerate import accelerate
from gigamorph.engine.datasets.tables import Finding, Record, read_table, write_table
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.evaluate.read import read_cases
from gigamorph.engine.mammography.recipes.classify import ClassifierTask
from gigamorph.engine.mammography.recipes.end2end.config import End2EndConfig, Model, Sampling, TopBlock
from gigamorph.engine.mammography.recipes.end2end.images import whole_images, write_resized
from gigamorph.engine.mammography.recipes.end2end.network import PatchNet, convert, features
from gigamorph.engine.mammography.recipes.end2end.train import PatchTask, _add_front, _patients, train
from gigamorph.engine.morph.files import Grown
from gigamorph.engine.published.classifier import open_classifier
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage

NET = "gigamorph.engine.mammography.recipes.end2end.synthetic:SmallNet?stages=1"
SMALL = End2EndConfig(
    resize=(48, 40),
    channels=1,
    mean=(0.5,),
    std=(0.2,),
    augment="flip",
    sampling=Sampling(16, 2, 2),
    models=(
        Model("a", NET, "random", blocks=(TopBlock("residual", 4, 1, 2),)),
        Model("b", NET, "random", blocks=(TopBlock("vgg", 4),), heatmap=True, heatmap_pool=(2, 1)),
    ),
    patch=(Stage("head", 1, 1e-3, trainable=("head",), batch_size=8), Stage("all", 1, 1e-3, batch_size=8)),
    whole=(
        Stage("top", 1, 1e-3, trainable=("top", "head"), batch_size=4),
        Stage("all", 1, 1e-3, batch_size=2, batch_norm="eval"),
    ),
    transfer=(Stage("transfer", 1, 1e-6, batch_size=2, batch_norm="eval"),),
)


def write(folder, labels, findings=True):
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i, label in enumerate(labels):
        path = folder / f"{i}.npy"
        np.save(path, np.random.default_rng(i).integers(8000, 65535, (60, 50), dtype=np.uint16))
        box = Finding("mass", (10, 30, 10, 26), pathology="malignant" if label else "benign")
        split = ("train", "train", "train", "train", "val", "val", "test", "test")[i % 8]
        records.append(Record(path, label, f"p{i}", split, findings=(box,) if findings else ()))
    return write_table(folder / "table.csv", records, ["0", "1"])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"), [0, 1] * 4)


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, train(table, SMALL, Run(out, seed=2))


def test_both_variants_and_their_ensemble(whole):
    out, metrics = whole
    assert all(0 <= metrics[name]["auc"] <= 1 for name in "ab") and 0 <= metrics["auc"] <= 1
    assert 0 <= metrics["patch_accuracy_a"] <= 1 and "patch_accuracy_b" not in metrics  # one backbone, learnt once
    assert np.load(out / "images" / "000000.npy").shape == (48, 40)
    assert (out / "ensemble.csv").exists() and json.loads((out / "metrics.json").read_text())["seed"] == 2


def test_predictions_name_the_images_of_the_table(whole, table):
    """By which they are joined to it, and not the copies that the recipe made."""
    named = [str(record.path) for record in read_table(table).records if record.split == "test"]
    for path in ("a/test.csv", "b/test.csv", "ensemble.csv"):
        assert list(read_cases(whole[0] / path, table=table).names) == named


def test_checkpoints_are_classifiers_for_predict_and_explain(whole, table, tmp_path):
    """Of images of any size, which are brought to the network's; maps go back to the pixels of the file."""
    out, folder = whole[0], table.parent
    opened = open_classifier(out / "a" / "best.ckpt", memory_budget=None, device="cpu")
    record = Record(folder / "3.npy", -1, "p")
    source = opened.open_images([record])[0]["image"]
    assert opened.classes == ["0", "1"] and source.shape == (1, 48, 40)
    assert source.to_original.points([[0, 0], [40, 48]]).tolist() == [[0, 0], [50, 60]]
    state = torch.load(out / "a" / "best.ckpt", weights_only=True)["state_dict"]
    stock = convert(PatchNet(features(NET, 1), 8), SMALL.models[0])
    stock.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    [small] = write_resized([record], SMALL, tmp_path / "images")
    want = stock.eval()(whole_images([small], SMALL)[0]["image"].read(0, 48, 0, 40)[None])
    assert (opened.net.eval()(source) - want).abs().max() < 1e-3  # the recipe keeps resized images in 16 bits
    for command, files in (("predict", ["--heatmaps"]), ("explain", [])):
        with pytest.raises(SystemExit) as done:
            main(
                [command, str(out / "a" / "best.ckpt"), str(folder / "3.npy"), *files, "--out", str(tmp_path / command)]
            )
        assert done.value.code == 0
    for path in (tmp_path / "predict" / "heatmaps" / "3.png", tmp_path / "explain" / "3.png"):
        assert imagecodecs.png_decode(path.read_bytes()).shape == (60, 50, 3)
    with pytest.raises(DataError, match="does not classify whole images"):
        open_classifier(out / "a-patches" / "best.ckpt", memory_budget=None, device="cpu")


def test_killed_and_resumed_is_bitwise_the_same(whole, table, tmp_path):
    for task, nth in ((PatchTask, 3), (ClassifierTask, 5)):
        with killed_at(task, nth):
            train(table, SMALL, Run(tmp_path, seed=2, resume=task is ClassifierTask))
    assert train(table, SMALL, Run(tmp_path, seed=2, resume=True)) == whole[1]
    for name in "ab":
        first, second = (torch.load(folder / name / "model.pt") for folder in (whole[0], tmp_path))
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_from_weights_of_keras(table, tmp_path):
    """As the original began; its checkpoint knows eps and strides of Keras' network."""
    pytest.importorskip("h5py")
    import keras_layout

    path, spec = tmp_path / "w.h5", "resnet50_v1?eps=0.001&pool_padding=0&width=2"
    keras_layout.write(path, keras_layout.resnet50(2, False), "keras1")
    own = replace(SMALL.models[0], name="keras", backbone=spec, weights=str(path))
    patch, whole = (replace(stages[-1], lr=1e-9) for stages in (SMALL.patch, SMALL.whole))
    config = replace(
        SMALL, models=(own,), channels=3, mean=(52.18 / 255,), std=(1 / 255,), patch=(patch,), whole=(whole,)
    )
    said = []
    train(table, config, Run(tmp_path / "run", say=said.append))
    assert any("weights: w.h5, SHA-256" in line for line in said)
    net = open_classifier(tmp_path / "run" / "keras" / "best.ckpt", memory_budget=None, device="cpu").net
    layer = net.get_submodule("features.layer2.0")
    assert layer.bn1.eps == 1e-3 and layer.conv1.stride == (2, 2) and layer.conv2.stride == (1, 1)
    torch.testing.assert_close(
        layer.conv1.weight.detach(), features(spec, 3, path).layer2[0].conv1.weight.detach(), rtol=0, atol=1e-6
    )
    with pytest.raises(GigamorphError, match=r"times as large as those that w\.h5"):
        train(table, replace(config, std=(0.226,)), Run(tmp_path / "other"))


def test_any_backbone_at_native_resolution_within_a_budget(table, tmp_path):
    own = replace(SMALL.models[0], name="any", backbone="lesionnet?stages=1", layer="stages")
    config = replace(SMALL, models=(own,), resize=(), flips=False)
    found = train(table, config, Run(tmp_path / "run", memory_budget=64 * 2**20))
    assert 0 <= found["any"]["auc"] <= 1
    # Its whole-image network is found again by another run.
    config = replace(config, start=str(tmp_path / "run"))
    assert train(table, config, Run(tmp_path / "next"))["any"]["before"] == found["any"]["auc"]
    net = convert(PatchNet(features("lesionnet?stages=1", 1, layer="stages"), 8), own).double().eval()
    x = torch.randn(1, 1, 160, 128, dtype=torch.float64)
    assert (accelerate(net, tile=(64, 64))(x) - net(x)).abs().max() < 1e-12
    for layer, told in (("body", "unknown layer"), ("fc", "must be maps")):
        with pytest.raises(GigamorphError, match=told):
            train(table, replace(SMALL, models=(replace(own, layer=layer),)), Run(tmp_path / layer))


def test_front_of_morphhr_at_a_higher_resolution(table, tmp_path):
    """Without a step of training it is the network that it began as, on images twice as large; then it is trained."""
    model = replace(SMALL.models[0], front=2)
    native = (Stage("native", 1, 1e-3, batch_size=2, batch_norm="eval"),)
    config = replace(SMALL, models=(model,), native=native, flips=False)
    metrics = train(table, config, Run(tmp_path, seed=2))
    assert 0 <= metrics["a-front"]["auc"] <= 1 and metrics["auc"] == metrics["a"]["auc"]
    assert np.load(tmp_path / "images_2" / "000000.npy").shape == (96, 80)
    opened = open_classifier(tmp_path / "a-front" / "best.ckpt", memory_budget=None, device="cpu")
    [item] = opened.open_images([Record(table.parent / "3.npy", -1, "p")])
    assert item["image"].shape == (1, 96, 80) and opened.net.eval()(item["image"]).shape == (1, 2)
    parent = convert(PatchNet(features(NET, 1), 8), model).double().eval()
    child, _ = _add_front(Grown(parent), model, config, 0)
    x = torch.randn(1, 1, 96, 80, dtype=torch.float64)
    assert (child.network(x) - parent(F.avg_pool2d(x, 2))).abs().max() < 1e-12
    with pytest.raises(GigamorphError, match="'nowhere' matches no parameter"):
        train(table, replace(config, native=(replace(native[0], trainable=("nowhere",)),)), Run(tmp_path / "bad"))
    assert not (tmp_path / "bad").exists()
    with pytest.raises(GigamorphError, match="front must be 2 or more, with blocks on one image size"):
        replace(config, resize=())


def test_transfer_and_its_learning_curve(whole, tmp_path):
    other = write(tmp_path / "other", [1, 0] * 4, findings=False)
    config = replace(SMALL, start=str(whole[0]), patients=(2, 4))
    metrics = train(other, config, Run(tmp_path / "out"))
    assert [(row["patients"], row["images"]) for row in metrics["curve"]] == [(2, 2), (4, 4)]
    assert metrics["auc"] == metrics["curve"][-1]["auc"] and {"before"} == set(metrics["a"])
    start, end = (torch.load(folder / "model.pt") for folder in (whole[0] / "a", tmp_path / "out" / "a-4"))
    moved = max((start[k] - end[k]).abs().max().item() for k in start if start[k].is_floating_point())
    assert 0 < moved < 1e-4  # a small rate
    with pytest.raises(DataError, match="patients = 9, but there are 4"):
        train(other, replace(config, patients=(9,)), Run(tmp_path / "more"))
    with pytest.raises(GigamorphError, match="start must be the folder of a finished run"):
        train(other, replace(config, start=str(tmp_path / "nowhere")), Run(tmp_path / "none"))


def test_patients_of_the_curve_alternate_and_nest():
    records = [Record(f"{i}{v}", i % 3 == 0, f"p{i}") for i in range(12) for v in "ab"]
    order = _patients(records, 0)
    assert len(order) == len(set(order)) == 12 and order == _patients(records, 0)
    assert [int(name[1:]) % 3 == 0 for name in order[:8]] == [True, False] * 4


def test_bad_tables(tmp_path):
    np.save(tmp_path / "crop.npy", np.full((20, 30), 255, np.uint8))
    with pytest.raises(DataError, match="no training image has a lesion"):
        train(write(tmp_path / "a", [0, 1] * 4, findings=False), SMALL, Run(tmp_path / "ao"))
    for name, finding, told in (
        ("e", Finding("mass", pathology="malignant"), "neither mask nor box"),
        ("f", Finding("mass", mask=tmp_path / "none.png", pathology="malignant"), "none.png: the mask .* is missing"),
        (
            "g",
            Finding("mass", (10, 30, 50, 70), pathology="malignant"),
            "50 to 70. is outside .* 60 x 50 pixels",
        ),
        ("h", Finding("mass", mask=tmp_path / "crop.npy", pathology="malignant"), "crop.npy: is 20 x 30, its image 60"),
    ):
        read = read_table(write(tmp_path / name, [0, 1] * 4))
        records = [replace(record, findings=(finding,)) for record in read.records]
        with pytest.raises(DataError, match=told):
            train(write_table(tmp_path / name / "t.csv", records, read.classes), SMALL, Run(tmp_path / f"{name}o"))
    assert not any((tmp_path / f"{name}o").exists() for name in "aefgh")  # before any image was resized
    with pytest.raises(DataError, match="split val has only images of class"):
        train(write(tmp_path / "b", [0, 1, 0, 1, 1, 1, 0, 1]), SMALL, Run(tmp_path / "bo"))
    table = write(tmp_path / "c", [0, 1] * 4)
    table.write_text(table.read_text().replace("p5", "p1"))
    with pytest.raises(DataError, match="patient p1 is in train and val"):
        train(table, SMALL, Run(tmp_path / "co"))
    table = write_table(
        tmp_path / "c" / "three.csv",
        [Record(tmp_path / "c" / f"{i}.npy", i % 3, f"p{i}", ("train", "val")[i // 4]) for i in range(8)],
        ["0", "1", "2"],
    )
    with pytest.raises(DataError, match="has the classes 0, 1, 2; the method needs two"):
        train(table, SMALL, Run(tmp_path / "do"))
    assert not any((tmp_path / f"{name}o").exists() for name in "bcd")
    with pytest.raises(GigamorphError, match="models must have different names"):
        End2EndConfig(models=(Model("a"), Model("a")))
    with pytest.raises(GigamorphError, match="set start to the run to transfer"):
        End2EndConfig(patients=(5,))


@pytest.mark.parametrize(("stages", "kept"), [("patch", "a-patches"), ("whole", "a")])
def test_loss_that_is_no_number_keeps_the_state(table, tmp_path, stages, kept):
    wild = tuple(replace(stage, lr=1e30 * number) for number, stage in enumerate(getattr(SMALL, stages)))
    config = replace(SMALL, models=SMALL.models[:1], **{stages: wild})
    with pytest.raises(GigamorphError, match=r"stage 'all', epoch 1, step \d: the (loss|gradient) is") as caught:
        train(table, config, Run(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path / kept / "last.ckpt") in str(caught.value)
    stored = torch.load(tmp_path / kept / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in stored["state_dict"].values())


def test_two_steps_on_real_images(real_data, tmp_path):
    names = ["mg_film_jpeg2000.dcm", "mg_film_jpeg_extended_12bit.dcm", "mg_ge_jpeg_lossless.dcm"]
    records = []
    for i, split in enumerate(["train", "train", "val", "val"]):
        path = real_data / "dicom" / names[i] if i < 3 else real_data / "nih_chest_xray.png"
        box = Finding("mass", (100, 300, 100, 300), pathology="malignant" if i % 2 else "benign")
        records.append(Record(path, i % 2, f"p{i}", split, findings=(box,)))
    table = write_table(tmp_path / "table.csv", records, ["0", "1"])
    config = replace(SMALL, resize=(288, 224), models=SMALL.models[:1], flips=False, sampling=Sampling(64, 1, 1))
    metrics = train(table, config, Run(tmp_path / "out", memory_budget=300 * 2**20))
    assert metrics["a"]["auc"] is None and len(metrics["a"]["val_auc"]) == 2
