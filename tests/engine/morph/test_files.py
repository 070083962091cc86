"""Grown networks in files: what is found with the weights, what fits, and how two are compared."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from gigamorph.engine.errors import MorphError
from gigamorph.engine.models import LesionNet
from gigamorph.engine.morph.deepen import insert_residual
from gigamorph.engine.morph.files import (
    Grown,
    add_morph,
    compare_networks,
    open_network,
    recipe_path,
    save_network,
    verdict,
)
from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.inputs import add_planes
from gigamorph.engine.morph.recipe import Recipe
from gigamorph.engine.morph.step import Difference
from gigamorph.engine.morph.store import read_state, write_state
from gigamorph.engine.morph.widen import widen


@pytest.fixture
def grown(made: Grown) -> Grown:
    return copy.deepcopy(made)


@pytest.fixture(scope="module")
def made() -> Grown:
    """A small network that was widened, got a front and one more image plane."""
    torch.manual_seed(0)
    parent = Grown(LesionNet(2, 1))
    parent = add_morph(parent, *widen(parent.network, parent.example(), factor=1.5))
    parent = add_morph(parent, *front(parent.network, parent.example(), 2))
    return add_morph(parent, *add_planes(parent.network, torch.zeros(1, 2, 128, 128), 1))


def test_what_a_recipe_says_of_the_images(grown):
    assert grown.channels == 2 and grown.shrink == 2 and grown.example().shape == (1, 2, 128, 128)
    assert grown.example((64, 32)).shape == (1, 2, 64, 32)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_round_trip(grown, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    beside = {".safetensors": "a.recipe.json", ".pt": "a.pt.recipe.json"}[suffix]
    assert save_network(path, grown) == recipe_path(path) == tmp_path / beside
    for name in (path, recipe_path(path)):
        back = open_network("lesionnet", name)
        assert back.channels == 2 and back.recipe.morphs == grown.recipe.morphs
        for key, value in back.network.state_dict().items():
            assert torch.equal(value, grown.network.state_dict()[key])


def test_no_two_files_share_a_recipe(tmp_path):
    torch.manual_seed(0)
    parent = Grown(LesionNet(2, 1))
    wide = add_morph(parent, *widen(parent.network, parent.example(), factor=1.5))
    wider = add_morph(parent, *widen(parent.network, parent.example(), factor=2))
    for name, net in (("b.pt", wide), ("b.safetensors", wider), ("b.pth", wide)):
        save_network(tmp_path / name, net)
    for name, net in (("b.pt", wide), ("b.safetensors", wider), ("b.pth", wide)):
        for file in (tmp_path / name, recipe_path(tmp_path / name)):
            assert open_network("lesionnet", file).recipe.morphs == net.recipe.morphs


def test_the_header_counts_and_a_bare_file_takes_the_recipe_beside_it(grown, tmp_path):
    path = tmp_path / "a.safetensors"
    save_network(path, grown)
    recipe_path(path).write_text("damaged")
    assert len(open_network("lesionnet", path).recipe.morphs) == 3
    write_state(path, dict(read_state(path)))
    with pytest.raises(MorphError, match=r"a\.recipe\.json: the recipe is not JSON"):
        open_network("lesionnet", path)
    recipe_path(path).unlink()
    with pytest.raises(MorphError, match="put its recipe in the same folder"):
        open_network("lesionnet", path)
    with pytest.raises(MorphError, match=r"its weights none\.safetensors are missing"):
        open_network("lesionnet", tmp_path / "none.recipe.json")


def test_weights_keep_the_dtype_of_the_file_and_certificates_hold_in_it(tmp_path):
    path = tmp_path / "a.safetensors"
    write_state(path, {name: value.bfloat16() for name, value in LesionNet(2, 1).state_dict().items()})
    parent = open_network("lesionnet", path)
    child, report = widen(parent.network, parent.example(), factor=2)
    assert {p.dtype for p in child.parameters()} == {torch.bfloat16}
    assert report.certificate is not None and report.certificate.violations == 0
    assert all(p.requires_grad for p in child.parameters())


def test_the_counter_of_batch_norm_may_be_missing(tmp_path):
    from gigamorph.engine.models import resnet18

    state = {n: t for n, t in resnet18(2, 1).state_dict().items() if not n.endswith("num_batches_tracked")}
    write_state(tmp_path / "a.safetensors", state)
    open_network("resnet18", tmp_path / "a.safetensors")
    state["fc.bias"] = torch.zeros(3)
    write_state(tmp_path / "a.safetensors", state)
    with pytest.raises(MorphError, match=r"fc\.bias is \(3,\), the model has \(2,\)"):
        open_network("resnet18", tmp_path / "a.safetensors")


def test_siblings_are_compared_directly_unless_one_reads_other_images():
    torch.manual_seed(0)
    parent = Grown(LesionNet(2, 1))
    wide = add_morph(parent, *widen(parent.network, parent.example(), factor=2))
    deep = add_morph(parent, *insert_residual(parent.network, parent.example(), "stem"))
    large = add_morph(parent, *front(parent.network, parent.example(), 2))
    assert verdict(compare_networks(wide, deep)) == (True, "equal")
    assert verdict(compare_networks(wide, large)) == (True, "equal")
    with pytest.raises(MorphError, match="in that order"):
        compare_networks(large, wide)


def test_other_networks_are_found_to_be_different():
    one, other = Grown(LesionNet(2, 1)), Grown(LesionNet(2, 1))
    equal, text = verdict(compare_networks(one, other))
    assert not equal and text.startswith("different: by ")


@pytest.mark.parametrize(
    ("float64", "float32", "train", "expected"),
    [
        (1e-16, 2e-7, 1e-16, (True, "equal")),
        (1e-8, 2e-7, 1e-8, (True, "equal up to the rounding of the stored weights")),
        (1e-16, 2e-7, 0.5, (True, "equal in eval mode; in train mode they differ by 5.0e-01")),
        (1e-5, 1e-5, 1e-5, (False, "different: by 1.0e-05, the first one's own rounding noise is 1.0e-07")),
        (1e-16, 1e-5, 1e-16, (False, "different: by 1.0e-16, the first one's own rounding noise is 1.0e-07")),
        (math.nan, math.nan, 0.0, (False, "different: by nan, the first one's own rounding noise is 1.0e-07")),
    ],
)
def test_verdict(float64, float32, train, expected):
    assert verdict(Difference(float64, train, float32, max(train, 1e-7), 1e-7, 1e-7)) == expected


def test_a_head_that_is_a_map_of_classes():
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    from gigamorph.engine.morph.head import grow_head, split_class

    torch.manual_seed(0)
    parent = Grown(net())
    child = add_morph(parent, *grow_head(parent.network, parent.example(), "2", 5, "softmax"))
    child = add_morph(child, *split_class(child.network, child.example(), "2", 1, 2))
    equal, _ = verdict(compare_networks(parent, child))
    assert equal
    with torch.no_grad():
        child.network.get_parameter("2.bias")[1] += 0.1
    assert not verdict(compare_networks(parent, child))[0]


def test_nothing_is_written_where_it_cannot_be(grown, tmp_path):
    with pytest.raises(MorphError, match="the name must end in one of"):
        save_network(tmp_path / "a.onnx", grown)
    with pytest.raises(MorphError, match=r"the folder .* does not exist"):
        save_network(tmp_path / "b" / "a.pt", grown)
    assert not list(Path(tmp_path).iterdir()) and isinstance(grown.recipe, Recipe)
