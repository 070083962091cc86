"""Peak memory of a training step, ours against stock PyTorch and against what plan() predicts, on the CPU.

    python benchmarks/memory.py --json benchmarks/results/memory_cpu.json --plot benchmarks/results/memory_cpu.png
    python benchmarks/memory.py --quick

Every figure is taken in a process of its own: import, build the network, run a step on a 64 x 64 image so that the
libraries have loaded what they need, make the image, then read the resident memory, reset its high-water mark, and run
three steps: the heap grows until the second or third. The peak is parameters + what the steps added. The image itself,
which plan() leaves out too, is not in it.

Two series: square images (stock; ours with tile 512; ours with a third of stock's memory as its budget), and images of
fixed height that grow in width at tile 512, where memory may grow by the carries alone.

glibc raises the size from which it takes blocks straight from the system as the program runs, and keeps what is freed
below that size: resident memory is then well above the bytes in use, for stock as for ours. `--mmap-threshold 4000000`
holds that size fixed in the measured processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gigamorph.engine import BudgetError, Plan, accelerate, plan
from gigamorph.engine.models import create_model

sys.path.insert(0, str(Path(__file__).parent))
from own_process import in_own_process, measure_steps
from provenance import provenance

TILE = 512
HEIGHT = 1024
STEPS = 3
MB = 1e6


@dataclass
class Row:
    """One measured step. Bytes; the image is left out of `measured` and `predicted`."""

    series: str
    model: str
    height: int
    width: int
    how: str
    tile: list[int] | None
    tiles: int | None
    retained: int | None
    budget: int | None
    carries: int | None
    """Carries that are kept between the passes, and those of the strips in work."""
    predicted: int
    measured: int
    image: int
    seconds: float

    @property
    def megapixels(self) -> float:
        return self.height * self.width / 1e6


def build(model: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(model, num_classes=1000, in_channels=3).eval()


def child(task: dict[str, Any]) -> None:
    """Measure one step in this process and print it as JSON."""
    network = build(task["model"])
    small = torch.randn(1, 3, 64, 64)
    for warm in (network, accelerate(network, tile=64)):
        warm(small).square().mean().backward()
    network.zero_grad(set_to_none=True)
    image = torch.randn(1, 3, task["height"], task["width"])
    net = network
    if task["how"] != "stock":
        net = accelerate(network, memory_budget=task["budget"], tile=None if task["tile"] is None else TILE)
    print(json.dumps(measure_steps(net, image, STEPS)))


def measure(series: str, model: str, height: int, width: int, how: str, planned: Plan, fixed_tile: bool) -> Row:
    ours = how != "stock"
    task = {"model": model, "height": height, "width": width, "how": how, "budget": planned.budget,
            "tile": TILE if fixed_tile else None}  # fmt: skip
    found = in_own_process(__file__, task)
    assert planned.stock_bytes is not None
    kept = planned.carry_bytes if planned.carries == "device" else 0
    return Row(
        series, model, height, width, how,
        tile=list(planned.tile) if ours else None,
        tiles=planned.tiles[0] * planned.tiles[1] if ours else None,
        retained=planned.retained if ours else None,
        budget=planned.budget if ours else None,
        carries=kept + planned.strip_bytes if ours else None,
        predicted=planned.peak_bytes if ours else planned.stock_bytes,
        measured=found["bytes"],
        image=3 * height * width * 4,
        seconds=found["seconds"],
    )  # fmt: skip


def square(model: str, sides: list[int]) -> list[Row]:
    network = build(model)
    rows = []
    for side in sides:
        whole = plan(network, (side, side), tile=TILE)
        assert whole.stock_bytes is not None
        rows.append(show(measure("square", model, side, side, "stock", whole, False)))
        rows.append(show(measure("square", model, side, side, "tile 512", whole, True)))
        try:
            third = plan(network, (side, side), whole.stock_bytes // 3)
        except BudgetError as error:
            print(f"{model} {side} x {side}: {error}")
            continue
        rows.append(show(measure("square", model, side, side, "a third", third, False)))
    return rows


def growth(model: str, widths: list[int]) -> list[Row]:
    network = build(model)
    return [
        show(measure("growth", model, HEIGHT, w, "tile 512", plan(network, (HEIGHT, w), tile=TILE), True))
        for w in widths
    ]


HEADER = (
    f"{'model':9} {'image':>13} {'how':9} {'tile':>9} {'kept':>6} {'measured':>9} {'predicted':>9} {'ratio':>6} "
    f"{'carries':>8} {'rest':>8} {'image':>7} {'time':>7}\n"
    f"{'':9} {'H x W':>13} {'':9} {'':>9} {'tiles':>6} {'MB':>9} {'MB':>9} {'p/m':>6} "
    f"{'MB':>8} {'MB':>8} {'MB':>7} {'s':>7}"
)


def show(row: Row) -> Row:
    """Print a line of the table. `rest` is measured without carries: the parameters' share and one tile."""
    carries = "" if row.carries is None else f"{row.carries / MB:.0f}"
    rest = "" if row.carries is None else f"{(row.measured - row.carries) / MB:.0f}"
    tile = "" if row.tile is None else f"{row.tile[0]}x{row.tile[1]}"
    kept = "" if row.retained is None else f"{row.retained}/{row.tiles}"
    print(
        f"{row.model:9} {f'{row.height} x {row.width}':>13} {row.how:9} {tile:>9} {kept:>6} {row.measured / MB:9.0f} "
        f"{row.predicted / MB:9.0f} {row.predicted / row.measured:6.2f} {carries:>8} {rest:>8} {row.image / MB:7.0f} "
        f"{row.seconds:7.1f}",
        flush=True,
    )
    return row


