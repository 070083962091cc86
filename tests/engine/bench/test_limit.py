"""The search finds the border, whatever lies behind it, in few tries."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gigamorph import BudgetError, accelerate
from gigamorph.engine.bench import limit
from gigamorph.engine.bench.limit import Search, find
from gigamorph.engine.bench.process import measure_in_new_process
from gigamorph.engine.bench.results import FAILED, NOT_RUN, OK, OUT_OF_MEMORY, BenchTask, LimitRow, Try

TASK = BenchTask("lesionnet", (1, 1, 0, 0))


@pytest.fixture
def with_border(monkeypatch):
    """Replaces tries by a rule: sides up to the border fit; counts them."""

    def install(border, predicted, beyond=OUT_OF_MEMORY):
        def pretend(row, network, side, search):
            return Try(side, OK if side <= border else beyond, reason="too large")

        monkeypatch.setattr(limit, "_try", pretend)
        monkeypatch.setattr(limit, "predicted_side", lambda *_: predicted)
        return find(TASK, "stock", Search(2**30))

    return install


@given(border=st.integers(32, 40_000), guess=st.integers(1, 1200).map(lambda n: 32 * n))
def test_the_border_is_found_within_the_tolerance(border, guess):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limit, "_try", lambda row, net, side, search: Try(side, OK if side <= border else OUT_OF_MEMORY))
        patch.setattr(limit, "predicted_side", lambda *_: guess)
        patch.setattr(limit, "build", lambda task: None)
        row = find(TASK, "stock", Search(2**30))
    assert row.side is not None and row.too_large is not None
    assert row.side <= border < row.too_large
    assert row.too_large <= max(1.03 * row.side, row.side + 32)
    assert row.task.image[2:] == (row.side, row.side)


def test_a_good_guess_takes_few_tries(with_border):
    row = with_border(2050, 2048)
    assert (row.side, row.status) == (2048, OK) and len(row.tries) <= 3
    assert row.agreement == 1.0


def test_nothing_fits(with_border):
    row = with_border(0, 64)
    assert (row.side, row.status) == (None, OUT_OF_MEMORY)


def test_sizes_that_take_too_long_are_told(with_border):
    row = with_border(1000, 1024, beyond=NOT_RUN)
    assert row.side is not None and row.status == OK and "too large" in (row.reason or "")


def test_a_peer_that_fails_otherwise_ends_the_search(with_border):
    row = with_border(0, 1024, beyond=FAILED)
    assert (row.side, row.status, row.reason) == (None, FAILED, "too large") and len(row.tries) == 1


def test_a_peer_that_is_not_installed_is_not_run(monkeypatch):
    monkeypatch.setattr("gigamorph.engine.bench.peers.importlib.util.find_spec", lambda name: None)
    assert find(TASK, "lightstream", Search(2**30)).status == NOT_RUN


def test_the_prediction_is_the_largest_side_that_plan_allows(monkeypatch):
    def pretend(network, task, budget, tile=None, halos="auto"):
        assert (budget, halos) == (900, "device")
        if task.image[2] > 5000:
            raise BudgetError("no tile fits")

    monkeypatch.setattr(limit, "planned", pretend)
    side = limit.predicted_side(nn.Identity(), TASK, "gigamorph", Search(1000))
    assert side is not None and 5000 / 1.01 - 32 <= side <= 5000
    assert limit.predicted_side(nn.Identity(), TASK, "checkpoint", Search(1000)) is None


@pytest.mark.parametrize("peak, status", [(1000, OK), (1001, OUT_OF_MEMORY)])
def test_a_try_keeps_to_the_cap_in_a_process_that_gives_memory_back(monkeypatch, peak, status):
    given = {}

    def pretend(task, peer, settings, steps, **more):
        given.update(image=task.image, settings=settings, steps=steps, **more)
        return {"status": OK, "peak_bytes": peak, "seconds": [2.0, 1.0]}

    monkeypatch.setattr(limit, "measure_in_new_process", pretend)
    row = LimitRow(TASK, "gigamorph", 1000)
    found = limit._try(row, nn.Identity(), 96, Search(1000, longest=7.0))
    assert (found.side, found.status, found.peak_bytes, found.seconds) == (96, status, peak, 1.0)
    assert given["lean"] and given["longest"] == 7.0 and given["cap"] == 1000 and given["image"] == (1, 1, 96, 96)
    assert given["steps"] == 2
    assert given["settings"] == {"memory_budget": 900, "tile": None, "halos": "device"}
    inspect.signature(accelerate).bind(nn.Identity(), **given["settings"])  # which takes no others


@pytest.mark.usefixtures("forked_peers")
def test_a_small_cap_does_not_stop_a_step_that_keeps_to_it():
    """The stacks and heaps of threads reserve more addresses than such a cap has bytes."""
    task = BenchTask("lesionnet", (1, 1, 512, 512))
    answer = measure_in_new_process(task, "gigamorph", {"tile": 128}, 1, cap=16 * 2**20, lean=True)
    assert answer["status"] == OK and answer["peak_bytes"] < 16 * 2**20, answer


@pytest.mark.usefixtures("forked_peers")
def test_a_real_limit_is_where_memory_ends():
    row = find(TASK, "stock", Search(24 * 2**20, steps=1))
    assert row.status == OK and row.side and row.too_large and row.predicted_side, row
    fitted = [one for one in row.tries if one.status == OK]
    assert all((one.peak_bytes or 0) <= row.cap_bytes for one in fitted)
