"""Splits: stored parts add up exactly, differ where they should, and the certificate sees a single wrong bit."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.lookup import FREE
from gigamorph.engine.morph.splits import SPLITS, certify, kraft_lengths, split_columns

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 40))
def test_kraft_lengths_sum_to_one(copies: int) -> None:
    lengths = kraft_lengths(copies)
    assert len(lengths) == copies
    assert sum(Fraction(1, 2**length) for length in lengths) == 1


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SPLITS),
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.integers(0, 999),
    st.booleans(),
)
def test_parts_add_up_as_rational_numbers(
    split: str, dtype: torch.dtype, counts: list[int], seed: int, free: bool
) -> None:
    weight = torch.randn((2, len(counts), 2), generator=generator(seed)).to(dtype)
    columns = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    columns = columns[torch.randperm(len(columns), generator=generator(seed))]
    if free:
        columns = torch.cat([columns[:1], torch.tensor([FREE]), columns[1:]])
    grown = split_columns(weight, columns, split, generator(seed))
    assert grown.dtype == dtype
    for old in range(len(counts)):
        for o in range(2):
            for k in range(2):
                parts = grown[o, columns == old, k].double().tolist()
                assert sum(map(Fraction, parts)) == Fraction(weight[o, old, k].double().item())
    assert not grown[:, columns == FREE].any()
    certificate = certify(weight, grown, columns)
    assert certificate.violations == 0
    assert certificate.entries == weight.numel()


def test_sterbenz_parts_differ_from_weight_to_weight_and_are_convex() -> None:
    weight = torch.randn(50, 4, generator=generator())
    shares = split_columns(weight, torch.arange(4).repeat(3), "sterbenz", generator(1)).reshape(50, 3, 4)
    shares = shares / weight[:, None]
    assert shares.min() >= 0 and shares.max() <= 1
    assert shares.std(0).min() > 0.05
    assert (shares.mean(0) - 1 / 3).abs().max() < 0.1  # no copy is favoured


def test_noise_cancels_over_the_copies() -> None:
    weight = 0.01 * torch.randn(600, 3, generator=generator(), dtype=torch.float64)
    columns = torch.tensor([0, 1, 1, 2, 2, 2])
    plain = split_columns(weight, columns, "kraft", generator(1))
    noisy = split_columns(weight, columns, "kraft", generator(1), noise=0.3)
    back = torch.zeros_like(weight).index_add_(1, columns, noisy)
    assert torch.allclose(back, weight, atol=1e-15)
    ratio = (noisy - plain).std(0) / weight.std()  # what cancels over c copies has (c - 1) / c of its variance
    assert ratio[1:].tolist() == pytest.approx([0.3 * (1 / 2) ** 0.5] * 2 + [0.3 * (2 / 3) ** 0.5] * 3, rel=0.1)
    assert torch.equal(noisy[:, 0], weight[:, 0])


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_the_certificate_sees_one_wrong_bit(copies: int) -> None:
    weight = torch.randn(8, 4, generator=generator())
    columns = torch.arange(4).repeat(copies)
    grown = split_columns(weight, columns, "sterbenz", generator(1))
    grown[3, 1] = torch.nextafter(grown[3, 1], torch.tensor(torch.inf))
    assert certify(weight, grown, columns).violations == 1


def test_the_certificate_sees_one_third_and_a_used_new_channel() -> None:
    weight = torch.randn(100, 1, generator=generator())
    assert certify(weight, (weight / 3).repeat(1, 3), torch.zeros(3, dtype=torch.int64)).violations > 30
    columns = torch.tensor([0, FREE])
    grown = torch.cat([weight, torch.zeros_like(weight)], 1)
    assert certify(weight, grown, columns).violations == 0
    grown[5, 1] = 1e-30
    assert certify(weight, grown, columns).violations == 1


def test_kraft_of_the_smallest_numbers_is_a_violation() -> None:
    weight = torch.full((1, 1), 2.0**-149)
    columns = torch.zeros(2, dtype=torch.int64)
    assert certify(weight, split_columns(weight, columns, "kraft", generator()), columns).violations == 1


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(MorphError, match="uniform"):
        split_columns(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), "uniform", generator())
