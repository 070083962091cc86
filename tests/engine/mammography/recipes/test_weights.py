"""Weights of others: named, found, refused, fitted to inputs of their scale; the names in published files."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gigamorph.engine.datasets.tables import Record, write_table
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.mammography.recipes import RECIPES, get_recipe
from gigamorph.engine.mammography.recipes.dvme.network import make_extractor
from gigamorph.engine.mammography.recipes.end2end.network import features
from gigamorph.engine.mammography.recipes.weights import PUBLISHED, check_inputs, find_weights, load_pretrained
from gigamorph.engine.models import create_model
from gigamorph.engine.models.compat import make_torchvision_importable
from gigamorph.engine.train.run import Run

make_torchvision_importable()

PRETRAINED = sorted(set(RECIPES) - {"siamese"})


def named(config):
    """The files of weights of a configuration."""
    parts = getattr(config, "models", getattr(config, "extractors", (config,)))
    return [part.weights for part in parts]


@pytest.mark.parametrize("name", PRETRAINED)
def test_default_inputs_are_of_the_scale_that_the_weights_are_used_to(name):
    """Those of end2end were 58 times too large: grey values from 0 to 255, for weights of torchvision."""
    config = get_recipe(name).config()
    files = [file for file in named(config) if file != "random"]
    assert files and all(file in PUBLISHED for file in files)
    for file in files:
        check_inputs(file, PUBLISHED[file], config.mean, config.std)
        # An image of middle contrast, as the network sees it, and as it saw those that it was trained on.
        grey = torch.linspace(0.1, 0.7, 100)
        ours = (grey - np.mean(config.mean)) / np.mean(config.std)
        theirs = (grey - np.mean(PUBLISHED[file].mean)) / np.mean(PUBLISHED[file].std)
        assert 0.5 < float(ours.std() / theirs.std()) < 2


@pytest.mark.parametrize(
    ("mean", "std", "told"),
    [
        ((52.18 / 255,), (1 / 255,), "57.6 times as large as"),
        ((52.18,), (0.226,), "far from"),
        ((103.939, 116.779, 123.68), (1.0, 1.0, 1.0), "far from"),
    ],
)
def test_inputs_of_another_scale_are_refused(mean, std, told):
    with pytest.raises(GigamorphError, match=f"make inputs {told} those that resnet50 was trained on") as caught:
        check_inputs("resnet50", PUBLISHED["resnet50-0676ba61.pth"], mean, std)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRETRAINED)
def test_without_its_weights_a_recipe_does_not_begin(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    records = []
    for i in range(12):
        np.save(tmp_path / f"{i}.npy", np.zeros((8, 8), np.uint16))
        records.append(Record(tmp_path / f"{i}.npy", i % 2, f"p{i}", ("train", "val", "test")[i // 4]))
    table = write_table(tmp_path / "table.csv", records, ["0", "1"])
    with pytest.raises(GigamorphError, match=r'no such file; download it from https://.* or write weights = "random"'):
        get_recipe(name).train(table, get_recipe(name).config(), Run(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_files_are_found_checked_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    said = []
    run = Run(tmp_path, say=said.append)
    assert find_weights("random", (0.5,), (0.2,), run) is None and said == ["weights: random, without pretraining"]
    with pytest.raises(GigamorphError, match=r"weights 'mine.pth': no such file; use another"):
        find_weights("mine.pth", (0.5,), (0.2,))
    cached = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"SHA-256 begins with .*, not with 0676ba61"):
        find_weights("resnet50-0676ba61.pth", (0.45,), (0.226,))
    # Known by its bytes under another name; of an unknown file no scale is known.
    (tmp_path / "mine.pth").write_bytes(b"mine")
    assert str(find_weights("mine.pth", (0.0,), (1 / 255,), run)) == "mine.pth" and "SHA-256" in said[-1]
    monkeypatch.setitem(PUBLISHED, "theirs.pth", replace(PUBLISHED["resnet50-0676ba61.pth"], sha256=said[-1][-8:]))
    with pytest.raises(GigamorphError, match="times as large as"):
        find_weights("mine.pth", (0.449,), (1 / 255,))
    assert find_weights(str(tmp_path / "mine.pth"), (0.449,), (0.226,), run).name == "mine.pth"
    assert said[-1].endswith(PUBLISHED["theirs.pth"].source)


# ------------------------------------------------------------------------------------------------------- names in files


@pytest.mark.parametrize("form", ["plain", "vissl", "swav", "dino"])
def test_published_files_of_weights(tmp_path, form):
    torch.manual_seed(0)
    state = make_extractor("resnet18", 3).network.state_dict()
    below = {f"backbone.{name}": value for name, value in state.items()} | {"head.mlp.0.weight": torch.ones(2)}
    head = {"projection_head.0.weight": torch.randn(3, 3), "prototypes.weight": torch.randn(2, 2)}
    stored = {
        "plain": state,
        "vissl": {
            "classy_state_dict": {
                "base_model": {"model": {"trunk": {f"_feature_blocks.{k}": v for k, v in state.items()}, "heads": head}}
            }
        },
        "swav": {f"module.{k}": v for k, v in (state | head).items()},
        "dino": {"student": {}, "teacher": below},
    }
    torch.save(stored[form], tmp_path / "w.pth")
    network = make_extractor("resnet18", 3).network
    left_out = load_pretrained(network, tmp_path / "w.pth")
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert len(left_out) == {"plain": 0, "vissl": 0, "swav": 2, "dino": 1}[form]


def test_weights_that_do_not_fit_are_refused(tmp_path):
    network = make_extractor("resnet18", 3).network
    state = network.state_dict()
    for change, message in (
        ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, r"conv1.weight is \(64, 1, 7, 7\), the network has \(64, 3"),
        ({"extra.weight": torch.zeros(1)}, "extra.weight is not in the network"),
    ):
        torch.save({**state, **change}, tmp_path / "w.pth")
        with pytest.raises(DataError, match=message):
            load_pretrained(network, tmp_path / "w.pth")
    torch.save({"a": 1}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="contains no state_dict"):
        load_pretrained(network, tmp_path / "w.pth")
    with pytest.raises(DataError, match="no such weights file"):
        load_pretrained(network, tmp_path / "none.pth")


def small(network):
    """A file's tensors by their names, with the memory of one number each."""
    return {name: torch.zeros(()).expand(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize(
    ("maker", "name", "ours"),
    [
        ("torchvision", "alexnet", "gigamorph.engine.mammography.recipes.cae.alexnet:AlexNet"),
        ("torchvision", "resnet50", "resnet50"),
        ("torchvision", "resnet50", "timm:resnet50"),
        ("timm", "resnet50", "resnet50"),
        ("timm", "resnet50", "timm:resnet50"),
        ("timm", "vit_small_patch8_224", "timm:vit_small_patch8_224.dino"),
    ],
)
def test_names_of_torchvision_and_timm(maker, name, ours, tmp_path):
    """All tensors of a published file but its classifier of a thousand classes, into networks of two."""
    with torch.device("meta"):
        if maker == "timm":
            theirs = pytest.importorskip("timm").create_model(name)
        else:
            theirs = getattr(pytest.importorskip("torchvision").models, name)()
        network = create_model(ours, 2, 3)
    torch.save(small(theirs), tmp_path / "w.pth")
    left_out = load_pretrained(network, tmp_path / "w.pth")
    assert len(left_out) == (0 if name.startswith("vit") else 2)  # DINO's has no classifier


@pytest.mark.parametrize("maker", ["torchvision", "timm"])
def test_names_of_vgg_16(maker, tmp_path):
    """The published features go into timm's network, whose classifier is built otherwise."""
    pytest.importorskip("timm")
    with torch.device("meta"):
        if maker == "timm":
            theirs = pytest.importorskip("timm").create_model("vgg16")
        else:
            theirs = pytest.importorskip("torchvision").models.vgg16()
        torch.save(small(theirs), tmp_path / "w.pth")
        maps = features("timm:vgg16", 3, tmp_path / "w.pth")
    assert len([name for name, _ in maps.named_parameters()]) == 26
