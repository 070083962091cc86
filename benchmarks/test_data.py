"""Reading and normalising pixels, compared with the library alone, alternately within one run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from gigamorph import open_pixels

SIDE, TILE = 2048, 256


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a TIFF of 12-bit noise in zstd tiles."""
    path = tmp_path_factory.mktemp("data") / "image.tif"
    pixels = np.random.default_rng(0).integers(0, 4096, (SIDE, SIDE), dtype=np.uint16)
    tifffile.imwrite(path, pixels, tile=(TILE, TILE), compression="zstd")
    return path


def test_a_whole_image(compare: Callable[..., float], picture: Path) -> None:
    """Ours reads to normalised float32, tifffile to integers."""
    compare(
        "read a TIFF whole",
        lambda: open_pixels(picture).read(0, SIDE, 0, SIDE),
        lambda: tifffile.imread(picture),
        limit=3.0,
    )


def test_a_region(compare: Callable[..., float], picture: Path) -> None:
    """One tile of 64 must take at most a third of the whole image's time."""
    compare(
        "read a region of a TIFF",
        lambda: open_pixels(picture).read(TILE, 2 * TILE, TILE, 2 * TILE),
        lambda: tifffile.imread(picture),
        limit=0.3,
    )
