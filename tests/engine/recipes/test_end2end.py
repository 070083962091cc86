"""end2end: the sampler's rules, published shapes and stage tables, conversion, the runs, kills, bad tables."""

import json
from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gigamorph.cli.main import main
from gigamorph.engine.accelerate import accelerate
from gigamorph.engine.config import parse_config
from gigamorph.engine.datasets.tables import Finding, Record, write_table
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.evaluate.cases import Cases
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.models import create_model
from gigamorph.engine.recipes import default_text
from gigamorph.engine.recipes.classify import ImageTask
from gigamorph.engine.recipes.end2end.config import CLASSES, Block, Config, Model, Sampling
from gigamorph.engine.recipes.end2end.images import Window, lesions, resized, whole_images
from gigamorph.engine.recipes.end2end.network import PatchNet, WholeNet, convert, features, top_blocks
from gigamorph.engine.recipes.end2end.sampler import Lesion, Patch, breast_box, sample
from gigamorph.engine.recipes.end2end.train import PatchTask, _patients, train
from gigamorph.engine.recipes.networks import open_classifier
from gigamorph.engine.recipes.tta import FLIPS, averaged, predict
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage, trainable_names

# ---------------------------------------------------------------------------------------------------------- the sampler


def share(mask, patch, side):
    inside = np.zeros((mask.shape[0] + 2 * side, mask.shape[1] + 2 * side), bool)
    inside[side:-side, side:-side] = mask
    y, x = patch.top + side, patch.left + side
    common = inside[y : y + side, x : x + side].sum()
    return max(common / mask.sum(), common / side**2)


