"""Measures of predicted numbers: errors, agreement and correlation, with intervals over patients; and their report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from ..errors import DataError
from ..report.figure import open_axes, png
from ..report.page import TextTable
from ..versions import versions
from .bootstrap import Array, Resamples, listed
from .cases import Cases, counted_patients
from .evaluate import Settings, at_levels
from .report import format_value, write_results

_ROUNDING = 1e-12
_UNDEFINED = "not defined: one row, or numbers that are all the same"
NAMES = {
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "bias": "bias (predicted - true)",
    "low": "limit of agreement, low",
    "high": "limit of agreement, high",
    "r2": "R2",
    "pearson": "Pearson's r",
    "concordance": "Lin's concordance",
}


def statistics(truth: Array, predicted: Array, weights: Array) -> dict[str, Array]:
    """Measures (b,) of numbers (n,) with weights (b, n); NaN where undefined.

    mae, rmse; bias, with the limits of agreement bias -+ 1.96 sample standard deviations with divisor n - 1 (Bland and
    Altman, 1986); R2 = 1 - mean squared error / variance of the truth; Pearson's r; concordance (Lin, 1989).
    """
    total = weights.sum(1)

    def mean(values: Array) -> Array:
        return weights @ values / total

    error = predicted - truth
    # Centred, because products of large numbers lose their variation to rounding; tiny variances count as 0.
    middles = [np.median(values) for values in (truth, predicted, error)]
    true, estimated, off = (values - middle for values, middle in zip((truth, predicted, error), middles, strict=True))

    def variance(values: Array) -> Array:
        square = mean(values**2)
        found = square - mean(values) ** 2
        return np.where(found > _ROUNDING * square, found, 0)

    own, other = variance(true), variance(estimated)
    bias, square = mean(off) + middles[2], mean(error**2)
    together = mean(true * estimated) - mean(true) * mean(estimated)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.sqrt(variance(off) * np.where(total > 1, total / (total - 1), np.nan))
        return {
            "mae": mean(np.abs(error)),
            "rmse": np.sqrt(square),
            "bias": bias,
            "low": bias - 1.96 * spread,
            "high": bias + 1.96 * spread,
            "r2": np.where(own > 0, 1 - square / own, np.nan),
            "pearson": np.where((own > 0) & (other > 0), together / np.sqrt(own * other), np.nan),
            "concordance": np.where(own + other > 0, 2 * together / (own + other + bias**2), np.nan),
        }


def evaluate_numbers(images: Cases, settings: Settings | None = None) -> dict[str, Any]:
    """Measure predicted numbers at each level; returns plain values for JSON.

    For breasts and exams, truth and prediction are the means over their images.

    Args:
        images: with true and predicted numbers.
        settings: of the evaluation.

    Raises:
        DataError: if no row has a truth.
    """
    settings = settings or Settings()
    found: dict[str, Any] = {
        "kind": "numbers",
        "outputs": list(images.outputs),
        "resamples": settings.resamples,
        "seed": settings.seed,
        "levels": {},
    }
    for level, cases in at_levels(images, settings.levels).items():
        labelled = cases.labelled()
        if not len(labelled):
            raise DataError("no row has a true number; give the table with --table")
        resamples = Resamples(labelled.clusters, settings.resamples, settings.seed)
        outputs = {name: _measure(labelled, column, resamples) for column, name in enumerate(images.outputs)}
        found["levels"][level] = {"rows": len(labelled), **counted_patients(labelled.patients), "outputs": outputs}
    found["versions"] = versions("gigamorph", "numpy", "scipy")
    return found


def _measure(cases: Cases, column: int, resamples: Resamples) -> dict[str, Any]:
    rows = np.flatnonzero(~np.isnan(cases.truth[:, column]))
    truth, predicted = cases.truth[rows, column], cases.scores[rows, column]
    if not len(rows):
        return {"rows": 0, "undefined": "no row has a true number"}
    ones = statistics(truth, predicted, np.ones((1, len(rows))))
    around = resamples.spreads(lambda weights: statistics(truth, predicted, weights), rows)
    measures = {name: listed(value[0], around[name], _UNDEFINED) for name, value in ones.items()}
    varied = len(set(truth.tolist())) > 1 and len(set(predicted.tolist())) > 1
    return {
        "rows": len(rows),
        **measures,
        "spearman": float(np.corrcoef(rankdata(truth), rankdata(predicted))[0, 1]) if varied else None,
    }


def numbers_headline(found: dict[str, Any]) -> list[str]:
    """A summary line for each level and number."""
    lines = []
    for level, one in found["levels"].items():
        for name, output in one["outputs"].items():
            if "undefined" in output:
                lines.append(f"{level} level, {name}: {output['undefined']}")
                continue
            values = f"MAE {format_value(output['mae'])}, r {format_value(output['pearson'])}"
            lines.append(f"{level} level, {name}: {values}, {output['rows']} {level}s")
    return lines


def write_numbers_report(out: str | Path, images: Cases, found: dict[str, Any]) -> Path:
    """Write ``metrics.json``, the plots as PNG and ``report.html`` into `out`; returns the page's path.

    Raises:
        GigamorphError: if a file cannot be written.
    """
    pictures, levels = {}, []
    for level, cases in at_levels(images, list(found["levels"])).items():
        outputs = found["levels"][level]["outputs"]
        shown = [name for name in outputs if "undefined" not in outputs[name]]
        for name in shown:
            picture = f"{level}_{''.join(c if c.isalnum() else '_' for c in name)}"
            pictures[picture] = png(_figure(cases.labelled(), images.outputs.index(name), name, outputs[name]))
        levels.append((level, _measures({name: outputs[name] for name in shown})))
    return write_results(out, found, "numbers.html", pictures, levels=levels)


def _measures(outputs: dict[str, dict[str, Any]]) -> TextTable:
    """A table with a row per measure and a column per number."""
    rows: list[Sequence[object]] = [["rows", *(one["rows"] for one in outputs.values())]]
    rows += [[name, *(format_value(one[key]) for one in outputs.values())] for key, name in NAMES.items()]
    ranks = (one["spearman"] for one in outputs.values())
    rows.append(["Spearman's rho", *("not defined" if one is None else f"{one:.3f}" for one in ranks)])
    return TextTable(["", *outputs], rows)


def _figure(cases: Cases, column: int, name: str, measured: dict[str, Any]) -> Figure:
    """Plots of predicted against true numbers, and of their difference against their mean."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    open_axes(left, right)
    truth, predicted = cases.truth[:, column], cases.scores[:, column]
    ends = [np.nanmin([truth, predicted]), np.nanmax([truth, predicted])]
    left.plot(ends, ends, color="0.75", linewidth=1)
    left.plot(truth, predicted, ".", alpha=0.6)
    left.set(xlabel=f"{name}, true", ylabel=f"{name}, predicted")
    left.set_title("predicted and true", loc="left", fontsize=10)
    right.plot((truth + predicted) / 2, predicted - truth, ".", alpha=0.6)
    for key, style in (("bias", "-"), ("low", "--"), ("high", "--")):
        if measured[key]["value"] is not None:
            right.axhline(measured[key]["value"], color="0.5", linewidth=1, linestyle=style)
    right.set(xlabel=f"{name}, mean of both", ylabel="predicted - true")
    right.set_title("difference, with limits of agreement", loc="left", fontsize=10)
    return figure
