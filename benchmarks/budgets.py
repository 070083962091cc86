"""Tests on the CPU whether budgets are kept and predicted, for networks to which no constant of the plan was fitted.

    python benchmarks/budgets.py --json benchmarks/results/budgets_cpu.json
    python benchmarks/budgets.py --json benchmarks/results/budgets_cpu.json --markdown

Each row is three steps of one network in a separate process, with a share of stock PyTorch's memory as budget. It has
the maximal resident memory above that before the first step, including parameters, and the prediction of `plan()`.
Steps accumulate gradients, as in training over several steps: earlier gradients stay allocated and count towards the
budget. A run continues where its file ends; existing rows are not measured again. Times come from a machine that may
do other work: the minimum over the steps, by the clock and by CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gigamorph import BudgetError, plan
from gigamorph.engine.bench.child import measure_in_new_process
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.bench.results import OK, Task
from gigamorph.engine.bench.work import build

STEPS, SIDE = 3, 1024
SHARES = (0.3, 0.45, 0.6)
NORMS = ("frozen", "live")
_FACTORY = "benchmarks.budgets:"
NETWORKS = {
    "lesionnet": "lesionnet",
    "RegNetY-400MF": "timm:regnety_004",
    "MobileNetV3-L": "timm:mobilenetv3_large_100",
    "EfficientNet-B0": "timm:efficientnet_b0",
    "U-Net": _FACTORY + "unet",
    "ConvNeXt-T": "timm:convnext_tiny",
    "DenseNet-121": "timm:densenet121",
    "VGG16-BN": _FACTORY + "vgg16_bn",
    "Swin-T": _FACTORY + "swin_tiny",
}
NO_BATCH_NORM = ("ConvNeXt-T", "Swin-T")  # equal with frozen and live norms
_NEAR, _OVER = 0.10, 1.05  # limits: predicted over measured, measured over budget


def unet(in_channels: int = 3) -> nn.Module:
    """Build the census's U-Net with three levels, 32 channels wide."""
    from benchmarks.coverage_nets import UNet

    assert in_channels == 3
    return UNet(("transposed", "bilinear"), width=32)


def vgg16_bn(in_channels: int = 3) -> nn.Module:
    """Build timm's VGG16-BN with global pooling and a linear classifier, as is common for large images."""
    import timm

    features = timm.create_model("vgg16_bn", features_only=False, in_chans=in_channels).features
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def swin_tiny(in_channels: int = 3) -> nn.Module:
    """Build timm's Swin-T for images of `SIDE` pixels, with windows of 8 x 8 patches."""
    import timm

    return timm.create_model("swin_tiny_patch4_window7_224", img_size=SIDE, window_size=8, in_chans=in_channels)


def tasks(networks: list[str], sides: int) -> Iterator[tuple[str, Task]]:
    """Yield the measured tasks: each network with its norms, training and inference."""
    for name in networks:
        for norms in NORMS[: 1 if name in NO_BATCH_NORM else None]:
            for training in (True, False):
                if training or norms == "frozen":  # inference uses norms in evaluation mode
                    yield name, Task(NETWORKS[name], (1, 3, sides, sides), training, norms, accumulate=True)