@given(st.integers(0, 10**6), st.sampled_from([7, 16, 25]), st.integers(0, 3))
@settings(max_examples=40)
def test_patches_meet_the_rules(seed, side, count):
    """Lesions at the border, tiny ones and overlapping ones too; background is checked against every lesion."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        y, x, h, w = rng.integers(0, 60), rng.integers(0, 50), rng.integers(1, 25), rng.integers(1, 25)
        mask = np.zeros((64, 56), bool)
        mask[y : y + h, x : x + w] = True
        found.append(Lesion(mask, int(rng.integers(1, 5))))
    wanted = Sampling(side=side, per_lesion=3, background=4)
    box = (0, 64, 0, 56)
    patches = sample(box, found, wanted, np.random.default_rng(seed))
    assert patches == sample(box, found, wanted, np.random.default_rng(seed))
    own, background = [p for p in patches if p.label], [p for p in patches if not p.label]
    assert [p.label for p in own] == [lesion.label for lesion in found for _ in range(3)]
    for i, patch in enumerate(own):
        assert share(found[i // 3].mask, patch, side) > patch.cutoff and 0 <= patch.cutoff <= 0.9
    assert len(background) <= 4 and (count or len(background) == 4)
    for patch in background:
        assert all(share(lesion.mask, patch, side) <= 0.35 for lesion in found)


def test_s1_is_the_centroid_and_s10_lowers_its_cutoff_only_where_it_must():
    mask = np.zeros((100, 100), bool)
    mask[40:61, 20:31] = True
    one = sample((0, 100, 0, 100), [Lesion(mask, 3)], Sampling(20, 1, 0), np.random.default_rng(0))
    assert one == [Patch(40, 15, 3, 0.0)]
    ten = sample((0, 100, 0, 100), [Lesion(mask, 3)], Sampling(40, 10, 10), np.random.default_rng(0))
    assert [p.label for p in ten] == [3] * 10 + [0] * 10 and all(p.cutoff == 0.9 for p in ten[:10])
    # A ring: no square of 20 pixels around a point of its box holds nine tenths of anything.
    ring = np.zeros((200, 200), bool)
    ring[20:180, 20:180] = True
    ring[22:178, 22:178] = False
    found = sample((0, 200, 0, 200), [Lesion(ring, 1)], Sampling(20, 2, 0), np.random.default_rng(0))
    assert all(share(ring, p, 20) > p.cutoff for p in found) and all(p.cutoff < 0.9 for p in found)
    with pytest.raises(DataError, match=r"mask of a lesion \(mass_ben\) is empty"):
        sample((0, 9, 0, 9), [Lesion(np.zeros((9, 9), bool), 4)], Sampling(4), np.random.default_rng(0))


def test_breast_is_the_largest_bright_part():
    image = np.zeros((50, 60), np.float32)
    image[5:40, 10:30] = 0.5
    image[2:4, 50:58] = 1.0  # a label
    assert breast_box(image) == (5, 40, 10, 30)
    assert breast_box(np.zeros((4, 5), np.float32)) == (0, 4, 0, 5)


def test_lesions_come_from_masks_and_boxes(tmp_path):
    np.save(tmp_path / "image.npy", np.ones((20, 30), np.uint16))
    mask = np.zeros((20, 30), np.uint8)
    mask[4:8, 6:10] = 255
    np.save(tmp_path / "mask.npy", mask)
    findings = (
        Finding("calcification", mask=tmp_path / "mask.npy", pathology="malignant"),
        Finding("mass", box=(2, 6, 10, 20), pathology="benign_without_callback"),
        Finding("mass", box=(0, 1, 0, 1)),
    )
    found = lesions(Record(tmp_path / "image.npy", 1, "p", findings=findings), (10, 15))
    assert [CLASSES[lesion.label] for lesion in found] == ["calc_mal", "mass_ben"]
    assert np.argwhere(found[0].mask).tolist() == [[2, 3], [2, 4], [3, 3], [3, 4]]
    assert found[1].mask.sum() == 2 * 5
    with pytest.raises(DataError, match="neither mask nor box"):
        lesions(Record(tmp_path / "image.npy", 1, "p", findings=(Finding("mass", pathology="benign"),)), (10, 15))


def test_windows_are_black_beyond_the_image():
    image = torch.rand(1, 12, 10)
    padded = F.pad(image, (8, 8, 8, 8))
    source = open_pixels(image)
    for top, left in ((-3, -2), (2, 3), (8, 6), (-8, 20)):
        got = Window(source, top, left, 6).read(0, 6, 0, 6)
        want = padded[:, top + 8 : top + 14, left + 8 : left + 14] if left < 12 else torch.zeros(1, 6, 6)
        assert torch.equal(got, want)
        assert torch.equal(Window(source, top, left, 6).read(1, 4, 2, 6), want[:, 1:4, 2:6])


# ----------------------------------------------------------------------------------------------------------- structure


def shapes(net, x):
    """Sizes of the maps on the way, on the meta device."""
    found = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: found.__setitem__(name, tuple(o.shape[1:])))
    net(x)
    return found


@pytest.mark.parametrize(
    ("blocks", "after", "count"),
    [
        ((Block("residual", 512, 1, 4),) * 2, [(2048, 18, 14), (2048, 9, 7)], None),
        ((Block("residual", 512, 2, 2),) * 2, [(1024, 18, 14), (1024, 9, 7)], None),
        (
            (Block("vgg", 512, 1), Block("vgg", 512, 1)),
            [(512, 18, 14), (512, 9, 7)],
            9 * 2048 * 512 + 9 * 512 * 512 + 2 * 512 + 4 * 512,
        ),
    ],
)
def test_published_sizes_of_the_whole_image_network(blocks, after, count):
    with torch.device("meta"):
        patch = PatchNet(features("resnet50", 3), 2048)
        net = convert(patch, Model(blocks=blocks)).eval()
        found = shapes(net, torch.empty(1, 3, 1152, 896))
    assert found["features"] == (2048, 36, 28) and found[""] == (2,)
    each = [size[1:] for name, size in found.items() if name.startswith("top.") and name.count(".") == 1]
    assert list(dict.fromkeys(each)) in ([(18, 14), (9, 7)], [(36, 28), (18, 14), (9, 7)])
    assert found["top"] == after[-1]
    assert sum(p.numel() for p in net.features.parameters()) == 23_508_032  # ResNet-50 without its classifier
    if count is not None:
        assert sum(p.numel() for p in net.top.parameters()) == count


def test_published_sizes_of_the_heat_map_variant():
    with torch.device("meta"):
        patch = PatchNet(features("resnet50", 3), 2048)
        net = convert(patch, Model(heatmap=True)).eval()
        found = shapes(net, torch.empty(1, 3, 1152, 896))
    assert found["heatmap.mean"] == (2048, 30, 22) and found["heatmap.classes"] == (5, 30, 22)
    assert found["heatmap.pool"] == (5, 6, 4)


def test_bottleneck_parameters():
    """[512-512-2048] on 2048 maps: three convolutions and a projection with biases, four norms."""
    top, width = top_blocks(2048, [Block("residual", 512, 1, 4)])
    convs = 2048 * 512 + 512 + 9 * 512 * 512 + 512 + 512 * 2048 + 2048 + 2048 * 2048 + 2048
    assert width == 2048 and sum(p.numel() for p in top.parameters()) == convs + 2 * (512 + 512 + 2048 + 2048)


def test_heat_map_is_the_patch_classifier_at_every_place():
    torch.manual_seed(0)
    patch = PatchNet(features("resnet18", 1), 512).double().eval()
    net = convert(patch, Model(blocks=(Block("vgg", 4),), heatmap=True, heatmap_pool=(2, 2))).eval()
    x = torch.randn(1, 1, 160, 128, dtype=torch.float64)
    maps = patch.features(x)
    want = F.linear(F.avg_pool2d(maps, 2, 1).movedim(1, -1), patch.head[-1].weight, patch.head[-1].bias).movedim(-1, 1)
    got = net.heatmap.classes(net.heatmap.mean(net.features(x)))
    assert (got - want).abs().max() < 1e-12
    # A patch of one window of the maps is classified alike.
    assert (patch.head(F.avg_pool2d(maps, 2, 1)[:, :, 0, 0]) - got[:, :, 0, 0]).abs().max() < 1e-12
    net.features[0].weight.data.zero_()
    assert patch.features[0].weight.abs().sum() > 0  # the patch network keeps its own


def test_stage_tables_by_name():
    """The 46 top layers of Keras' ResNet-50 are block 4f, stage 5 and the head."""
    config = Config()
    with torch.device("meta"):
        patch = PatchNet(features("resnet50", 3), 2048)
        whole = convert(patch, config.models[0])
    head, top, both = (set(trainable_names(patch, stage)) for stage in config.patch)
    assert head == {"head.1.weight", "head.1.bias"}
    blocks = {".".join(name.split(".")[1:3]) for name in top - head}
    assert blocks == {"layer3.5", "layer4.0", "layer4.1", "layer4.2"}
    convs = [
        m
        for n, m in patch.named_modules()
        if isinstance(m, torch.nn.Conv2d) and n.startswith(("features.layer3.5", "features.layer4"))
    ]
    assert len(convs) == 3 + 3 * 3 + 1  # 3 of 4f; 5a to 5c, and 5a's projection
    assert both == {name for name, _ in patch.named_parameters()}
    first, second = (set(trainable_names(whole, stage)) for stage in config.whole)
    assert first == {name for name in second if name.startswith(("top.", "head."))} and first < second
    assert [(s.lr, s.epochs) for s in config.patch] == [(1e-3, 3), (1e-4, 10), (1e-5, 37)]
    assert [(s.lr, s.epochs, s.weight_decay) for s in config.whole] == [(1e-4, 30, 1e-3), (1e-5, 20, 1e-2)]


