"""Growing a trained network against training the grown architecture from scratch: time of the morph, and time and
epochs until each reaches the accuracy with which training from scratch ends.

The runs are those of `benchmarks/morph_training.py`; seconds are of one CPU core, the parent's training included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .checkout import script
from .results import MorphRow

MORPHS = ("widened", "deepened")
_RIVAL = "from scratch, same epochs"


def measure(
    seeds: Sequence[int] = (0, 1, 2), epochs: tuple[int, int] = (30, 30), say: Callable[[str], None] = print
) -> list[MorphRow]:
    """Run everything anew."""
    return rows_of(script("morph_training").run(seeds, epochs, say))


def rows_of(result: dict[str, Any]) -> list[MorphRow]:
    """Rows of what `morph_training.run` returns."""
    rows = []
    for one in result["seeds"]:
        for name in MORPHS:
            rival = f"{name}, {_RIVAL}"
            aim = one["curves"][rival][-1]["test_accuracy"]
            for how in (name, rival):
                curve = [(p["seconds"], p["epoch"], p["test_accuracy"]) for p in one["curves"][how]]
                reached = next((point for point in curve if point[2] >= aim), None)
                seconds = one["checks"][name]["seconds"] if how == name else None
                when, epoch = reached[:2] if reached else (None, None)
                rows.append(MorphRow(one["seed"], how, seconds, aim, when, epoch, curve))
    return rows
