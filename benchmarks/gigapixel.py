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
from gigamorph.engine.bench.results import Results, StepRow, Task
from gigamorph.engine.models.resnet import resnet18
from gigamorph.engine.tiling.memory import format_bytes, parse_bytes, peak_bytes, reset_peak, used_bytes


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32768)
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage of the ResNet-18")
    parser.add_argument("--budget", default="2.5GiB")
    parser.add_argument("--folder", type=Path, default=None, help="where the image is written (2 GB)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    network = resnet18(num_classes=2, in_channels=1, width=options.width).eval()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "image.npy"
        write_image(path, options.side)
        planned = plan(network, (1, options.side, options.side), options.budget, tile=options.tile)
        print(planned, flush=True)
        net = accelerate(network, memory_budget=options.budget, tile=options.tile)
        started = time.perf_counter()

        def progress(event: object) -> None:
            done, total = event.done, event.total  # type: ignore[attr-defined]
            if done % max(1, total // 32) == 0:
                seconds = time.perf_counter() - started
                memory = format_bytes(used_bytes())
                print(f"{event.phase:8} {done:5}/{total} tiles  {seconds:7.0f} s  {memory} resident", flush=True)  # type: ignore[attr-defined]

        net.on_tile = progress
        source = open_pixels(path)
        reset_peak()
        logits = net(source)
        forward = time.perf_counter() - started
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([1]))
        loss.backward()
        seconds = time.perf_counter() - started
        peak = peak_bytes()
    megapixels = options.side**2 / 1e6
    if options.json:
        model = "resnet18" if options.width == 64 else f"resnet18 of width {options.width}"
        row = StepRow(
            Task(model, (1, 1, options.side, options.side)),
            "gigamorph",
            seconds=[seconds],
            process_bytes=peak,
            predicted_bytes=planned.peak_bytes,
            settings={
                "image": "on disk, read by tile",
                "memory_budget": parse_bytes(options.budget),
                "tile": list(planned.tile),
                "carries": planned.halos,
                "carry_bytes": planned.halo_bytes,
                "stock_bytes": planned.stock_bytes,
                "forward_seconds": forward,
            },
        )
        Results("benchmarks/gigapixel.py", provenance(), steps=[row]).write(options.json)
    print(
        f"{megapixels:.0f} Mpx in {seconds:.0f} s ({megapixels / seconds:.2f} Mpx/s), "
        f"peak resident memory {format_bytes(peak)}"
    )


if __name__ == "__main__":
    main()
