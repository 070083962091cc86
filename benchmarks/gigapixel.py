"""One exact training step on a gigapixel image that lies on disk, on the CPU.

    python benchmarks/gigapixel.py --json benchmarks/results/gigapixel_cpu.json

Writes a 16-bit image of --side x --side pixels to a temporary .npy file, trains one step of a ResNet on it through a
pixel source, and stores time, peak resident memory and what the plan had predicted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gigamorph import accelerate, open_pixels, plan
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.bench.meter import measure
from gigamorph.engine.bench.results import Results, StepRow, Task
from gigamorph.engine.models.resnet import resnet18
from gigamorph.engine.tiling.memory import format_bytes, parse_bytes, used_bytes
from gigamorph.engine.tiling.scan import TileEvent


def write_image(path: Path, side: int, strip: int = 512) -> None:
    """Smooth texture plus noise, 12 bits in 16, written strip by strip."""
    random = np.random.default_rng(0)
    image = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(side, side))
    columns = np.sin(np.arange(side) / 900.0)
    for top in range(0, side, strip):
        rows = np.cos(np.arange(top, min(top + strip, side)) / 700.0)
        smooth = 1800 + 900 * rows[:, None] * columns[None, :]
        image[top : top + strip] = (smooth + random.integers(0, 256, smooth.shape)).astype(np.uint16)
    image.flush()
    del image


def train_step(options: argparse.Namespace, path: Path) -> StepRow:
    """One step on the image in a file, with its progress printed; `process_bytes` is the peak of resident memory."""
    torch.manual_seed(0)
    network = resnet18(num_classes=2, in_channels=1, width=options.width).eval()
    planned = plan(network, (1, options.side, options.side), options.memory_budget, tile=options.tile)
    print(planned, flush=True)
    net = accelerate(network, memory_budget=options.memory_budget, tile=options.tile)
    source, forward = open_pixels(path), 0.0
    started = time.perf_counter()

    def progress(event: TileEvent) -> None:
        if event.done % max(1, event.total // 32) == 0:
            seconds, memory = time.perf_counter() - started, format_bytes(used_bytes())
            done = f"{event.phase:8} {event.done:5}/{event.total} tiles"
            print(f"{done}  {seconds:7.0f} s  {memory} resident", flush=True)

    def step() -> None:
        nonlocal forward
        logits = net(source)
        forward = time.perf_counter() - started
        torch.nn.functional.cross_entropy(logits, torch.tensor([1])).backward()

    net.on_tile = progress
    cost = measure(step)
    model = "resnet18" if options.width == 64 else f"resnet18 of width {options.width}"
    return StepRow(
        Task(model, (1, 1, options.side, options.side)),
        "gigamorph",
        seconds=cost.seconds,
        process_bytes=cost.peak_bytes,
        predicted_bytes=planned.peak_bytes,
        settings={
            "image": "on disk, read by tile",
            "memory_budget": parse_bytes(options.memory_budget),
            "tile": list(planned.tile),
            "carries": planned.halos,
            "carry_bytes": planned.halo_bytes,
            "stock_bytes": planned.stock_bytes,
            "forward_seconds": forward,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32768)
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage of the ResNet-18")
    parser.add_argument("--memory-budget", default="2.5GiB")
    parser.add_argument("--folder", type=Path, default=None, help="where the image is written (2 GB)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "image.npy"
        write_image(path, options.side)
        row = train_step(options, path)
    if options.json:
        Results("benchmarks/gigapixel.py", provenance(), steps=[row]).write(options.json)
    print(
        f"{row.task.megapixels:.0f} Mpx in {row.seconds[0]:.0f} s ({row.mpx_per_s:.2f} Mpx/s), "
        f"peak resident memory {format_bytes(row.process_bytes or 0)}"
    )


if __name__ == "__main__":
    main()
