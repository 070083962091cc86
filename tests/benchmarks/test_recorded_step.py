"""benchmarks/recorded_step.py: another size of an image compiles nothing and measures next to nothing.

It runs in a process of its own, for Triton's interpreter would take the launches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CODE = """
import torch
from torch import nn
from recorded_step import start_up

def network():
    layers = []
    for wide, narrow, stride in ((3, 32, 2), (32, 64, 1), (64, 64, 2)):
        layers += [nn.Conv2d(wide, narrow, 3, stride, 1), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 1, 1), nn.Conv2d(64, 64, 5, 1, 2, groups=64), nn.GroupNorm(4, 64), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2)).eval()

rows = start_up(network, 256, 90, [(1024, 1024), (1024, 1024), (1000, 968), (917, 1011)])
print(rows)
"""


def test_a_new_size_compiles_nothing() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, same, *others = eval(done.stdout.splitlines()[-1])
    assert first["compiled"] >= 8 and first["measured"] >= 8
    assert same["compiled"] == same["measured"] == 0
    assert all(row["compiled"] <= 2 and row["measured"] <= 4 for row in others), others
