"""BatchNorm in training mode: time and peak memory of a step under budgets, against stock and torch.checkpoint (CPU).

    python benchmarks/live_norm.py --json benchmarks/results/live_norm_cpu.json
    python benchmarks/live_norm.py --models resnet18 --side 1024 --rounds 1

Every figure comes from a process of its own that has done a small step of another network before: the fastest of three
steps and the peak of them, of which the image and what was there before, libraries with it, are not counted. The
processes take turns, so that a busy machine hurts all alike. A time is the ratio to stock (in channels_last) of the
medians, by the clock and (for a busy machine) by the processors' seconds, where threads that wait count as threads that
work. The budgets are shares of stock's measured peak, parameters included; the plan then chooses which maps are stored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gigamorph import BudgetError, plan
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.bench.results import OK, StepRow, Task
from gigamorph.engine.bench.step import alone
from gigamorph.engine.bench.work import build

SHARES = (0.7, 0.56, 0.43, 0.34, 0.25)
STEPS = 3
PEERS = {"stock": "channels-last", "checkpoint": "checkpoint", "ours": "gigamorph"}


def task_of(model: str, side: int) -> Task:
    return Task(model, (1, 3, side, side), batch_norm="live")


def run(model: str, side: int, how: str, budget: int | None) -> dict[str, Any]:
    """Bytes and least seconds of some steps in a process of their own; what fails ends this one."""
    settings = {"memory_budget": budget} if how == "ours" else {}
    row = alone(StepRow(task_of(model, side), PEERS[how], settings=settings), STEPS)
    if row.status != OK or row.peak_bytes is None:
        sys.exit(f"{row.task}, {how}: {row.reason}")
    parameters = sum(t.nbytes for t in build(row.task).state_dict().values())
    return {
        "bytes": row.peak_bytes,
        "added": row.peak_bytes - parameters,
        "seconds": min(row.seconds),
        "cpu_seconds": min(row.cpu_seconds),
    }


def rows_of(model: str, side: int, rounds: int, shares: Sequence[float]) -> list[dict[str, Any]]:
    """One row for stock, checkpoint and each budget that can be kept."""
    stock = run(model, side, "stock", None)["bytes"]
    rows: list[dict[str, Any]] = [{"how": "stock", "budget": None}, {"how": "checkpoint", "budget": None}]
    network = build(task_of(model, side))
    for share in (None, *shares):
        budget = None if share is None else int(share * stock)
        try:
            made = plan(network, (side, side), budget)
        except BudgetError as error:
            print(f"{model} {side}: {share} of stock's: {error}")
            continue
        chosen = made.choices[made.choice]
        rows.append(
            {
                "how": "ours",
                "share": share,
                "budget": budget,
                "predicted": made.peak_bytes,
                "tile": made.tile,
                "stored": chosen.name,
                "forwards": chosen.forwards,
                "stored_bytes": chosen.bytes,
                "maps": made.maps,
            }
        )
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
    text += f"time {row['time']:5.2f} (CPU {row['cpu_time']:.2f})"
    text += f"  memory {row['memory']:5.2f} ({row['added_memory']:.2f} without parameters)"
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
    options = parser.parse_args()
    rows = [row for model in options.models for row in rows_of(model, options.side, options.rounds, options.shares)]
    if options.json:
        result = {
            "what": "a training step with live BatchNorm, float32, CPU; the image is not counted",
            "rows": rows,
            "provenance": provenance(),
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
