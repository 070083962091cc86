"""A recipe's card has its settings and figures, and no file and no patient."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.mammography.recipes.recipe import recipe_card
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage
from gigamorph.engine.train.target import Target


@dataclass(frozen=True)
class Config:
    model: str = "resnet18"
    weights: str | None = "secret.safetensors"
    tables: tuple[str, ...] = ("/secret/a.csv", "b")
    stages: tuple[Stage, ...] = (Stage("first", 3, 1e-3), Stage("second", 5, 1e-5))


def test_settings_and_figures(tmp_path):
    records = [Record(Path(f"/secret/{k}.dcm"), k % 2, f"Secret-{k}", "test") for k in range(30)]
    z = np.random.default_rng(0).normal(size=(30, 1)) + np.arange(30)[:, None] % 2
    cases = Target(("benign", "malignant")).cases(records, np.concatenate([-z, z], 1))
    path = recipe_card(
        Run(tmp_path, memory_budget=2**30),
        "morphhr",
        Config(),
        parameters=1234567,
        records={"train": [], "test": records},
        classes=("benign", "malignant"),
        predictions={"test": cases},
    )
    text = path.read_text()
    assert path == tmp_path / "model_card.md" and text.startswith("# Model card: morphhr, resnet18\n")
    assert "- weights: given" in text and "- tables: given; b" in text and "- parameters: 1,234,567" in text
    assert "name first, epochs 3, lr 0.001" in text and "name second, epochs 5, lr 1e-05" in text
    assert "- memory budget of a step: 1.00 GiB" in text and "| test | image | malignant | 30 | 15 |" in text
    assert "ecret" not in text


def test_weights_are_told_by_their_published_names():
    """Of others only that they were given; where they are random, that."""
    from gigamorph.engine.mammography.recipes.recipe import _describe

    assert _describe("weights", "/secret/resnet50-0676ba61.pth").startswith("resnet50-0676ba61.pth (https://")
    assert _describe("weights", "random") == "random, without pretraining"
    assert _describe("models", ({"name": "a", "weights": "w.pt"},)) == "name a, weights given"
