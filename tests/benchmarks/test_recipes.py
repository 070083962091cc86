"""The page of recipes is what its JSON says."""

import json
import sys
from pathlib import Path

import pytest

from gigamorph.engine.recipes import RECIPES

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import recipes


def test_table_tells_what_was_measured_and_what_was_not():
    first, *others = RECIPES
    rows = [{"seed": 0, "auc": 0.98765, "sure": True}, {"seed": 1, "auc": None, "sure": False}]
    claim = {"claim": "It learns.", "rule": "auc > 0.5", "rows": rows, "holds": False}
    text = recipes.page({first: {**claim, "seconds": 61.2, "cpu_seconds": 44.0, "exit": 1}})
    assert f"| [{first}]({first}.md) | {RECIPES[first]} | It learns. | **no** | 61 s | 44 s |" in text
    assert "| 0 | 0.9877 | yes |" in text and "| 1 |  | no |" in text
    assert text.count("not measured") == len(others)


def test_committed_page_is_up_to_date():
    if not recipes.JSON.exists():
        pytest.skip("nothing measured yet")
    assert recipes.PAGE.read_text() == recipes.page(json.loads(recipes.JSON.read_text()))
    for name in RECIPES:
        assert (Path(recipes.PAGE).parent / f"{name}.md").exists()
