"""Pairs, registration, mixture, loss and asymmetry maps; the recipe on files, killed and resumed."""

import csv
import importlib
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.config import parse_config
from gigamorph.engine.datasets.phantom import PhantomImage, write_phantoms
from gigamorph.engine.datasets.sampling import SampledSource
from gigamorph.engine.datasets.tables import Record, read_table, write_table
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.images.affine import Affine
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.recipes import default_text
from gigamorph.engine.recipes.siamese import SiameseConfig, train
from gigamorph.engine.recipes.siamese.byol import BYOLTask
from gigamorph.engine.recipes.siamese.mixture import Mixture, fit_mixture, soft_labels
from gigamorph.engine.recipes.siamese.network import AsymmetryMap, Embedding, distance, soft_contrastive
from gigamorph.engine.recipes.siamese.pairs import find_pairs
from gigamorph.engine.recipes.siamese.patches import PatchPairs, sources_of, write_patches
from gigamorph.engine.recipes.siamese.probe import probed
from gigamorph.engine.recipes.siamese.register import register, registered
from gigamorph.engine.recipes.siamese.simclr import SimCLRTask
from gigamorph.engine.recipes.siamese.task import SiameseTask
from gigamorph.engine.train.run import Run

SMALL = SiameseConfig(
    model="lesionnet",
    layer="stages",
    patch=32,
    stride=32,
    dim=4,
    warm_up=1,
    epochs=3,
    batch_size=8,
    registration="gauss_newton",
    fractions=(1.0,),
    probe_epochs=1,
)


def test_config_file_holds_the_defaults():
    assert parse_config(default_text("siamese"), SiameseConfig, "siamese.toml") == SiameseConfig()


# ----------------------------------------------------------------------------------------------------------- mixture


def two_gaussians(seed=0, n=4000, share=0.1):
    rng = np.random.default_rng(seed)
    different = rng.random(n) < share
    return np.where(different, rng.normal(0.9, 0.1, n), rng.normal(0.3, 0.06, n)), different


def test_mixture_recovers_two_known_gaussians():
    d, different = two_gaussians()
    found = fit_mixture(d)
    assert found.means == pytest.approx((0.3, 0.9), abs=0.02)
    assert found.deviations == pytest.approx((0.06, 0.1), abs=0.01)
    assert found.share == pytest.approx(0.1, abs=0.01) and found.separated
    assert np.mean((found.posterior(d) > 0.5) == different) > 0.999


@given(
    st.floats(0, 1),
    st.floats(0.01, 1),
    st.floats(0.01, 0.5),
    st.floats(0.01, 0.5),
    st.floats(0.01, 0.5),
)
def test_posterior_never_falls(low, gap, first, second, share):
    mixture = Mixture((low, low + gap), (first, second), share)
    d = np.linspace(-2, 4, 500)
    assert (np.diff(mixture.posterior(d)) >= 0).all()
    # Between the means it is Bayes' rule as it stands.
    between = np.linspace(low, low + gap, 7)
    dense = [
        w * np.exp(-0.5 * ((between - m) / s) ** 2) / s
        for w, m, s in zip((1 - share, share), mixture.means, mixture.deviations, strict=True)
    ]
    ordinary = dense[1] / np.maximum(dense[0] + dense[1], 1e-300)
    known = dense[0] + dense[1] > 1e-200
    np.testing.assert_allclose(mixture.posterior(between)[known], ordinary[known], atol=1e-9)


