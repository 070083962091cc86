"""Figures of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.figure import open_axes, panel
from . import roc
from .bootstrap import Resamples
from .cases import Cases
from .curves import WeightedCurves

_BAND = 500  # resamples for the band of a curve


def curves_figure(cases: Cases, found: dict[str, Any], seed: int = 0) -> Figure:
    """ROC and precision-recall curves of each output that has both classes.

    Args:
        cases: labelled rows at their level.
        found: measures of the outputs by name.
        seed: of the bootstrap.
    """
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="0.75", linewidth=1)
    shown = [(column, name) for column, name in enumerate(cases.outputs) if "auc" in found[name]]
    for column, name in shown:
        rows = ~np.isnan(cases.truth[:, column])
        curve = WeightedCurves(cases.truth[rows, column], roc.ranks(cases.scores[rows, column]))
        true, false = _plotted_points(*(counts[0] for counts in curve(np.ones((1, int(rows.sum())))).counts()))
        [line] = left.plot(np.append(0, false / false[-1]), np.append(0, true / true[-1]), linewidth=1.8, clip_on=False)
        right.plot(*_steps(true, false), color=line.get_color(), linewidth=1.8, clip_on=False)
        line.set_label(f"{name}: {found[name]['auc']['value']:.3f}")
        if len(shown) == 1:
            _band(left, cases, curve, rows, seed)
            prevalence = found[name]["prevalence"]
            right.axhline(prevalence, color="0.75", linewidth=1)
    for axes, title, key, measure in (
        (left, "ROC curve", "auc", "area"),
        (right, "Precision and recall", "average_precision", "average precision"),
    ):
        value = f", {measure} {found[shown[0][1]][key]['value']:.3f}" if len(shown) == 1 else ""
        axes.set_title(title + value, loc="left", fontsize=10)
    if len(shown) > 1:
        left.legend(fontsize=8, title="area", loc="lower right")
    left.set(xlabel="1 − specificity", ylabel="sensitivity")
    right.set(xlabel="sensitivity (recall)", ylabel="positive predictive value (precision)")
    for axes in (left, right):
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    open_axes(left, right)
    return figure


def _plotted_points(true: np.ndarray, false: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points of a curve that a plot can resolve: a few thousand of a million thresholds."""
    cells = np.stack([np.round(2000 * true / true[-1]), np.round(2000 * false / false[-1])])
    distinct = np.append((cells[:, 1:] != cells[:, :-1]).any(0), True)
    return true[distinct], false[distinct]


def _steps(true: np.ndarray, false: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision of the step curve whose area is the average precision."""
    recall, precision = true / true[-1], true / (true + false)
    return np.stack([np.append(0, recall[:-1]), recall], 1).ravel(), np.repeat(precision, 2)


def _band(axes: Axes, cases: Cases, curve: WeightedCurves, rows: np.ndarray, seed: int) -> None:
    """Fill the band of the middle 95 % of the resampled curves."""
    grid = np.linspace(0, 1, 201)
    resamples = Resamples(cases.clusters, _BAND, seed)
    drawn = np.concatenate([curve(weights).rates(grid) for weights in resamples.weights(rows)])
    drawn = drawn[~np.isnan(drawn).any(1)]
    if len(drawn):
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        axes.fill_between(grid, low, high, alpha=0.15, linewidth=0)


def calibration_figure(found: dict[str, Any]) -> Figure:
    """Frequency against probability of each output that has a reliability curve."""
    figure, axes = panel(4.8, 4.6, "Frequency of positives against their probability")
    axes.plot([0, 1], [0, 1], color="0.75", linewidth=1)
    shown = {name: one["calibration"]["reliability"] for name, one in found.items() if "calibration" in one}
    for name, curve in shown.items():
        p, frequency = np.array(curve["probability"]), np.array(curve["frequency"])
        # Intervals of several outputs would overlap.
        error = np.array([frequency - curve["low"], np.array(curve["high"]) - frequency]) if len(shown) == 1 else None
        axes.errorbar(
            p,
            frequency,
            None if error is None else np.maximum(error, 0),
            marker="o",
            markersize=4,
            linewidth=1.2,
            elinewidth=0.8,
            label=name,
        )
    if len(shown) > 1:
        axes.legend(fontsize=8)
    axes.set(xlabel="mean probability of the rows of a bin", ylabel="fraction of positives among them")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    return figure


def subgroups_figure(rows: Sequence[dict[str, Any]], by: str) -> Figure:
    """The AUC of each subgroup with its interval."""
    shown = [row for row in rows if row.get("auc")]
    figure, axes = panel(6.4, 1.1 + 0.32 * len(shown), f"By {by}, rows in parentheses")
    for place, row in enumerate(shown):
        value, interval = row["auc"]["value"], row["auc"]["bootstrap"]
        axes.plot([value], [place], "o", color="tab:blue", markersize=5)
        if interval is not None:
            axes.plot(interval, [place, place], color="tab:blue", linewidth=1.2)
    axes.set_yticks(range(len(shown)), [f"{row['value']} ({row['rows']})" for row in shown])
    axes.set(xlabel="area under the ROC curve", ylim=(len(shown) - 0.5, -0.5), xlim=(0, 1.02))
    axes.axvline(0.5, color="0.75", linewidth=1)
    return figure


def froc_figure(found: dict[str, Any]) -> Figure:
    """Sensitivity per lesion against false marks per image, on a logarithmic axis."""
    figure, axes = panel(5.6, 4, "Lesions found against false marks (FROC)")
    false, sensitivity = (np.array(found["curve"][name]) for name in ("false_marks_per_image", "sensitivity"))
    axes.step(
        np.append(np.maximum(false, 0.01), max(10.0, false[-1])),
        np.append(sensitivity, sensitivity[-1]),
        where="post",
        linewidth=1.8,
    )
    for row in found["sensitivity"]:
        axes.plot([row["false_marks_per_image"]], [row["value"]], "o", color="tab:blue", markersize=4)
        if row["bootstrap"]:
            axes.plot([row["false_marks_per_image"]] * 2, row["bootstrap"], color="tab:blue", linewidth=0.8)
    axes.set(xlabel="false marks per image", ylabel="lesions found", xscale="log", ylim=(0, 1.02))
    rates = [row["false_marks_per_image"] for row in found["sensitivity"] if row["false_marks_per_image"] > 0]
    axes.set_xlim(min([0.05, *(rate / 2 for rate in rates)]), max([10, *(1.25 * rate for rate in rates)]))
    axes.set_xticks(rates, [str(Fraction(rate).limit_denominator(64)) if rate < 1 else f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    return figure
