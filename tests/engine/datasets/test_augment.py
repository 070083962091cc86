"""Augmentation read by region is the augmented image, and that is what its formulas say."""

import math
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gigamorph.engine.datasets.augment import Augment, Elastic, Intensity, IntensitySource, augmented
from gigamorph.engine.datasets.counter_random import bits, key_of, normal, uniform
from gigamorph.engine.datasets.views import SampledSource
from gigamorph.engine.errors import DataError
from gigamorph.engine.images.affine import Affine, ComposedMap
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import PixelSource, steps_of, to_original

ALL = "flip,rotate=20,scale=0.3,shear=10,translate=40,elastic=9:60,gamma=0.3,contrast=0.2,brightness=0.1,noise=0.05"
IMAGE = np.random.default_rng(0).random((2 + 1, 317, 291), dtype=np.float32)


def whole(source: PixelSource) -> np.ndarray:
    return source.read(0, source.shape[1], 0, source.shape[2]).numpy()


texts = st.lists(st.sampled_from(ALL.split(",")), unique=True).map(",".join)


@settings(max_examples=25)
@given(data=st.data(), text=texts, index=st.integers(0, 99), channels=st.sampled_from([1, 3]))
def test_regions_and_tiles_are_cut_from_the_augmented_image(
    data: st.DataObject, text: str, index: int, channels: int
) -> None:
    source = augmented(open_pixels(IMAGE[:channels]), Augment.parse(text), seed=1, epoch=2, index=index)
    expected = whole(source)
    height, width = expected.shape[1:]
    for _ in range(3):
        top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, height)] * 2)))
        left, right = sorted(data.draw(st.tuples(*[st.integers(0, width)] * 2)))
        np.testing.assert_array_equal(
            source.read(top, bottom, left, right).numpy(), expected[:, top:bottom, left:right], strict=True
        )
    step_y, step_x = data.draw(st.tuples(st.integers(50, 317), st.integers(50, 291)))
    tiled = np.empty_like(expected)
    for y, x in product(range(0, height, step_y), range(0, width, step_x)):
        tiled[:, y : y + step_y, x : x + step_x] = source.read(y, min(y + step_y, height), x, min(x + step_x, width))
    np.testing.assert_array_equal(tiled, expected)


def spline(t: np.ndarray) -> np.ndarray:
    """The cubic B-spline, as the fourfold convolution of a box: a sum of truncated powers."""
    return np.sum([(-1) ** k * math.comb(4, k) * np.maximum(t + 2 - k, 0) ** 3 / 6 for k in range(5)], 0)


