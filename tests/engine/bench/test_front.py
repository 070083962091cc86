"""The front of time against memory: which steps are on it, and what is compared with what."""

from __future__ import annotations

from gigamorph.engine.bench.front import comparisons, fastest_by_memory, figure_of, share_of, ways
from gigamorph.engine.bench.results import OK, WRONG, BenchTask, StepRow
from gigamorph.engine.report.figure import png

TASK = BenchTask("resnet18", (1, 1, 64, 64))


def row(peer: str, gigabytes: float, seconds: float, status: str = OK) -> StepRow:
    return StepRow(TASK, peer, status, seconds=[seconds], peak_bytes=int(gigabytes * 1e9))


ROWS = [
    row("stock", 4, 10),
    row("channels-last", 4, 8),
    row("checkpoint", 2, 12),
    row("folded", 3, 13),  # slower than checkpoints, and larger
    row("compile", 1, 1, WRONG),  # not counted
    row("gigamorph", 3.5, 6),
    row("gigamorph, 0.5 of stock", 1.9, 9),
    row("gigamorph, least memory", 0.5, 20),
]


def test_only_right_steps_that_none_beats_are_on_the_front() -> None:
    assert [one.peer for one in fastest_by_memory(ROWS[:5])] == ["checkpoint", "channels-last"]


def test_each_amount_of_memory_of_stock_is_compared_and_each_below_it() -> None:
    found = {one.memory / 1e9: (one.stock.peer, one.ours and one.ours.peer, one.ratio) for one in comparisons(ROWS)}
    assert found == {
        0.5: ("stock", "gigamorph, least memory", 2.0),
        1.9: ("stock", "gigamorph, 0.5 of stock", 0.9),
        2: ("checkpoint", "gigamorph, 0.5 of stock", 0.75),
        4: ("channels-last", "gigamorph", 0.75),
    }
    texts = [str(one) for one in comparisons(ROWS)]
    assert texts[0].endswith(
        "no way of stock; eager stock 10.00 s, gigamorph, least memory 20.00 s: 2.00 times its time"
    )


def test_stock_that_needs_less_than_gigamorph_is_said() -> None:
    (found,) = comparisons([row("stock", 1, 10), row("gigamorph", 2, 5)])
    assert found.ours is None and found.ratio is None and str(found).endswith("gigamorph needs more")


def test_ways_fit_the_task() -> None:
    frozen, live = ways(TASK), ways(BenchTask("resnet18", (1, 1, 64, 64), batch_norm="live"))
    assert frozen[0] == live[0] == "stock"
    assert "folded-channels-last" in frozen and not [name for name in live if name.startswith("folded")]
    assert "folded-compile, 0.2 of activations" in frozen and "compile, 0.2 of activations" in live
    assert share_of("compile, 0.2 of activations") == 0.2


def test_a_figure_names_every_way() -> None:
    figure = figure_of(ROWS, "resnet18")
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"torch.compile (wrong)", "0.5 of stock", "checkpoint per block"} <= texts
    assert png(figure).startswith(b"\x89PNG")
