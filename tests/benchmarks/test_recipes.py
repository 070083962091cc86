"""The page of recipes is what its JSON says."""

import json
import sys
from pathlib import Path

import pytest

from gigamorph.engine.mammography.recipes import RECIPES

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import recipes


def test_table_tells_what_was_measured_and_what_was_not():
    first, *others = RECIPES
    seeds = {
        str(seed): {
            "rows": [{"seed": seed, "auc": 0.98765}],
            "cpu_seconds": 44.0,
            "provenance": {"commit": "0123456789abcdef"},
        }
        for seed in (0, 20)
    }
    lines = [
        {"what": "auc - other", "mean": 0.1, "low": 0.05, "high": 0.15, "wins": 2, "seeds": 2, "holds": True},
        {
            "what": "auc at least 1",
            "mean": 0.98765,
            "low": None,
            "high": None,
            "wins": None,
            "seeds": 2,
            "holds": False,
        },
        {"what": "auc - third", "mean": 0.1, "low": -1.0, "high": 1.0, "wins": 1, "seeds": 2, "holds": None},
    ]
    found = {"claim": "It learns.", "rule": "auc > 0.5", "holds": False, "judged": lines, "seeds": seeds}
    text = recipes.page({first: found})
    assert f"| [{first}]({first}.md) | {RECIPES[first]} | It learns. | does not hold | 2 | 44 s |" in text
    assert "**Does not hold.** Seeds 1, 2, 21, 22, 23, 24, 25, 26 were not run." in text
    assert "| auc - other | 0.1000 | 0.0500 to 0.1500 | 2 of 2 | yes |" in text
    assert "| auc at least 1 | 0.9877 |  |  | **no** |" in text and "| 1 of 2 | not claimed |" in text
    assert "| 0 | 0.9877 |" in text and "| 20 * | 0.9877 |" in text and "Measured at 0123456789ab." in text
    assert text.count("not measured") == len(others)


def test_seeds_are_run_once_of_committed_states_only(monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "JSON", tmp_path / "recipes.json")
    monkeypatch.setattr(recipes, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["recipes.py", "--only", "morphhr"])
    monkeypatch.setattr(recipes, "changed", lambda: " M engine/x.py")
    with pytest.raises(SystemExit, match="must be of a committed state"):
        recipes.main()
    monkeypatch.setattr(recipes, "changed", lambda: "")
    ran = []

    def measure(name, seed):
        ran.append(seed)
        if len(ran) == 4:
            raise KeyboardInterrupt
        morph = 0.9 + 1e-4 * seed
        row = {"seed": seed, "parent": 0.4 + 0.01 * (seed - 40), "direct": 0.6, "new_front": 0.5, "morph": morph}
        row["deepened"] = morph
        where = {"commit": "c" * 40, "uncommitted_changes": len(ran) == 2}
        return {"rows": [row], "seconds": 1.0, "cpu_seconds": 1.0, "provenance": where}

    monkeypatch.setattr(recipes, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        recipes.main()
    recipes.main()
    assert ran == [40, 41, 42, 43, 41, 43, *range(44, 50)]  # 41 was of a state that was not committed
    found = json.loads((tmp_path / "recipes.json").read_text())["morphhr"]
    assert len(found["seeds"]) == 10 and found["holds"] is True and "40 *" in (tmp_path / "page.md").read_text()
    recipes.main()
    assert len(ran) == 12
    monkeypatch.setattr(recipes, "task_of", lambda name: "another")
    recipes.main()
    assert len(ran) == 22


def test_committed_page_is_up_to_date():
    found = json.loads(recipes.JSON.read_text())
    assert recipes.PAGE.read_text() == recipes.page(found)
    for name in RECIPES:
        assert (Path(recipes.PAGE).parent / f"{name}.md").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_claims_are_of_ten_seeds_of_the_present_task_at_committed_states(name):
    """Seven of them held out; with a floor, and with headroom."""
    own, synthetic = json.loads(recipes.JSON.read_text())[name], recipes.get_recipe(name).synthetic
    assert own["task"] == recipes.task_of(name) and recipes.judged(name, own) == own
    assert list(own["seeds"]) == [str(seed) for seed in synthetic.seeds]
    assert len(synthetic.held_out) >= 7 and all(recipes.is_recorded(seed) for seed in own["seeds"].values())
    assert synthetic.rule.floors
    headroom = own["judged"][-1]
    assert headroom["what"].startswith("best mean below 0.98") and headroom["holds"] is True
