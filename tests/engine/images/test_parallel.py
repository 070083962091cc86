"""Work in several processes: results in place, errors as results, and a crash that takes nobody along."""

import os
from collections.abc import Sequence

import pytest

from gigamorph.engine.errors import DataError
from gigamorph.engine.images.parallel import run_parallel


def work(item: int) -> int:
    if item == 13:
        raise DataError("13: damaged")
    if item == 77:
        os._exit(11)  # what a segmentation fault in a decoder looks like
    if item == 99:
        raise ZeroDivisionError
    return item * item


def results(items: Sequence[int], **options: int) -> dict[int, int | DataError]:
    return dict(run_parallel(work, items, **options))


@pytest.mark.parametrize(("workers", "chunk"), [(1, 1), (2, 1), (3, 7), (2, 64)])
def test_every_item_has_its_result(workers: int, chunk: int) -> None:
    items = [number for number in range(70) if number != 13]
    assert results(items, workers=workers, chunk=chunk) == {i: item * item for i, item in enumerate(items)}


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_are_results(workers: int) -> None:
    found = results(range(40), workers=workers, chunk=8)
    assert str(found.pop(13)) == "13: damaged"
    assert found == {number: number * number for number in range(40) if number != 13}


def test_a_crash_names_its_item_and_spares_the_others() -> None:
    found = results(range(60, 95), workers=2, chunk=8)
    error = found.pop(17)
    assert str(error).startswith("77: reading it crashed the process")
    assert found == {number: (60 + number) ** 2 for number in range(35) if number != 17}


@pytest.mark.parametrize("workers", [1, 2])
def test_faults_of_ours_are_raised(workers: int) -> None:
    with pytest.raises(ZeroDivisionError):
        results(range(80, 120), workers=workers)


def test_nothing_to_do() -> None:
    assert results([]) == {}
