"""A deformation by a B-spline: beside its definition, its way back, and its recovery by SimpleITK."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gigamorph.engine.datasets.augment import Elastic
from gigamorph.engine.datasets.views import SampledSource
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.images.affine import Affine
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.mammography.phantom import PhantomImage
from gigamorph.engine.mammography.recipes.siamese.register import (
    FreeForm,
    breast_mask,
    downsampled,
    register,
    resample_to,
)


def form(seed=0, size=2.0):
    moves = np.random.default_rng(seed).uniform(-size, size, (2, 7, 6))
    return FreeForm(moves, (-30.0, -20.0), (25.0, 24.0))


def cubic(t):
    t = abs(t)
    return (4 - 6 * t**2 + 3 * t**3) / 6 if t < 1 else (2 - t) ** 3 / 6 if t < 2 else 0.0


@given(st.floats(-5, 44.9), st.floats(4, 99), st.integers(0, 9))
def test_displacement_is_the_sum_over_the_grid(x, y, seed):
    own = form(seed)
    wanted = [x, y]
    for i, j in itertools.product(range(7), range(6)):
        weight = cubic((x + 30) / 25 - j) * cubic((y + 20) / 24 - i)
        wanted[0] += weight * own.moves[0, i, j]
        wanted[1] += weight * own.moves[1, i, j]
    np.testing.assert_allclose(own.points([[x, y]])[0], wanted, rtol=0, atol=1e-11)
    np.testing.assert_allclose(own.inverse().points(own.points([[x, y]])), [[x, y]], rtol=0, atol=1e-5)
    assert own.inverse().inverse() is own


def test_a_fold_has_no_way_back():
    with pytest.raises(DataError, match="folds"):
        form(size=400.0).inverse().points(np.random.default_rng(0).uniform(0, 60, (50, 2)))


def test_regions_are_those_of_the_whole_to_the_last_bit():
    source = open_pixels(PhantomImage(128, 96, seed=1).read(0, 128, 0, 96))
    seen = SampledSource(source, Affine(1.0, 0.0, 2.5) @ form(), "bent")
    whole = seen.read(0, 128, 0, 96)
    assert (seen.read(31, 77, 13, 90) == whole[:, 31:77, 13:90]).all()


def test_a_smooth_deformation_is_recovered_where_an_affine_map_cannot():
    pytest.importorskip("SimpleITK")
    moving = open_pixels(PhantomImage(384, 288, seed=4, symmetry=1.0).read(0, 384, 0, 288))
    known = Affine(1.02, 0.02, 3.0, -0.02, 0.98, 7.5) @ Elastic((np.uint64(4), np.uint64(54)), 12.0, 130.0)
    fixed = SampledSource(moving, known, "bent")
    values = fixed.read(0, 384, 0, 288)
    y, x = np.nonzero(breast_mask(values[0].numpy()))
    points = np.stack([x, y], 1)[:: len(x) // 500] + 0.5
    error = {}
    for method in ("simpleitk", "bspline"):
        found = register(fixed, moving, method)
        error[method] = np.median(np.linalg.norm(found.points(points) - known.points(points), axis=1))
    assert error["bspline"] < 0.5 < 2 < error["simpleitk"], error
    # Seen small, it is the small image of what is seen.
    seen = resample_to(fixed, moving, "bspline")
    np.testing.assert_array_equal(seen.back.points(points), found.points(points))
    small, whole = downsampled(seen, 4).read(0, 96, 0, 72), seen.read(0, 384, 0, 288)
    assert (small - whole.reshape(1, 96, 4, 72, 4).mean((2, 4))).abs().mean() < 0.02 * whole.abs().mean()


def test_simpleitk_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    source = open_pixels(PhantomImage(128, 96, seed=1).read(0, 128, 0, 96))
    with pytest.raises(GigamorphError, match="pip install SimpleITK"):
        register(source, source, "bspline")
