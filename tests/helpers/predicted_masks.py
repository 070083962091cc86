"""A table of images with masks and its predictions, as `gigamorph predict` writes them, without a network."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import imagecodecs
import numpy as np

CLASSES = ("background", "mass", "cyst")


def dice(predicted: np.ndarray, mask: np.ndarray, number: int) -> float:
    """NaN where neither has the class; 255 of the mask is not judged."""
    own, other = (predicted == number) & (mask != 255), mask == number
    return 2 * (own & other).sum() / (own.sum() + other.sum()) if (own | other).any() else np.nan


def write_predicted(folder: Path, count: int = 4, height: int = 1100, width: int = 700) -> tuple[Path, Path]:
    """(table, predictions) of `count` images of patients with a right and a left breast, and their masks.

    The predicted squares lie 20 pixels below those of the table; of the last image there is nothing.
    """
    (folder / "masks").mkdir(parents=True)
    (folder / "out" / "masks").mkdir(parents=True)
    table, predictions = [], []
    for number in range(count):
        random = np.random.default_rng(number)
        image = random.normal(90, 10, (height, width)).clip(0, 255).astype(np.uint8)
        mask, predicted = np.zeros((2, height, width), np.uint8)
        for value, side in ((1, 160), (2, 60)) if number < count - 1 else ():
            top, left = random.integers(0, height - side - 20), random.integers(0, width - side)
            mask[top : top + side, left : left + side] = value
            predicted[top + 20 : top + side + 20, left : left + side] = value
            image[top : top + side, left : left + side] += np.uint8(40 * value)
        mask[:4] = 255
        for path, values in (
            (f"{number}.png", image),
            (f"masks/{number}.png", mask),
            (f"out/masks/{number}.png", predicted),
        ):
            (folder / path).write_bytes(imagecodecs.png_encode(values))
        who = {"patient_id": f"p{number // 2}", "laterality": "RL"[number % 2], "view": "MLO"}
        table.append({"image_path": f"{number}.png", "mask_path": f"masks/{number}.png", **who})
        shares = {f"share_{name}": float((predicted == k).mean()) for k, name in enumerate(CLASSES)}
        found = {name: dice(predicted, mask, k) for k, name in enumerate(CLASSES) if k}
        dices = {f"dice_{name}": "" if np.isnan(value) else value for name, value in found.items()}
        own = {
            "image_path": str(folder / f"{number}.png"),
            "mask": f"masks/{number}.png",
            "split": "test",
            "exam_id": "",
        }
        predictions.append({**own, **who, **shares, **dices})
    for path, rows in ((folder / "table.csv", table), (folder / "out" / "predictions.csv", predictions)):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    (folder / "out" / "predictions.json").write_text(json.dumps({"masks": {"classes": CLASSES, "binary": False}}))
    return folder / "table.csv", folder / "out" / "predictions.csv"