def displaced(elastic: Elastic, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """At columns x and rows y, from all grid points in reach of the image, float64 (rows, columns)."""
    nodes = np.arange(-4, int(max(x.max(), y.max()) / elastic.spacing) + 5)
    counter = ((nodes[:, None] + 2**30) * 2**32 + nodes + 2**30).astype(np.uint64)
    found = []
    for key in elastic.keys:
        grid = (2 * uniform(key, counter) - 1) * elastic.size
        along_y = spline(y[..., None] / elastic.spacing - nodes)
        along_x = spline(x[..., None] / elastic.spacing - nodes)
        found.append(along_y @ grid @ along_x.T)
    return tuple(found)


@pytest.mark.parametrize("index", range(3))
def test_geometry_is_the_whole_image_sampled_by_torch(index: int) -> None:
    """Bilinear sampling of the whole image in float64 with a grid from the formulas."""
    augment = Augment.parse("rotate=20,scale=0.3,shear=10,translate=40,elastic=9:60")
    source = augmented(open_pixels(IMAGE), augment, seed=3, epoch=0, index=index)
    assert isinstance(source, SampledSource) and isinstance(source.back, ComposedMap)
    affine, elastic = source.back.maps
    assert isinstance(affine, Affine) and isinstance(elastic, Elastic)
    height, width = IMAGE.shape[1:]
    y, x = np.arange(height) + 0.5, np.arange(width) + 0.5
    move_x, move_y = displaced(elastic, x, y)
    assert 4 < np.abs(move_x).max() <= 9 and 4 < np.abs(move_y).max() <= 9
    place = np.stack([x + move_x, y[:, None] + move_y, np.ones_like(move_x)], -1) @ affine.matrix().T
    grid = torch.from_numpy(place[None, ..., :2] / [width, height] * 2 - 1)
    expected = F.grid_sample(torch.from_numpy(IMAGE[None].astype(np.float64)), grid, align_corners=False)[0].numpy()
    found = whole(source)
    assert np.abs(found - expected).max() < 2e-6  # float32 weights
    assert (expected == 0).mean() > 0.01 and (expected > 0).mean() > 0.5
    np.testing.assert_array_equal(found == 0, expected == 0)


def test_flips_and_shifts_keep_every_pixel() -> None:
    seen = set()
    for index in range(30):
        source = augmented(open_pixels(IMAGE), Augment.parse("flip,translate=5"), seed=0, epoch=0, index=index)
        x0, y0, x1, y1 = to_original(source).inverse().boxes([100, 110, 130, 150]).astype(int)
        flips = to_original(source).matrix()[0, 0] < 0, to_original(source).matrix()[1, 1] < 0  # pyright: ignore[reportAttributeAccessIssue]
        part = IMAGE[:, 110:150, 100:130][:, :: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
        np.testing.assert_array_equal(source.read(y0, y1, x0, x1).numpy(), part)
        seen.add((*flips, x0, y0))
    assert len({flips[:2] for flips in seen}) == 4 and len(seen) > 25


@pytest.mark.parametrize(("flip", "allowed"), [("left-right", {(1, 0)}), ("up-down", {(0, 1)})])
def test_one_flip_alone(flip: str, allowed: set[tuple[int, int]]) -> None:
    seen = set()
    for index in range(20):
        image = whole(augmented(open_pixels(IMAGE), Augment(flip=flip), seed=0, epoch=0, index=index))
        seen |= {(x, y) for x in (0, 1) for y in (0, 1) if np.array_equal(image, IMAGE[:, :: 1 - 2 * y, :: 1 - 2 * x])}
    assert seen == allowed | {(0, 0)}


def test_intensity_is_its_formula() -> None:
    image = IMAGE - np.float32(0.25)
    intensity = Intensity(key_of(7), gamma=1.3, contrast=0.8, brightness=0.05, noise=0.02)
    found = whole(IntensitySource(open_pixels(image), intensity))
    y, x = np.mgrid[:317, :291].astype(np.uint64)
    noise = normal(intensity.key, y * np.uint64(2**32) + x)
    grey = image.astype(np.float64)
    expected = 0.8 * np.sign(grey) * np.abs(grey) ** 1.3 + 0.05 + 0.02 * noise
    assert np.abs(found - expected).max() < 1e-6


def test_noise_is_normal_and_independent_of_its_neighbours_and_of_other_tiles() -> None:
    source = IntensitySource(open_pixels(np.full((1024, 1024), 0.5, np.float32)), Intensity(key_of(0), noise=0.1))
    found = (whole(source)[0].astype(np.float64) - 0.5) / 0.1
    count = found.size
    assert abs(found.mean()) < 4 / math.sqrt(count)
    assert abs(found.std() - 1) < 4 / math.sqrt(2 * count)
    shares = [(found < limit).mean() for limit in (-2, -1, 0, 1, 2)]
    expected = [0.5 * (1 + math.erf(limit / math.sqrt(2))) for limit in (-2, -1, 0, 1, 2)]
    np.testing.assert_allclose(shares, expected, atol=4 * 0.5 / math.sqrt(count))
    for dy, dx in [(0, 1), (1, 0), (1, 1), (0, 64), (64, 0), (256, 256), (512, 0), (0, 512)]:
        other = np.roll(found, (dy, dx), (0, 1))
        assert abs((found * other).mean()) < 4 / math.sqrt(count), (dy, dx)
    other = (normal(key_of(1), np.arange(count, dtype=np.uint64)).astype(np.float64)).reshape(found.shape)
    assert abs((found * other).mean()) < 4 / math.sqrt(count)


def test_random_bits_are_those_of_splitmix64() -> None:
    """The first outputs for seed 1234567, from the generator's reference implementation."""
    found = bits(np.uint64(1234567), np.arange(5, dtype=np.uint64))
    assert found.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_what_is_drawn_depends_on_seed_epoch_and_image_only() -> None:
    source = open_pixels(IMAGE)
    augment = Augment.parse(ALL)

    def drawn(**place: int) -> np.ndarray:
        return whole(augmented(source, augment, **{"seed": 0, "epoch": 0, "index": 0} | place))

    first = drawn()
    np.testing.assert_array_equal(drawn(), first)
    for place in ({"seed": 1}, {"epoch": 1}, {"index": 1}, {"seed": 2**40}):
        assert np.abs(drawn(**place) - first).mean() > 0.05
    sent = pickle.loads(pickle.dumps(augmented(source, augment, seed=0, epoch=0, index=0)))
    np.testing.assert_array_equal(whole(sent), first)


def test_an_option_more_leaves_the_others_as_they_were() -> None:
    def steps(text: str) -> set[str]:
        return set(steps_of(augmented(open_pixels(IMAGE), Augment.parse(text), seed=5, epoch=0, index=0)))

    alone = [steps(text) for text in ("gamma=0.2", "noise=0.1", "contrast=0.1", "rotate=10")]
    assert set.union(*alone) == steps("noise=0.1,contrast=0.1,gamma=0.2,rotate=10")


def test_limits_are_reached_and_kept() -> None:
    """Of 400 draws: even over the range that the options name."""
    augment = Augment.parse("rotate=10,scale=0.25,shear=5,translate=7,gamma=0.5,contrast=0.2,brightness=0.1,noise=0.3")
    found = []
    for index in range(400):
        source = augmented(open_pixels(IMAGE), augment, seed=0, epoch=0, index=index)
        assert isinstance(source, IntensitySource) and isinstance(source.source, SampledSource)
        forth = source.source.back.inverse()
        assert isinstance(forth, Affine)
        move = forth.points([291 / 2, 317 / 2]) - [291 / 2, 317 / 2]
        angle = math.degrees(math.atan2(forth.yx, forth.xx))
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        shear = math.degrees(math.atan((forth.xy * cos + forth.yy * sin) / (forth.yy * cos - forth.xy * sin)))
        scale = math.log(math.hypot(forth.xx, forth.yx))
        own = source.intensity
        found.append([angle, scale, shear, *move, math.log(own.gamma), own.contrast - 1, own.brightness, own.noise])
    values = np.array(found)
    limits = np.array([10, math.log(1.25), 5, 7, 7, math.log(1.5), 0.2, 0.1])
    assert (np.abs(values[:, :-1]) <= limits + 1e-9).all() and (np.abs(values[:, :-1]).max(0) > 0.97 * limits).all()
    np.testing.assert_allclose(values[:, :-1].mean(0), 0, atol=4 * limits.max() / math.sqrt(3 * 400))
    np.testing.assert_allclose(np.abs(values[:, :-1]).mean(0) / limits, 0.5, atol=0.08)
    assert values[:, -1].min() >= 0 and 0.29 < values[:, -1].max() < 0.3
    np.testing.assert_allclose(values[:, 3:5], np.rint(values[:, 3:5]), atol=1e-12)
    assert np.abs(np.corrcoef(values.T) - np.eye(9)).max() < 0.2


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), size=st.floats(0.5, 50), ratio=st.floats(5, 20), data=st.data())
def test_an_elastic_map_is_bounded_and_has_a_way_back(
    seed: int, size: float, ratio: float, data: st.DataObject
) -> None:
    elastic = Elastic((key_of(seed, 0), key_of(seed, 1)), size, size * ratio)
    xy = np.array(data.draw(st.lists(st.tuples(*[st.floats(-2000, 70000)] * 2), min_size=1, max_size=9)))
    there = elastic.points(xy)
    assert np.abs(there - xy).max() <= size * (1 + 1e-9)
    np.testing.assert_allclose(elastic.inverse().points(there), xy, atol=1e-5)
    np.testing.assert_allclose(elastic.points(elastic.inverse().points(xy)), xy, atol=1e-5)
    assert elastic.inverse().inverse() == elastic
    # Points one by one are those of a region.
    rows, columns = (n * (size * ratio / 3) for n in np.ogrid[0:5, 0:7])
    region = np.stack(elastic.at(columns, rows), -1)
    scattered = elastic.points(np.stack(np.broadcast_arrays(columns, rows), -1))
    np.testing.assert_allclose(region, scattered, atol=1e-9)


