"""Writes a reader study: ``metrics.json`` and one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..report.page import TextTable
from .readers import Analysis, Estimate, ReaderStudy
from .report import format_p, write_results

_KINDS = {
    "random_readers_random_cases": "new readers and new cases",
    "fixed_readers_random_cases": "these readers and new cases",
    "random_readers_fixed_cases": "new readers and these cases",
}


def write_reader_report(out: str | Path, study: ReaderStudy, source: Mapping[str, Any]) -> Path:
    """Write ``metrics.json`` and ``report.html`` into `out`; returns the page's path.

    Args:
        out: the folder.
        study: the result of the study.
        source: sources of the readings, under the keys of `report.SOURCES`, and "rows".

    Raises:
        GigamorphError: if a file cannot be written.
    """
    readers = list(next(iter(study.areas.values())))
    rows = [[reader, *(f"{of[reader]:.3f}" for of in study.areas.values())] for reader in readers]
    return write_results(
        out,
        asdict(study) | dict(source),
        "readers.html",
        {},
        counts=f"{len(readers)} readers, {study.cases} cases, {study.positives} positive",
        covariance={"delong": "DeLong's", "jackknife": "the jackknife's"}[study.covariance],
        analyses=[(words, _table(analysis)) for words, analysis in _analyses(study)],
        areas=TextTable(["reader", *study.areas], rows),
        components=TextTable(
            ["", "value"], [[name, f"{value:.8f}"] for name, value in asdict(study.components).items()]
        ),
    )


def reader_headline(study: ReaderStudy) -> list[str]:
    """A summary line for each modality and difference, and each kind of generalisation."""
    lines = []
    for words, analysis in _analyses(study):
        for name, one in (*analysis.modalities.items(), *analysis.differences.items()):
            p = "" if one.p is None else f", p {format_p(one.p)}"
            lines.append(f"{words}: {name}: AUC {_with_interval(one)}{p}")
    return lines


def _analyses(study: ReaderStudy) -> list[tuple[str, Analysis]]:
    found = [(words, getattr(study, kind)) for kind, words in _KINDS.items()]
    return [(words, analysis) for words, analysis in found if analysis is not None]


def _table(analysis: Analysis) -> TextTable:
    rows = [[name, *_row(one)] for name, one in (*analysis.modalities.items(), *analysis.differences.items())]
    for reader, differences in analysis.readers.items():
        rows += [[f"reader {reader}: {name}", *_row(one)] for name, one in differences.items()]
    if analysis.test is not None:
        test = analysis.test
        df = f"{test.df}" if test.denominator_df is None else f"{test.df} and {test.denominator_df:.2f}"
        rows.append(["all modalities alike", f"statistic {test.statistic:.3f}", "", df, format_p(test.p)])
    return TextTable(["", "AUC (95 % interval)", "standard error", "degrees of freedom", "p"], rows)


def _row(one: Estimate) -> list[str]:
    error = "" if one.error is None else f"{one.error:.4f}"
    return [_with_interval(one), error, "" if one.df is None else f"{one.df:.2f}", format_p(one.p)]


def _with_interval(one: Estimate) -> str:
    if one.interval is None:
        return f"{one.value:.3f} (no interval: the variance is 0)"
    return f"{one.value:.3f} ({one.interval[0]:.3f} to {one.interval[1]:.3f})"