def draw(rows: list[Row], path: Path) -> None:
    """Memory against pixels: measured as dots and lines, predicted as crosses; every line carries its own name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"stock": "#b03a2e", "tile 512": "#1f5f99", "a third": "#3d8f5f"}
    names = {"stock": "stock PyTorch", "tile 512": "ours, tile 512", "a third": "ours, budget a third of stock"}
    models = sorted({row.model for row in rows})
    figure, axes = plt.subplots(2, len(models), figsize=(6.2 * len(models), 8.4), squeeze=False, sharex="row")
    for column, model in enumerate(models):
        for line, series in enumerate(("square", "growth")):
            panel = axes[line][column]
            hows = [h for h in colours if any((r.series, r.model, r.how) == (series, model, h) for r in rows)]
            panel.set_visible(bool(hows))
            for how in hows:
                part = [r for r in rows if (r.series, r.model, r.how) == (series, model, how)]
                x = [r.megapixels for r in part]
                y = [r.measured / 1e9 for r in part]
                panel.plot(x, y, "o-", color=colours[how], markersize=4, linewidth=1.6)
                panel.plot(x, [r.predicted / 1e9 for r in part], "x", color=colours[how], markersize=7)
                label = names[how] if series == "square" else "measured"
                above = y[-1] >= max(r.measured for r in rows if (r.series, r.model, r.width) ==
                                     (series, model, part[-1].width) and r.how != "stock") / 1e9  # fmt: skip
                panel.annotate(f"{label}, {y[-1]:.2f} GB", (x[-1], y[-1]), xytext=(0, 9 if above else -9),
                               textcoords="offset points", ha="right", va="bottom" if above else "top",
                               color=colours[how])  # fmt: skip
            if series == "growth" and hows:
                rest = [(r.measured - (r.carries or 0)) / 1e9 for r in part]
                panel.plot(x, rest, "--", color="#777777", linewidth=1.2)
                panel.annotate("without the carries", (x[-1], rest[-1]), xytext=(0, -6), textcoords="offset points",
                               ha="right", va="top", color="#777777")  # fmt: skip
            panel.set_title(
                f"{model}, square images" if series == "square" else f"{model}, {HEIGHT} pixels high, wider and wider"
            )
            panel.set_xlabel("image in megapixels")
            panel.set_ylabel("peak of a training step in GB")
            panel.set_ylim(
                0, 1.2 * max((r.measured for r in rows if (r.series, r.model) == (series, model)), default=1) / 1e9
            )
            panel.spines[["top", "right"]].set_visible(False)
    figure.text(0.99, 0.005, "crosses: predicted by plan(). float32, CPU, the image itself not counted",
                ha="right", fontsize=9, color="#555555")  # fmt: skip
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 alone, small images: one to three minutes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--mmap-threshold", type=int, metavar="BYTES", help="glibc's, fixed; default: as it comes")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child)
        return
    if options.mmap_threshold is not None:  # the measured processes inherit it
        os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(options.mmap_threshold)
    models = ["resnet18"] if options.quick else ["resnet18", "resnet50"]
    sides = [768, 1024] if options.quick else [1024, 2048]
    widths = [1024, 2048, 4096] if options.quick else [1024, 2048, 4096, 8192, 16384]
    print(HEADER)
    started = time.perf_counter()
    rows = [row for model in models for row in square(model, sides)] + growth("resnet18", widths)
    if options.json:
        result = {
            "what": "peak memory of one training step, float32, frozen BatchNorm, CPU; bytes, the image left out",
            "mmap_threshold": options.mmap_threshold,
            "seconds": time.perf_counter() - started,
            "rows": [asdict(row) | {"megapixels": row.megapixels} for row in rows],
            "provenance": provenance(),
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        draw(rows, options.plot)
    worst = max(rows, key=lambda r: abs(r.predicted / r.measured - 1) if r.how != "stock" else 0)
    print(f"largest error of the prediction: {worst.predicted / worst.measured - 1:+.0%} ({worst.model} {worst.height} "
          f"x {worst.width}, {worst.how})")  # fmt: skip


if __name__ == "__main__":
    main()
