"""What a call costs before the first tile: TorchDynamo's guards, and the look-up of the program.

python benchmarks/guard.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from gigamorph import accelerate
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.bench.meter import time_call
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.models.compat import make_torchvision_importable

NETWORKS = ("resnet50", "efficientnet_b2", "convnext_tiny")
_ROUNDS = 200


def measure(name: str) -> dict[str, Any]:
    """Milliseconds of a call up to its program (median and worst of rounds), and of the recording that it saves."""
    import timm

    model = timm.create_model(name).train()
    recorded, _ = time_call(lambda: capture(model, (1, 3, 512, 512), torch.float32, "cpu"))
    net, image = accelerate(model, tile=256), torch.zeros(1, 3, 512, 512)
    program = net.open(image).program
    found = []
    times = [1e3 * time_call(lambda: found.append(net.open(image).program))[0] for _ in range(_ROUNDS)]
    assert all(one is program for one in found)
    return {
        "network": name,
        "modules": sum(1 for _ in model.modules()),
        "check_ms": statistics.median(times),
        "worst_ms": max(times),
        "recording_ms": recorded * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    make_torchvision_importable()  # timm needs it
    rows = [measure(name) for name in NETWORKS]
    for row in rows:
        print(
            f"{row['network']:18} {row['modules']:4} modules   check {row['check_ms']:.3f} ms (worst "
            f"{row['worst_ms']:.2f})   recording {row['recording_ms']:.0f} ms"
        )
    if given.json:
        given.json.write_text(json.dumps({"machine": provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
