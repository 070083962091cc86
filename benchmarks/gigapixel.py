"""Exact training steps and predictions on a gigapixel image on disk, on the CPU.

    python benchmarks/gigapixel.py --json benchmarks/results/gigapixel_cpu.json

Writes a 16-bit image of --side x --side pixels to a .npy file. For each --tile, a separate process trains one step of a
ResNet on it through a pixel source, and stores time, peak resident memory and the plan's prediction; with --inference,
one more process predicts. Stock PyTorch cannot run at such a size, so a step's logits and gradients are compared with
those of the first tile: another order of sums, other seams and other halos must give the same result.

Rows in the JSON file are not run again; --folder keeps the image and the gradients for that.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gigamorph import accelerate, open_pixels, plan
from gigamorph.engine.bench import read
from gigamorph.engine.bench.check import compare
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.bench.meter import measure
from gigamorph.engine.bench.results import BenchTask, Results, StepRow
from gigamorph.engine.models.resnet import resnet18
from gigamorph.engine.tiling.memory import format_bytes, parse_bytes, used_bytes
from gigamorph.engine.tiling.scan import TileEvent


def write_image(path: Path, side: int, strip: int = 512) -> None:
    """Write smooth texture plus noise, 12 bits in 16, strip by strip; an existing file of this side is kept."""
    if path.exists():
        return
    random = np.random.default_rng(0)
    partial = path.with_suffix(".partial")
    image = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint16, shape=(side, side))
    columns = np.sin(np.arange(side) / 900.0)
    for top in range(0, side, strip):
        rows = np.cos(np.arange(top, min(top + strip, side)) / 700.0)
        smooth = 1800 + 900 * rows[:, None] * columns[None, :]
        image[top : top + strip] = (smooth + random.integers(0, 256, smooth.shape)).astype(np.uint16)
    image.flush()
    del image
    partial.rename(path)


def one_step(options: argparse.Namespace, image: Path, tile: int, training: bool, saved: Path) -> StepRow:
    """Run one step or prediction and print its progress; `process_bytes` is the peak of resident memory.

    Logits and gradients are written to the file `saved`.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = resnet18(num_classes=2, in_channels=1, width=options.width).eval()
    shape = (1, options.side, options.side)
    planned = plan(network, shape, options.memory_budget, tile=tile, training=training)
    print(planned, flush=True)
    net = accelerate(network, memory_budget=options.memory_budget, tile=tile)
    source, forward = open_pixels(image), 0.0
    logits = torch.empty(0)
    started = time.perf_counter()

    def progress(event: TileEvent) -> None:
        if event.done % max(1, event.total // 32) == 0:
            seconds, memory = time.perf_counter() - started, format_bytes(used_bytes())
            done = f"{event.phase:8} {event.done:5}/{event.total} tiles"
            print(f"{done}  {seconds:7.0f} s  {memory} resident", flush=True)

    def step() -> None:
        nonlocal forward, logits
        with torch.set_grad_enabled(training):
            logits = net(source)
        forward = time.perf_counter() - started
        if training:
            torch.nn.functional.cross_entropy(logits, torch.tensor([1])).backward()

    net.on_tile = progress
    cost = measure(step)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    torch.save({"outputs": {"logits": logits.detach()}, "gradients": gradients, "buffers": {}}, saved)
    return StepRow(
        task_of(options, training),
        "gigamorph",
        seconds=cost.seconds,
        cpu_seconds=cost.cpu_seconds,
        process_bytes=cost.peak_bytes,
        predicted_bytes=planned.peak_bytes,
        settings={
            "image": "on disk, read by tile",
            "memory_budget": parse_bytes(options.memory_budget),
            "tile": list(planned.tile),
            "threads": options.threads,
            "carries": planned.halos,
            "carry_bytes": planned.halo_bytes,
            "stock_bytes": planned.stock_bytes,
            "forward_seconds": forward,
            "logits": logits.flatten().tolist(),
        },
    )


def task_of(options: argparse.Namespace, training: bool) -> BenchTask:
    model = "resnet18" if options.width == 64 else f"resnet18 of width {options.width}"
    return BenchTask(model, (1, 1, options.side, options.side), training)


def run(options: argparse.Namespace, folder: Path) -> None:
    """Run every missing row in a separate process, and store it at once."""
    image = folder / f"image_{options.side}.npy"
    write_image(image, options.side)
    results = Results("benchmarks/gigapixel.py", provenance())
    if options.json and options.json.exists():
        results = read.read(options.json)
    first = options.tile[0]
    cells = [(True, tile) for tile in options.tile] + [(False, first)] * options.inference
    for training, tile in cells:
        task = task_of(options, training)
        saved = folder / f"{task.mode}_{options.side}_{tile}.pt"
        if any(row.task == task and row.settings["tile"] == [tile, tile] for row in results.steps):
            continue
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            row = process.submit(one_step, options, image, tile, training, saved).result()
        reference = folder / f"training_{options.side}_{first}.pt"
        if saved != reference and reference.exists():  # not if a run without --folder is continued
            expected = loaded(reference)
            row.check = compare(loaded(saved), expected if training else {**expected, "gradients": {}}, f"tile {first}")
        results.steps.append(row)
        if options.json:
            results.write(options.json)
        print(
            f"{row.task}: {row.task.megapixels:.0f} Mpx in {row.seconds[0]:.0f} s ({row.mpx_per_s:.2f} Mpx/s), "
            f"peak resident memory {format_bytes(row.process_bytes or 0)}; {row.check or 'compared with none'}",
            flush=True,
        )


def loaded(path: Path) -> dict[str, dict[str, Tensor]]:
    return torch.load(path, weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32768)
    parser.add_argument("--tile", type=int, nargs="+", default=[1024], help="the first is the reference")
    parser.add_argument("--inference", action="store_true", help="also predict, with the first tile")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage of the ResNet-18")
    parser.add_argument("--memory-budget", default="2.5GiB")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="folder of image (2 GB) and gradients; default: temporary")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        run(options, options.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(options, Path(folder))


if __name__ == "__main__":
    main()
