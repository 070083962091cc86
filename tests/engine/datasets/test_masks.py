"""Masks that are read by region and go where the pixels of their images go."""

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from torch.nn import functional as F

from gigamorph.engine.datasets.augment import Augment
from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.datasets.masks import (
    IGNORED,
    FileMask,
    classes_of,
    count_values,
    mask_as_seen,
    mask_as_stored,
    mask_on_grid,
)
from gigamorph.engine.datasets.tables import Finding, Record
from gigamorph.engine.errors import DataError

HEIGHT, WIDTH = 41, 34


class Array:
    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def read(self, top, bottom, left, right):
        return self.values[top:bottom, left:right]


def whole(mask):
    return mask.read(0, mask.shape[0], 0, mask.shape[1])


def written(folder, mask, image=None, **record):
    """A record of an image that is bright where the mask is not 0."""
    image = (mask != 0).astype(np.uint8) * 200 if image is None else image
    (folder / "i.png").write_bytes(imagecodecs.png_encode(image))
    (folder / "m.png").write_bytes(imagecodecs.png_encode(mask))
    return Record(folder / "i.png", -1, "p", findings=(Finding(mask=folder / "m.png"),), **record)


def drawn(seed=0):
    return np.random.default_rng(seed).integers(0, 3, (HEIGHT, WIDTH)).astype(np.uint8)


@pytest.mark.parametrize(
    "augment",
    ["flip", "rotate=20", "translate=9", "scale=0.3,shear=5", "elastic=2:20,flip=up-down", "gamma=0.2,noise=0.1"],
)
def test_a_mask_goes_where_the_pixels_of_its_image_go(tmp_path, augment):
    """The image is its mask: where it was not interpolated across an edge, both agree."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[6:30, 4:20] = 1
    image = np.where(mask, np.uint8(255), np.uint8(60))
    record = written(tmp_path, mask, image, chest_wall="right")
    data = ImageDataset([record], augment=Augment.parse(augment), seed=3)
    for epoch in range(4):
        data.set_epoch(epoch)
        source = data[0]["image"]
        seen = mask_as_seen(FileMask(record), source)
        found, pixels = whole(seen), source.read(0, HEIGHT, 0, WIDTH)[0].numpy()
        clear = (pixels > 0.9) | ((pixels < 0.32) & (pixels > 0.15)) if "noise" not in augment else pixels > -1
        if "noise" in augment:
            assert (found == mask[:, ::-1]).all()
            continue
        assert clear.mean() > 0.3
        assert ((pixels > 0.9) == (found == 1))[clear].all()
        assert (pixels[found == IGNORED] < 0.25).all()  # beyond the image
        assert (seen.read(5, 19, 3, 11) == found[5:19, 3:11]).all()  # whatever region is read


def test_a_mask_on_a_coarser_grid_is_that_of_nearest_exact():
    mask = drawn()
    for shape in ((11, 9), (41, 17), (20, 34), (82, 68), (3, 1)):
        found = whole(mask_on_grid(Array(mask), shape))
        expected = F.interpolate(torch.from_numpy(mask)[None, None].double(), shape, mode="nearest-exact")
        assert (found == expected[0, 0].numpy()).all()


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("chest_wall", ["left", "right"])
def test_the_way_back_to_the_file(tmp_path, factor, chest_wall):
    record = written(tmp_path, drawn(), chest_wall=chest_wall)
    source = ImageDataset([record], downsample=factor)[0]["image"]
    seen = whole(mask_as_seen(FileMask(record), source))
    assert seen.shape == source.shape[1:]
    back = whole(mask_as_stored(Array(seen), source))
    assert back.shape == (HEIGHT, WIDTH)
    if factor == 1:
        assert (back == drawn()).all()
    again = ImageDataset([written(tmp_path, back, chest_wall=chest_wall)], downsample=factor)[0]
    assert (whole(mask_as_seen(FileMask(again["record"]), again["image"])) == seen).all()


@pytest.mark.parametrize("kind", ["tif", "npy", "float"])
def test_masks_are_read_from_other_files_too(tmp_path, kind):
    record, path = written(tmp_path, drawn()), tmp_path / ("m.tif" if kind == "tif" else "m.npy")
    if kind == "tif":
        tifffile.imwrite(path, drawn(), tile=(16, 16))
    else:
        np.save(path, drawn().astype(np.float32 if kind == "float" else np.int16))
    other = Record(record.path, -1, "p", findings=(Finding(mask=path),))
    assert (whole(FileMask(other)) == drawn()).all()


def test_what_the_values_mean(tmp_path):
    def classes(*values, names=()):
        counts = np.zeros(256, np.int64)
        counts[list(values)] = 5
        return classes_of({tmp_path / "m.png": counts}, names)

    assert classes(0, 1, 2, 255).names == classes(1, 2).names == ("background", "1", "2")
    with pytest.raises(DataError, match=r"m\.png: contains 9, but no mask contains 2; correct it, or name all classes"):
        classes(0, 1, 9, 255)
    assert classes(0, 1, names=("tissue", "mass", "cyst")).names == ("tissue", "mass", "cyst")
    assert classes(0, 255).binary and classes(0, 255, names=("no", "mass")).names == ("no", "mass")
    assert not classes(0, 1, 255).binary
    assert classes(0, 1, 255, names=("no", "mass")).names == ("no", "mass")
    with pytest.raises(DataError, match="all masks contain only value 0"):
        classes(0)
    with pytest.raises(DataError, match="255 everywhere"):
        classes_of({tmp_path / "m.png": np.eye(256, dtype=np.int64)[255], tmp_path / "n.png": counts_of(0, 1)}, ())


def counts_of(*values):
    return sum(np.eye(256, dtype=np.int64)[value] for value in values)


def test_masks_that_cannot_be_used_are_named(tmp_path):
    record = written(tmp_path, drawn())
    with pytest.raises(DataError, match=r"i\.png: has no mask; add one in the column mask_path"):
        count_values(Record(record.path, -1, "p"))
    with pytest.raises(DataError, match=r"gone\.png: no such mask"):
        count_values(Record(record.path, -1, "p", findings=(Finding(mask=tmp_path / "gone.png"),)))
    with pytest.raises(DataError, match=r"m\.png: contains 2, which is not a class; classes are 0 no, 1 mass, and 255"):
        count_values(record, ("no", "mass"))
    (tmp_path / "m.png").write_bytes(imagecodecs.png_encode(drawn()[:-1]))
    with pytest.raises(DataError, match=r"m\.png: is 40 x 34, but its image 41 x 34"):
        count_values(record)
    (tmp_path / "m.png").write_bytes(imagecodecs.png_encode(np.stack([drawn()] * 3, -1)))
    with pytest.raises(DataError, match="has 3 channels; a mask must have one"):
        count_values(record)
    np.save(tmp_path / "m.npy", drawn() + 0.5)
    with pytest.raises(DataError, match="which is not a class"):
        count_values(Record(record.path, -1, "p", findings=(Finding(mask=tmp_path / "m.npy"),)))


def test_masks_of_several_findings_are_one(tmp_path):
    record = written(tmp_path, np.where(drawn() == 1, np.uint8(255), np.uint8(0)))
    (tmp_path / "n.png").write_bytes(imagecodecs.png_encode(np.where(drawn() == 2, np.uint8(255), np.uint8(0))))
    both = Record(record.path, -1, "p", findings=(*record.findings, Finding(mask=tmp_path / "n.png")))
    assert (whole(FileMask(both)) == np.where(drawn() > 0, 255, 0)).all()
