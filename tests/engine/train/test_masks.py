"""Masks learnt by tiles: the loss against stock PyTorch's over the whole map, the score, what a run leaves."""

import json
from types import SimpleNamespace

import imagecodecs
import masks
import numpy as np
import pytest
import torch
from masks import Strided, squares, write_table
from torch import nn
from torch.nn import functional as F
from training import press_at

from gigamorph import accelerate
from gigamorph.engine.datasets.augment import Augment
from gigamorph.engine.datasets.masks import FileMask
from gigamorph.engine.errors import BudgetError, DataError, GigamorphError
from gigamorph.engine.models.classifier import check_segmenter
from gigamorph.engine.models.unet import UNet
from gigamorph.engine.train.checkpoint import load_checkpoint
from gigamorph.engine.train.fit import fit, preview_lines
from gigamorph.engine.train.inputs import Labels, training_data
from gigamorph.engine.train.mask_target import MaskLoss, MaskTarget, Segmentation, dice
from gigamorph.engine.train.network import restore_network, target_of
from gigamorph.engine.train.options import Loss, Optimizer, TrainOptions

MASKS = Labels("masks")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def even_table(tmp_path_factory):
    """Images of one size, of which a run records less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "SIZES", masks.SIZES[:1])
        return write_table(tmp_path_factory.mktemp("even"))


WEIGHTS = (0.5, 2.0, 3.0)


def stock_focal(logits, mask, smoothing, gamma):
    each = F.cross_entropy(logits, mask, ignore_index=255, reduction="none", label_smoothing=smoothing)
    p = torch.exp(-F.cross_entropy(logits, mask, ignore_index=255, reduction="none"))
    return (each * (1 - p) ** gamma)[mask != 255].sum() / (mask != 255).sum()


@pytest.mark.parametrize("network", [lambda: UNet(3, 1, 3, 1), Strided], ids=["unet", "strided"])
@pytest.mark.parametrize(
    "settings, weights",
    [(Loss(), None), (Loss(label_smoothing=0.1), WEIGHTS), (Loss(focal=2.0), None)],
    ids=["plain", "weighted", "focal"],
)
def test_loss_and_gradients_are_those_of_stock_pytorch(table, network, settings, weights):
    """In float64, live BatchNorm included, of an image that is turned, mirrored and partly beyond its border."""
    torch.manual_seed(1)
    model = network().double()
    augment = Augment.parse("flip,rotate=20,elastic=2:20")
    data = training_data(table, labels=MASKS, augment=augment)
    net = accelerate(model, tile=16)
    task = Segmentation(net, data.train, data.val, {}, data.target, settings, weights=weights)
    item = data.train[0]
    image = item["image"].read(0, *item["image"].shape[1:2], 0, item["image"].shape[2])[None].double()
    seen = data.target.seen(item["record"], item["image"])
    mask = torch.from_numpy(seen.read(0, seen.shape[0], 0, seen.shape[1]).astype(np.int64))[None]
    assert (mask == 255).any()
    model.train()
    logits = model(image)
    small = F.interpolate(mask[None].double(), logits.shape[2:], mode="nearest-exact")[0].long()
    if settings.focal:
        expected = stock_focal(logits, small, 0.0, settings.focal)
    else:
        weight = None if weights is None else torch.tensor(weights).double()
        expected = F.cross_entropy(logits, small, weight, ignore_index=255, label_smoothing=settings.label_smoothing)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    found = task.loss([item])
    found.backward()
    assert abs(float(found.detach() - expected.detach())) < 1e-12
    largest = max(float(one.abs().max()) for one in wanted)
    for parameter, one in zip(model.parameters(), wanted, strict=True):
        assert float((parameter.grad - one).abs().max()) <= 1e-12 * max(largest, 1)


def test_an_image_of_which_nothing_is_judged_teaches_nothing():
    logits = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    for settings in (Loss(), Loss(focal=0.5)):
        [loss] = MaskLoss(3, settings)(logits, torch.full((1, 5, 4), 255))
        [gradient] = torch.autograd.grad(loss, logits)
        assert loss == 0 and not gradient.any()


def test_dice_is_that_of_whole_masks_which_are_read_by_region(table, monkeypatch):
    torch.manual_seed(5)  # with these weights both classes are predicted
    largest, read = [0], FileMask.read

    def watched(self, top, bottom, left, right):
        largest[0] = max(largest[0], (bottom - top) * (right - left))
        return read(self, top, bottom, left, right)

    data = training_data(table, labels=MASKS)
    model = UNet(3, 1, 3, 1)
    task = Segmentation(accelerate(model, tile=16), data.train, data.train, {}, data.target, Loss())
    task.module.eval()
    monkeypatch.setattr(FileMask, "read", watched)
    found = task.measures(task.predict(data.train, "test"))
    predicted, true = [], []
    for item in (data.train[i] for i in range(len(data.train))):
        with torch.no_grad():
            image = item["image"].read(0, item["image"].shape[1], 0, item["image"].shape[2])[None]
            predicted.append(model(image).argmax(1).flatten().numpy())
        true.append(imagecodecs.imread(str(item["record"].findings[0].mask)).ravel())
    a, b = np.concatenate(predicted), np.concatenate(true)
    for number in (1, 2):
        expected = 2 * ((a == number) & (b == number)).sum() / ((a == number).sum() + (b == number).sum())
        assert found[f"dice_{number}"] == pytest.approx(expected, abs=1e-12)
    assert found["dice"] == pytest.approx((found["dice_1"] + found["dice_2"]) / 2)
    assert min(found["dice_1"], found["dice_2"]) > 0.01
    assert found["images"] == len(data.train) and 0 < largest[0] < 40 * 33  # the smallest mask
    assert np.isnan(dice(np.zeros((3, 2)))).all()


def test_a_run_learns_and_its_checkpoint_knows_the_task(even_table, tmp_path):
    options = TrainOptions(model="unet?width=4&depth=1", epochs=5, accumulate=1, optimizer=Optimizer(lr=3e-2), seed=1)
    labels = Labels("masks", classes=("tissue", "grey", "bright"))
    found = fit(training_data(even_table, labels=labels), options, tmp_path / "run")
    assert found.metrics["test"]["dice_bright"] > 0.6 and len(found.overlaps["test"]) == 1
    stored = load_checkpoint(tmp_path / "run" / "best.ckpt")
    assert target_of(stored["gigamorph"]) == MaskTarget(("tissue", "grey", "bright"))
    restored = restore_network(stored, "best.ckpt", memory_budget=None, device="cpu")
    for name, value in restored.state_dict().items():
        assert torch.equal(value, found.net.state_dict()[name])
    card = (tmp_path / "run" / "model_card.md").read_text()
    assert "- learnt: a class for each pixel" in card and "- test, bright: Dice 0." in card
    header = (tmp_path / "run" / "log.csv").read_text().splitlines()[0]
    assert "val_dice,val_dice_grey,val_dice_bright" in header
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["val"]["dice_bright"] is not None


def test_a_resumed_run_ends_with_the_same_weights(even_table, tmp_path):
    options = TrainOptions(model="masks:Strided", epochs=1, accumulate=2, seed=1)
    augment = Augment.parse("flip,translate=3")

    def trained(name, **how):
        fit(training_data(even_table, labels=MASKS, augment=augment), options, tmp_path / name, **how)
        return load_checkpoint(tmp_path / name / "last.ckpt")["state_dict"]

    expected = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("cut", report=press_at("train", 3))
    found = trained("cut", resume=True)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_balanced_sampling_and_weights_go_by_the_pixels_of_the_masks(tmp_path):
    table = write_table(tmp_path, 4, split=False)
    _, mask = squares(0)
    (tmp_path / "masks" / "0.png").write_bytes(imagecodecs.png_encode(np.where(mask == 1, np.uint8(1), np.uint8(0))))
    (tmp_path / "masks" / "1.png").write_bytes(imagecodecs.png_encode(squares(1)[1] * 0))
    records = training_data(table, labels=Labels("masks", classes=("a", "b", "c"))).train.records
    target = MaskTarget(("a", "b", "c"))
    pixels = np.zeros(3)
    for record in records:
        pixels += np.bincount(imagecodecs.imread(str(record.findings[0].mask)).ravel(), minlength=3)
    assert target.weights(records) == pytest.approx([pixels.sum() / (3 * n) if n else 0 for n in pixels])
    drawn = target.rarity(records)
    empty = [i for i, record in enumerate(records) if record.path.name == "1.png"]
    assert drawn.sum() == pytest.approx(1)
    assert all(drawn[i] >= drawn.max() - 1e-12 for i in empty)


def test_masks_of_0_and_255_are_told_to_be_binary(tmp_path):
    told = []
    data = training_data(write_table(tmp_path, values=(0, 255)), labels=MASKS, warn=told.append)
    assert data.target == MaskTarget(("background", "1"), binary=True)
    assert MaskTarget.from_plain(data.target.to_plain()) == data.target
    assert any("255 is read as class 1" in line for line in told)
    item = data.train[0]
    seen = data.target.seen(item["record"], item["image"])
    assert (seen.read(0, seen.shape[0], 0, seen.shape[1]) == (squares(0, (0, 255))[1] > 0)).all()


def test_bad_tables_are_refused_and_bad_masks_left_out_with_skip_bad(table, tmp_path):
    own = write_table(tmp_path, 4, split=False)
    plain = tmp_path / "plain.csv"
    plain.write_text("image_path,patient_id\n0.png,p\n")
    with pytest.raises(DataError, match=r"plain\.csv: has no column mask_path"):
        training_data(plain, labels=MASKS)
    (tmp_path / "masks" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png: no such mask"):
        training_data(own, labels=MASKS)
    told = []
    data = training_data(own, labels=MASKS, skip_bad=True, warn=told.append)
    assert sum(map(len, data.parts.values())) == 3 and any("left out:" in line for line in told)
    (tmp_path / "masks" / "1.png").write_bytes(imagecodecs.png_encode(squares(1, (0, 1, 7))[1]))
    named = Labels("masks", classes=("a", "b", "c"))
    with pytest.raises(DataError, match=r"1\.png: contains 7"):
        training_data(own, labels=named)
    data = training_data(own, labels=named, skip_bad=True, warn=told.append)
    assert sum(map(len, data.parts.values())) == 2 and any("1.png: contains 7" in line for line in told)


def test_networks_without_a_map_are_refused(table, tmp_path):
    with pytest.raises(
        GigamorphError, match="outputs 1 x 3 for 1 image and 3 classes; a network for masks must output one"
    ):
        fit(training_data(table, labels=MASKS), TrainOptions(model="lesionnet"), tmp_path / "run")
    pooled = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(GigamorphError, match="outputs 1 x 3 x 1 x 1"):
        check_segmenter(pooled, "pooled", (1, 1, 40, 33), 3)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 16), (33, 18)])
def test_the_unet_gives_a_map_of_any_image(size):
    assert UNet(4, 3, 2, 3)(torch.zeros(2, 3, *size)).shape == (2, 4, *size) if size != (1, 1) else True


def test_the_proposal_plans_a_step_in_which_the_map_is_not_whole():
    """8 channels of 2048 x 2048 are 128 MiB in float32."""
    target = MaskTarget(tuple("abcdefgh"))
    images = [{"image": SimpleNamespace(shape=(1, 2048, 2048)), "record": SimpleNamespace(path="i.png")}]
    options = TrainOptions(model="unet", memory_budget=100 * 2**20, batch_norm="frozen")
    net = accelerate(UNet(8, 1, 2, 1), options.memory_budget, batch_norm="frozen")
    told = list(preview_lines(net, SimpleNamespace(train=images, target=target), options))
    assert "2048 x 2048" in told[0] and "tiles of" in told[0]
    with pytest.raises(BudgetError):
        net.train().plan_for((1, 1, 2048, 2048))
