"""SyncBatchNorm over several processes, against BatchNorm in one process on the batch of all of them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from exactness import LIMIT, assert_exact, errors, named
from processes import in_processes
from sync_norms import images, in_ddp, in_one_process, network, state, unlike_plans, with_segments

Sizes = list[tuple[int, int]]
TWO: dict[str, tuple[Sizes, bool, bool]] = {
    "one size": ([(37, 29)], False, False),
    "two sizes": ([(37, 29), (20, 51)], False, False),
    "maps computed again": ([(37, 29)], True, False),
    "whole maps, as on a GPU": ([(37, 29), (20, 51)], False, True),
}
FOUR: Sizes = [(37, 29), (20, 51), (9, 9), (1, 64)]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, list[Any]]:
    tasks = [(in_ddp, sizes, ranges, None, fused) for sizes, ranges, fused in TWO.values()] + [(unlike_plans, (37, 29))]
    return dict(zip([*TWO, "unlike plans"], in_processes(2, tmp_path_factory.mktemp("two"), tasks), strict=True))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[list[Any]]:
    tasks = [(in_ddp, FOUR, False, None), (in_ddp, FOUR, False, 2)]
    return in_processes(4, tmp_path_factory.mktemp("four"), tasks)


def one_process(ranks: list[int], sizes: Sizes) -> tuple[dict[str, torch.Tensor], list[list[torch.Tensor]]]:
    """Gradients and buffers after two steps on the images of these ranks, and the outputs of each step."""
    stock, outputs = network(), []
    for step in range(2):
        stock.zero_grad()
        parts = in_one_process(stock, [images(rank, step, sizes) for rank in ranks])
        torch.stack([part.square().sum() for part in parts]).mean().backward()  # DDP averages over the processes
        outputs.append([part.detach() for part in parts])
    return state(stock), outputs


def assert_equal(wanted: dict[str, torch.Tensor], outputs: list[torch.Tensor], got: dict[str, Any]) -> None:
    worst = errors(wanted, {name: got[name] for name in wanted}) | errors(named(outputs), named(got["outputs"]))
    assert max(worst.values()) < LIMIT, worst


@pytest.mark.parametrize("name", TWO)
def test_two_processes(name, two):
    sizes, *_ = TWO[name]
    wanted, outputs = one_process([0, 1], sizes)
    for rank, got in enumerate(two[name]):
        assert_equal(wanted, [output[rank] for output in outputs], got)


def test_four_processes(four):
    wanted, outputs = one_process([0, 1, 2, 3], FOUR)
    for rank, got in enumerate(four[0]):
        assert_equal(wanted, [output[rank] for output in outputs], got)
        assert all(torch.equal(got[name], four[0][0][name]) for name in wanted)


@pytest.mark.slow
def test_statistics_of_neighbours(four):
    """Groups of two of four processes; the gradients are averaged over all four."""
    pairs = [one_process([rank, rank + 1], FOUR) for rank in (0, 2)]
    for rank, got in enumerate(four[1]):
        own, outputs = pairs[rank // 2]
        gradients = [name for name in own if name.startswith("gradient")]
        wanted = own | {name: (pairs[0][0][name] + pairs[1][0][name]) / 2 for name in gradients}
        assert_equal(wanted, [output[rank % 2] for output in outputs], got)


@pytest.mark.slow
def test_plans_that_would_wait_forever_are_refused(two):
    assert all("store different maps" in text for text in two["unlike plans"]), two["unlike plans"]


def test_cumulative_averages_in_maps_computed_again(monkeypatch):
    """The counter of batches is there where a range of steps runs by itself."""
    monkeypatch.setattr(sys.modules["gigamorph.engine.planning.search"], "strategies", with_segments)
    assert_exact(network(), images(0, 0, [(37, 29)]), tile=9)
