"""One image over several processes, against stock PyTorch in one: outputs, all gradients, running statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from exactness import LIMIT, errors, named, step, step_errors
from hypothesis import HealthCheck, Phase, given, settings
from processes import in_processes
from random_net import programs
from split_image import (
    NETS,
    after_one_records_again,
    dense,
    dropout_in_the_head,
    enough_memory,
    image,
    in_ddp_too,
    in_pairs,
    in_shards,
    network,
    programs_in_shards,
    refusals,
    rows_read,
)

from gigamorph import GigamorphError, accelerate

Case = tuple[Any, ...]  # name, size, tile, whether maps are computed again
TILES = (32, 17, 200, 5, 64, 23, 32, 32, 19, 7, 17, 11)
TWO: list[Case] = [(name, (97, 83), tile) for name, tile in zip(NETS, TILES, strict=True)]
# Networks that exchange what others do: between two processes is enough.
LIKE_OTHERS = ("frozen", "cumulative", "excite", "max", "amax")
FOUR: list[Case] = [(name, (61, 41), TILES[n]) for n, name in enumerate(NETS) if name not in LIKE_OTHERS] + [
    ("live", (13, 90), 7),  # bands without a row
    ("unet", (13, 20), 4),
    ("live", (97, 83), 20, True),
    ("unet", (64, 64), 33, True),
]
PAIRS = [(45, 38), (30, 61)]


def drawn(count: int) -> list[Any]:
    """Random networks."""
    found: list[Any] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs(statistics=True))
    def collect(program: Any) -> None:
        found.append(program)

    collect()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[list[Any]]:
    tasks = [(in_shards, *case) for case in TWO]
    tasks += [(refusals,), (dropout_in_the_head, True), (rows_read, (400, 30)), (in_ddp_too, (97, 83)), (dense, True)]
    tasks += [(enough_memory,), (after_one_records_again,)]
    return in_processes(2, tmp_path_factory.mktemp("two"), tasks)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[list[Any]]:
    tasks = [(in_shards, *case) for case in FOUR] + [(in_pairs, "live", PAIRS)]
    return in_processes(4, tmp_path_factory.mktemp("four"), tasks)


def check(case: Case, found: list[Any]) -> None:
    wanted = step(network(case[0]), image(case[1]))
    for got in found:
        worst = step_errors(wanted, got)
        assert max(worst.values()) < LIMIT, worst
        assert max(step_errors(found[0], got).values()) == 0


@pytest.mark.parametrize("number", range(len(TWO)), ids=[case[0] for case in TWO])
def test_two_processes(number, two):
    check(TWO[number], two[number])


@pytest.mark.parametrize("number", range(len(FOUR)), ids=[f"{case[0]} {case[1][0]}" for case in FOUR])
def test_four_processes(number, four):
    check(FOUR[number], four[number])


@pytest.mark.slow
def test_two_images_over_two_processes_each(four):
    for pair, size in enumerate(PAIRS):
        check(("live", size), four[len(FOUR)][2 * pair : 2 * pair + 2])


def test_random_networks(tmp_path):
    cases = drawn(9)
    (found,) = in_processes(3, tmp_path, [(programs_in_shards, cases)])
    for worst in found:
        wrong = [(error, case) for error, case in zip(worst, cases, strict=True) if error >= LIMIT]
        assert not wrong, wrong[0]
    assert sum(math.isfinite(error) for error in found[0]) > 4


@pytest.mark.slow
def test_refusals(two):
    for shapes, drops, evidence, budget, sizes, *others in two[len(TWO)]:
        assert "different shapes" in shapes
        assert "'1'" in drops or "dropout" in drops
        assert "without split" in evidence
        assert "budget" in budget
        assert "BatchNorm in training mode cannot share statistics between images of several sizes" in sizes
        assert len(others) == 3 and all("other weights" in text for text in others), others


@pytest.mark.slow
def test_a_budget_that_is_too_small_names_one_that_is_enough_for_all(two):
    (said, enough), (other, _) = two[len(TWO) + 5]
    assert said == other and "processes that share an image of 160 x 120" in said and enough, said


@pytest.mark.slow
def test_one_process_that_records_again_does_not_stop_the_others(two):
    for before, after in two[len(TWO) + 6]:
        assert torch.equal(before, after)


def test_processes_drop_what_the_first_would_drop_alone(two):
    first, second = two[len(TWO) + 1]
    assert torch.equal(first, second) and not torch.equal(first[:4], first[4:8])
    alone = dropout_in_the_head(False)
    assert max(errors(named([alone]), named([first])).values()) < LIMIT


@pytest.mark.slow
def test_a_process_reads_its_rows(two):
    upper, lower = two[len(TWO) + 2]
    assert upper[0] == 0 and 200 <= upper[1] < 260
    assert 140 < lower[0] <= 200 and lower[1] == 400


@pytest.mark.slow
def test_averaged_by_ddp(two):
    check(("live", (97, 83)), two[len(TWO) + 3])


@pytest.mark.slow
def test_dense_loss(two):
    wanted = dense(False)
    for got in two[len(TWO) + 4]:
        assert max(errors(named(wanted), named(got)).values()) < LIMIT  # pyright: ignore[reportArgumentType]


def test_without_a_process_group():
    with pytest.raises(GigamorphError, match="init_process_group"):
        accelerate(network("frozen"), split=True)(image((20, 20)))
