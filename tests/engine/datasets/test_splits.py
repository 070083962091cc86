"""Splits by patient: stratified, deterministic, without leaks."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gigamorph.engine.datasets.splits import assign_splits, check_leaks, fill_validation, leaks
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.errors import DataError


def records(patients: list[tuple[int, int]], split: str | None = None) -> list[Record]:
    """One entry per patient: label, number of images."""
    return [
        Record(Path(f"{number}_{image}.png"), label if image == 0 else 0, f"P{number}", split)
        for number, (label, images) in enumerate(patients)
        for image in range(images)
    ]


PATIENTS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=60)


@given(patients=PATIENTS, seed=st.integers(0, 99), order=st.randoms())
def test_no_leak_and_the_order_does_not_matter(patients: list[tuple[int, int]], seed: int, order) -> None:
    table = records(patients)
    split = assign_splits(table, seed=seed)
    assert [record.path for record in split] == [record.path for record in table]
    of = {}
    for record in split:
        assert record.split in ("train", "val", "test")
        assert of.setdefault(record.patient_id, record.split) == record.split
    shuffled = list(table)
    order.shuffle(shuffled)
    assert {r.path: r.split for r in assign_splits(shuffled, seed=seed)} == {r.path: r.split for r in split}


@given(patients=PATIENTS, seed=st.integers(0, 99))
def test_fractions_hold_for_every_label(patients: list[tuple[int, int]], seed: int) -> None:
    fractions = (0.6, 0.2, 0.2)
    split = {
        record.patient_id: record.split for record in assign_splits(records(patients), fractions=fractions, seed=seed)
    }
    for label in range(3):
        members = [split[f"P{number}"] for number, (own, _) in enumerate(patients) if own == label]
        counts = Counter(members)
        for name, fraction in zip(("train", "val", "test"), fractions, strict=True):
            assert abs(counts[name] - fraction * len(members)) <= 1.2
            if len(members) >= 3:
                assert counts[name] >= 1


def test_seeds_differ_and_zero_fractions_stay_empty() -> None:
    table = records([(number % 2, 1) for number in range(40)])
    splits = [tuple(record.split for record in assign_splits(table, seed=seed)) for seed in range(5)]
    assert len(set(splits)) == 5
    assert Counter(record.split for record in assign_splits(table, fractions=(0.5, 0.5, 0.0))) == {
        "train": 20,
        "val": 20,
    }
    with pytest.raises(DataError, match="with sum 1"):
        assign_splits(table, fractions=(0.5, 0.5, 0.5))


def test_given_splits_are_kept_and_checked() -> None:
    table = [*records([(0, 2)], "train"), Record(Path("x.png"), 1, "Q", "test")]
    assert assign_splits(table) == table
    leaking = [*table, Record(Path("y.png"), 1, "P0", "test"), Record(Path("z.png"), 1, "Q", "val")]
    for check in (assign_splits, check_leaks):
        with pytest.raises(DataError, match=r"patient P0 is in train and test \(and 1 more patients\)"):
            check(leaking)
    with pytest.raises(DataError, match="1 of 4 rows have no split"):
        assign_splits([*table, Record(Path("y.png"), 1, "R")])
    check_leaks([*table, Record(Path("y.png"), 1, "P0")])


def test_val_is_drawn_from_the_train_of_an_official_split() -> None:
    table = [*records([(number % 2, 2) for number in range(40)], "train")]
    table += [Record(Path(f"t{number}.png"), number % 2, f"T{number}", "test") for number in range(10)]
    filled = fill_validation(table, fractions=(0.6, 0.2, 0.2), seed=1)
    check_leaks(filled)
    assert [record.path for record in filled] == [record.path for record in table]
    assert [r.path for r in filled if r.split == "test"] == [r.path for r in table if r.split == "test"]
    val = {record.patient_id: record.label for record in filled if record.split == "val"}
    assert len(val) == 10  # a quarter of 40
    assert sum(1 for number in range(40) if number % 2 and f"P{number}" in val) == 5
    assert fill_validation(table, fractions=(0.6, 0.2, 0.2), seed=1) == filled
    assert fill_validation(table, fractions=(0.6, 0.2, 0.2), seed=2) != filled
    assert fill_validation(filled) == filled  # there is a val already
    plain = records([(0, 1), (1, 1)])
    assert fill_validation(plain) == plain  # and here no split
    with pytest.raises(DataError, match="patient P0 is in train and test"):
        fill_validation([*records([(0, 1)], "train"), Record(Path("x"), 0, "P0", "test")])


def test_every_leak_is_told() -> None:
    table = [Record(Path(f"{n}.png"), 0, f"P{n // 2}", ("train", "test", "val", "val")[n % 4]) for n in range(8)]
    assert leaks(table) == {"P0": ["train", "test"], "P2": ["train", "test"]}
