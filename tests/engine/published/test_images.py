"""Images brought to the size and by the statistics that a published network was made with."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gigamorph import open_pixels
from gigamorph.engine.images.pixels import to_original
from gigamorph.engine.models.folder import Preprocessing
from gigamorph.engine.published.images import PreparedSource


def source(height=40, width=16, channels=1):
    pixels = np.random.default_rng(1).integers(0, 65535, (channels, height, width), np.uint16)
    return open_pixels(pixels), torch.from_numpy(pixels.astype(np.float64) / 65535)


def whole(prepared):
    return prepared.read(0, prepared.shape[1], 0, prepared.shape[2])


def test_padded_to_a_size():
    """As the RSNA 2023 winner does: bilinear, as large as fits, black around it."""
    given, grey = source()
    prepared = PreparedSource(given, Preprocessing(1, (0.4,), (0.2,), size=(20, 20), fit="pad"))
    wanted = torch.zeros(1, 20, 20, dtype=torch.float64)
    wanted[:, :, 6:14] = F.interpolate(grey[None], (20, 8), mode="bilinear")[0]
    torch.testing.assert_close(whole(prepared).double(), (wanted - 0.4) / 0.2, rtol=0, atol=1e-5)
    torch.testing.assert_close(prepared.read(3, 9, 5, 12), whole(prepared)[:, 3:9, 5:12], rtol=0, atol=0)
    assert to_original(prepared).boxes([6, 0, 14, 20]).tolist() == [0, 0, 16, 40]


def test_widened_and_stretched():
    """As two of mammoscreen's networks do: black beside a narrow image, then stretched; wide ones only stretched."""
    given, grey = source(40, 10)
    prepared = PreparedSource(given, Preprocessing(1, size=(20, 10), fit="widen"))
    canvas = F.pad(grey, (5, 5))  # aspect 2
    inner = F.interpolate(grey[None], (20, 5), mode="bilinear")[0]
    assert canvas.shape == (1, 40, 20)
    torch.testing.assert_close(whole(prepared)[:, :, 2:7].double(), inner, rtol=0, atol=1e-5)
    assert not whole(prepared)[:, :, :2].any() and not whole(prepared)[:, :, 7:].any()
    given, grey = source(20, 40)
    prepared = PreparedSource(given, Preprocessing(1, size=(20, 10), fit="widen"))
    wanted = F.interpolate(grey[None], (20, 10), mode="bilinear")[0]
    torch.testing.assert_close(whole(prepared).double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [None, (600, 300)])
def test_statistics_of_the_image_itself(size):
    """As GMIC's mean and deviation, and Mammo-CLIP's extremes; over more rows than are read at a time."""
    given, grey = source(700, 31)
    given_to = grey if size is None else F.interpolate(grey.float()[None], size, mode="bilinear")[0].double()
    standard = PreparedSource(given, Preprocessing(1, per_image="standard", size=size, fit="stretch"))
    wanted = (given_to - given_to.mean()) / given_to.std(correction=0)
    torch.testing.assert_close(whole(standard).double(), wanted, rtol=0, atol=1e-5)
    extremes = PreparedSource(given, Preprocessing(1, (0.3,), (0.25,), per_image="minmax", size=size, fit="stretch"))
    wanted = ((given_to - given_to.min()) / (given_to.max() - given_to.min()) - 0.3) / 0.25
    torch.testing.assert_close(whole(extremes).double(), wanted, rtol=0, atol=1e-5)


def test_an_even_image_is_no_division_by_zero():
    given = open_pixels(np.full((1, 8, 8), 7, np.uint8))
    for kind in ("standard", "minmax"):
        assert whole(PreparedSource(given, Preprocessing(1, per_image=kind))).isfinite().all()
