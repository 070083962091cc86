"""Peak memory of a training step on the CPU, ours compared with stock PyTorch and with the prediction of plan().

    python benchmarks/memory.py --json benchmarks/results/memory_cpu.json
    python benchmarks/memory.py --quick

Two series: square images (stock; ours with tile 512; ours with a third of stock's memory as its budget), and images of
fixed height and growing width at tile 512, where only the halos may need more memory. Each figure is that of three
steps in a separate process (`gigamorph.engine.bench.process`), because the heap grows until the second or third.

glibc raises the threshold above which it maps blocks directly from the system as the program runs, and caches freed
blocks below it: resident memory is then well above the bytes in use, for stock and for ours. `--mmap-threshold 4000000`
fixes it in the measured processes. `gigamorph bench report` plots the results.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from gigamorph import BudgetError
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.bench.results import OUT_OF_MEMORY, BenchTask, Results, StepRow
from gigamorph.engine.bench.step import measure_row, planned
from gigamorph.engine.bench.work import build

TILE = 512
HEIGHT = 1024
STEPS = 3
GB = 1e9


def measure(task: BenchTask, peer: str, settings: dict[str, Any], predicted: int | None) -> StepRow:
    """Measure and print one row."""
    return show(measure_row(StepRow(task, peer, settings=settings, predicted_bytes=predicted), STEPS))


def square(model: str, sides: list[int]) -> list[StepRow]:
    rows = []
    for side in sides:
        task = BenchTask(model, (1, 3, side, side))
        network = build(task)
        whole = planned(network, task, None, TILE)
        assert whole.stock_bytes is not None
        rows.append(measure(task, "stock", {}, whole.stock_bytes))
        rows.append(measure(task, "gigamorph", {"tile": TILE}, whole.peak_bytes))
        budget, peer = whole.stock_bytes // 3, "gigamorph, a third of stock's memory"
        try:
            third = planned(network, task, budget)
        except BudgetError as error:
            rows.append(show(StepRow(task, peer, OUT_OF_MEMORY, str(error), {"memory_budget": budget})))
            continue
        rows.append(measure(task, peer, {"memory_budget": budget}, third.peak_bytes))
    return rows


def growth(model: str, widths: list[int]) -> list[StepRow]:
    rows = []
    for width in widths:
        task = BenchTask(model, (1, 3, HEIGHT, width))
        made = planned(build(task), task, None, TILE)
        rows.append(measure(task, f"gigamorph, {HEIGHT} pixels high", {"tile": TILE}, made.peak_bytes))
    return rows


def show(row: StepRow) -> StepRow:
    """Print a line of the table."""
    if row.peak_bytes and row.predicted_bytes:
        ratio = row.predicted_bytes / row.peak_bytes
        found = f"{row.peak_bytes / GB:6.2f} GB  predicted {row.predicted_bytes / GB:6.2f} ({ratio:.2f})"
    else:
        found = f"{row.status}: {row.reason}"
    print(f"{row.task!s:36} {row.peer:38} {found}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only ResNet-18, small images: one to three minutes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--mmap-threshold", type=int, metavar="BYTES", help="glibc's mmap threshold; default: dynamic")
    options = parser.parse_args()
    if options.mmap_threshold is not None:  # the measured processes inherit it
        os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(options.mmap_threshold)
    models = ["resnet18"] if options.quick else ["resnet18", "resnet50"]
    sides = [768, 1024] if options.quick else [1024, 2048]
    widths = [1024, 2048, 4096] if options.quick else [1024, 2048, 4096, 8192, 16384]
    rows = [row for model in models for row in square(model, sides)] + growth("resnet18", widths)
    if options.json:
        Results("benchmarks/memory.py", provenance(), steps=rows).write(options.json)
    ours = [
        row.predicted_bytes / row.peak_bytes - 1
        for row in rows
        if row.peer != "stock" and row.peak_bytes and row.predicted_bytes
    ]
    print(f"largest error of the prediction: {max(ours, key=abs):+.0%}")


if __name__ == "__main__":
    main()
