"""The report of the demonstration: one HTML page and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ...evaluate.evaluate import Settings, evaluate
from ...evaluate.report import format_value, no_interval
from ...report.figure import panel, png
from ...report.page import TextTable, write_page
from ...tiling.memory import format_bytes
from ...train.curves import roc_figure
from ...train.metrics import Prediction, as_cases
from ...versions import versions_of_results
from .run import BUDGET, FACTOR, HEIGHT, WIDTH, DemoResult
from .step import StepCost

Window = tuple[int, int, int, int]  # top, bottom, left, right; ends excluded
_DETAIL = 160  # pixels: side of the region shown at full size


def write_report(result: DemoResult, out: str | Path) -> Path:
    """Write ``report.html``, ``evidence.png``, ``roc.png`` and ``memory.png`` into ``out``; return the page's path.

    Raises:
        GigamorphError: a file cannot be written.
    """
    figures = {
        "roc": roc_figure(
            {f"native: AUC {result.auc_native:.3f}": result.native, f"1/{FACTOR}: AUC {result.auc_low:.3f}": result.low}
        ),
        "memory": _memory_figure(result.stock, result.tiled),
        "evidence": _evidence_figure(result),
    }
    settings = Settings(levels=("image",))
    areas = {"native": _auc(result.native, settings), f"1/{FACTOR} of it": _auc(result.low, settings)}
    return write_page(
        Path(out) / "report.html",
        "demo.html",
        {name: png(figure) for name, figure in figures.items()},
        images=len(result.native),
        height=HEIGHT,
        width=WIDTH,
        factor=FACTOR,
        budget=format_bytes(BUDGET),
        resamples=settings.resamples,
        areas=TextTable(
            ["Resolution", "AUC on test patients"], [[name, format_value(area)] for name, area in areas.items()]
        ),
        without_interval=[f"{name}: {no_interval(area)}" for name, area in areas.items() if no_interval(area)],
        costs=_costs(result.stock, result.tiled),
        made=[
            ("training at native resolution", f"{result.native_seconds:.0f} s"),
            ("whole demonstration", f"{result.seconds:.0f} s"),
            ("seed", result.seed),
        ],
        versions=versions_of_results().items(),
    )


def _auc(predictions: Sequence[Prediction], settings: Settings) -> dict[str, Any]:
    """Return the AUC per image with its interval over patients, or the reason why it has none."""
    [output] = evaluate(as_cases(predictions, ("0", "1")), settings)["levels"]["image"]["outputs"].values()
    return output["auc"]


def _costs(stock: StepCost, tiled: StepCost) -> TextTable:
    return TextTable(
        ["One training step", "stock PyTorch", "gigamorph"],
        [
            ["peak memory", format_bytes(stock.peak_bytes), format_bytes(tiled.peak_bytes)],
            ["time", f"{stock.seconds:.2f} s", f"{tiled.seconds:.2f} s"],
            ["loss", f"{stock.loss:.7f}", f"{tiled.loss:.7f}"],
        ],
    )


def _memory_figure(stock: StepCost, tiled: StepCost) -> Figure:
    figure, axes = panel(9.2, 3.6, "One training step of one image: memory above what the process held before")
    mib = 2**20
    end = 1.03 * max(cost.curve[-1][0] if cost.curve else 0.0 for cost in (stock, tiled))
    for name, cost, color in (("stock PyTorch", stock, "tab:red"), ("gigamorph", tiled, "tab:blue")):
        if cost.curve:
            seconds, used = zip(*cost.curve, strict=True)
            axes.plot(seconds, np.array(used) / mib, color=color, linewidth=1.2)
        axes.axhline(cost.peak_bytes / mib, color=color, linestyle=":", linewidth=1)
        text = f"{name}, peak {format_bytes(cost.peak_bytes)}"
        axes.text(1.01 * end, cost.peak_bytes / mib, text, color=color, va="center")
    axes.axhline(BUDGET / mib, color="0.3", linestyle="--", linewidth=1)
    apart = 0.055 * max(stock.peak_bytes, tiled.peak_bytes) / mib  # the height of a line of text
    label = max(BUDGET / mib, tiled.peak_bytes / mib + apart) if tiled.peak_bytes <= BUDGET else BUDGET / mib - apart
    axes.text(1.01 * end, label, f"budget {format_bytes(BUDGET)}", color="0.3", va="center")
    axes.set(xlabel="time since the step began (s)", ylabel="memory of the step (MiB)", xlim=(0, end), ylim=(0, None))
    return figure


def _evidence_figure(result: DemoResult) -> Figure:
    """Plot each example reduced by maxima, which keeps a few bright pixels visible, and its cluster at full size."""
    figure = Figure(figsize=(11.5, 4.5 * len(result.overlays)), layout="constrained")
    axes = figure.subplots(len(result.overlays), 3, squeeze=False, width_ratios=(1, 1.1, 1.1))
    for row, (path, item) in enumerate(zip(result.overlays, result.examples, strict=True)):
        picture: NDArray[np.uint8] = imagecodecs.png_decode(path.read_bytes())
        box = _parse_window(item["record"].extra["cluster"])
        window = _window_around(box, picture.shape[:2])
        top, bottom, left, right = window
        pixels = item["image"].read(*window)[0].numpy()
        extent = (left, right, bottom, top)
        whole, plain, evidence = axes[row]
        whole.imshow(_max_pooled(picture, 4), extent=(0, picture.shape[1], picture.shape[0], 0))
        whole.set_title(
            f"{path.stem}: {_probability(result, item)} probability of a cluster; frame: the true one", fontsize=10
        )
        plain.imshow(pixels, cmap="gray", interpolation="nearest", extent=extent)
        plain.set_title("the cluster, every pixel", fontsize=10)
        evidence.imshow(picture[top:bottom, left:right], interpolation="nearest", extent=extent)
        evidence.set_title("evidence for a cluster: red some, yellow most", fontsize=10)
        for ax in (whole, plain, evidence):
            corner, width, height = (box[2], box[0]), box[3] - box[2], box[1] - box[0]
            ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="cyan", linewidth=1.5))
            ax.set_xlabel("column (pixels)")
        whole.set_ylabel("row (pixels)")
    return figure


def _parse_window(text: str) -> Window:
    top, bottom, left, right = (int(side) for side in text.split())
    return top, bottom, left, right


def _window_around(box: Window, shape: tuple[int, ...]) -> Window:
    """Return a square window around the box, of 160 pixels unless the image is smaller."""
    sides = []
    for low, high, size in ((box[0], box[1], shape[0]), (box[2], box[3], shape[1])):
        start = min(max((low + high) // 2 - _DETAIL // 2, 0), max(size - _DETAIL, 0))
        sides += [start, min(start + _DETAIL, size)]
    return sides[0], sides[1], sides[2], sides[3]


def _probability(result: DemoResult, item: dict[str, Any]) -> str:
    found = next(p for p in result.native if p.image == str(item["record"].path))
    return f"{100 * found.probabilities[1]:.1f} %"


def _max_pooled(picture: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    height, width = (side // factor * factor for side in picture.shape[:2])
    blocks = picture[:height, :width].reshape(height // factor, factor, width // factor, factor, -1)
    return blocks.max((1, 3))
