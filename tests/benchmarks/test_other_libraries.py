"""benchmarks/other_libraries.py: what was recorded is exact, and the page says how many networks that were."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_was_recorded() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "other_libraries.json").read_text())["rows"]
    assert {row["verdict"] for row in rows} == {"exact", "taken whole"}
    whole = {(row["network"], row["norms"]) for row in rows if row["verdict"] == "taken whole"}
    assert whole == {("smp MAnet", "frozen"), ("smp MAnet", "live"), ("transformers Swin", "live")}
    names = sorted({row["network"] for row in rows})
    page = (ROOT / "docs" / "networks.md").read_text()
    for source in ("smp", "monai", "transformers"):
        assert f"| {source} | {sum(name.startswith(source) for name in names)} |" in page
