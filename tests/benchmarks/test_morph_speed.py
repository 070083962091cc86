"""benchmarks/morph_speed.py: it measures what it says, and what was recorded keeps the limits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import morph_speed  # noqa: E402

from gigamorph.engine.models import create_model  # noqa: E402


def test_a_small_network() -> None:
    found = morph_speed.measure(create_model("lesionnet"), torch.zeros(1, 1, 32, 32), 1)
    assert list(found) == ["spaces", "widen x1.5", "widen x2"]
    assert all(0 < s["passed"] < 60 and 0 < s["processor"] < 60 for s in found.values())


def test_the_record() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "results" / "morph_speed.json").read_text())
    assert recorded["settings"]["model"] == "resnet50" and recorded["provenance"]["threads"] == 2
    seconds = {task: s["passed"] for task, s in recorded["seconds"].items()}
    assert seconds["spaces"] < 2 and seconds["widen x1.5"] < 3 and seconds["widen x2"] < 3
    text = (ROOT / "docs" / "morph.md").read_text()
    assert all(f"{s:.1f} s" in text for s in seconds.values())
