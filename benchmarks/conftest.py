"""Comparisons that fail on a ratio within one run, and the provenance of their figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gigamorph.engine.bench import ratio
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.bench.meter import time_call


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--side", type=int, default=2048, help="side of the square image in pixels")
    parser.addoption("--rounds", type=int, default=3, help="timed rounds of each comparison")
    parser.addoption("--save-ratios", action="store_true", help="save the ratios for later comparisons")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    for private in ("node", "release"):
        machine_info.pop(private, None)
    machine_info["provenance"] = provenance()


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., float]:
    """Run ours and a reference alternately; compare the ratio of their minimal CPU times with limit and saved ratio.

    pytest-benchmark times ours; CPU times of both and their ratio are in `extra_info`.
    """

    def run(
        name: str, ours: Callable[[], Any], reference: Callable[[], Any], limit: float | None = None, **info: Any
    ) -> float:
        seconds: dict[str, list[float]] = {"ours": [], "reference": []}

        def timed(which: str, call: Callable[[], Any]) -> None:
            seconds[which].append(time_call(call)[1])

        benchmark.pedantic(
            lambda: timed("ours", ours),
            setup=lambda: timed("reference", reference),
            rounds=request.config.getoption("--rounds"),
        )
        found = min(seconds["ours"]) / min(seconds["reference"])
        benchmark.extra_info.update(cpu_seconds=seconds, ratio=found, limit=limit, **info)
        print(f"\n{name}: {found:.2f} times the reference's CPU time")
        if request.config.getoption("--save-ratios"):
            ratio.save(name, found)
        wrong = ratio.judge(name, found, limit, ratio.load())
        assert wrong is None, wrong
        return found

    return run
