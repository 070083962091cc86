"""The faults of tests/planted.py can still be planted: each text that they replace is in the code exactly once."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

PLANTED: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("planted.py")))
FAULTS = PLANTED["FAULTS"]
PACKAGES = (
    "kernels cli engine/bench engine/capture engine/cuda_graphs engine/datasets engine/evaluate engine/execution "
    "engine/explain engine/images engine/lowering engine/models engine/module engine/morph engine/parallel "
    "engine/planning engine/predict engine/published engine/report engine/tiling engine/train "
    "engine/mammography/recipes engine/mammography/view"
).split()


def test_each_fault_can_be_planted() -> None:
    assert [why for fault in FAULTS if (why := PLANTED["broken"](fault))] == []


def test_names_are_unique_and_every_package_has_a_fault() -> None:
    assert [name for name, count in Counter(fault.name for fault in FAULTS).items() if count > 1] == []
    assert [package for package in PACKAGES if not any(f.file.startswith(package + "/") for f in FAULTS)] == []


def test_code_that_has_moved_is_named() -> None:
    fault = FAULTS[0]
    with pytest.raises(ValueError, match=rf"{fault.name}: the text to replace occurs 2 times in {fault.file}"):
        PLANTED["planted"](fault, 2 * fault.right)