def measured(task: Task, peer: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Measure three steps in a separate process."""
    answer = measure_in_new_process(task, peer, settings, STEPS, longest=1800)
    if answer["status"] != OK:
        return {"status": answer["status"], "reason": answer["reason"]}
    return {
        "status": OK,
        "measured_bytes": answer["peak_bytes"],
        "seconds": min(answer["seconds"]),
        "cpu_seconds": min(answer["cpu_seconds"]),
    }


def under_budget(task: Task, budget: int) -> dict[str, Any]:
    """Make the plan for a budget, and measure its steps in a separate process."""
    network = build(task)
    started = time.perf_counter()
    try:
        made = plan(network, task.image, budget, training=task.training)
    except BudgetError as error:
        return {"status": "refused", "reason": str(error), "plan_seconds": time.perf_counter() - started}
    row = {
        "predicted_bytes": made.peak_bytes,
        "plan_seconds": time.perf_counter() - started,
        "tile": made.tile,
        "tiles": made.tiles,
        "retained": made.retained,
        "stages": len(made.sides),
        "kept": made.choices[made.choice].name,
    }
    return row | measured(task, "gigamorph", {"memory_budget": budget})


class Results:
    """The rows of a file, which is written after each row."""

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.rows = {row["row"]: row for row in json.loads(path.read_text())["rows"]}

    def row(self, key: str, make: Any) -> dict[str, Any]:
        """Return the row of this name; measure it if it does not exist."""
        if key not in self.rows:
            self.rows[key] = {"row": key, **make(), "commit": provenance()["commit"]}
            print(line(self.rows[key]), flush=True)
            if self.path is not None:
                what = {"what": "benchmarks/budgets.py", "provenance": provenance(), "rows": [*self.rows.values()]}
                self.path.write_text(json.dumps(what, indent=1) + "\n")
        return self.rows[key]


def run(results: Results, networks: list[str], shares: list[float], side: int) -> None:
    """Measure all rows of these networks."""
    for name, task in tasks(networks, side):
        what = {"network": name, "norms": task.batch_norm, "mode": task.mode, "side": side}
        key = f"{name} {task.batch_norm} {task.mode} {side}"
        stock = results.row(f"{key} stock", lambda task=task, what=what: what | measured(task, "stock", {}))
        if stock["status"] != OK:
            continue
        for share in shares:
            budget = int(share * stock["measured_bytes"])
            more = what | {"share": share, "budget": budget, "stock_bytes": stock["measured_bytes"]}
            more |= {"stock_seconds": stock["seconds"], "stock_cpu_seconds": stock["cpu_seconds"]}
            results.row(f"{key} {share}", lambda task=task, more=more, budget=budget: more | under_budget(task, budget))


def line(row: dict[str, Any]) -> str:
    """Format a row for the terminal."""
    if row["status"] != OK:
        return f"{row['row']:44} {row['status']}: {row['reason']}"
    text = (
        f"{row['row']:44} {row['measured_bytes'] / 1e6:6.0f} MB {row['seconds']:6.2f} s (CPU {row['cpu_seconds']:.2f})"
    )
    if "budget" in row:
        text += f"  budget {row['budget'] / 1e6:5.0f} ({row['measured_bytes'] / row['budget']:.2f})"
        text += (
            f"  predicted {row['predicted_bytes'] / 1e6:5.0f} ({row['predicted_bytes'] / row['measured_bytes']:.2f})"
        )
        text += f"  time {row['seconds'] / row['stock_seconds']:.2f} (CPU {_cpu_ratio(row):.2f})"
        text += f"  tile {row['tile']} x{math.prod(row['tiles'])} retained {row['retained']}, {row['stages']} stages"
    return text


def _cpu_ratio(row: dict[str, Any]) -> float:
    return row["cpu_seconds"] / row["stock_cpu_seconds"]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table for the documentation."""
    under = [row for row in rows if "budget" in row]
    ran = [row for row in under if row["status"] == OK]
    near = sum(abs(row["predicted_bytes"] / row["measured_bytes"] - 1) <= _NEAR for row in ran)
    over = [row for row in ran if row["measured_bytes"] > _OVER * row["budget"]]
    worst = max((row["measured_bytes"] / row["budget"] for row in ran), default=0.0)
    side = max((row["side"] for row in under), default=SIDE)
    lines = [
        f"{len(ran)} rows at {side} x {side} pixels ran, {len(under) - len(ran)} budgets were refused. Predicted over "
        f"measured lies within 10 % in {near} of them. Budgets exceeded by more than 5 %: {len(over)}; the worst row "
        f"takes {worst:.2f} of its own.",
        "",
        "| network, norms | mode | budget MB (share) | predicted | measured | predicted / measured | measured / budget "
        "| time / stock (CPU) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in under:
        cells = [f"{row['network']}, {row['norms']}", row["mode"], f"{row['budget'] / 1e6:.0f} ({row['share']})"]
        if row["status"] == OK:
            cells += [f"{row[name] / 1e6:.0f}" for name in ("predicted_bytes", "measured_bytes")]
            cells += [f"{row['predicted_bytes'] / row['measured_bytes']:.2f}"]
            cells += [f"{row['measured_bytes'] / row['budget']:.2f}"]
            cells += [f"{row['seconds'] / row['stock_seconds']:.2f} ({_cpu_ratio(row):.2f})"]
        else:
            cells += [row["status"], "", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="of stock's peak")
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true", help="print the table without measuring")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.json)
    if options.markdown:
        print(markdown([*results.rows.values()]), end="")
    else:
        run(results, options.networks, options.shares, options.side)


if __name__ == "__main__":
    main()
