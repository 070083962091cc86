"""Checks whether networks of libraries other than timm and torchvision are exact, unmodified (`library_networks.py`).

    pip install segmentation-models-pytorch monai einops transformers vit-pytorch dynamic-network-architectures \\
        open_clip_torch torchxrayvision efficientnet_pytorch pretrainedmodels ultralytics
    python benchmarks/other_libraries.py --json benchmarks/results/other_libraries.json
    python benchmarks/other_libraries.py --only smp --json FILE

A row is one network with random weights at a small size, in tiles of 32, with frozen and with live norms: outputs and
all gradients against stock PyTorch in float64, judged as in `coverage.py`, with the verdicts of the census. Random
numbers are disabled. Libraries that are not installed are skipped; existing rows are not computed again, and each has
the commit of its measurement.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)]
from coverage_judge import judge  # noqa: E402
from exactness import randomize  # noqa: E402
from library_networks import DISTRIBUTIONS, SIZE, SOURCES, SQUARE, SQUARES, Build  # noqa: E402

from gigamorph import GigamorphError, accelerate  # noqa: E402
from gigamorph.engine.bench.machine import provenance  # noqa: E402
from gigamorph.engine.models.compat import make_torchvision_importable  # noqa: E402

TILE, LIMIT = 32, 1e-12


def networks() -> Iterator[tuple[str, Build]]:
    """Yield the networks of the installed libraries."""
    make_torchvision_importable()
    for package, (source, own) in SOURCES.items():
        if importlib.util.find_spec(package) is not None:
            yield from ((f"{source} {name}", build) for name, build in own())


def check(build: Build, live: bool, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """Return the verdict on one network."""
    torch.manual_seed(0)
    model = randomize(build()).double().train(live)
    _without_random_numbers(model)
    image = torch.randn(2 if live else 1, 3, *size, dtype=torch.float64)
    found: dict[str, Any] = {}
    for fallback in (None, "untiled"):
        fast = lambda twin, fallback=fallback: accelerate(twin, tile=TILE, fallback=fallback)  # noqa: E731
        try:
            found |= judge(model, image, fast, casts=False, limit=LIMIT)
        except GigamorphError as refusal:
            found["message"] = str(refusal)
            continue
        good, unclear = found.pop("good"), found.pop("unclear")
        exact = "exact" if fallback is None else "taken whole"
        return found | {"verdict": exact if good else "unclear" if unclear else "wrong"}
    return found | {"verdict": "refused"}


def _without_random_numbers(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--json", type=Path, help="file to which rows are appended")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() else []
    done = {(row["network"], row["norms"]) for row in rows}
    for name, build in networks():
        for norms in ("frozen", "live"):
            if (name, norms) in done or not any(part in name for part in options.only):
                continue
            try:
                row = check(build, norms == "live", (SQUARE, SQUARE) if name in SQUARES else SIZE)
            except Exception as error:  # any error of a network is its verdict
                row = {"verdict": "wrong", "message": f"{type(error).__name__}: {error}"}
            machine = provenance()
            rows.append({"network": name, "norms": norms, **row, "commit": machine["commit"]})
            error = f"{row['error']:.1e}" if "error" in row else ""
            print(f"{name:32} {norms:6} {row['verdict']:11} {error:8} {row.get('message', '')[:150]}", flush=True)
            if options.json:
                packages = (package for package in SOURCES if importlib.util.find_spec(package))
                versions = {package: version(DISTRIBUTIONS.get(package, package)) for package in packages}
                what = {"what": "benchmarks/other_libraries.py", "libraries": versions, "provenance": machine}
                options.json.write_text(json.dumps({**what, "rows": rows}, indent=1) + "\n")
    return 1 if any(row["verdict"] == "wrong" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
