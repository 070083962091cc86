"""When a ratio of two times, measured in turns within one run, is a regression. Times themselves never fail a run."""

from __future__ import annotations

import json

from .machine import ROOT

SAVED = ROOT / "benchmarks" / "results" / "ratios.json"
REGRESSION = 1.3  # over the saved ratio: what a busy machine moves one of a few rounds by is a tenth


def judge(name: str, ratio: float, limit: float | None, saved: dict[str, float]) -> str | None:
    """Why a ratio fails, or None."""
    if limit is not None and ratio > limit:
        return f"{name}: {ratio:.2f} times the reference's time, above the limit of {limit}"
    if name in saved and ratio > REGRESSION * saved[name]:
        return f"{name}: {ratio:.2f} times the reference's time; it was {saved[name]:.2f} when it was saved"
    return None


def load() -> dict[str, float]:
    """The saved ratios by name."""
    return json.loads(SAVED.read_text()) if SAVED.exists() else {}


def save(name: str, ratio: float) -> None:
    """Keep a ratio as the one that later runs are compared with."""
    SAVED.write_text(json.dumps(dict(sorted({**load(), name: round(ratio, 3)}.items())), indent=1) + "\n")
