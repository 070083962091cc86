"""Plots of a run: curves.png, roc.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from ..report.figure import open_axes, panel, save_figure
from .metrics import SHOWN, Prediction


def write_curves(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Plot the rows of a log in ``curves.png``."""
    save_figure(_curves(rows), folder / "curves.png")


def _curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss, score = figure.subplots(1, 2)
    open_axes(loss, score)
    epochs = [row["epoch"] for row in rows]
    for name, label in (("train_loss", "training"), ("val_loss", "validation")):
        if name in rows[0]:
            loss.plot(epochs, [row[name] for row in rows], marker=".", label=label)
    for axes in (loss, score):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    loss.set(xlabel="epoch", ylabel="loss")
    if "val_dice" in rows[0]:
        _dice(score, rows)
    measure = "mae" if "val_mae_image" in rows[0] else "auc"
    for level in ("image", "breast"):
        name = f"val_{measure}_{level}"
        if name in rows[0]:
            score.plot(epochs, [row[name] for row in rows], marker=".", label=f"per {level}")
    shown = "Dice" if "val_dice" in rows[0] else SHOWN[f"{measure}_image"]
    score.set(xlabel="epoch", ylabel=f"validation {shown}")
    score.set_ylim(0, 1.02 if measure == "auc" else None)
    for axes in (loss, score):
        if axes.lines:  # above the axes, to avoid the curves
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure


def _dice(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Plot the Dice of each class of masks, and the mean if there are several."""
    names = [name for name in rows[0] if name.startswith("val_dice_")]
    for name in names if len(names) == 1 else [*names, "val_dice"]:
        label = name.removeprefix("val_dice_") if name != "val_dice" else "mean"
        axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], marker=".", label=label)


def roc_figure(curves: Mapping[str, Sequence[Prediction]]) -> Figure:
    """ROC curves of labelled two-class predictions, with their names above the axes."""
    figure, axes = panel(4.4, 4.2)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, predictions in curves.items():
        labelled = [p for p in predictions if p.label is not None]
        labels = np.array([p.label for p in labelled])
        false, true, _ = roc_curve(labels, np.array([p.log_odds[1] for p in labelled]))
        axes.plot(false, true, linewidth=2, clip_on=False, label=name)
    axes.set(xlabel="false positive rate (1 − specificity)", ylabel="true positive rate (sensitivity)")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    # Above the axes: inside, the legend would cover curves near the diagonal.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, labelcolor="linecolor")
    return figure
