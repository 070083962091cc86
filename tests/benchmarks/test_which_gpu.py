"""benchmarks/which_gpu.py: the smallest GPU of a plan, and the page."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import which_gpu


def test_the_smallest_card_is_named_with_its_work():
    def row(*cards, stock, **others):
        found = {str(card): {"work": work, "maps": maps, "peak_bytes": 1} for card, work, maps in cards}
        return {"cards": found, "stock_bytes": stock * 2**30, **others}

    assert which_gpu.cell(row((16, 1.0, "device"), stock=10)) == "16 (16)"
    assert which_gpu.cell(row((16, 1.0, "host"), (24, 1.31, "device"), stock=20)) == "24, work 1.3 (40)"
    assert which_gpu.cell(row((80, 9.0, "device"), (141, 2.0, "device"), stock=900)) == "141, work 2 (none)"
    assert which_gpu.cell(row((16, 9.0, "device"), stock=900)) == "none (none)"
    assert which_gpu.cell(row((16, 1.0, "device"), stock=30, folded_bytes=2**30)) == "16 (16)"
    assert which_gpu.cell({"error": "no"}) == "refused"


def test_plans_of_a_small_image_and_the_page():
    rows = [which_gpu.plans_of("resnet18", mode, (256, 192)) for mode in which_gpu.MODES]
    live, frozen, inference = rows
    assert inference["stock_bytes"] < frozen["folded_bytes"] < frozen["stock_bytes"] < 2**30
    assert all(row["cards"]["16"]["peak_bytes"] < 2**30 for row in rows) and "folded_bytes" not in live
    for row in rows:
        row["size"] = which_gpu.SIZES[0]
    page = which_gpu.page({"provenance": {"commit": "0123456789", "torch": "2.13.0"}, "rows": rows})
    assert "(commit 01234567, torch 2.13.0)" in page and page.count("| resnet18 | 16") == 3
