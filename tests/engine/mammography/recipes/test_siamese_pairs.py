"""siamese: registration, pairs of contralateral views, and asymmetry maps."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.datasets.views import SampledSource
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.images.affine import Affine
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.mammography.phantom import PhantomImage
from gigamorph.engine.mammography.recipes.siamese.network import AsymmetryMap, Embedding, distance
from gigamorph.engine.mammography.recipes.siamese.pairs import find_pairs
from gigamorph.engine.mammography.recipes.siamese.register import register, resample_to


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
    seen = resample_to(fixed, moving, method).read(0, 512, 0, 384)
    wanted = fixed.read(0, 512, 0, 384)
    assert (seen - wanted).abs().mean() < 0.3 * (moving.read(0, 512, 0, 384) - wanted).abs().mean()


def test_images_of_other_sizes_are_seen_on_the_fixed_ones_canvas():
    values = PhantomImage(512, 384, seed=3).read(0, 512, 0, 384)
    fixed = open_pixels(values[:480])
    for method in ("gauss_newton", "none"):
        seen = resample_to(fixed, open_pixels(values), method)
        assert seen.shape == fixed.shape
        parts = torch.cat([seen.read(0, 200, 0, 384), seen.read(200, 480, 0, 384)], 1)
        assert torch.equal(parts, seen.read(0, 480, 0, 384))
    assert torch.equal(parts, fixed.read(0, 480, 0, 384))
    larger = resample_to(open_pixels(values), fixed, "none").read(400, 512, 0, 384)
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
    twice = [*records(("a", "L", "CC")), Record("again.npy", 0, "a", "train", "L", "CC"), *records(("a", "R", "CC"))]
    with pytest.raises(DataError, match=r"two images L CC.*skip_unpaired = true"):
        find_pairs(twice)
    said = []
    [pair] = find_pairs([*twice, *alone[2:]], skip_unpaired=True, say=said.append)[:1]
    assert (pair.left.path, pair.right.path) == ("aLCC.npy", "aRCC.npy")
    assert said == ["omitted 3 of 5 images, which have no contralateral view or repeat a side and view: again.npy"]
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
