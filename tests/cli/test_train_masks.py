"""`gigamorph train --task masks` and `predict` of its checkpoint, from table to files, and every bad input."""

import json

import imagecodecs
import masks
import numpy as np
import pytest
import tifffile
import torch
from commands import rows, run
from masks import squares, write_table

from gigamorph import TrainedMasks, load
from gigamorph.engine.train.checkpoint import load_checkpoint
from gigamorph.engine.train.network import restore_network

pytestmark = pytest.mark.usefixtures("undrawn")
FAST = ["--task", "masks", "--epochs", "1", "--accumulate", "2", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_size():
    """A run of one size is recorded once; tests/engine/train/test_masks.py has two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "SIZES", masks.SIZES[:1])
        yield


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"), 6)


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    said = ["--model", "unet?width=2&depth=1", "-o", 'data.classes=["tissue","grey","bright"]', "-o", "loss.focal=1"]
    assert run("train", table, "--out", out, *FAST, *said, "--class-weights") == 0
    return out


def classes_of(trained, image):
    """By stock PyTorch, the whole image at once."""
    stored = load_checkpoint(trained / "best.ckpt")
    model = restore_network(stored, "best.ckpt", memory_budget=None, device="cpu")._network.eval()
    with torch.no_grad():
        return model(torch.from_numpy(image)[None, None].float() / 255).argmax(1)[0].numpy()


def test_the_run_says_what_it_learns(trained, table, capsys):
    written = {"last.ckpt", "best.ckpt", "log.csv", "curves.png", "metrics.json", "model_card.md", "config.toml"}
    assert {p.name for p in trained.iterdir()} == written
    assert 'task = "masks"' in (trained / "config.toml").read_text()
    assert run("train", "--task", "masks", "--print-config") == 0
    assert 'task = "masks"' in capsys.readouterr().out
    assert run("train", table, "--out", trained, "--resume") == 0
    assert "masks tissue, grey, bright" in capsys.readouterr().out


def test_predict_writes_masks_and_a_table(trained, table, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("predict", trained / "best.ckpt", table, "--out", out, "--device", "cpu") == 0
    told = capsys.readouterr().out
    found = rows(out / "predictions.csv")
    assert [row["split"] for row in found] == ["train"] * 4 + ["val", "test"]
    for number, row in enumerate(found):
        image, mask = squares(number)
        expected = classes_of(trained, image)
        written = imagecodecs.imread(str(out / row["mask"]))
        assert row["mask"] == f"masks/{number}.png" and (written == expected).all()
        for k, name in enumerate(("tissue", "grey", "bright")):
            assert float(row[f"share_{name}"]) == pytest.approx((expected == k).mean())
            both, sums = ((expected == k) & (mask == k)).sum(), (expected == k).sum() + (mask == k).sum()
            if k:
                assert float(row[f"dice_{name}"]) == pytest.approx(2 * both / sums)
    metrics = json.loads((trained / "metrics.json").read_text())["test"]
    assert f"test: Dice of grey {metrics['dice_grey']:.4f}, bright {metrics['dice_bright']:.4f} (1 image)" in told
    assert (
        "\nval (chose the epoch): Dice" in told
        and "\ntrain (learnt from these, so this measures nothing): Dice" in told
    )
    assert not list((out / "masks").glob(".*"))
    assert json.loads((out / "predictions.json").read_text())["masks"]["classes"] == ["tissue", "grey", "bright"]
    (out / "masks" / "0.png").unlink()
    assert run("predict", trained / "best.ckpt", table, "--out", out, "--resume", "--json", "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["computed"] == 0


def test_large_and_mirrored_images_and_such_without_masks(trained, table, tmp_path, monkeypatch):
    """As TIFF, in the orientation of the file, from a processes of its own, without Dice."""
    monkeypatch.setattr("gigamorph.engine.images.writers.PNG_PIXELS", 100)
    image = squares(1)[0]
    path = tmp_path / "table.csv"
    path.write_text(f"image_path,chest_wall\n{table.parent / '1.png'},right\n")
    assert run("predict", trained / "best.ckpt", path, "--out", tmp_path / "out", "--device", "cpu") == 0
    [row] = rows(tmp_path / "out" / "predictions.csv")
    written = tifffile.imread(tmp_path / "out" / row["mask"])
    assert row["mask"] == "masks/1.tif"
    assert (written[:, ::-1] == classes_of(trained, np.ascontiguousarray(image[:, ::-1]))).all()
    assert row["dice_grey"] == row["dice_bright"] == ""


def test_masks_are_written_at_the_size_of_the_file_whatever_the_network_sees(table, tmp_path, monkeypatch):
    (tmp_path / "coarse.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels):\n"
        "    return nn.Conv2d(in_channels, num_classes, 5, 3, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    said = ["--model", "coarse:net", "--downsample", "2", "--folds", "2", "--quiet"]
    assert run("train", table, "--out", tmp_path / "run", *FAST, *said) == 0
    assert {"val_dice", "val_dice_1", "val_dice_2"} <= json.loads((tmp_path / "run" / "folds.json").read_text()).keys()
    held = rows(tmp_path / "run" / "out_of_fold.csv")
    assert len(held) == 5 and {"image_path", "patient_id", "dice_1", "dice_2", "fold"} == set(held[0])
    out = tmp_path / "out"
    assert run("predict", tmp_path / "run" / "fold1" / "best.ckpt", table, "--out", out, "--device", "cpu") == 0
    for number in range(6):
        assert imagecodecs.imread(str(out / "masks" / f"{number}.png")).shape == squares(number)[1].shape
    opened = load(tmp_path / "run" / "fold1" / "best.ckpt", device="cpu")
    assert isinstance(opened, TrainedMasks) and opened.classes == ("background", "1", "2")
    for number, mask in enumerate(opened.predict([table.parent / f"{number}.png" for number in range(2)])):
        assert (mask.numpy() == imagecodecs.imread(str(out / "masks" / f"{number}.png"))).all()


def test_what_makes_no_sense_is_refused_in_one_line(trained, table, tmp_path, capsys):
    def refused(*args):
        assert run(*args, "--out", tmp_path / "no") == 2
        told = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
        return " ".join(" ".join(told).replace("│", " ").split())

    best = trained / "best.ckpt"
    assert "predicts masks, not classes of images" in refused("explain", best, table)
    assert "do not support checkpoints of masks" in refused("predict", best, table, "--heatmaps")
    assert "a network for masks must output one map" in refused("train", table, *FAST, "--model", "lesionnet")
    other = tmp_path / "other.csv"
    other.write_text(f"image_path,mask_path,patient_id\n{table.parent / '0.png'},,p\n")
    assert "has no column mask_path and no masks in findings" in refused("train", other, *FAST)
    _, mask = squares(0)
    for name, values, said in (
        ("value", np.where(mask == 2, np.uint8(9), mask), "contains 9, which is not a class"),
        ("size", mask[1:], "correct it"),
    ):
        (tmp_path / f"{name}.png").write_bytes(imagecodecs.png_encode(values))
        other.write_text(f"image_path,mask_path,patient_id\n{table.parent / '0.png'},{name}.png,p\n")
        classes = ["-o", 'data.classes=["no","grey","bright"]']
        assert said in refused("train", other, *FAST, *classes)
        if name == "value":  # a stray value makes no classes
            assert "value.png: contains 9, but no mask contains 2; correct it" in refused("train", other, *FAST)
        assert said in refused("predict", best, other, "--device", "cpu")
    assert "cannot export a network of --task masks because it returns maps" in refused("export", best, "--to", "onnx")


def test_a_resumed_run_compares_all_images_with_the_masks_of_its_table(trained, table, tmp_path):
    """Those that were done before the table named masks had no Dice."""
    plain = table.parent / "plain.csv"
    plain.write_text("image_path\n" + "\n".join(row["image_path"] for row in rows(table)[:3]) + "\n")
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run("predict", trained / "best.ckpt", plain, "--out", out) == 0
    assert run("predict", trained / "best.ckpt", table, "--out", out, "--resume") == 0
    assert run("predict", trained / "best.ckpt", table, "--out", whole) == 0
    dice = [
        [{k: v for k, v in row.items() if k.startswith("dice_")} for row in rows(own / "predictions.csv")]
        for own in (out, whole)
    ]
    assert dice[0] == dice[1] and any(dice[0][0].values())
