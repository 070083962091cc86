"""end2end: which patches are taken of an image, and what lies in them."""

from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gigamorph.engine.datasets.tables import Finding, Record
from gigamorph.engine.errors import DataError
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.mammography.recipes.end2end.config import CLASSES, End2EndConfig, Sampling
from gigamorph.engine.mammography.recipes.end2end.images import (
    LesionMask,
    Patch,
    Patches,
    breast_box,
    lesions,
    sample,
    sample_all,
)
from gigamorph.engine.mammography.recipes.sized import PaddedRegion


def share(mask, patch, side):
    inside = np.zeros((mask.shape[0] + 2 * side, mask.shape[1] + 2 * side), bool)
    inside[side:-side, side:-side] = mask
    y, x = patch.top + side, patch.left + side
    common = inside[y : y + side, x : x + side].sum()
    return max(common / mask.sum(), common / side**2)


@given(st.integers(0, 10**6), st.sampled_from([7, 16, 25]), st.integers(0, 3))
@settings(max_examples=40)
def test_patches_meet_the_rules(seed, side, count):
    """Lesions at the border, tiny ones and overlapping ones too; background is checked against every lesion."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        y, x, h, w = rng.integers(0, 60), rng.integers(0, 50), rng.integers(1, 25), rng.integers(1, 25)
        mask = np.zeros((64, 56), bool)
        mask[y : y + h, x : x + w] = True
        found.append(LesionMask(mask, int(rng.integers(1, 5))))
    wanted = Sampling(side=side, per_lesion=3, background=4)
    box = (0, 64, 0, 56)
    patches = sample(box, found, wanted, np.random.default_rng(seed))
    assert patches == sample(box, found, wanted, np.random.default_rng(seed))
    own, background = [p for p in patches if p.label], [p for p in patches if not p.label]
    assert [p.label for p in own] == [lesion.label for lesion in found for _ in range(3)]
    for i, patch in enumerate(own):
        assert share(found[i // 3].mask, patch, side) > patch.cutoff and 0 <= patch.cutoff <= 0.9
    assert len(background) <= 4 and (count or len(background) == 4)
    for patch in background:
        assert all(share(lesion.mask, patch, side) <= 0.35 for lesion in found)


def test_s1_is_the_centroid_and_s10_lowers_its_cutoff_only_where_it_must():
    mask = np.zeros((100, 100), bool)
    mask[40:61, 20:31] = True
    one = sample((0, 100, 0, 100), [LesionMask(mask, 3)], Sampling(20, 1, 0), np.random.default_rng(0))
    assert one == [Patch(40, 15, 3, 0.0)]
    ten = sample((0, 100, 0, 100), [LesionMask(mask, 3)], Sampling(40, 10, 10), np.random.default_rng(0))
    assert [p.label for p in ten] == [3] * 10 + [0] * 10 and all(p.cutoff == 0.9 for p in ten[:10])
    # A ring: no square of 20 pixels around a point of its box holds nine tenths of anything.
    ring = np.zeros((200, 200), bool)
    ring[20:180, 20:180] = True
    ring[22:178, 22:178] = False
    found = sample((0, 200, 0, 200), [LesionMask(ring, 1)], Sampling(20, 2, 0), np.random.default_rng(0))
    assert all(share(ring, p, 20) > p.cutoff for p in found) and all(p.cutoff < 0.9 for p in found)
    with pytest.raises(DataError, match=r"mask of a lesion \(mass_ben\) is empty"):
        sample((0, 9, 0, 9), [LesionMask(np.zeros((9, 9), bool), 4)], Sampling(4), np.random.default_rng(0))


def test_breast_is_the_largest_bright_part():
    image = np.zeros((50, 60), np.float32)
    image[5:40, 10:30] = 0.5
    image[2:4, 50:58] = 1.0  # a label
    assert breast_box(image) == (5, 40, 10, 30)
    assert breast_box(np.zeros((4, 5), np.float32)) == (0, 4, 0, 5)


def test_lesions_come_from_masks_and_boxes(tmp_path):
    np.save(tmp_path / "image.npy", np.ones((20, 30), np.uint16))
    mask = np.zeros((20, 30), np.uint8)
    mask[4:8, 6:10] = 255
    np.save(tmp_path / "mask.npy", mask)
    findings = (
        Finding("calcification", mask=tmp_path / "mask.npy", pathology="malignant"),
        Finding("mass", box=(2, 6, 10, 20), pathology="benign_without_callback"),
        Finding("mass", box=(0, 1, 0, 1)),
    )
    found = lesions(Record(tmp_path / "image.npy", 1, "p", findings=findings), (10, 15))
    assert [CLASSES[lesion.label] for lesion in found] == ["calc_mal", "mass_ben"]
    assert np.argwhere(found[0].mask).tolist() == [[2, 3], [2, 4], [3, 3], [3, 4]]
    assert found[1].mask.sum() == 2 * 5
    with pytest.raises(DataError, match="neither mask nor box"):
        lesions(Record(tmp_path / "image.npy", 1, "p", findings=(Finding("mass", pathology="benign"),)), (10, 15))


def test_masks_of_jpeg_are_cut_at_half(tmp_path):
    """Kaggle's CBIS-DDSM: what the codec leaves around a lesion is none of it."""
    np.save(tmp_path / "image.npy", np.ones((96, 80), np.uint16))
    mask = np.zeros((96, 80), np.uint8)
    mask[29:51, 19:43] = 255
    (tmp_path / "mask.jpg").write_bytes(imagecodecs.jpeg8_encode(mask, level=75))
    finding = Finding("mass", mask=tmp_path / "mask.jpg", pathology="malignant")
    [lesion] = lesions(Record(tmp_path / "image.npy", 1, "p", findings=(finding,)), (96, 80))
    np.testing.assert_array_equal(lesion.mask, mask > 0)


