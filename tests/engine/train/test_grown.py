"""A grown network goes on training from its file; checkpoints of it are predicted with, resumed and grown on."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from training import make_data

from gigamorph.engine.errors import DataError, GigamorphError, MorphError
from gigamorph.engine.models.registry import create_model
from gigamorph.engine.morph.deepen import deepen
from gigamorph.engine.morph.files import Grown, Origin, add_morph, create_grown, open_network, save_network
from gigamorph.engine.morph.head import grow_head
from gigamorph.engine.morph.inputs import add_planes
from gigamorph.engine.morph.widen import widen
from gigamorph.engine.train.checkpoint import load_checkpoint
from gigamorph.engine.train.fit import fit
from gigamorph.engine.train.network import restore_network
from gigamorph.engine.train.option_checks import _meta_network, check_choices
from gigamorph.engine.train.options import Optimizer, TrainOptions

OPTIONS = TrainOptions(model="grown_nets:small", epochs=1, accumulate=3, seed=5)
X = torch.zeros(1, 1, 64, 64)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A folder with a network's factory."""
    (tmp_path / "grown_nets.py").write_text(
        "from torch import nn\n"
        "def small(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 8, 3, 2), nn.ReLU(),\n"
        "                         nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    sys.modules.pop("grown_nets", None)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def wide(classes: int = 2) -> Grown:
    parent = open_network("grown_nets:small", None, classes)
    return add_morph(parent, *widen(parent.network, X, factor=2))


@pytest.mark.parametrize("name", ["wide.safetensors", "wide.pt"])
def test_a_grown_network_is_trained_on_restored_resumed_and_grown_on(name, tmp_path):
    grown = wide()
    save_network(name, grown)
    data = make_data()
    fitted = fit(data, replace(OPTIONS, weights=name), "run")
    assert fitted.net[0].out_channels == 8 and fitted.metrics["best_epoch"] == 1
    stored = load_checkpoint("run/best.ckpt")
    (tmp_path / name).unlink()  # the checkpoint is whole without it
    net = restore_network(stored, "best.ckpt", memory_budget=None, device="cpu")
    image = torch.rand(1, 1, 40, 40)
    with torch.no_grad():
        assert torch.equal(net.eval()(image), fitted.net.eval()(image))
    resumed = fit(data, OPTIONS, "run", resume=True)
    assert resumed.net[0].out_channels == 8
    again = open_network("grown_nets:small", "run/best.ckpt")
    wider = add_morph(again, *widen(again.network, X, factor=1.5))
    assert wider.network[0].out_channels == 12 and len(wider.recipe.morphs) == 2


def test_weights_that_are_trained_are_those_of_the_file():
    grown = wide()
    save_network("wide.safetensors", grown)
    fitted = fit(make_data(), replace(OPTIONS, weights="wide.safetensors", optimizer=Optimizer(lr=1e-12)), "run")
    for name, value in grown.network.state_dict().items():
        assert torch.allclose(fitted.net.state_dict()[name], value, atol=1e-6), name


def test_another_number_of_classes_gets_a_new_last_layer(caplog):
    save_network("wide.safetensors", wide(5))
    fitted = fit(make_data(), replace(OPTIONS, weights="wide.safetensors"), "run")
    assert fitted.net[0].out_channels == 8 and fitted.net[6].out_features == 2
    assert "classifier of another shape skipped" in caplog.text


def test_where_it_began_is_found_through_changed_heads_and_inputs():
    grown = wide(3)
    grown = add_morph(grown, *grow_head(grown.network, X, "6", 5))
    grown = add_morph(grown, *add_planes(grown.network, torch.zeros(1, 3, 64, 64), 2))
    save_network("g.safetensors", grown)
    origin = Origin.of_file("grown_nets:small", "g.safetensors", 3)
    assert origin is not None and (origin.classes, origin.channels) == (3, 1)
    assert Origin.from_record(origin.record()).build("grown_nets:small", 4)[6].out_features == 4
    with pytest.raises(DataError, match="images of 3 channels, not 1"):
        Origin.of_file("grown_nets:small", "g.safetensors", 1)
    with pytest.raises(MorphError, match="its network was not grown from 'resnet18'"):
        Origin.of_file("resnet18", "g.safetensors", 3)


def test_a_file_as_a_model():
    grown = wide()
    save_network("wide.safetensors", grown)
    net = create_grown("grown_nets:small+wide.safetensors", 1000, 1)
    for name, value in grown.network.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)
    assert create_grown("grown_nets:small", 7, 1)[6].out_features == 7
    torch.save(create_grown("grown_nets:small", 2, 1).state_dict(), "plain.pt")
    with pytest.raises(MorphError, match="no recipe of a grown network"):
        create_grown("grown_nets:small+plain.pt", 2, 1)


def test_parts_of_a_grown_network_are_looked_for_in_it():
    """Not in the network that it began as, which does not have what was put between its layers."""
    parent = open_network("grown_nets:small", None, 2)
    grown = add_morph(parent, *deepen(parent.network, X, "0"))
    save_network("deep.safetensors", grown)
    own = {name for name, _ in grown.network.named_parameters()}
    [new, *_] = sorted(own - {name for name, _ in parent.network.named_parameters()})
    check_choices(replace(OPTIONS, weights="deep.safetensors", freeze=(new,)), 1, (), ())
    with pytest.raises(GigamorphError, match="matches no parameter"):
        check_choices(replace(OPTIONS, freeze=(new,)), 1, (), ())
    fit(make_data(), replace(OPTIONS, weights="deep.safetensors", freeze=(new,)), "run")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"model": "resnet19"}, "unknown model 'resnet19'; use one of"),
        ({"model": "no_such_module:net"}, "no module 'no_such_module'"),
        ({"weights": "none.pt"}, "none.pt: no such weights file"),
    ],
)
def test_a_network_that_is_not_there_is_told_before_any_image_is_read(wrong, told):
    with pytest.raises(GigamorphError, match=told):
        check_choices(replace(OPTIONS, **wrong), 1, (), ())


def test_the_parts_of_a_network_are_looked_for_without_its_memory():
    names = [name for name, p in _meta_network("resnet18", 1).named_parameters() if p.is_meta]
    assert names == [name for name, _ in create_model("resnet18", in_channels=1).named_parameters()]
