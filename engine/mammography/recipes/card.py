"""The model card of a recipe's network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...datasets.tables import Record
from ...evaluate.cases import Cases
from ...tiling.memory import format_bytes, peak_bytes
from ...train.card import Card, write_card
from ...train.run import Run
from .weights import PUBLISHED, RANDOM


def recipe_card(
    run: Run,
    name: str,
    config: Any,
    *,
    parameters: int,
    records: Mapping[str, Sequence[Record]],
    classes: Sequence[str] = (),
    predictions: Mapping[str, Cases] | None = None,
    output: str | None = None,
    measured: Sequence[str] = (),
    pictures: Sequence[str] = (),
) -> Path:
    """Write ``model_card.md`` into the run's folder; return its path.

    Args:
        name: of the recipe.
        config: its configuration; the card omits file names.
        parameters: number of parameters of the trained network.
        records: the images of each split.
        classes: names of the classes in order, or of labels.
        predictions: for the images of "val" and "test".
        pictures: lines returned by `draw_evidence`.
        output, measured: output of a network that does not predict for images, and lines with its measures.
    """
    settings = {key: _describe(key, value) for key, value in asdict(config).items()}
    budget = "free memory" if run.memory_budget is None else format_bytes(run.memory_budget)
    card = Card(
        title=f"{name}, {settings.get('model', 'see the configuration')}",
        model={"recipe": name, "parameters": f"{parameters:,}", "output": output or ", ".join(classes)},
        training={
            **settings,
            "seed": run.seed,
            "precision": run.precision,
            "device": run.device,
            "memory budget of a step": budget,
            "largest memory of the process": format_bytes(peak_bytes(run.device)),
        },
        records=records,
        classes=classes,
        predictions=predictions or {},
        measured=measured,
        pictures=[f"- {line}" for line in pictures],
    )
    return write_card(run.out / "model_card.md", card)


def _describe(key: str, value: Any) -> Any:
    """Return a setting as text: "given" or the published name for a file; the settings of several stages in order."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_describe(name, own)}" for name, own in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(str(_describe(key, own)) for own in value) or "none"
    if key == "weights":
        name = Path(value).name
        published = f"{name} ({PUBLISHED[name].source})" if name in PUBLISHED else "given"
        return "random, without pretraining" if value == RANDOM else published
    is_file = isinstance(value, Path) or (isinstance(value, str) and ("/" in value or "\\" in value))
    return "given" if is_file or (key == "unlabelled" and value is not None) else value