def test_a_lesion_smaller_than_a_pixel_stays(tmp_path):
    np.save(tmp_path / "image.npy", np.ones((100, 80), np.uint16))
    findings = tuple(Finding("calc", (top, top + 1, 33, 34), pathology="benign") for top in (44, 49))
    found = lesions(Record(tmp_path / "image.npy", 1, "p", findings=findings), (10, 8))
    assert [np.argwhere(lesion.mask).tolist() for lesion in found] == [[[4, 3]]] * 2


def test_an_empty_mask_is_named(tmp_path):
    for name in ("image", "mask"):
        np.save(tmp_path / f"{name}.npy", np.zeros((9, 8), np.uint16))
    beyond = Finding("mass", (20, 30, 20, 30), pathology="benign")
    for finding, name in ((replace(beyond, box=None, mask=tmp_path / "mask.npy"), "mask"), (beyond, "image")):
        with pytest.raises(DataError, match=rf"{name}.npy: contains no pixel of a lesion \(mass_ben\); remove"):
            lesions(Record(tmp_path / "image.npy", 1, "p", findings=(finding,)), (9, 8))


def test_windows_are_black_beyond_the_image():
    image = torch.rand(1, 12, 10)
    padded = F.pad(image, (8, 8, 8, 8))
    source = open_pixels(image)
    for top, left in ((-3, -2), (2, 3), (8, 6), (-8, 20)):
        got = PaddedRegion(source, top, left, 6).read(0, 6, 0, 6)
        want = padded[:, top + 8 : top + 14, left + 8 : left + 14] if left < 12 else torch.zeros(1, 6, 6)
        assert torch.equal(got, want)
        assert torch.equal(PaddedRegion(source, top, left, 6).read(1, 4, 2, 6), want[:, 1:4, 2:6])


def test_each_image_has_random_numbers_of_its_own(tmp_path):
    np.save(tmp_path / "image.npy", np.random.default_rng(0).integers(20000, 65535, (64, 56), dtype=np.uint16))
    twice = [Record(tmp_path / "image.npy", 0, "p")] * 2
    places = sample_all(twice, twice, End2EndConfig(sampling=Sampling(16, background=4)), 3)
    first, second = ([patch for image, patch in places if image == number] for number in (0, 1))
    assert len(first) == len(second) == 4 and first != second


def test_patches_of_three_channels_are_one_varied_and_repeated(tmp_path):
    """Each epoch another variation; grey values less each channel's mean."""
    np.save(tmp_path / "image.npy", np.random.default_rng(0).integers(0, 65535, (40, 30), dtype=np.uint16))
    record, places = Record(tmp_path / "image.npy", 0, "p"), [(0, Patch(5, 3, 2, 0.9))]
    config = End2EndConfig(sampling=Sampling(16), augment="flip,rotate=25,brightness=0.1,noise=0.05")
    one = Patches([record], places, replace(config, channels=1), augment=True, seed=3)
    three = Patches([record], places, replace(config, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.2)), augment=True, seed=3)
    grey = one[0][0] * config.std[0] + config.mean[0]
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.5), (0.3, 0.2))):
        assert (three[0][0][channel] - (grey[0] - mean) / std).abs().max() < 1e-5
    assert three[0][0].shape == (3, 16, 16) and three[0][1] == 2
    first = three[0][0]
    three.epoch = 1
    assert not torch.equal(three[0][0], first)
