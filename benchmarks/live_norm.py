"""BatchNorm in training mode: time and peak memory of a step under budgets, against stock and torch.checkpoint (CPU).

    python benchmarks/live_norm.py --json benchmarks/results/live_norm_cpu.json
    python benchmarks/live_norm.py --models resnet18 --side 1024 --rounds 1

Every figure comes from a process of its own that has done a small step in the same way before: two steps, of which the
image and what was there before, libraries with it, are not counted. The processes take turns, so that a busy machine
hurts all alike. A time is the ratio to stock of the medians, by the clock and (for a busy machine) by the processors'
seconds, where threads that wait count as threads that work. The budgets are shares of stock's measured peak,
parameters included; the plan then chooses which maps are stored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigamorph.engine import BudgetError, accelerate, plan
from gigamorph.engine.models import create_model

sys.path.insert(0, str(Path(__file__).parent))
from own_process import in_own_process, measure_steps

from gigamorph.engine.bench.machine import provenance

SHARES = (0.7, 0.56, 0.43, 0.34, 0.25)
STEPS = 2


class Checkpointed(nn.Module):
    """A residual block that keeps its input alone."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)  # pyright: ignore[reportReturnType]


def build(model: str, how: str, budget: int | None) -> nn.Module:
    torch.manual_seed(0)
    network = create_model(model, num_classes=1000, in_channels=3).train()
    if how == "ours":
        return accelerate(network, memory_budget=budget)
    if how == "checkpoint":
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            for name, block in list(stage.named_children()):
                setattr(stage, name, Checkpointed(block))
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def child(task: dict[str, Any]) -> None:
    """Measure in this process and print as JSON."""
    build(task["model"], task["how"], None)(torch.randn(1, 3, 64, 64)).square().mean().backward()
    net = build(task["model"], task["how"], task["budget"])
    image = torch.randn(1, 3, task["side"], task["side"]).contiguous(memory_format=torch.channels_last)
    print(json.dumps(measure_steps(net, image, STEPS)))


def run(model: str, side: int, how: str, budget: int | None) -> dict[str, Any]:
    return in_own_process(__file__, {"model": model, "side": side, "how": how, "budget": budget})


def rows_of(model: str, side: int, rounds: int, shares: Sequence[float]) -> list[dict[str, Any]]:
    """One row for stock, checkpoint and each budget that can be kept."""
    stock = run(model, side, "stock", None)["bytes"]
    rows: list[dict[str, Any]] = [{"how": "stock", "budget": None}, {"how": "checkpoint", "budget": None}]
    network = build(model, "stock", None)
    for share in (None, *shares):
        budget = None if share is None else int(share * stock)
        try:
            made = plan(network, (side, side), budget)
        except BudgetError as error:
            print(f"{model} {side}: {share} of stock's: {error}")
            continue
        chosen = made.choices[made.choice]
        rows.append({
            "how": "ours", "share": share, "budget": budget, "predicted": made.peak_bytes, "tile": made.tile,
            "stored": chosen.name, "forwards": chosen.forwards, "stored_bytes": chosen.bytes, "maps": made.maps,
        })  # fmt: skip
    measured = [[run(model, side, row["how"], row["budget"]) for row in rows] for _ in range(rounds)]
    for number, row in enumerate(rows):
        own = [turn[number] for turn in measured]
        row |= {"model": model, "side": side}
        row |= {what: [r[what] for r in own] for what in own[0]}
        first = [turn[0] for turn in measured]
        for what, name in (("seconds", "time"), ("cpu_seconds", "cpu_time")):
            row[name] = statistics.median(row[what]) / statistics.median([r[what] for r in first])
        row["memory"] = max(row["bytes"]) / max(r["bytes"] for r in first)
        row["added_memory"] = max(row["added"]) / max(r["added"] for r in first)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as people read it."""
    text = f"{row['model']:9} {row['side']:5} {row['how']:10} {row.get('share') or '':<5} "
    text += f"time {row['time']:5.2f} (CPU {row['cpu_time']:.2f})  memory {row['memory']:5.2f} ({row['added_memory']:.2f} without parameters)"
    text += f"  {max(row['bytes']) / 1e9:5.2f} GB"
    if row["how"] == "ours":
        text += f"  predicted/measured {row['predicted'] / max(row['bytes']):5.2f}  {row['stored']}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="budgets, in peaks of stock")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child)
        return
    rows = [row for model in options.models for row in rows_of(model, options.side, options.rounds, options.shares)]
    if options.json:
        result = {
            "what": "a training step with live BatchNorm, float32, CPU; the image is not counted",
            "rows": rows, "provenance": provenance(),
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
