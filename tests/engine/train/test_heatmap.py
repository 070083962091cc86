import errno

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch.nn import functional as F

from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.pixels import open_pixels
from gigamorph.engine.train.heatmap import overlay_name, write_overlay


@pytest.fixture
def source():
    return open_pixels(torch.rand(1, 1111, 603, generator=torch.Generator().manual_seed(0)))


def expected(source, evidence):
    """The same picture from whole native-size maps."""
    _, h, w = source.shape
    positive = (evidence - evidence.median().clamp(min=0)).clamp(min=0)
    heat = F.interpolate((positive / positive.max())[None, None], (h, w), mode="bilinear")[0, 0]
    alpha = heat.sqrt() * 0.6
    return heat, alpha


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_overlay_is_the_whole_image_one_strip_at_a_time(tmp_path, source, suffix):
    evidence = torch.randn(35, 19, generator=torch.Generator().manual_seed(1)) + 0.3
    path = tmp_path / f"map{suffix}"
    write_overlay(source, evidence, path)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # not the private mode of a temporary file
    picture = np.array(Image.open(path)) if suffix == ".png" else tifffile.imread(path)
    assert picture.shape == (1111, 603, 3) and picture.dtype == np.uint8
    heat, alpha = expected(source, evidence)
    grey = source.read(0, 1111, 0, 603)[0]
    # blue = grey * (1 - alpha): linear in the grey window, whose ends are those of a sample
    where = alpha == 0
    low, high = np.polyfit(grey[where].numpy(), picture[..., 2][where.numpy()], 1)[::-1]
    assert low == pytest.approx(0, abs=3) and high == pytest.approx(255, abs=6)
    red_minus_blue = picture[..., 0].astype(float) - picture[..., 2]
    assert np.abs(red_minus_blue - 255 * alpha.numpy()).max() <= 1.01
    assert np.abs((picture[..., 1].astype(float) - picture[..., 2]) - 255 * (alpha * heat).numpy()).max() <= 1.01


def test_what_most_of_the_image_has_is_left_grey(tmp_path, source):
    evidence = torch.full((35, 19), 0.8)
    evidence[20:24, 10:12] = 1.0
    write_overlay(source, evidence, tmp_path / "a.png")
    picture = np.array(Image.open(tmp_path / "a.png")).astype(int)
    coloured = picture[..., 0] != picture[..., 2]
    assert coloured[650:740, 325:370].all() and not coloured[:580].any() and not coloured[:, :270].any()


def test_negative_or_no_evidence_leaves_the_image_grey(tmp_path, source):
    write_overlay(source, -torch.rand(8, 8), tmp_path / "a.png")
    picture = np.array(Image.open(tmp_path / "a.png"))
    assert (picture[..., 0] == picture[..., 2]).all() and picture.std() > 50


def test_a_large_image_is_a_tiff_and_other_suffixes_are_refused(tmp_path, source):
    assert overlay_name("x", (1, 4096, 3328)) == "x.png"
    assert overlay_name("x", (1, 32768, 32768)) == "x.tif"
    with pytest.raises(GigamorphError, match=r"a\.jpg: heat maps are written as"):
        write_overlay(source, torch.rand(3, 3), tmp_path / "a.jpg")


def test_full_disk_is_one_line_and_leaves_no_half_file(tmp_path, source, monkeypatch):
    import os

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(GigamorphError, match=r"a\.png: the heat map cannot be written: No space left on device"):
        write_overlay(source, torch.rand(3, 3), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_no_native_size_float_map_is_held(tmp_path):
    """4096 x 4096 is 67 MB per float map; a strip of 512 rows is 8 MB, the 8-bit picture of a TIFF is streamed."""

    class Blank:
        shape = (1, 4096, 4096)
        name = "blank"
        largest = 0

        def read(self, top, bottom, left, right):
            self.largest = max(self.largest, (bottom - top) * (right - left))
            return torch.zeros(1, bottom - top, right - left)

    blank = Blank()
    write_overlay(blank, torch.rand(128, 128), tmp_path / "a.tif")
    assert blank.largest <= 512 * 4096
