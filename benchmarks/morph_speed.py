"""How long it takes to find the channel spaces of a network, and to widen it with all its checks.

Each line is the least of several runs in one process, after a first one that loads what is needed: seconds that
passed, and of the processor, on as many threads as torch has.

    python benchmarks/morph_speed.py [--model resnet50] [--size 64] [--threads 2] [--runs 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gigamorph.engine.bench import meter
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.morph.spaces import find_spaces
from gigamorph.engine.morph.widen import widen


def measure(model: nn.Module, x: Tensor, runs: int) -> dict[str, dict[str, float]]:
    """Task -> seconds "passed" and of the "processor"."""
    tasks: dict[str, Callable[[], object]] = {
        "spaces": lambda: find_spaces(model, x),
        "widen x1.5": lambda: widen(model, x, factor=1.5),
        "widen x2": lambda: widen(model, x, factor=2),
    }
    found: dict[str, dict[str, float]] = {}
    for task, run in tasks.items():
        cost = meter.measure(run, times=runs, warm=1)
        found[task] = {"passed": round(min(cost.seconds), 2), "processor": round(min(cost.cpu_seconds), 2)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="of timm")
    parser.add_argument("--size", type=int, default=64, help="pixels along a side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from gigamorph.engine.models.compat import make_torchvision_importable

    make_torchvision_importable()
    import timm

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = timm.create_model(options.model, pretrained=False).eval()
    seconds = measure(model, torch.zeros(1, 3, options.size, options.size), options.runs)
    for task, s in seconds.items():
        print(f"{options.model}, {options.size} pixels, {task}: {s['passed']} s, {s['processor']} s of the processor")
    if options.json:
        settings = {"model": options.model, "size": options.size, "runs": options.runs}
        result = {"settings": settings, "seconds": seconds, "provenance": provenance()}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
