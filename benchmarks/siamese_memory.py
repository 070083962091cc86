"""Memory of the siamese recipe's training and probe as the number of pairs grows, each number in a process of its own.

python benchmarks/siamese_memory.py [--pairs 100,1000] [--cells 4] [--patch 32]   # prints, and writes the JSON

Patches lie on disk as the recipe writes them, with pixels drawn at random. What is measured is one epoch with the
distances of all pairs before it, and the probe; the growth from the first number to the last is extrapolated to
VinDr-Mammo's 8,000 training pairs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.models import create_model
from gigamorph.engine.recipes.siamese import SiameseConfig
from gigamorph.engine.recipes.siamese.network import Embedding
from gigamorph.engine.recipes.siamese.pairs import Pair
from gigamorph.engine.recipes.siamese.patches import PatchFile, PatchPairs, SinglePatches
from gigamorph.engine.recipes.siamese.probe import probed
from gigamorph.engine.recipes.siamese.task import SiameseTask
from gigamorph.engine.train.loop import run_stages
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage

JSON = Path(__file__).parent / "results" / "siamese_memory.json"
WHOLE = 8000  # pairs of VinDr-Mammo's training split: 4,000 exams, two views


def worker(pairs: int, cells: int, patch: int) -> int:
    """Train for an epoch and probe on that many pairs; returns the largest memory of the process in bytes."""
    torch.set_num_threads(1)
    config = SiameseConfig(model="lesionnet", layer="stages", patch=patch, warm_up=0, epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        files = [write(Path(folder), number, cells, config) for number in range(pairs)]
        found = PatchPairs(files)
        network = Embedding(create_model("lesionnet", 2, 1), "stages", config.dim, 1, patch)
        task = SiameseTask([network], found, found.patients, config)
        run_stages(task, [Stage("pairs", 1, 1e-3, batch_size=config.batch_size)], Run(Path(folder) / "run"))
        single = SinglePatches(files)
        probed(network, single, torch.arange(len(single)) % 2, single)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write(folder: Path, number: int, cells: int, config: SiameseConfig) -> PatchFile:
    """A pair's patches of random pixels."""
    path, side = folder / f"{number}.npy", config.patch
    np.save(path, np.random.default_rng(number).integers(0, 65536, (cells, 2, side, side), dtype=np.uint16))
    sides = [Record(path, 0, f"p{number}", "train", side, "CC") for side in "LR"]
    return PatchFile(Pair(*sides), path, np.zeros((cells, 2), np.int64), np.zeros((2, cells, 4)), config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="100,1000")
    parser.add_argument("--cells", type=int, default=4, help="patches of a pair")
    parser.add_argument("--patch", type=int, default=32, help="side in pixels")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        print(worker(given.worker, given.cells, given.patch))
        return
    peaks: dict[int, int] = {}
    for pairs in map(int, given.pairs.split(",")):
        command = [sys.executable, __file__, "--worker", str(pairs), "--cells", str(given.cells)]
        done = subprocess.run(
            [*command, "--patch", str(given.patch)], capture_output=True, text=True, check=True, timeout=3600
        )
        peaks[pairs] = int(done.stdout.split()[-1])
        print(f"{pairs} pairs of {given.cells} patches: {peaks[pairs] / 2**20:.0f} MiB")
    first, last = min(peaks), max(peaks)
    slope = (peaks[last] - peaks[first]) / max(last - first, 1)
    whole = peaks[last] + slope * (WHOLE - last)
    on_disk = WHOLE * given.cells * 2 * given.patch**2 * 2
    print(
        f"{slope / 1024:.1f} KiB a pair; {WHOLE} pairs: {whole / 2**20:.0f} MiB, and {on_disk / 2**30:.1f} GiB on disk"
    )
    found = {
        "peak_bytes": peaks,
        "cells": given.cells,
        "patch": given.patch,
        "bytes_per_pair": slope,
        "extrapolated_pairs": WHOLE,
        "extrapolated_bytes": whole,
        "provenance": provenance(),
    }
    JSON.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
