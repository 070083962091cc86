"""benchmarks/gpu.py on a GPU: a few items of each section, with what only a GPU shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("section", "match"),
    [
        ("ceilings", "ceilings"),
        ("checks", "conv forward 3x3 bfloat16"),
        ("ops", "3x3 128>128 @256 forward"),
        ("steps", "resnet18 infer 4096"),
    ],
)
def test_items(tmp_path: Path, section: str, match: str) -> None:
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--json", str(path), "--only", section, "--match", match]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())[section]
    assert rows and not any("error" in row for row in rows.values()), rows
    if section == "checks":
        assert all(row["ok"] for row in rows.values()), rows
    if section == "ceilings":
        assert rows["machine"]["driver"] and rows["ceilings"]["gb_per_s"] > 100
    if section == "steps":
        assert all(row["nvml_bytes"] is not None for name, row in rows.items() if name != "choices"), rows