def test_published_configuration():
    assert parse_config(default_text("end2end"), Config, "end2end.toml") == Config()


def test_networks_of_timm():
    pytest.importorskip("timm")
    maps = features("timm:vgg16", 3).eval()
    with torch.no_grad():
        assert maps(torch.zeros(1, 3, 64, 96)).shape == (1, 512, 2, 3)
    assert sum(p.numel() for p in maps.parameters()) == 14_714_688  # VGG-16 without its classifier
    with pytest.raises(GigamorphError, match="does not say which maps"):
        features("lesionnet", 1)


# ------------------------------------------------------------------------------------------------------------ averages


def test_mirrored_predictions_do_not_depend_on_mirroring():
    torch.manual_seed(0)
    net = create_model("resnet18", 2, 1).eval()
    image = torch.rand(1, 48, 64)

    class One:
        def __init__(self, x):
            self.x = x

        def __len__(self):
            return 1

        def __getitem__(self, i):
            return {"image": open_pixels(self.x)}

    call = lambda sources: net(torch.stack([s.read(0, 48, 0, 64) for s in sources]))  # noqa: E731
    found = [predict(call, One(x), [0], FLIPS) for x in (image, image.flip(2), image.flip(1), image.flip(1, 2))]
    assert max(np.abs(f - found[0]).max() for f in found) < 1e-5
    with torch.no_grad():
        views = torch.stack([image, image.flip(2), image.flip(1), image.flip(1, 2)])
        p = net(views).double().softmax(1).mean(0).numpy()
    assert found[0][0] == pytest.approx(np.log(p / (1 - p)), abs=1e-5)


def test_ensemble_is_the_mean_probability():
    odds = np.random.default_rng(0).normal(size=(3, 5, 1))
    members = [Cases(("yes",), np.ones((5, 1)), o, ("a",) * 5, ("",) * 5, ("",) * 5, ("",) * 5) for o in odds]
    p = (1 / (1 + np.exp(-odds))).mean(0)
    assert averaged(members).scores == pytest.approx(np.log(p / (1 - p)), abs=1e-12)


# ------------------------------------------------------------------------------------------------------------- the runs

