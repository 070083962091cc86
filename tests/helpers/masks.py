"""A table of images with bright squares, and their masks."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import imagecodecs
import numpy as np
from torch import Tensor, nn

SIZES = ((40, 33), (37, 45))


class Strided(nn.Module):
    """A map at a quarter of the resolution."""

    def __init__(self, num_classes: int = 3, in_channels: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, num_classes, 3, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def squares(number: int, values: Sequence[int] = (0, 1, 2)) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image, uint8, with a grey and a bright square, and its mask, whose values are `values`."""
    random = np.random.default_rng(number)
    height, width = SIZES[number % len(SIZES)]
    mask = np.full((height, width), values[0], np.uint8)
    image = random.normal(40, 8, (height, width))
    for value, grey in zip(values[1:], (110, 210), strict=False):
        top, left = random.integers(0, height - 12), random.integers(0, width - 12)
        image[top : top + 11, left : left + 11] = grey
        mask[top : top + 11, left : left + 11] = value
    return image.clip(0, 255).astype(np.uint8), mask


def write_table(folder: Path, count: int = 8, values: Sequence[int] = (0, 1, 2), split: bool = True) -> Path:
    """`count` images in a table: the last two of split val and test."""
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        image, mask = squares(number, values)
        (folder / f"{number}.png").write_bytes(imagecodecs.png_encode(image))
        (folder / "masks" / f"{number}.png").write_bytes(imagecodecs.png_encode(mask))
        part = {count - 2: "val", count - 1: "test"}.get(number, "train")
        rows.append([f"{number}.png", f"masks/{number}.png", f"p{number}", part])
    path = folder / "table.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        header = ["image_path", "mask_path", "patient_id", "split"]
        writer.writerows(row if split else row[:3] for row in [header, *rows])
    return path
