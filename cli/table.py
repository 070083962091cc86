"""Tables for the terminal, and a plan with bars; plain lines otherwise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..engine.planning.largest import MOST_WORK
from ..engine.planning.plan import Plan
from ..engine.tiling.memory import format_bytes

_BAR_WIDTH = 32
_MAX_WIDTH = 1000


def show_plan(plan: Plan, model: str, console: Console | None = None) -> None:
    """Print a plan; bars on one scale compare the parts of its peak, the peak, the budget and stock PyTorch."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        click.echo(str(plan))
        return
    n, _, height, width = plan.image
    step = "a training step" if plan.training else "a prediction"
    batch = f"{n} images of " if n > 1 else ""
    size = f"{height} x {width} pixels ({n * height * width / 1e6:.1f} Mpx)"
    console.print(f"{step} of [bold]{model}[/] on {batch}{size}")
    rows, columns = plan.tiles
    passes = f", {plan.retained} of them not recomputed" if plan.retained else ""
    console.print(
        f"[bold]{rows * columns}[/] tiles of [bold]{plan.tile[0]} x {plan.tile[1]}[/] ({rows} x {columns}){passes}"
    )
    parts = _parts(plan)
    sums = [("predicted peak", plan.peak_bytes, "bold")]
    if plan.budget is not None:
        sums.append((f"budget ({'kept' if plan.fits else 'exceeded'})", plan.budget, "cyan"))
    if plan.stock_bytes is not None:
        name = f"stock PyTorch ({plan.stock_bytes / plan.peak_bytes:.1f} times the peak)"
        sums.append((name, plan.stock_bytes, "red"))
    if plan.folded_bytes is not None:
        sums.append(("stock PyTorch, norms folded", plan.folded_bytes, "red"))
    largest = max(size for _, size, _ in [*parts, *sums])
    table = _table("", ">", "", show_header=False)
    console.print("at the moment of the peak:")
    for group in (parts, sums):
        for name, size, style in group:
            bar = "█" * max(1, round(_BAR_WIDTH * size / largest)) if size else ""
            table.add_row(name, format_bytes(size), bar, style=style)
        table.add_row()
    if plan.choices:
        kept = f"; kept: {plan.choices[plan.choice].name}" if len(plan.sides) > 1 else ""
        table.caption = f"work {plan.work:.2f} times that of stock PyTorch{kept}"
        table.caption_justify = "left"
    print_whole(console, table)


def _table(*columns: str, **options: Any) -> Table:
    """Return a table without lines; columns whose name begins with > are right-aligned."""
    table = Table(box=None, pad_edge=False, **options)
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    return table


def print_whole(console: Console, table: Table) -> None:
    """Print a table without truncating numbers; in a narrow terminal, its lines wrap."""
    needed = Measurement.get(console, console.options.update(width=_MAX_WIDTH), table).maximum
    console.width = max(console.width, needed)
    console.print(table)


@dataclass(frozen=True)
class BudgetRow:
    """A row of the budget table: name, bytes, plan (None if nothing fits) and lower bound of seconds."""

    name: str
    budget: int
    plan: Plan | None
    seconds: float | None


def show_budgets(rows: Sequence[BudgetRow], rates: str, console: Console | None = None) -> None:
    """Print the cost of a step under several budgets, and the smallest sufficient budget."""
    console = console or Console(highlight=False)
    table = _table("", ">budget", ">peak", ">tile", ">work", ">at best")
    for row in rows:
        cells = ("does not fit", "", "", "")
        if row.plan is not None:
            tile = f"{row.plan.tile[0]} x {row.plan.tile[1]}"
            cells = (format_bytes(row.plan.peak_bytes), tile, f"{row.plan.work:.2f}", _time(row.seconds))
        table.add_row(row.name, format_bytes(row.budget), *cells)
    console.print()
    print_whole(console, table)
    enough = [row for row in rows if row.plan is not None]
    if enough:
        least = min(enough, key=lambda row: row.budget)
        assert least.plan is not None
        what = f"peak {format_bytes(least.plan.peak_bytes)}, at best {_time(least.seconds)} a step"
        console.print(f"smallest sufficient budget: {least.name} ({what})", soft_wrap=True)
    console.print(
        "work: arithmetic relative to stock PyTorch's step. At best: a lower bound (roofline) from stock's arithmetic "
        f"and memory traffic, times work; {rates}",
        soft_wrap=True,
    )


def show_largest(what: str, names: Sequence[str], plans: Sequence[Plan | None], as_json: bool) -> None:
    """Print the largest image or batch for each budget."""
    rows = []
    for name, plan in zip(names, plans, strict=True):
        row: dict[str, Any] = {"budget": name, f"largest {what}": "does not fit"}
        if plan is not None:
            n, _, height, width = plan.image
            size = f"{n} x {height} x {width}" if n > 1 or what == "batch" else f"{height} x {width}"
            row |= {f"largest {what}": size, "Mpx": n * height * width / 1e6, "peak GiB": plan.peak_bytes / 2**30}
            row |= {"work": plan.work, "stock PyTorch, GiB": (plan.stock_bytes or 0) / 2**30}
            if plan.folded_bytes is not None:
                row["norms folded, GiB"] = plan.folded_bytes / 2**30
        rows.append(row)
    if as_json:
        click.echo(json.dumps(rows))
        return
    show_rows(rows)
    click.echo(f"with all maps on the device, and at most {MOST_WORK:g} times the work of stock PyTorch")


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


def show_rows(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print rows of numbers and texts with a header; missing values stay empty."""
    (console or Console(highlight=False)).print(rows_table(rows))


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of rows of numbers and texts with a header; missing values stay empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(box=None, pad_edge=False)
    for name in names:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_shown(row.get(name)) for name in names))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _parts(plan: Plan) -> list[tuple[str, int, str]]:
    """Return the parts of the peak; all parts on the device add up to it."""
    where = {"device": "halos", "host": "halos, in host memory", "disk": "halos, on disk"}[plan.halos]
    resident = "" if plan.halos == "device" else "dim"
    assert plan.at_peak is not None
    at = plan.at_peak
    parts = [
        ("parameters and gradients" if plan.training else "parameters", plan.parameter_bytes, ""),
        (where, plan.halo_bytes, resident),
        ("resident strips", at.strips, ""),
        ("one tile", at.tile, ""),
        ("retained tiles", at.graphs, ""),
        ("whole maps", at.maps, ""),
        ("captured step", plan.capture_bytes, ""),
        ("replayed tiles", 0 if plan.capture_bytes else plan.replay_bytes, ""),
        ("libraries", plan.library_bytes, ""),
        ("heap", plan.heap_bytes, ""),
        ("records", plan.record_bytes, ""),
    ]
    return [part for part in parts if part[1]]
