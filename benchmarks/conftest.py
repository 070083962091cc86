"""Options of the timed comparisons, and where their figures come from."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from provenance import provenance


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--side", type=int, default=2048, help="side of the square image in pixels")
    parser.addoption("--rounds", type=int, default=3, help="timed rounds of each comparison")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    for private in ("node", "release"):
        machine_info.pop(private, None)
    machine_info["cpu"] = provenance()["cpu"]
    machine_info["provenance"] = provenance()
