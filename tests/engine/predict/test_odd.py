"""Images whose grey values are odd: `predict` names each of them, not only those that it samples before it begins."""

import functools
from dataclasses import replace

import archives
import numpy as np
import pytest
from commands import rows
from PIL import Image

from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.predict.run import PredictOptions, predict

ODD = (7, 17)  # none of the four that are sampled


@pytest.fixture
def folder(tmp_path):
    """24 images of 16 bits, two of them with 12 bits."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 4095 if number in ODD else 65535, (40, 36), np.uint16)
        Image.fromarray(pixels).save(images / f"{number:02d}.png")
    return images


def predicted(folder, out, **how):
    return predict(archives.tiny, [folder], out, PredictOptions(model="sha", checkpoint="net", device="cpu", **how))


@pytest.mark.parametrize("workers", [0, 1])
def test_each_odd_image_is_listed(folder, tmp_path, caplog, workers):
    out = tmp_path / "out"
    predicted(folder, out, workers=workers)
    found = rows(out / "odd.csv")
    assert [row["image_path"].rsplit("/", 1)[-1] for row in found] == [f"{number:02d}.png" for number in ODD]
    assert all("nearly black" in row["reason"] and "--white 4095" in row["reason"] for row in found)
    assert "odd grey values in 2 image(s), listed in odd.csv; first " in caplog.text


def test_a_white_level_that_fits_removes_the_list(folder, tmp_path):
    for number in {*range(24)} - {*ODD}:
        (folder / f"{number:02d}.png").unlink()
    out = tmp_path / "out"
    predicted(folder, out, workers=1)
    assert len(rows(out / "odd.csv")) == len(ODD)
    opened = replace(archives.tiny(device="cpu"), open_images=functools.partial(ImageDataset, white=4095))
    options = PredictOptions(model="sha", checkpoint="net", device="cpu", workers=0, white=4095, overwrite=True)
    predict(lambda *, device: opened, [folder], out, options)
    assert not (out / "odd.csv").exists()
