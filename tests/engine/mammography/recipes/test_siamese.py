"""siamese: two networks that exchange labels; the recipe on files, killed and resumed."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from killed import killed_at
from torch import nn

from gigamorph.engine.config import parse_config
from gigamorph.engine.datasets.tables import Finding, Record, read_table, write_table
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.mammography.recipes import default_text
from gigamorph.engine.mammography.recipes.siamese import SiameseConfig, train
from gigamorph.engine.mammography.recipes.siamese.full_images import centres
from gigamorph.engine.mammography.recipes.siamese.network import Embedding
from gigamorph.engine.mammography.recipes.siamese.pairs import find_pairs
from gigamorph.engine.mammography.recipes.siamese.patches import (
    PatchFile,
    patch_pairs,
    single_patches,
    sources_of,
    write_patches,
)
from gigamorph.engine.mammography.recipes.siamese.probe import probed
from gigamorph.engine.mammography.recipes.siamese.starts import BYOLTask, SimCLRTask
from gigamorph.engine.mammography.recipes.siamese.task import SiameseTask
from gigamorph.engine.train.run import Run

NET = "lesionnet?stages=1"
SMALL = SiameseConfig(
    model=NET,
    layer="stages",
    patch=32,
    stride=32,
    dim=4,
    warm_up=1,
    epochs=3,
    batch_size=8,
    registration="gauss_newton",
    labelled=(1.0,),
    probe_epochs=1,
)


def test_config_file_holds_the_defaults():
    assert parse_config(default_text("siamese"), SiameseConfig, "siamese.toml") == SiameseConfig()


def embeddings(count=2):
    made = []
    for number in range(count):
        torch.manual_seed(number)
        made.append(Embedding(nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU()), "", 4, 1, 8))
    return made


def test_networks_start_apart_and_exchange_their_labels():
    networks = embeddings()
    assert not torch.equal(networks[0].project.weight, networks[1].project.weight)
    pairs = torch.randn(60, 1, 1, 8, 8).expand(-1, 2, -1, -1, -1).clone()
    pairs[::6, 1] += 2 * torch.randn(10, 1, 8, 8)
    task = SiameseTask(networks, pairs, [str(i) for i in range(60)], SMALL)
    task.module.eval()
    task.begin_epoch(0)  # warm-up
    assert not any(labels.any() for labels in task.labels) and not task.history
    task.begin_epoch(1)
    own = [task.measure(network)[0] for network in networks]
    assert not torch.equal(*own) and torch.equal(task.labels[0], own[1]) and torch.equal(task.labels[1], own[0])
    assert task.history[0][0]["embedding_std"] > 1e-3
    with torch.no_grad():
        for parameter in networks[0].project.parameters():
            parameter.zero_()
        networks[0].project.bias.fill_(1)
    with pytest.raises(GigamorphError, match="collapsed"):
        task.begin_epoch(2)


def test_both_patches_of_a_pair_are_mirrored_alike_and_negatives_are_of_other_patients():
    task = SiameseTask(embeddings(), torch.randn(6, 2, 1, 8, 8), list("aabbcc"), replace(SMALL, jitter=0.0, noise=0.0))
    x = torch.randn(50, 1, 1, 8, 8).expand(-1, 2, -1, -1, -1)
    varied = task._vary(x)
    assert torch.equal(varied[:, 0], varied[:, 1]) and not torch.equal(varied, x)
    for _ in range(20):
        others = task._others(range(6))
        assert all(task.patients[a] != task.patients[b] for a, b in others.tolist())
    assert not len(task._others([0, 1]))


def test_probe_needs_two_classes():
    with pytest.raises(DataError, match="only one class"):
        probed(embeddings(1)[0], torch.randn(4, 1, 8, 8), torch.zeros(4), torch.randn(2, 1, 8, 8))


def test_probe_learns_from_all_mirrorings_and_leaves_the_encoder_alone():
    torch.manual_seed(0)
    embedding = embeddings(1)[0]
    before = {key: value.clone() for key, value in embedding.state_dict().items()}
    x, test = torch.randn(12, 1, 8, 8), torch.randn(30, 1, 8, 8)
    y = torch.arange(12) % 2
    scores = probed(embedding, x, y, test)
    assert scores.shape == (30,) and scores.std() > 0
    np.testing.assert_allclose(probed(embedding, x.flip(2), y, test), scores, rtol=0, atol=1e-5 * scores.std())
    assert all(torch.equal(value, before[key]) for key, value in embedding.state_dict().items())


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    path = write_phantoms(folder, patients=6, height=160, width=128, breasts=2, lesions=("mass",), positive=0.7, seed=1)
    read = read_table(path)
    views = [r for r in read.records if r.view == "CC"]
    splits = {
        p: ("train", "train", "train", "val", "test", "test")[i]
        for i, p in enumerate(sorted({r.patient_id for r in views}))
    }
    return write_table(folder / "cc.csv", [replace(r, split=splits[r.patient_id]) for r in views], read.classes)


def test_patches_are_those_of_the_images_and_are_kept(table, tmp_path, monkeypatch):
    pairs = find_pairs(read_table(table, labels=False).records)[:2]
    files = [write_patches(pair, SMALL, tmp_path) for pair in pairs]
    found = patch_pairs(files)
    assert len(found) == sum(len(file.cells) for file in files)
    for index in np.random.default_rng(0).permutation(len(found)):
        number, place = found.places[index]
        top, left = files[number].cells[place]
        wanted = [s.read(top, top + 32, left, left + 32).numpy() for s in sources_of(pairs[number], SMALL)]
        np.testing.assert_allclose(found[int(index)], np.stack(wanted), rtol=0, atol=0.51 / 65535 / SMALL.std[0])
    # A kill between the two files of a pair: both are written again; what is there is not.
    files[0].path.with_suffix(".npz").unlink()
    again = write_patches(pairs[0], SMALL, tmp_path)
    np.testing.assert_array_equal(again.open(), files[0].open())
    np.testing.assert_array_equal(again.boxes, files[0].boxes)
    monkeypatch.setattr("gigamorph.engine.mammography.recipes.siamese.patches.sources_of", None)
    assert write_patches(pairs[1], SMALL, tmp_path).path == files[1].path


@pytest.mark.parametrize("own", [{"white": 4095}, {"chest_wall": "right"}])
def test_patches_are_kept_under_what_the_table_says_of_images(table, tmp_path, own):
    """How their files are to be read, besides what is in them."""
    pair = find_pairs(read_table(table, labels=False).records)[0]
    other = replace(pair, right=replace(pair.right, **own))
    assert write_patches(pair, SMALL, tmp_path).path != write_patches(other, SMALL, tmp_path).path


@pytest.mark.parametrize("kind", ["box", "outline", "mask"])
def test_a_finding_is_where_its_box_its_outline_or_its_mask_is(tmp_path, kind):
    """A patch is one with a finding if the middle is in it, however the table says where that is."""
    mask = np.zeros((40, 50), np.uint8)
    mask[10:14, 20:30] = 255
    np.save(tmp_path / "mask.npy", mask)
    told = {"box": (10, 14, 20, 30), "outline": ((10, 20), (14, 20), (14, 30), (10, 30)), "mask": tmp_path / "mask.npy"}
    record = Record(tmp_path / "a.npy", 1, "p", findings=(Finding(**{kind: told[kind]}), Finding("elsewhere")))
    assert centres(record) == [(12, 25)]


def test_single_patches_are_read_when_they_are_asked_for(table, tmp_path, monkeypatch):
    """Grey values of 16 bits on disk, in order and by choice, with as many channels as the network has."""
    config = replace(SMALL, channels=3)
    files = [write_patches(pair, config, tmp_path) for pair in find_pairs(read_table(table, labels=False).records)[:2]]
    assert all(file.open().dtype == np.uint16 for file in files)
    opened, counts = PatchFile.open, []
    monkeypatch.setattr(PatchFile, "open", lambda self: counts.append(1) or opened(self))
    patches = single_patches(files)
    some = patches.take([len(patches) - 1, 0])
    assert len(patches) == 2 * sum(len(file.cells) for file in files) and len(some) == 2 and not counts
    x = some[:]
    assert x.shape == (2, 3, 32, 32) and torch.equal(x[:, 0], x[:, 2]) and len(counts) == 2
    assert torch.equal(x[1], patch_pairs(files)[0][0]) and torch.equal(patches[[0]][0], x[1])


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(table, tmp_path):
    whole = train(table, SMALL, Run(tmp_path / "whole", seed=3))
    assert whole["pairs"] == {"train": 3, "val": 1, "test": 2} and len(whole["epochs"]) == 2
    with killed_at(SiameseTask, lambda task: 2 * -(-len(task.pairs) // SMALL.batch_size) + 1):  # in the third epoch
        train(table, SMALL, Run(tmp_path / "cut", seed=3))
    resumed = train(table, SMALL, Run(tmp_path / "cut", seed=3, resume=True))
    assert resumed == whole == json.loads((tmp_path / "cut" / "metrics.json").read_text())
    for name in ("last.ckpt", "encoder.pt"):
        first, second = (torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "cut"))
        first, second = first.get("state_dict", first), second.get("state_dict", second)
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    rows = list(csv.DictReader((tmp_path / "cut" / "soft_labels.csv").open()))
    assert len(rows) == whole["patches"]["train"] and all(0 <= float(row["soft_label"]) <= 1 for row in rows)
    maps = [tifffile.imread(tmp_path / "cut" / name) for name in whole["maps"]]
    assert len(maps) == 2 and all(m.shape[:2] == (160 // 16 - 1, 128 // 16 - 1) and np.isfinite(m).all() for m in maps)
    # Weights for a network of the same name.
    from gigamorph.engine.models import create_model

    create_model(NET, 2, 1, tmp_path / "cut" / "encoder.pt")


def test_every_start_is_compared_and_a_kill_in_any_changes_nothing(table, tmp_path, monkeypatch):
    from gigamorph.engine.models import create_model

    weights = tmp_path / "weights.pt"
    torch.save(create_model(NET, 2, 1).state_dict(), weights)
    config = replace(
        SMALL,
        weights=str(weights),
        starts=("byol", "weights", "simclr", "scratch", "siamese"),
        hidden=16,
        epochs=2,
        batch_size=6,
        registration="none",
        scores=False,
        maps=False,
    )
    whole = train(table, config, Run(tmp_path / "whole", seed=3))
    assert [row["start"] for row in whole["probe"]] == list(config.starts)
    assert all(0 <= row[key] <= 1 for row in whole["probe"] for key in ("probe", "fine_tuned"))
    card = (tmp_path / "whole" / "model_card.md").read_text()
    assert f"# Model card: siamese, {NET}" in card and "- weights: given" in card and str(tmp_path) not in card
    row = whole["probe"][0]
    assert f"(100%), start byol: AUC {row['probe']:.3f} by a linear probe, {row['fine_tuned']:.3f} fine-tuned." in card
    # A checkpoint after each step; killed inside the second epoch of both methods.
    monkeypatch.setattr("gigamorph.engine.train.callbacks.SAVE_EVERY", 0.0)
    for task in (BYOLTask, SimCLRTask):
        with killed_at(task, lambda task: -(-len(task.pairs) // config.batch_size) + 3):
            train(table, config, Run(tmp_path / "cut", seed=3, resume=task is SimCLRTask))
    assert train(table, config, Run(tmp_path / "cut", seed=3, resume=True)) == whole
    for name in ("byol", "simclr"):
        first, second = (torch.load(tmp_path / run / "starts" / name / "encoder.pt") for run in ("whole", "cut"))
        assert all(torch.equal(value, second[key]) for key, value in first.items())
        create_model(NET, 2, 1, tmp_path / "cut" / "starts" / name / "encoder.pt")


def test_two_steps_on_real_images(real_data, tmp_path):
    paths = sorted((real_data / "dicom").glob("mg_*.dcm"))[:2]
    own = []
    for patient, split in (("P0", "train"), ("P1", "test")):
        for path, side in zip(paths, "LR", strict=True):
            copy = tmp_path / f"{patient}{side}.dcm"
            shutil.copyfile(path, copy)
            own.append(Record(copy, 0, patient, split, side, "CC"))
    table = write_table(tmp_path / "real.csv", own, ["0"])
    config = replace(
        SMALL, mirror="table", patch=256, stride=1024, tissue=0.3, epochs=2, warm_up=1, batch_size=8, scores=False
    )
    found = train(table, config, Run(tmp_path / "run", memory_budget=200 * 2**20))
    assert found["patches"]["train"] >= 2 and found["probe"].startswith("the table has no findings")
    assert "- Patches were not classified: the table" in (tmp_path / "run" / "model_card.md").read_text()
    shape = open_pixels(paths[0]).shape[1:]
    seen = tifffile.imread(tmp_path / "run" / "maps" / "0.tif")
    assert seen.shape[:2] == tuple((side // 2 - 128) // 64 + 1 for side in shape) and np.isfinite(seen).all()


def test_bad_input_is_told_in_one_line(table, tmp_path):
    text = table.read_text()
    lines = text.splitlines()

    def refused(message, lines=lines, error=DataError, config=SMALL, **settings):
        bad = table.parent / "bad.csv"
        bad.write_text("\n".join(lines))
        with pytest.raises(error, match=message) as caught:
            train(bad, config, Run(tmp_path / "bad", **settings))
        assert "\n" not in str(caught.value)

    refused("has no contralateral view", [line for line in lines if "PHANTOM0001_R" not in line])
    refused(
        "is in train and test", [line.replace("train", "test") if "PHANTOM0001_R" in line else line for line in lines]
    )
    assert not (tmp_path / "bad").exists()
    refused("stage 'pairs', epoch .*: the (loss|gradient) is", error=GigamorphError, config=replace(SMALL, lr=1e30))
    assert list((tmp_path / "bad" / "patches").glob("*.npz"))
    refused("was begun with lr = .* in its configuration, not 0.001", error=GigamorphError, resume=True)
    with pytest.raises(DataError, match="no patch has enough tissue"):
        train(table, replace(SMALL, tissue=1.0, patch=120), Run(tmp_path / "other"))