def test_boxes_and_maps_go_back_to_the_original() -> None:
    """A bright square of the file, found in the augmented image, lies in the box that leads there, and back."""
    image = np.zeros((200, 150), np.float32)
    box = [60, 80, 90, 115]
    image[box[1] : box[3], box[0] : box[2]] = 1
    augment = Augment.parse("flip,rotate=30,scale=0.2,shear=10,translate=20,elastic=8:80")
    for index in range(3):
        source = augmented(open_pixels(image), augment, seed=0, epoch=0, index=index)
        back = to_original(source)
        seen = whole(source)[0]
        rows, columns = np.nonzero(seen)
        left, top, right, bottom = back.inverse().boxes(box)
        # Bilinear sampling reaches up to a pixel beyond, times the largest stretch.
        assert (
            np.abs(
                np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) - [left, top, right, bottom]
            ).max()
            < 2.5
        )
        carried = back.resample(seen, 0, 200, 0, 150)
        inside = carried[box[1] + 3 : box[3] - 3, box[0] + 3 : box[2] - 3]
        outside = carried.copy()
        outside[box[1] - 3 : box[3] + 3, box[0] - 3 : box[2] + 3] = 0
        assert inside.min() > 0.999 and outside.max() < 0.001


class Counted:
    """A gigapixel whose grey values follow from the place, and the pixels that were read of it."""

    shape, name = (1, 40000, 30000), "counted"
    pixels = largest = 0

    def read(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        assert 0 <= top < bottom <= 40000 and 0 <= left < right <= 30000
        self.pixels += (bottom - top) * (right - left)
        self.largest = max(self.largest, (bottom - top) * (right - left))
        return ((torch.arange(top, bottom)[:, None] * 7 + torch.arange(left, right)) % 1000)[None] / 1000


def test_a_gigapixel_is_read_where_it_is_needed_only() -> None:
    counted = Counted()
    source = augmented(counted, Augment.parse(ALL.replace("elastic=9:60", "elastic=40:400")), seed=0, epoch=0, index=3)
    tile = source.read(30000, 31024, 10000, 11024)
    assert counted.pixels < 2.5 * 1024**2  # scaled down by up to 1.3 and turned by up to 20 degrees
    assert counted.largest < 2.5 * 1024**2
    np.testing.assert_array_equal(source.read(30500, 30600, 10100, 10900), tile[:, 500:600, 100:900])
    # A strip across the image is no more expensive.
    counted.pixels = 0
    source.read(100, 1124, 0, 9000)
    assert counted.pixels < 2.5 * 1024 * 9000 and counted.largest < 2.5 * 1024**2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rotat=10", "augmentation rotat=10: unknown; choose from flip, rotate, scale"),
        ("rotate", "augmentation rotate: 'nothing' is not a number, as in rotate=10"),
        ("flip,noise=x", "augmentation noise=x: 'x' is not a number"),
        ("noise=1,noise=1", "augmentation noise=1: noise is given twice"),
        ("flip=sideways", "augmentation flip=sideways: must be flip, flip=left-right or flip=up-down"),
        ("rotate=181", "augmentation rotate=181: must be between 0 and 180"),
        ("gamma=-1", "augmentation gamma=-1: must be between 0 and 4"),
        ("contrast=nan", "augmentation contrast=nan: must be between 0 and 1"),
        ("elastic=20:90", "augmentation elastic=20:90: the grid must be at least 5 times as wide"),
        ("elastic=20:inf", "augmentation elastic=20:inf: the grid"),
        ("elastic=20:", "augmentation elastic=20:: 'nothing' is not a number"),
    ],
)
def test_wrong_text_is_one_line(text: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        Augment.parse(text)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@given(text=texts)
def test_text_and_back(text: str) -> None:
    augment = Augment.parse(text)
    assert Augment.parse(str(augment)) == augment
    assert set(str(augment).split(",")) == set(text.split(","))


def test_every_step_is_told() -> None:
    source = augmented(open_pixels(IMAGE), Augment.parse(ALL), seed=1, epoch=2, index=4)
    told = " / ".join(steps_of(source))
    words = [
        "mirrored",
        "turned by",
        "sheared by",
        "times as large",
        "moved by",
        "bent by up to 9 pixels on a grid",
        "gamma",
        "contrast times",
        "brightness",
        "noise of standard deviation",
    ]
    assert [word for word in words if word not in told] == []
    plain = open_pixels(IMAGE)
    assert augmented(plain, Augment(), seed=1, epoch=2, index=4) is plain