def test_guards_of_the_mixture():
    same = fit_mixture(np.random.default_rng(0).normal(0.5, 0.1, 2000))
    assert not same.separated or same.means[1] - same.means[0] > 0.1
    assert (
        fit_mixture(two_gaussians(share=0.5)[0]).share == 0.2
        and fit_mixture(two_gaussians(share=0.001)[0]).share >= 0.01
    )
    assert np.isfinite(fit_mixture(np.full(50, 0.3)).posterior([0.1, 0.3, 0.5])).all()  # a floor below the variances
    with pytest.raises(GigamorphError, match="cannot be told apart"):
        fit_mixture([0.1, np.nan, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("rule", ["gmm", "exp", "rank", "hard"])
def test_rules_are_monotone_and_within_limits(rule):
    d, different = two_gaussians()
    labels = soft_labels(d, rule, fit_mixture(d))
    assert labels.min() >= 0 and labels.max() <= 1 and (np.diff(labels[np.argsort(d)]) >= 0).all()
    assert labels[different].mean() > labels[~different].mean() + 0.3
    assert set(np.unique(labels)) == {0, 1} or rule != "hard"


# -------------------------------------------------------------------------------------------------------------- loss


def test_hard_labels_give_the_classic_contrastive_loss():
    d = torch.tensor([0.0, 0.3, 0.8, 1.4])
    assert soft_contrastive(d, torch.zeros(4), 1.0) == pytest.approx(float((d**2).mean()))
    assert soft_contrastive(d, torch.ones(4), 1.0) == pytest.approx(float((1 + 0.7**2 + 0.2**2) / 4))


def test_gradients_are_right_finite_at_zero_and_not_into_the_labels():
    torch.manual_seed(0)
    a, b = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: soft_contrastive(distance(a, b), y, 3.0), (a, b))
    same = torch.ones(2, 3, requires_grad=True)
    soft_contrastive(distance(same, same.detach().clone()), torch.ones(2)).backward()
    assert torch.isfinite(same.grad).all()
    labels = torch.rand(5, dtype=torch.float64, requires_grad=True)
    soft_contrastive(distance(a, b), labels).backward()
    assert labels.grad is None


# ------------------------------------------------------------------------------------------------------ registration


@pytest.mark.parametrize("method", ["gauss_newton", "simpleitk"])
def test_a_known_affine_map_is_recovered(method):
    if method == "simpleitk":
        pytest.importorskip("SimpleITK")
    values = PhantomImage(512, 384, seed=3, symmetry=1.0).read(0, 512, 0, 384)
    moving = open_pixels(values)
    # What lies at p in the fixed image lies at known(p) in the moving one.
    known = Affine(1.03, 0.02, 6.0, -0.03, 0.97, 14.0)
    fixed = SampledSource(moving, known, "moved")
    found = register(fixed, moving, method)
    corners = np.array([[20, 120], [20, 400], [200, 256], [120, 180]])
    error = np.abs(found.points(corners) - known.points(corners)).max()
    assert error < 2.0, error
    seen = registered(fixed, moving, method).read(0, 512, 0, 384)
    wanted = fixed.read(0, 512, 0, 384)
    assert (seen - wanted).abs().mean() < 0.3 * (moving.read(0, 512, 0, 384) - wanted).abs().mean()


def test_images_of_other_sizes_are_seen_on_the_fixed_ones_canvas():
    values = PhantomImage(512, 384, seed=3).read(0, 512, 0, 384)
    fixed = open_pixels(values[:480])
    for method in ("gauss_newton", "none"):
        seen = registered(fixed, open_pixels(values), method)
        assert seen.shape == fixed.shape
        parts = torch.cat([seen.read(0, 200, 0, 384), seen.read(200, 480, 0, 384)], 1)
        assert torch.equal(parts, seen.read(0, 480, 0, 384))
    assert torch.equal(parts, fixed.read(0, 480, 0, 384))
    larger = registered(open_pixels(values), fixed, "none").read(400, 512, 0, 384)
    assert larger.shape == (1, 112, 384) and not larger[:, 80:].any()
    with pytest.raises(DataError, match="no breast"):
        register(fixed, open_pixels(np.zeros((512, 384), np.uint16)), "gauss_newton")


def test_without_simpleitk_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    source = open_pixels(PhantomImage(256, 192, seed=1).read(0, 256, 0, 192))
    with pytest.raises(GigamorphError, match="pip install SimpleITK"):
        register(source, source, "simpleitk")
    found = register(source, source, "auto")
    np.testing.assert_allclose(found.points([[50, 90]]), [[50, 90]], atol=0.1)


# -------------------------------------------------------------------------------------------------- pairs and maps


def records(*sides):
    return [Record(f"{p}{s}{v}.npy", 0, p, "train", s, v) for p, s, v in sides]


def test_pairs_are_of_one_exam_and_view():
    found = find_pairs(records(("a", "L", "CC"), ("a", "R", "MLO"), ("a", "R", "CC"), ("a", "L", "MLO")))
    assert [(p.left.path, p.right.path, p.name) for p in found] == [
        ("aLCC.npy", "aRCC.npy", "a CC"),
        ("aLMLO.npy", "aRMLO.npy", "a MLO"),
    ]
    alone = records(("a", "L", "CC"), ("a", "R", "CC"), ("b", "R", "CC"), ("b", "L", "MLO"))
    with pytest.raises(DataError, match=r"patient b has no contralateral view L CC \(and 1 more\)"):
        find_pairs(alone)
    assert len(find_pairs(alone, skip_unpaired=True)) == 1
    with pytest.raises(DataError, match="no pair"):
        find_pairs(alone[2:], skip_unpaired=True)
    with pytest.raises(DataError, match="two images L CC"):
        find_pairs(records(("a", "L", "CC"), ("a", "L", "CC")))
    with pytest.raises(DataError, match="no laterality"):
        find_pairs([Record("x.npy", 0, "a", "train", None, "CC")])


class Valid(nn.Module):
    """Convolutions without padding, whose patches see what the image shows."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.Tanh(), nn.Conv2d(4, 6, 1), nn.Tanh())

    def forward(self, x):
        return self.body(x)


def test_map_of_a_network_without_padding_is_the_distance_of_patches():
    torch.manual_seed(0)
    embedding = Embedding(Valid(), "", 5, 1, 16).eval()
    left, right = torch.randn(2, 1, 40, 32)
    found = AsymmetryMap(embedding, step=2)(torch.cat([left, right])[None])
    assert found.shape == (1, 1, 4, 3)
    for row in range(4):
        for column in range(3):
            cell = slice(8 * row, 8 * row + 16), slice(8 * column, 8 * column + 16)
            d = distance(*(embedding(image[None, :, *cell]) for image in (left, right)))
            torch.testing.assert_close(found[0, 0, row, column], d[0], rtol=1e-4, atol=1e-5)


def test_map_through_the_scan_is_that_of_the_whole_image():
    torch.manual_seed(0)
    from gigamorph.engine.models import create_model

    embedding = Embedding(create_model("resnet18", 2, 1), "layer2", 5, 1, 32).double()
    module = AsymmetryMap(embedding).eval()
    x = torch.randn(1, 2, 150, 131, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(accelerate(module, tile=64)(x), module(x), rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------------- the networks


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
    with pytest.raises(DataError, match="one class only"):
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


def test_claim_asks_the_probe_to_beat_scratch_at_few_labels(monkeypatch, tmp_path):
    module = importlib.import_module("gigamorph.engine.recipes.siamese.synthetic")
    columns = {"fine_tuned": 0.9, "scratch": 0.8, "probe": 0.85, "untrained_probe": 0.7}
    row = {f"{name}_{n}": value for name, value in columns.items() for n in (8, 20, 60)} | {"soft_label_auc": 0.95}

    def holds(**other):
        monkeypatch.setattr(module, "_one", lambda run, seed: row | other)
        return module.synthetic(Run(tmp_path), [0]).holds

    assert holds() and holds(probe_60=0.75)
    assert not holds(probe_8=0.75) and not holds(probe_20=0.75) and not holds(probe_60=0.65)
    assert not holds(fine_tuned_60=0.75) and not holds(soft_label_auc=0.85)


# -------------------------------------------------------------------------------------------------------- the recipe


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
    found = PatchPairs(files)
    assert len(found) == sum(len(file.cells) for file in files) and len(found.patients) == len(found)
    for index in np.random.default_rng(0).permutation(len(found)):
        number, place = found.where(int(index))
        top, left = files[number].cells[place]
        wanted = [s.read(top, top + 32, left, left + 32).numpy() for s in sources_of(pairs[number], SMALL)]
        np.testing.assert_array_equal(found[int(index)], np.stack(wanted))
    # A kill between the two files of a pair: both are written again; what is there is not.
    files[0].path.with_suffix(".npz").unlink()
    again = write_patches(pairs[0], SMALL, tmp_path)
    np.testing.assert_array_equal(again.patches, files[0].patches)
    np.testing.assert_array_equal(again.boxes, files[0].boxes)
    monkeypatch.setattr("gigamorph.engine.recipes.siamese.patches.sources_of", None)
    assert write_patches(pairs[1], SMALL, tmp_path).path == files[1].path


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(table, tmp_path, monkeypatch):
    whole = train(table, SMALL, Run(tmp_path / "whole", seed=3))
    assert whole["pairs"] == {"train": 3, "val": 1, "test": 2} and len(whole["epochs"]) == 2
    loss, calls = SiameseTask.loss, []

    def killed(self, batch):
        calls.append(batch)
        if len(calls) == 2 * -(-len(self.pairs) // SMALL.batch_size) + 1:  # in the third epoch
            raise RuntimeError("killed")
        return loss(self, batch)

    monkeypatch.setattr(SiameseTask, "loss", killed)
    with pytest.raises(RuntimeError, match="killed"):
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
    assert len(maps) == 2 and all(
        m.shape[:2] == (160 // 8 // 2 - 1, 128 // 8 // 2 - 1) and np.isfinite(m).all() for m in maps
    )
    # Weights for a network of the same name.
    from gigamorph.engine.models import create_model

    create_model("lesionnet", 2, 1, tmp_path / "cut" / "encoder.pt")


def test_every_start_is_compared_and_a_kill_in_any_changes_nothing(table, tmp_path, monkeypatch):
    from gigamorph.engine.models import create_model

    weights = tmp_path / "weights.pt"
    torch.save(create_model("lesionnet", 2, 1).state_dict(), weights)
    config = replace(
        SMALL,
        weights=str(weights),
        starts=("byol", "weights", "simclr", "scratch", "siamese"),
        hidden=16,
        epochs=2,
        batch_size=3,
        maps=False,
    )
    whole = train(table, config, Run(tmp_path / "whole", seed=3))
    assert [row["start"] for row in whole["probe"]] == list(config.starts)
    assert all(0 <= row[key] <= 1 for row in whole["probe"] for key in ("probe", "fine_tuned"))
    card = (tmp_path / "whole" / "model_card.md").read_text()
    assert "# Model card: siamese, lesionnet" in card and "- weights: given" in card and str(tmp_path) not in card
    row = whole["probe"][0]
    assert f"(100%), start byol: AUC {row['probe']:.3f} by a linear probe, {row['fine_tuned']:.3f} fine-tuned." in card
    # A checkpoint after each step; killed inside the second epoch of both methods.
    monkeypatch.setattr("gigamorph.engine.train.callbacks.SAVE_EVERY", 0.0)
    for task in (BYOLTask, SimCLRTask):
        loss, calls = task.loss, []

        def killed(self, batch, loss=loss, calls=calls):
            calls.append(batch)
            if len(calls) == -(-len(self.pairs) // config.batch_size) + 3:
                raise RuntimeError("killed")
            return loss(self, batch)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(task, "loss", killed)
            train(table, config, Run(tmp_path / "cut", seed=3, resume=task is SimCLRTask))
        assert len(calls) > 3
    assert train(table, config, Run(tmp_path / "cut", seed=3, resume=True)) == whole
    for name in ("byol", "simclr"):
        first, second = (torch.load(tmp_path / run / "starts" / name / "encoder.pt") for run in ("whole", "cut"))
        assert all(torch.equal(value, second[key]) for key, value in first.items())
        create_model("lesionnet", 2, 1, tmp_path / "cut" / "starts" / name / "encoder.pt")


def test_two_steps_on_real_images(real_data, tmp_path):
    paths = sorted((real_data / "dicom").glob("mg_*.dcm"))[:2]
    own = []
    for patient, split in (("P0", "train"), ("P1", "test")):
        for path, side in zip(paths, "LR", strict=True):
            link = tmp_path / f"{patient}{side}.dcm"
            link.symlink_to(path)
            own.append(Record(link, 0, patient, split, side, "CC"))
    table = write_table(tmp_path / "real.csv", own, ["0"])
    config = replace(SMALL, mirror="table", patch=256, stride=1024, tissue=0.3, epochs=2, warm_up=1, batch_size=8)
    found = train(table, config, Run(tmp_path / "run", memory_budget=200 * 2**20))
    assert found["patches"]["train"] >= 2 and found["probe"].startswith("the table has no findings")
    assert "- Patches were not classified: the table" in (tmp_path / "run" / "model_card.md").read_text()
    shape = open_pixels(paths[0]).shape[1:]
    seen = tifffile.imread(tmp_path / "run" / "maps" / "0.tif")
    assert seen.shape[:2] == tuple((side // 8 - 32) // 16 + 1 for side in shape) and np.isfinite(seen).all()


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
    refused("another lr", error=GigamorphError, resume=True)
    with pytest.raises(DataError, match="no patch has enough tissue"):
        train(table, replace(SMALL, tissue=1.0, patch=120), Run(tmp_path / "other"))
