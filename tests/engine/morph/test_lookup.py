"""Rows that hold the same values: `Bags` against counting by hand."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gigamorph.engine.morph.lookup import MISSING, Bags


def rows(width: int) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(0, 3), min_size=width, max_size=width), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6).flatmap(rows), st.integers(1, 12).flatmap(rows), st.booleans())
def test_bags(old: list[list[int]], new: list[list[int]], extreme: bool) -> None:
    def held(row: list[int]) -> object:
        return set(row) if extreme else {v: Fraction(n, len(row)) for v, n in Counter(row).items()}

    known = [held(row) for row in old]
    want = [known.index(held(row)) if held(row) in known else MISSING for row in new]
    bags = Bags(torch.tensor(old), extreme)
    assert bags.find(torch.tensor(new)).tolist() == want
    assert bags.find(torch.tensor(old)).tolist() == [known.index(k) for k in known]
