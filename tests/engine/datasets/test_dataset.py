"""The data set of pixel sources: items, mirroring, area averaging, workers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gigamorph.engine.datasets.augment import Augment
from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.datasets.tables import Record, read_table
from gigamorph.engine.datasets.views import DownsampledSource, MirroredSource
from gigamorph.engine.errors import DataError
from gigamorph.engine.images.batches import as_batch
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import Normalize, PixelSource, steps_of
from gigamorph.engine.mammography.phantom import write_phantoms


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return read_table(write_phantoms(tmp_path_factory.mktemp("p"), patients=8, height=160, width=128)).records


def whole(source: PixelSource) -> torch.Tensor:
    return source.read(0, source.shape[1], 0, source.shape[2])


def collate(items: list[dict]) -> dict:
    """Items as a batch: image and record are lists, label and index int64 tensors (N,)."""
    return {
        "image": [item["image"] for item in items],
        "label": torch.tensor([item["label"] for item in items], dtype=torch.int64),
        "index": torch.tensor([item["index"] for item in items], dtype=torch.int64),
        "record": [item["record"] for item in items],
    }


def test_items_and_collate(records: list[Record]) -> None:
    normalize = Normalize((0.2,), (0.5,))
    dataset = ImageDataset(records, normalize=normalize, channels=3)
    assert len(dataset) == 16
    item = dataset[3]
    assert item["record"] is records[3]
    assert (item["label"], item["index"]) == (records[3].label, 3)
    assert torch.equal(whole(item["image"]), whole(open_pixels(records[3].path, normalize=normalize, channels=3)))
    batch = collate([dataset[i] for i in (3, 0)])
    assert batch["index"].tolist() == [3, 0]
    assert batch["label"].tolist() == [records[3].label, records[0].label]
    assert batch["label"].dtype == torch.int64
    assert as_batch(batch["image"]).shape == (2, 3, 160, 128)
    with pytest.raises(IndexError):
        dataset[16]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_with_workers(records: list[Record], workers: int) -> None:
    dataset = ImageDataset(records, downsample=2, augment=Augment.parse("flip,rotate=10,noise=0.1"), seed=3)
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=workers)
    seen = []
    for batch in loader:
        pixels = as_batch(batch["image"]).read(0, 80, 0, 64)
        for row, index in zip(pixels, batch["index"].tolist(), strict=True):
            assert torch.equal(row, whole(dataset[index]["image"]))
            seen.append(index)
    assert seen == list(range(16))


def test_variations_are_drawn_from_seed_epoch_and_index(records: list[Record]) -> None:
    dataset = ImageDataset(records, augment=Augment(flip="both"), seed=5)
    plain = ImageDataset(records)

    def drawn() -> list[tuple[bool, bool]]:
        found = []
        for index in range(16):
            shown, original = whole(dataset[index]["image"]), whole(plain[index]["image"])
            options = {(x, y): original.flip([d for d, on in ((2, x), (1, y)) if on]) for x in (0, 1) for y in (0, 1)}
            found.append(next(key for key, value in options.items() if torch.equal(value, shown)))
        return found

    first = drawn()
    assert len(set(first)) == 4  # all four are seen in 16 images
    assert drawn() == first
    dataset.set_epoch(1)
    assert drawn() != first
    dataset.set_epoch(0)
    assert drawn() == first


def test_normalisation_comes_after_what_is_varied(records: list[Record]) -> None:
    """What lies outside the image is black before the normalisation, and grey values are varied on [0, 1]."""
    normalize = Normalize((0.3,), (0.1,))
    augment = Augment.parse("translate=40,contrast=0.5,gamma=0.5")
    grey = whole(ImageDataset(records, augment=augment)[2]["image"])
    item = ImageDataset(records, augment=augment, normalize=normalize)[2]["image"]
    assert torch.equal(whole(item), (grey - 0.3) / 0.1)
    assert grey.min() == 0 and steps_of(item)[-1] == "minus [0.3], over [0.1]"
    assert [step.split()[0] for step in steps_of(item)[-4:-1]] == ["moved", "gamma", "contrast"]


ARRAY = np.random.default_rng(0).random((3, 61, 47), dtype=np.float32)


@settings(deadline=None)
@given(data=st.data(), factor=st.integers(1, 9))
def test_area_average_by_region(data: st.DataObject, factor: int) -> None:
    source = DownsampledSource(open_pixels(ARRAY), factor)
    height, width = 61 // factor, 47 // factor
    assert source.shape == (3, height, width)
    blocks = ARRAY[:, : height * factor, : width * factor].reshape(3, height, factor, width, factor).mean((2, 4))
    top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, height)] * 2)))
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, width)] * 2)))
    region = source.read(top, bottom, left, right)
    assert region.shape == (3, bottom - top, right - left)
    np.testing.assert_allclose(region.numpy(), blocks[:, top:bottom, left:right], atol=1e-6)
    assert isinstance(source, PixelSource)


def test_area_average_reads_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_pixels(ARRAY)
    expected = whole(DownsampledSource(source, 4))
    monkeypatch.setattr("gigamorph.engine.datasets.views._STEP", 3 * 44 * 4 * 2)
    sizes = []
    read = source.read
    monkeypatch.setattr(source, "read", lambda *region: (sizes.append(region), read(*region))[1])
    assert torch.equal(whole(DownsampledSource(source, 4)), expected)
    assert {bottom - top for top, bottom, _, _ in sizes} == {8, 4}
    assert len(sizes) == 8


@settings(deadline=None)
@given(data=st.data(), x=st.booleans(), y=st.booleans())
def test_mirror_by_region(data: st.DataObject, x: bool, y: bool) -> None:
    source = MirroredSource(open_pixels(ARRAY), left_right=x, up_down=y)
    expected = ARRAY[:, :: -1 if y else 1, :: -1 if x else 1]
    top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, 61)] * 2)))
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, 47)] * 2)))
    np.testing.assert_array_equal(source.read(top, bottom, left, right).numpy(), expected[:, top:bottom, left:right])


def test_views_refuse_what_is_outside_or_too_small() -> None:
    source = open_pixels(ARRAY)
    for view in (DownsampledSource(source, 2), MirroredSource(source, left_right=True, up_down=False)):
        with pytest.raises(ValueError, match="are not in"):
            view.read(0, view.shape[1] + 1, 0, 3)
    with pytest.raises(DataError, match="48 x 48"):
        DownsampledSource(source, 48)


def test_frame_of_a_file_with_several(real_data: Path) -> None:
    path = real_data / "dicom" / "dbt_4frames_jpeg2000.dcm"
    dataset = ImageDataset([Record(path, 0, "P", frame=number) for number in range(4)])
    frames = [whole(item["image"]) for item in (dataset[n] for n in range(4))]
    for number, frame in enumerate(frames):
        assert torch.equal(frame, whole(open_pixels(path, frame=number)))
    assert not torch.equal(frames[0], frames[3])
    with pytest.raises(DataError, match="has 4 frames"):
        ImageDataset([Record(path, 0, "P")])[0]


def test_damaged_image_names_its_file(records: list[Record], tmp_path: Path) -> None:
    path = tmp_path / "cut.dcm"
    path.write_bytes(records[0].path.read_bytes()[:9000])
    dataset = ImageDataset([records[0], Record(path, 0, "P")])
    assert whole(dataset[0]["image"]).shape == (1, 160, 128)
    with pytest.raises(DataError, match=r"cut\.dcm: is truncated"):
        dataset[1]
