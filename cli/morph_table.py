"""Reports of morphs and tables of spaces: rich tables in a terminal, plain lines otherwise."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from ..engine.morph.planner import Growth, cells
from ..engine.morph.step import Report
from .table import print_whole


def show_report(report: Report, console: Console | None = None) -> None:
    """Print the report of a morph."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        click.echo(str(report))
        return
    table = Table(box=None, pad_edge=False, title=report.transform, title_justify="left", title_style="bold")
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, (before, after) in (("parameters", report.parameters), ("FLOPs", report.flops)):
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.2f}" if before else "")
    print_whole(console, table)
    d = report.difference
    table = Table(box=None, pad_edge=False)
    for name in ("difference", "float64", "float32", "own rounding noise"):
        table.add_column(name, justify="left" if name == "difference" else "right", no_wrap=True)
    table.add_row("eval mode", f"{d.float64_eval:.1e}", f"{d.float32_eval:.1e}", f"{d.noise_eval:.1e}")
    if d.float64_train is not None:
        table.add_row("train mode", f"{d.float64_train:.1e}", f"{d.float32_train:.1e}", f"{d.noise_train:.1e}")
    print_whole(console, table)
    if report.certificate is not None:
        console.print(f"certificate: {report.certificate}", style="red" if report.certificate.violations else "green")
    for line in report.changes:
        console.print(f"  {line}", markup=False)


def show_growth(growth: Growth, console: Console | None = None) -> None:
    """Print the spaces with the cost of one more channel; frozen spaces are dim and show the reason."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        click.echo(str(growth))
        return
    image = " x ".join(map(str, growth.shape[2:]))
    console.print(f"on images of {image}: {growth.total}; each further channel costs")
    table = Table(box=None, pad_edge=False)
    for name in ("id", "width", "step", "parameters", "FLOPs", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("members", overflow="fold")
    for row in growth.rows:
        text = str(row.space).replace("[", r"\[")
        table.add_row(*cells(row), text, style="dim" if row.cost is None else "")
    console.print(table)
