"""Comparisons that fail on a ratio within one run, and where their figures come from."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gigamorph.engine.bench.machine import provenance

sys.path.insert(0, str(Path(__file__).parent))
import ratio as ratios


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--side", type=int, default=2048, help="side of the square image in pixels")
    parser.addoption("--rounds", type=int, default=3, help="timed rounds of each comparison")
    parser.addoption("--save-ratios", action="store_true", help="keep the ratios as those to compare with")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    for private in ("node", "release"):
        machine_info.pop(private, None)
    machine_info["provenance"] = provenance()


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., float]:
    """Runs ours and a reference in turns; the ratio of their least CPU times is compared with the limit and the saved.

    pytest-benchmark times ours; CPU times of both and their ratio are in `extra_info`.
    """

    def run(
        name: str, ours: Callable[[], Any], reference: Callable[[], Any], limit: float | None = None, **info: Any
    ) -> float:
        seconds: dict[str, list[float]] = {"ours": [], "reference": []}

        def timed(which: str, call: Callable[[], Any]) -> None:
            started = time.process_time()
            call()
            seconds[which].append(time.process_time() - started)

        benchmark.pedantic(
            lambda: timed("ours", ours),
            setup=lambda: timed("reference", reference),
            rounds=request.config.getoption("--rounds"),
        )
        found = min(seconds["ours"]) / min(seconds["reference"])
        benchmark.extra_info.update(cpu_seconds=seconds, ratio=found, limit=limit, **info)
        print(f"\n{name}: {found:.2f} times the reference's CPU time")
        if request.config.getoption("--save-ratios"):
            ratios.save(name, found)
        wrong = ratios.judge(name, found, limit, ratios.load())
        assert wrong is None, wrong
        return found

    return run
