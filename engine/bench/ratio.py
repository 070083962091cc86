"""Decides whether a ratio of two times, measured alternately in one run, is a regression. Times alone never fail."""

from __future__ import annotations

import json

from .machine import ROOT

SAVED = ROOT / "benchmarks" / "results" / "ratios.json"
REGRESSION = 1.3  # over the saved ratio; a busy machine changes a ratio by about a tenth


def judge(name: str, ratio: float, limit: float | None, saved: dict[str, float]) -> str | None:
    """Return why a ratio fails, or None."""
    if limit is not None and ratio > limit:
        return f"{name}: {ratio:.2f} times the reference's time, above the limit of {limit}"
    if name in saved and ratio > REGRESSION * saved[name]:
        return f"{name}: {ratio:.2f} times the reference's time; the saved ratio is {saved[name]:.2f}"
    return None


def load() -> dict[str, float]:
    """Return the saved ratios by name."""
    return json.loads(SAVED.read_text()) if SAVED.exists() else {}


def save(name: str, ratio: float) -> None:
    """Save a ratio for comparison with later runs."""
    SAVED.write_text(json.dumps(dict(sorted({**load(), name: round(ratio, 3)}.items())), indent=1) + "\n")
