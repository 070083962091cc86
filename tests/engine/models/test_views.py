"""Several views as one: against its definition written out, and what it must not depend on."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gigamorph.engine.models.outputs import VIEWS, Head, Outputs, Views

NAMES = ("a", "b", "c", "d")
HEADS = {
    "two classes": Head(NAMES[:2], "softmax", 2),
    "four classes": Head(NAMES, "softmax", 4),
    "labels": Head(NAMES[:3], "sigmoid", 3),
    "order": Head(NAMES, "ordinal", 3),
    "numbers": Head(NAMES[:1], "number", 1, center=(2.0,), spread=(3.0,)),
}


def by_hand(rows: list[list[float]], views: Views, softmax: bool) -> list[float]:
    """One view after the other."""
    if views == "attention":
        shares = torch.tensor([row[-1] for row in rows], dtype=torch.float64).exp()
        shares = (shares / shares.sum()).tolist()
        return [sum(a * row[k] for a, row in zip(shares, rows, strict=True)) for k in range(len(rows[0]) - 1)]
    if views == "mean":
        return [sum(row[k] for row in rows) / len(rows) for k in range(len(rows[0]))]
    if softmax and len(rows[0]) == 2:
        return max(rows, key=lambda row: row[1] - row[0])
    if softmax:
        rows = [torch.log_softmax(torch.tensor(row, dtype=torch.float64), 0).tolist() for row in rows]
    return [max(row[k] for row in rows) for k in range(len(rows[0]))]


@given(st.integers(1, 5), st.sampled_from(sorted(HEADS)), st.sampled_from(VIEWS), st.integers(0, 2**31))
def test_is_its_definition_whatever_the_order_of_the_views(count: int, head: str, views: Views, seed: int) -> None:
    outputs = Outputs((HEADS[head],), views=views)
    rows = 3 * torch.randn(count, outputs.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = outputs.together(rows)
    expected = torch.tensor([by_hand(rows.tolist(), views, HEADS[head].activation == "softmax")], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(outputs.together(rows.flip(0)), found, rtol=1e-13, atol=1e-13)
    assert outputs.log_odds(found).shape == (1, len(outputs.names))
    if HEADS[head].activation == "softmax":  # a constant on all logits of a view says nothing
        rows[:, : outputs.columns] += torch.randn(count, 1, dtype=torch.float64)
        moved = outputs.log_odds(outputs.together(rows))
        torch.testing.assert_close(moved, outputs.log_odds(found), rtol=1e-11, atol=1e-11)


def test_a_single_view_is_itself() -> None:
    for head in HEADS.values():
        for views in VIEWS:
            outputs = Outputs((head,), views=views)  # type: ignore[arg-type]
            row = torch.randn(1, outputs.width, dtype=torch.float64)
            own, alone = outputs.log_odds(outputs.together(row)), Outputs((head,)).log_odds(row[:, : head.outputs])
            torch.testing.assert_close(own, alone, rtol=1e-12, atol=1e-12)
