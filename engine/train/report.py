"""The report of the demonstration: one HTML page and its pictures."""

from __future__ import annotations

import html
from pathlib import Path

import imagecodecs
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ..memory import format_bytes
from .checkpoint import versions, write_atomically
from .compare import StepCost
from .curves import roc_figure, save_figure
from .demo import BUDGET, FACTOR, HEIGHT, WIDTH, DemoResult


def write_report(result: DemoResult, out: str | Path) -> Path:
    """Write ``report.html``, ``evidence.png``, ``roc.png`` and ``memory.png`` into ``out``; returns the page's path.

    Raises:
        GigamorphError: if a file cannot be written.
    """
    out = Path(out)
    save_figure(_memory_figure(result.stock, result.tiled), out / "memory.png")
    curves = {
        f"native: AUC {result.auc_native:.3f}": result.native,
        f"1/{FACTOR}: AUC {result.auc_low:.3f}": result.low,
    }
    save_figure(roc_figure(curves), out / "roc.png")
    save_figure(_evidence_figure(result), out / "evidence.png")
    page = _page(result)
    write_atomically(out / "report.html", lambda p: p.write_text(page, encoding="utf-8"), "report")
    return out / "report.html"


def _memory_figure(stock: StepCost, tiled: StepCost) -> Figure:
    figure = Figure(figsize=(5.6, 3.4))
    axes = figure.subplots()
    for name, cost in (("stock PyTorch", stock), ("gigamorph", tiled)):
        seconds, used = zip(*cost.curve, strict=True) if cost.curve else ((), ())
        axes.plot(seconds, np.array(used) / 2**20, label=f"{name}: peak {format_bytes(cost.peak_bytes)}")
    axes.axhline(BUDGET / 2**20, color="0.5", linestyle="--", linewidth=1, label=f"budget {format_bytes(BUDGET)}")
    axes.set(xlabel="seconds since the step began", ylabel="MiB above what was held before", ylim=(0, None))
    axes.legend()
    return figure


def _evidence_figure(result: DemoResult) -> Figure:
    """Each example whole, reduced by maxima so that a few bright pixels stay visible, and its cluster at full size."""
    figure = Figure(figsize=(8, 4.6 * len(result.overlays)))
    axes = figure.subplots(len(result.overlays), 2, squeeze=False)
    for row, (path, item) in enumerate(zip(result.overlays, result.examples, strict=True)):
        picture: NDArray[np.uint8] = imagecodecs.png_decode(path.read_bytes())
        top, bottom, left, right = (int(side) for side in item["record"].extra["cluster"].split())
        whole, detail = axes[row]
        whole.imshow(_reduced(picture, 4), extent=(0, picture.shape[1], picture.shape[0], 0))
        whole.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="cyan"))
        whole.set_title(f"{path.stem}; the true cluster is framed", fontsize=9)
        margin = 40
        window = (slice(max(top - margin, 0), bottom + margin), slice(max(left - margin, 0), right + margin))
        detail.imshow(picture[window], interpolation="nearest")
        detail.set_title("there, pixel by pixel: evidence for a cluster in red", fontsize=9)
        for ax in (whole, detail):
            ax.set_axis_off()
    figure.tight_layout()
    return figure


def _reduced(picture: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    height, width = (side // factor * factor for side in picture.shape[:2])
    blocks = picture[:height, :width].reshape(height // factor, factor, width // factor, factor, -1)
    return blocks.max((1, 3))


def _page(result: DemoResult) -> str:
    stock, tiled = result.stock, result.tiled
    rows = [
        ("AUC on test patients, native resolution", f"{result.auc_native:.3f}"),
        (f"AUC on test patients, 1/{FACTOR} of the resolution", f"{result.auc_low:.3f}"),
        ("Memory budget of a training step", format_bytes(BUDGET)),
        ("Peak of a step, stock PyTorch", format_bytes(stock.peak_bytes)),
        ("Peak of a step, gigamorph", format_bytes(tiled.peak_bytes)),
        ("Time of a step, stock PyTorch", f"{stock.seconds:.2f} s"),
        ("Time of a step, gigamorph", f"{tiled.seconds:.2f} s"),
        ("Loss of that step, stock PyTorch and gigamorph", f"{stock.loss:.7f} and {tiled.loss:.7f}"),
        ("Training at native resolution", f"{result.native_seconds:.0f} s"),
        ("Seed", str(result.seed)),
        *((name, text) for name, text in versions().items()),
    ]
    table = "\n".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>gigamorph demo</title>
<style>body{{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}
td{{padding:.1em 1.5em .1em 0}}img{{max-width:100%}}</style>
<h1>gigamorph demo</h1>
<p>{len(result.native)} test images of {HEIGHT} × {WIDTH} pixels, of patients that no training has seen. The label is a
cluster of micro-calcifications of 1 to 3 pixels; images without one hold the same cluster blurred, of equal total
brightness. Averaged over {FACTOR} × {FACTOR} pixels nothing tells the two apart.</p>
<table>{table}</table>
<h2>ROC</h2><img src="roc.png" alt="ROC curves">
<h2>Memory of one training step</h2><img src="memory.png" alt="memory over time">
<h2>Evidence</h2>
<p>Exact class activation: the gradient of the class's logit times the activation, drawn at native resolution.</p>
<img src="evidence.png" alt="evidence on two test images">
</html>
"""
