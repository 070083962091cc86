"""Pixels that go to the device as their files store them become there what the host would have made of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from exactness import step
from torch import Tensor, nn

from gigamorph import accelerate, open_pixels
from gigamorph.engine.execution import forward, image_batch
from gigamorph.engine.images.affine import Affine
from gigamorph.engine.images.batches import PixelBatch, StoredBatch
from gigamorph.engine.images.pixels import ImageSource, Normalize
from gigamorph.engine.tiling.scan import Scan


class Stored:
    """Stored values with a table, mirrored both ways, as a DICOM file may have them."""

    name, steps, to_original, self_describing = "stored", (), Affine(), True

    def __init__(self, values: np.ndarray, table: np.ndarray | None, full: float):
        self.values, self.table, self.full = values, table, full
        self.shape, self.dtype = values.shape, values.dtype

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        return self.values[:, top:bottom, left:right]

    def flips(self) -> tuple[bool, bool]:
        return True, True


def numbers(dtype: Any, channels: int = 1, most: int | None = None) -> np.ndarray:
    most = most or np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, most, (channels, 40, 31), dtype=np.int64, endpoint=True).astype(dtype)


def with_table(entries: int) -> ImageSource:
    table = np.random.default_rng(1).integers(0, 4095, entries).astype(np.uint16)
    return ImageSource(Stored(numbers(np.uint16, most=8191), table, 4095.0), normalize=Normalize((0.4,), (0.2,)))  # pyright: ignore


EACH = Normalize((0.1, 0.2, 0.3), (1, 2, 3))
SOURCES = {
    "uint16": lambda: open_pixels(numbers(np.uint16), flip=False),
    "uint8, normalised": lambda: open_pixels(numbers(np.uint8), normalize=Normalize((0.3,), (0.7,))),
    "big-endian": lambda: open_pixels(numbers(">u2"), flip=True),
    "tensor": lambda: open_pixels(torch.from_numpy(numbers(np.uint16)), flip=True),
    "three channels of one": lambda: open_pixels(numbers(np.uint16), channels=3, normalize=EACH),
    "colour": lambda: open_pixels(numbers(np.uint8, 3), normalize=EACH),
    "12 bits": lambda: ImageSource(Stored(numbers(np.uint16, most=4095), None, 4095.0)),  # pyright: ignore
    "table": lambda: with_table(8192),
    "table that is too short": lambda: with_table(4096),
}


@pytest.mark.parametrize("name", SOURCES)
def test_developed_is_what_is_read(name: str) -> None:
    source = SOURCES[name]()
    for batch in (PixelBatch([source]), PixelBatch([source, SOURCES[name]()])):
        stored = StoredBatch.of(batch)
        assert stored is not None and stored.shape == batch.shape
        for rect in ((0, 40, 0, 31), (3, 17, 5, 30), (0, 0, 4, 9)):
            pixels = stored.read(*rect)
            assert pixels.dtype in (torch.uint8, torch.uint16)
            assert torch.equal(stored.develop(pixels), batch.read(*rect))


def test_what_cannot_be_developed() -> None:
    eight, sixteen = open_pixels(numbers(np.uint8)), open_pixels(numbers(np.uint16))
    for sources in (
        [open_pixels(numbers(np.uint8).astype(np.float32))],  # nothing to be gained
        [open_pixels(numbers(np.uint8, 3), channels=1)],  # whether it is grey is not known
        [eight, sixteen],
    ):
        assert StoredBatch.of(PixelBatch(sources)) is None


def test_only_a_gpu_gets_stored_values() -> None:
    batch = PixelBatch([open_pixels(numbers(np.uint16))])
    assert isinstance(image_batch.as_uploaded(batch, torch.device("cuda")), StoredBatch)
    assert image_batch.as_uploaded(batch, torch.device("cpu")) is batch
    assert image_batch.as_uploaded(other := torch.zeros(1, 1, 4, 4), torch.device("cuda")) is other  # pyright: ignore


@pytest.mark.parametrize("name", ["uint16", "table", "three channels of one"])
def test_a_step_is_the_same(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Outputs and gradients, bit for bit; the tiles come as integers of 16 bits."""
    source = SOURCES[name]()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(source.shape[0], 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    expected = step(accelerate(copy.deepcopy(model), tile=16), source)
    seen: list[torch.dtype] = []
    plain = Scan._as_computed

    def convert(self: Scan, number: int, pixels: Tensor) -> Tensor:
        seen.append(pixels.dtype)
        return plain(self, number, pixels)

    monkeypatch.setattr(Scan, "_as_computed", convert)
    monkeypatch.setattr(forward, "as_uploaded", lambda pixels, device: StoredBatch.of(pixels))
    got = step(accelerate(model, tile=16), source)
    assert set(seen) == {torch.uint16}
    for a, b in zip(expected.outputs, got.outputs, strict=True):
        assert torch.equal(a, b)
    for parameter, gradient in expected.gradients.items():
        assert torch.equal(gradient, got.gradients[parameter])  # pyright: ignore
