"""A small training: phantom mammograms whose label is visible only at native resolution, within a memory budget."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import GigamorphError
from ...images.pixels import Normalize
from ...train.data import Images
from ...train.explanation import explain_class
from ...train.fit import Fitted, fit
from ...train.heatmap import write_overlay
from ...train.inputs import training_data
from ...train.metrics import Prediction, auc_of
from ...train.options import Optimizer, TrainOptions
from ...train.progress import Report
from ..phantom import write_phantoms
from .step import StepCost, measure_steps

HEIGHT, WIDTH = 2048, 1664
PATIENTS = {"train": 20, "val": 4, "test": 32}
FACTOR = 8
BUDGET = 96 * 2**20
# The phantoms' grey levels, as fractions of the full range: mean of tissue, and its spread.
_GREY = Normalize((0.3,), (0.1,))
_MODEL = "lesionnet"
_OUTPUTS = {"data", "low", "native", "overlays", "report.html", "roc.png", "memory.png", "evidence.png"}


@dataclass(frozen=True)
class DemoResult:
    """Results of the demonstration; ``low`` and ``native`` are the test predictions of the two networks."""

    stock: StepCost
    tiled: StepCost
    low: list[Prediction]
    native: list[Prediction]
    overlays: list[Path]
    examples: list[dict[str, Any]]
    """The items of the test images in ``overlays``."""
    native_seconds: float
    seconds: float
    seed: int

    @property
    def auc_low(self) -> float | None:
        """AUC per image on the test patients at 1/8 of the resolution."""
        return auc_of(self.low)

    @property
    def auc_native(self) -> float | None:
        """AUC per image on the test patients at native resolution."""
        return auc_of(self.native)


def run_demo(
    out: str | Path, *, seed: int = 0, device: str = "cpu", report: Report | None = None, say: Callable[[str], None]
) -> DemoResult:
    """Write phantoms, measure a step of stock PyTorch and of gigamorph, and train at 1/8 and at native resolution.

    Both resolutions use the same network, patients and optimizer; the smaller one, which is 64 times cheaper, gets
    three times the epochs. Writes ``data``, ``low``, ``native`` and ``overlays`` into ``out``.

    Raises:
        GigamorphError: ``out`` contains files that are not from a former demonstration, or cannot be written.
    """
    out = Path(out)
    _clear(out)
    began = time.monotonic()
    patients = sum(PATIENTS.values())
    say(f"writing {2 * patients} phantom mammograms of {HEIGHT} x {WIDTH} pixels as DICOM")
    train, val, test = (PATIENTS[name] / patients for name in ("train", "val", "test"))
    table = write_phantoms(
        out / "data", patients=patients, height=HEIGHT, width=WIDTH, seed=seed, fractions=(train, val, test)
    )
    native = training_data(table, normalize=_GREY, seed=seed)
    low = training_data(table, normalize=_GREY, downsample=FACTOR, seed=seed)

    say("measuring one training step of stock PyTorch and of gigamorph, alternately, each in its own process")
    image = native.train.records[0].path
    stock, tiled = measure_steps(image, _MODEL, (None, BUDGET), device=device)

    options = TrainOptions(
        model=_MODEL,
        memory_budget=BUDGET,
        epochs=4,
        optimizer=Optimizer(lr=5e-3),
        accumulate=4,
        seed=seed,
        device=device,
    )
    say(f"training at 1/{FACTOR} of the resolution")
    small = TrainOptions(**{**vars(options), "epochs": 3 * options.epochs})
    fitted_low = fit(low, small, out / "low", report=report)
    say("training at native resolution")
    started = time.monotonic()
    fitted = fit(native, options, out / "native", report=report)
    native_seconds = time.monotonic() - started

    examples, overlays = _examples(native.test, fitted, out / "overlays")
    return DemoResult(
        stock,
        tiled,
        fitted_low.predictions["test"],
        fitted.predictions["test"],
        overlays,
        examples,
        native_seconds,
        time.monotonic() - began,
        seed,
    )


def _examples(test: Images, fitted: Fitted, folder: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """Return the two positive test images with the highest log-odds, and the paths of their overlays."""
    predictions = fitted.predictions["test"]
    order = sorted(range(len(predictions)), key=lambda i: -predictions[i].log_odds[1])
    examples, overlays = [], []
    for index in [i for i in order if predictions[i].label == 1][:2]:
        item = test[index]
        path = folder / f"{item['record'].path.stem}.png"
        write_overlay(explain_class(fitted.net, item["image"], 1)[0], path)
        examples.append(item)
        overlays.append(path)
    return examples, overlays


def _clear(out: Path) -> None:
    """Remove a former demonstration; refuse to delete anything else."""
    if not out.exists():
        return
    others = sorted(entry.name for entry in out.iterdir() if entry.name not in _OUTPUTS)
    if others:
        raise GigamorphError(f"{out}: contains other files ({', '.join(others[:3])}); choose another --out")
    for entry in out.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