NET = "gigamorph.engine.recipes.end2end.synthetic:SmallNet"
SMALL = Config(
    resize=(48, 40),
    channels=1,
    mean=(0.5,),
    std=(0.2,),
    augment="flip",
    sampling=Sampling(16, 2, 2),
    models=(
        Model("a", NET, blocks=(Block("residual", 4, 1, 2),)),
        Model("b", NET, blocks=(Block("vgg", 4),), heatmap=True, heatmap_pool=(2, 1)),
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


def test_checkpoints_are_classifiers_for_predict_and_explain(whole, table, tmp_path):
    """Of images of any size, which are brought to the network's; maps go back to the pixels of the file."""
    out, folder = whole[0], table.parent
    net, classes, images = open_classifier(out / "a" / "best.ckpt", memory_budget=None, device="cpu")
    record = Record(folder / "3.npy", -1, "p")
    source = images([record])[0]["image"]
    assert classes == ["0", "1"] and source.shape == (1, 48, 40)
    assert source.to_original.points([[0, 0], [40, 48]]).tolist() == [[0, 0], [50, 60]]
    state = torch.load(out / "a" / "best.ckpt", weights_only=True)["state_dict"]
    stock = convert(PatchNet(features(NET, 1), 32), SMALL.models[0])
    stock.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    [small] = resized([record], SMALL, tmp_path / "images")
    want = stock.eval()(whole_images([small], SMALL)[0]["image"].read(0, 48, 0, 40)[None])
    assert (net.eval()(source) - want).abs().max() < 1e-3  # the recipe keeps resized images in 16 bits
    for command, files in (("predict", ["--heatmaps"]), ("explain", [])):
        with pytest.raises(SystemExit) as done:
            main(
                [command, str(out / "a" / "best.ckpt"), str(folder / "3.npy"), *files, "--out", str(tmp_path / command)]
            )
        assert done.value.code == 0
    for path in (tmp_path / "predict" / "heatmaps" / "3.png", tmp_path / "explain" / "3.png"):
        assert imagecodecs.png_decode(path.read_bytes()).shape == (60, 50, 3)
    with pytest.raises(DataError, match="no classifier of whole images"):
        open_classifier(out / "a-patches" / "best.ckpt", memory_budget=None, device="cpu")


@pytest.mark.parametrize(("task", "nth"), [(PatchTask, 3), (ImageTask, 5)])
def test_killed_and_resumed_is_bitwise_the_same(whole, table, tmp_path, monkeypatch, task, nth):
    calls, loss = [], task.loss

    def killed(self, batch):
        calls.append(1)
        if len(calls) == nth:
            raise RuntimeError("killed")
        return loss(self, batch)

    monkeypatch.setattr(task, "loss", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(table, SMALL, Run(tmp_path, seed=2))
    assert train(table, SMALL, Run(tmp_path, seed=2, resume=True)) == whole[1]
    for name in "ab":
        first, second = (torch.load(folder / name / "model.pt") for folder in (whole[0], tmp_path))
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_any_backbone_at_native_resolution_within_a_budget(table, tmp_path):
    own = replace(SMALL.models[0], name="any", backbone="lesionnet", layer="stages")
    config = replace(SMALL, models=(own,), resize=(), flips=False)
    found = train(table, config, Run(tmp_path / "run", memory_budget=64 * 2**20))
    assert 0 <= found["any"]["auc"] <= 1
    # Its whole-image network is found again by another run.
    config = replace(config, start=str(tmp_path / "run"))
    assert train(table, config, Run(tmp_path / "next"))["any"]["before"] == found["any"]["auc"]
    net = convert(PatchNet(features("lesionnet", 1, layer="stages"), 32), own).double().eval()
    x = torch.randn(1, 1, 160, 128, dtype=torch.float64)
    assert (accelerate(net, tile=(64, 64))(x) - net(x)).abs().max() < 1e-12
    for layer, told in (("body", "is no module"), ("fc", "are no maps")):
        with pytest.raises(GigamorphError, match=told):
            train(table, replace(SMALL, models=(replace(own, layer=layer),)), Run(tmp_path / layer))


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
    with pytest.raises(DataError, match="no training image has a lesion"):
        train(write(tmp_path / "a", [0, 1] * 4, findings=False), SMALL, Run(tmp_path / "ao"))
    with pytest.raises(DataError, match="split val has only images with"):
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
    with pytest.raises(DataError, match="has the classes 0, 1, 2; the method tells two apart"):
        train(table, SMALL, Run(tmp_path / "do"))
    assert not any((tmp_path / f"{name}o").exists() for name in "bcd")
    with pytest.raises(GigamorphError, match="models need different names"):
        Config(models=(Model("a"), Model("a")))
    with pytest.raises(GigamorphError, match="name the run to start from"):
        Config(patients=(5,))


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


def test_whole_networks_run_in_tiles():
    """The converted network through `accelerate`, in a budget, is the network itself."""
    torch.manual_seed(0)
    for model in SMALL.models:
        net = convert(PatchNet(features(NET, 1), 32), model).double().eval()
        assert isinstance(net, WholeNet)
        x = torch.randn(1, 1, 160, 128, dtype=torch.float64)
        assert (accelerate(net, tile=(64, 64))(x) - net(x)).abs().max() < 1e-12
