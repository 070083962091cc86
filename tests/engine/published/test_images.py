"""Images brought to the size and by the statistics that a published network was made with."""

import numpy as np
import pytest
import torch
from extra_memory import widen_narrow_image
from forked import Forked
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


def widened(grey, height, width):
    """As the authors write it: black beside the image itself, half of it (rounded down) at the left, then stretched."""
    aspect = height / width
    if grey.shape[1] / grey.shape[2] > aspect:
        missing = round(grey.shape[1] / aspect) - grey.shape[2]
        grey = F.pad(grey, (missing // 2, missing - missing // 2))
    return F.interpolate(grey[None], (height, width), mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "given"),
    [
        ((20, 10), (40, 10)),
        ((20, 10), (20, 40)),  # a wide one is only stretched
        ((30, 20), (97, 41)),  # round-offs: 65 columns, 12 of black at the left and as many at the right
        ((64, 31), (333, 118)),
        ((64, 31), (47, 12)),  # enlarged
        ((64, 32), (500, 3)),
        ((2, 2), (3, 1)),
    ],
)
def test_widened_and_stretched(size, given, channels):
    """As two of mammoscreen's networks do; the columns beside the image are of it and of black."""
    pixels, grey = source(*given, channels)
    prepared = PreparedSource(pixels, Preprocessing(channels, size=size, fit="widen"))
    torch.testing.assert_close(whole(prepared), widened(grey.float(), *size), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fit", ["widen", "pad", "stretch"])
@pytest.mark.parametrize("given", [(97, 41), (100, 40), (60, 90), (333, 118)])
def test_a_pixel_of_an_image_that_was_brought_to_a_size_knows_where_it_was(fit, given):
    """Grey values that tell column and row: what a pixel shows is where its middle comes from."""
    height, width = given
    ramps = np.stack([np.broadcast_to(np.arange(width), given), np.broadcast_to(np.arange(height)[:, None], given)])
    prepared = PreparedSource(
        open_pixels(np.ascontiguousarray(np.concatenate([ramps, ramps[:1]]).astype(np.uint16))),
        Preprocessing(3, size=(30, 17), fit=fit),
    )
    rows, columns = np.mgrid[:30, :17] + 0.5
    x, y = np.moveaxis(to_original(prepared).points(np.stack([columns, rows], -1)), -1, 0)
    inside = (x >= 0.5) & (x <= width - 0.5) & (y >= 0.5) & (y <= height - 0.5)
    assert inside.sum() > 100
    shown = whole(prepared).numpy() * 65535
    np.testing.assert_allclose(shown[0][inside], x[inside] - 0.5, rtol=0, atol=0.01)
    np.testing.assert_allclose(shown[1][inside], y[inside] - 0.5, rtol=0, atol=0.01)


def test_a_narrow_image_is_widened_in_the_rows_of_its_new_size():
    """Black beside all of its own rows would take 600 MiB here."""
    process = Forked(widen_narrow_image)
    assert process.wait() == 0, process.error
    assert int(process.output) < 100 * 1024


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
