"""The main job in small: phantom mammograms whose label only native resolution shows, learnt inside a memory budget."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..datasets.phantom import write_phantoms
from ..errors import GigamorphError
from ..images.pixels import Normalize
from ..train.data import Images
from ..train.explanation import explain_class
from ..train.fit import Fitted, fit
from ..train.heatmap import write_overlay
from ..train.inputs import training_data
from ..train.metrics import Prediction, auc_of
from ..train.options import Optimizer, TrainOptions
from ..train.progress import Report
from .step import StepCost, measure_steps

HEIGHT, WIDTH = 2048, 1664
PATIENTS = {"train": 20, "val": 4, "test": 32}
FACTOR = 8
BUDGET = 96 * 2**20
# The phantoms' grey levels, as fractions of the full range: middle tissue, and its spread.
_GREY = Normalize((0.3,), (0.1,))
_MODEL = "lesionnet"
_WRITTEN = {"data", "low", "native", "overlays", "report.html", "roc.png", "memory.png", "evidence.png"}


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found. ``low`` and ``native`` are the test predictions of the two networks."""

    stock: StepCost
    tiled: StepCost
    low: list[Prediction]
    native: list[Prediction]
    overlays: list[Path]
    examples: list[dict[str, Any]]
    """The items that the overlays show."""
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
    """Make the phantoms, measure a step of stock PyTorch and of ours, train at 1/8 and at native resolution.

    The same network, the same patients and the same optimizer serve both resolutions; the small one, being 64 times
    cheaper, gets three times the epochs. Writes ``data``, ``low``, ``native`` and ``overlays`` into ``out``.

    Raises:
        GigamorphError: if ``out`` holds anything but a former demonstration (which is replaced), or cannot be written.
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

    say("measuring one training step of stock PyTorch and of gigamorph, by turns, each in a process of its own")
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
    """The two positive test images that the network is surest of, and where their overlays were written."""
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
    """Remove a former demonstration; nothing else is ever deleted."""
    if not out.exists():
        return
    others = sorted(entry.name for entry in out.iterdir() if entry.name not in _WRITTEN)
    if others:
        raise GigamorphError(f"{out}: holds {', '.join(others[:3])}, not only a former demo; name another --out")
    for entry in out.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
