"""How long end2end's patch network waits for its patches: read ahead, read when asked for, and kept in memory, which is
what the training loop itself takes.

python benchmarks/patch_wait.py [--step 0.12] [--batches 20]   # prints, and writes the JSON

Patches of 224 x 224 pixels are varied as the recipe's configuration says, by a thread for each CPU. In the network's
place something waits for as long as a step takes on a GPU, which leaves the CPU to the threads as a GPU does: by
default 0.12 s, twice the floor of ResNet-50's step on 32 patches on an A100 (docs/recipes/sizes.md).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.images.parallel import available_cpus
from gigamorph.engine.recipes.end2end.config import Config
from gigamorph.engine.recipes.end2end.images import Patches, Place
from gigamorph.engine.recipes.end2end.sampler import Patch
from gigamorph.engine.recipes.end2end.train import PatchTask
from gigamorph.engine.train.loop import run_stages
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage
from gigamorph.engine.train.task import Task

JSON = Path(__file__).parent / "results" / "patch_wait.json"


class Steps(nn.Module):
    """In the place of a network on a GPU; notes when it was called."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight, self.seconds, self.began = nn.Parameter(torch.zeros(5)), seconds, list[float]()

    def forward(self, x: Tensor) -> Tensor:
        self.began.append(time.perf_counter())
        time.sleep(self.seconds)
        return self.weight.expand(len(x), -1)


def waited(how: str, step: float, batches: int, config: Config, folder: Path) -> float:
    """Seconds between the end of a step and the begin of the next, the median over an epoch without its first two."""
    size, side = config.patch[0].batch_size, config.sampling.side
    random = np.random.default_rng(0)
    np.save(folder / "image.npy", random.integers(0, 65536, config.resize, dtype=np.uint16))
    corners = [(int(random.integers(0, end - side)) for end in config.resize) for _ in range(size * batches)]
    places = [Place(0, Patch(*corner, n % 5, 0.9)) for n, corner in enumerate(corners)]
    patches = Patches([Record(folder / "image.npy", 0, "p")], places, config, augment=True)
    if how == "in_memory":
        patches.__class__ = type("Kept", (Patches,), {"__getitem__": lambda self, n, one=patches[0]: one})
    task, net = PatchTask, Steps(step)
    if how == "read_when_asked":
        task = type("Plain", (PatchTask,), {"ahead": Task.ahead})
    run_stages(task(net, patches, [], size), [Stage("patches", 1, 1e-3, batch_size=size)], Run(folder / how))
    return float(np.median(np.diff(net.began[2:]) - step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=0.12)
    parser.add_argument("--batches", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = Config()
    found = {"step_seconds": given.step, "patches_of_a_step": config.patch[0].batch_size, "threads": available_cpus()}
    with tempfile.TemporaryDirectory() as folder:
        for how in ("read_ahead", "read_when_asked", "in_memory"):
            found[f"waited_seconds_{how}"] = round(waited(how, given.step, given.batches, config, Path(folder)), 4)
    JSON.write_text(json.dumps({**found, "provenance": provenance()}, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
