"""benchmarks/other_libraries.py: what was recorded is exact, and the page says how many networks that were."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_was_recorded() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "other_libraries.json").read_text())["rows"]
    assert {row["verdict"] for row in rows} == {"exact", "taken whole"}
    both = ("frozen", "live")
    whole = {(row["network"], row["norms"]) for row in rows if row["verdict"] == "taken whole"}
    found = ("smp MAnet", "vit_pytorch RegionViT regionvit", "vit_pytorch SimpleViT simple_vit_with_fft")
    assert whole == {(name, norms) for name in found for norms in both}
    networks = Counter(name.split()[0] for name in {row["network"] for row in rows})
    page = (ROOT / "docs" / "networks.md").read_text()
    assert all(f"| {source} | {number} |" in page for source, number in networks.items())
