"""Affine maps back to the file: boxes and maps of mirrored, averaged and cropped images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gigamorph.engine.datasets.views import DownsampledSource, MirroredSource
from gigamorph.engine.errors import DataError
from gigamorph.engine.images.affine import Affine
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import steps_of, to_original

numbers = st.floats(-100, 100, allow_subnormal=False)


@given(values=st.lists(numbers, min_size=12, max_size=12), point=st.tuples(numbers, numbers))
def test_composition_and_inverse(values: list[float], point: tuple[float, float]) -> None:
    first, second = Affine(*values[:6]), Affine(*values[6:])
    np.testing.assert_allclose((second @ first).points(point), second.points(first.points(point)), atol=1e-6)
    if abs(first.xx * first.yy - first.xy * first.yx) > 1:
        np.testing.assert_allclose(first.inverse().points(first.points(point)), point, atol=1e-6)


def test_no_way_back_from_a_line() -> None:
    with pytest.raises(DataError, match="cannot be inverted because"):
        Affine.scale(1, 0).inverse()


@pytest.mark.parametrize("left_right", [False, True])
@pytest.mark.parametrize("up_down", [False, True])
def test_boxes_and_maps_of_sources(left_right: bool, up_down: bool) -> None:
    """A box around pixels of the changed image becomes the box around the pixels that they were made of."""
    image = np.random.default_rng(0).random((48, 63)).astype(np.float32)
    source = MirroredSource(DownsampledSource(open_pixels(image, flip=True), 3), left_right=left_right, up_down=up_down)
    top, bottom, left, right = 2, 9, 4, 11
    seen = source.read(top, bottom, left, right).numpy()[0]
    x0, y0, x1, y1 = to_original(source).boxes([left, top, right, bottom]).astype(int)
    assert (x1 - x0, y1 - y0) == (21, 21)
    part = image[y0:y1, x0:x1].reshape(7, 3, 7, 3).mean((1, 3))
    np.testing.assert_allclose(seen, part[:: -1 if up_down else 1, :: 1 if left_right else -1], rtol=1e-5)
    assert "averaged over 3 x 3 pixels" in steps_of(source)
    # The mirrored image carried back is the image.
    mirrored = MirroredSource(open_pixels(image), left_right=left_right, up_down=up_down)
    values = mirrored.read(0, 48, 0, 63)[0]
    np.testing.assert_array_equal(mirrored.to_original.resample(values, 5, 41, 7, 60), image[5:41, 7:60])


def test_heat_map_at_a_stride() -> None:
    """A map at stride 4 of a mirrored crop is drawn bilinearly where the crop lay, and is 0 elsewhere."""
    heat = np.add.outer(np.arange(5.0), 10 * np.arange(7.0)).astype(np.float32)
    crop = Affine.shift(3, 2) @ Affine.mirror(20, 28, left_right=True, up_down=False)
    back = crop @ Affine.scale(4)
    drawn = back.resample(heat, 0, 30, 0, 40)
    rows, columns = np.mgrid[0:30, 0:40] + 0.5
    y, x = (rows - 2) / 4, (28 - (columns - 3)) / 4
    expected = np.clip(y - 0.5, 0, 4) + 10 * np.clip(x - 0.5, 0, 6)
    expected = np.where((y >= 0) & (y <= 5) & (x >= 0) & (x <= 7), expected, 0)
    np.testing.assert_allclose(drawn, expected, atol=1e-4)
    assert np.all(drawn[:2] == 0)
    assert drawn[2:22, 3:31].max() > 60
    np.testing.assert_array_equal(back.resample(heat, 10, 20, 5, 25), drawn[10:20, 5:25])


def test_sources_that_do_not_say() -> None:
    class Plain:
        shape, name = (1, 4, 4), "plain"

        def read(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
            return torch.zeros(1, bottom - top, right - left)

    source = MirroredSource(Plain(), left_right=True, up_down=False)
    assert to_original(source) == Affine(xx=-1, x0=4)
    assert steps_of(source) == ("mirrored left-right",)


def test_nothing_that_names_the_file_gets_into_the_steps(tmp_path: Path) -> None:
    path = tmp_path / "Jane_Doe.npy"
    np.save(path, np.zeros((4, 4), np.uint16))
    assert open_pixels(path).steps == ("array, uint16", "grey 0 to 65535 as 0 to 1")
