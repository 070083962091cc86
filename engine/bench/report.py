"""Page, figures and tables for any set of results.

`report.html` is self-contained; `report.md` has the same content as Markdown, next to the PNGs.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..errors import GigamorphError
from ..files import write_atomically
from ..report.figure import png
from ..report.page import TextTable, render, write_page
from ..tiling.memory import format_bytes
from . import plots
from .read import read
from .results import (
    EQUAL_MEMORY,
    FAILED,
    NOT_RUN,
    OK,
    OUT_OF_MEMORY,
    WRONG,
    BenchTask,
    KernelRow,
    LimitRow,
    Results,
    StepRow,
)

Cells = dict[str, str]
_INTRO = (
    "A step's peak includes parameters, gradients and all that the step added, but not the image. Peers run "
    "alternately, each in its own process; times are medians, the spread is largest minus smallest. Every result is "
    f'compared with that of another peer; the reason of "{NOT_RUN}" and "{FAILED}" is in the remarks.'
)
_OURS = plots.label("gigamorph")


@dataclass
class Section:
    """A heading, a few sentences, figures by file name without ``.png``, and a table."""

    title: str
    table: TextTable
    lines: list[str] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)

    @property
    def pictures(self) -> dict[str, str]:
        """Return the caption of each figure: its own title."""
        return {name: figure.axes[0].get_title(loc="left").replace("\n", ": ") for name, figure in self.figures.items()}


def write_report(paths: Sequence[Path], folder: Path) -> Path:
    """Write `report.html`, `report.md` and the PNGs into a folder; return the page's path.

    Raises:
        DataError: a file is not a file of results.
        GigamorphError: there are no rows, or a file cannot be written.
    """
    runs = [read(path) for path in paths]
    sections = [*_steps(runs), *_exactness(runs), *_limits(runs), *_kernels(runs)]
    if not sections:
        raise GigamorphError("these results have no rows; measure something with gigamorph bench first")
    sections.append(_runs(runs))
    pictures = {name: png(figure) for one in sections for name, figure in one.figures.items()}
    page = write_page(folder / "report.html", "bench.html", pictures, intro=_INTRO, sections=sections)
    text = render("bench.md", intro=_INTRO, sections=sections)
    write_atomically(folder / "report.md", lambda p: p.write_text(text, encoding="utf-8"), "report")
    return page


@dataclass(frozen=True)
class _Group:
    """Rows of one machine that differ only in size and peer; `number` distinguishes machines in file names."""

    task: BenchTask
    machine: str
    number: int

    @property
    def what(self) -> str:
        n, channels = self.task.image[:2]
        images = f", {n} image{'s' * (n > 1)} of {channels} channel{'s' * (channels > 1)}"
        step = "one training step" if self.task.training else "inference"
        return f"{step} of {self.task.model}{'' if (n, channels) == (1, 3) else images}"

    @property
    def how(self) -> str:
        precision = {"fp32": "float32", "bf16": "bfloat16 autocast", "fp64": "float64"}[self.task.precision]
        return f"{precision}, {self.task.batch_norm} BatchNorm, {self.machine}"

    @property
    def title(self) -> str:
        return f"{self.what[0].upper()}{self.what[1:]}: {self.how}"

    @property
    def name(self) -> str:
        n, channels = self.task.image[:2]
        parts = [self.task.model, self.task.mode, self.task.batch_norm, self.task.precision, self.task.device]
        parts += [f"{n}x{channels}"] if (n, channels) != (1, 3) else []
        parts += [str(self.number)] if self.number else []
        return re.sub(r"[^a-z0-9]+", "_", " ".join(parts).lower())


def _machine(run: Results) -> str:
    made = run.provenance
    threads = made.get("threads", "?")
    return made.get("gpu") or f"{made.get('cpu', 'CPU')}, {threads} thread{'s' * (threads != 1)}"


def _with_run_numbers(runs: Sequence[Results], rows: Callable[[Results], Sequence[Any]]) -> list[tuple[int, Any]]:
    """Return rows with the number of their run."""
    return [(number, row) for number, run in enumerate(runs, 1) for row in rows(run)]


def _grouped(runs: Sequence[Results], rows: Callable[[Results], Sequence[Any]]) -> dict[_Group, list[tuple[int, Any]]]:
    """Return rows with the number of their run by group; the smallest image is first in each."""
    groups: dict[_Group, list[tuple[int, Any]]] = {}
    machines = list(dict.fromkeys(map(_machine, runs)))
    for number, row in _with_run_numbers(runs, rows):
        machine = _machine(runs[number - 1])
        task = dataclasses.replace(row.task, image=(*row.task.image[:2], 0, 0))
        groups.setdefault(_Group(task, machine, machines.index(machine)), []).append((number, row))
    return {group: sorted(found, key=lambda one: one[1].task.megapixels) for group, found in groups.items()}


def _float64_rows(runs: Sequence[Results]) -> list[tuple[int, StepRow]]:
    """Return the comparisons in float64."""
    return _with_run_numbers(runs, lambda run: [row for row in run.steps if row.task.precision == "fp64" and row.check])


def _steps(runs: Sequence[Results]) -> list[Section]:
    exact = [row for _, row in _float64_rows(runs)]
    sections = []
    for group, numbered in _grouped(runs, lambda run: [r for r in run.steps if r.task.precision != "fp64"]).items():
        rows: list[StepRow] = [row for _, row in numbered]
        # Only times of one run are compared: the run with most rows, or the last of several such runs.
        sizes = Counter(number for number, _ in numbered)
        fullest = max(sizes, key=lambda number: (sizes[number], number))
        one = [row for number, row in numbered if number == fullest]
        references = {(row.task, row.check.against) for row in rows if row.check is not None}
        cells = [_step_cells(number, row, (row.task, row.peer) in references) for number, row in numbered]
        section = Section(group.title, TextTable.of(cells, _OURS, grouped=True))
        section.lines = _headline(one, [row for row in exact if row.task.model == group.task.model])
        several = len({(row.task.image, row.peer) for row in rows}) > 1
        if several and any(row.peak_bytes for row in rows):
            title = f"Peak memory of {group.what}\n{group.how}"
            section.figures[f"memory_{group.name}"] = plots.memory_figure(rows, title)
        if several and any(row.seconds for row in rows):
            section.figures[f"speed_{group.name}"] = plots.throughput_figure(
                rows, f"Speed of {group.what}\n{group.how}"
            )
        if several and any(row.roofline_share and row.status in (OK, WRONG) for row in rows):
            title = f"Speed of {group.what}, as a share of the roofline\n{group.how}"
            section.figures[f"roofline_{group.name}"] = plots.roofline_figure(rows, title)
        sections.append(section)
    return sections


def _exactness(runs: Sequence[Results]) -> list[Section]:
    cells: list[Cells] = [
        {
            "network": row.task.model,
            "step": row.task.mode,
            "image": _size(row.task),
            "BatchNorm": row.task.batch_norm,
            "peer": plots.label(row.peer),
            "tile": _tile(row.settings),
            "outputs": _difference(row.check.outputs),
            "gradients": _difference(row.check.gradients),
            "run": str(number),
            "status": row.reason or row.status,
        }
        for number, row in _float64_rows(runs)
        if row.check
    ]
    title = "Exactness: float64, relative difference from stock PyTorch"
    return [Section(title, TextTable.of(cells, _OURS))] if cells else []


def _headline(rows: Sequence[StepRow], exact: Sequence[StepRow]) -> list[str]:
    """Return sentences on gigamorph's results, at the largest size that the other peer also reached."""
    lines = []
    for peer in ("stock", "checkpoint", "lightstream"):
        pairs = [
            (ours, other, other.median_seconds / ours.median_seconds, ours.peak_bytes / other.peak_bytes)
            for other in rows
            for ours in rows
            if other.peer == peer and ours.peer == "gigamorph" and ours.task == other.task
            if other.status == ours.status == OK
            if other.median_seconds and ours.median_seconds and other.peak_bytes and ours.peak_bytes
        ]
        if pairs:
            ours, other, speed, memory = max(pairs, key=lambda pair: pair[0].task.megapixels)
            by_cpu = ""
            if other.median_cpu_seconds and ours.median_cpu_seconds:
                by_cpu = f" ({other.median_cpu_seconds / ours.median_cpu_seconds:.3g} by CPU time)"
            lines.append(
                f"At {_size(ours.task)} gigamorph is {speed:.3g} times as fast as {plots.label(peer)}{by_cpu} "
                f"and takes {memory:.2g} times its memory."
            )
    short = [row.task for row in rows if row.peer == EQUAL_MEMORY and row.status == OUT_OF_MEMORY]
    if short:
        sides = ", ".join(map(_size, short))
        lines.append(f"With gigamorph's memory, lightstream cannot run at {sides}.")
    errors = [r.check.gradients for r in exact if r.peer == "gigamorph" and r.check and r.check.gradients is not None]
    if errors:
        lines.append(f"In float64 its gradients differ from stock's by {max(errors):.0e} at most.")
    return lines


def _difference(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}" if error else "0"


def _step_cells(number: int, row: StepRow, reference: bool) -> Cells:
    n = row.task.image[0]
    ratio = row.predicted_bytes / row.peak_bytes if row.predicted_bytes and row.peak_bytes else None
    against = ""
    if row.check is not None:
        error = row.check.outputs if row.check.gradients is None else row.check.gradients
        against = f"{plots.label(row.check.against)} by {_difference(error)}"
    remarks = [_tile(row.settings), row.reason or ""]
    if row.check is not None and row.check.missing:
        remarks.append(f"{row.check.missing} parameters are not trained")
    if row.status == OK and row.check is None:
        remarks.append("the others are compared with it" if reference else "its result was not compared")
    return {
        "image": f"{f'{n} × ' if n > 1 else ''}{_size(row.task)}",
        "peer": plots.label(row.peer),
        "status": row.status,
        "time, s (spread)": _format(row.median_seconds, ".2f") + (f" ({row.spread:.0%})" if row.seconds[1:] else ""),
        "CPU time, s": _format(row.median_cpu_seconds, ".2f"),
        "Mpx/s": _format(row.mpx_per_s, ".3g"),
        "peak, GB": _format(row.peak_bytes and row.peak_bytes / 1e9, ".2f"),
        "whole process, GB": _format(row.process_bytes and row.process_bytes / 1e9, ".2f"),
        "bytes per pixel": _format(row.bytes_per_pixel, ".0f"),
        "predicted / peak": _format(ratio, ".2f"),
        "of the roofline": _format(row.roofline_share, ".0%"),
        "first step, s": _format(row.first_seconds, ".1f"),
        "differs from": against,
        "run": str(number),
        "remarks": "; ".join(part for part in remarks if part),
    }


def _size(task: BenchTask) -> str:
    return f"{task.image[2]} × {task.image[3]}"


def _tile(settings: dict[str, Any]) -> str:
    tile = settings.get("tile")
    if not tile:
        return ""
    return f"tile {tile[0]} × {tile[1]}" if isinstance(tile, (list, tuple)) else f"tile {tile}"


def _limits(runs: Sequence[Results]) -> list[Section]:
    groups: dict[tuple[_Group, int], list[tuple[int, LimitRow]]] = {}
    for group, numbered in _grouped(runs, lambda run: run.limits).items():
        for number, row in numbered:
            groups.setdefault((group, row.cap_bytes), []).append((number, row))
    sections = []
    for (group, cap), numbered in groups.items():
        title = f"Largest image in {format_bytes(cap)}"
        section = Section(f"{title}. {group.title}", TextTable.of([_limit_cells(*one) for one in numbered], _OURS))
        if any(row.side for _, row in numbered):
            figure = plots.limits_figure([row for _, row in numbered], f"{title}: {group.what}\n{group.how}")
            section.figures[f"limits_{group.name}_{cap / 2**20:.0f}mib"] = figure
        sections.append(section)
    return sections


def _limit_cells(number: int, row: LimitRow) -> Cells:
    largest = next((one for one in row.tries if one.side == row.side), None)
    return {
        "peer": plots.label(row.peer),
        "status": row.status,
        "largest, pixels": f"{row.side} × {row.side}" if row.side else "",
        "Mpx": _format(row.side and row.side**2 / 1e6, ".3g"),
        "fails at": str(row.too_large or ""),
        "by plan()": str(row.predicted_side or ""),
        "found / planned pixels": _format(row.agreement, ".2f"),
        "time there, s": _format(largest and largest.seconds, ".1f"),
        "run": str(number),
        "remarks": row.reason or "",
    }


def _kernels(runs: Sequence[Results]) -> list[Section]:
    numbered: list[tuple[int, KernelRow]] = _with_run_numbers(runs, lambda run: run.kernels)
    names = dict.fromkeys(name for _, row in numbered for name in row.ms)
    cells: list[Cells] = []
    for number, row in numbered:
        floor = _floor(row, runs[number - 1].ceilings)
        share = floor / row.ms["ours"] if floor and "ours" in row.ms else None
        cells.append(
            {
                "op and shape": row.op,
                "dtype": row.dtype,
                **{f"{name}, ms": _format(row.ms.get(name), ".3f") for name in names},
                "roofline bound, ms": _format(floor, ".3f"),
                "ours: share of the bound": _format(share, ".0%"),
                "run": str(number),
                "remarks": row.reason or "",
            }
        )
    lines = ["The roofline bound is the larger of arithmetic / rate and traffic / bandwidth."]
    return [Section("Kernels", TextTable.of(cells), lines)] if cells else []


def _floor(row: KernelRow, ceilings: dict[str, float]) -> float | None:
    rate, bandwidth = ceilings.get(f"tflop_per_s {row.dtype}"), ceilings.get("gb_per_s")
    return row.floor_ms({"tflop_per_s": rate, "gb_per_s": bandwidth}) if rate and bandwidth else None


def _runs(runs: Sequence[Results]) -> Section:
    cells = []
    for number, run in enumerate(runs, 1):
        made = run.provenance
        packages = ("torch", "triton", "lightstream", "python")
        machine = f"{_machine(run)}, {(made.get('memory_bytes') or 0) / 2**30:.0f} GiB of memory"
        cells.append(
            {
                "run": str(number),
                "command": run.what,
                "machine": machine + (f", load {made['load']}" if "load" in made else ""),
                "versions": ", ".join(f"{name} {made[name]}" for name in packages if made.get(name)),
                "ceilings": ", ".join(_ceiling(name, value) for name, value in run.ceilings.items()),
                "commit": str(made.get("commit") or "")[:12] + ", with changes" * bool(made.get("uncommitted_changes")),
                "date": str(made.get("date", ""))[:10],
            }
        )
    return Section("Runs: machine and versions of each number", TextTable.of(cells))


def _ceiling(name: str, value: float) -> str:
    """Format "gb_per_s" and "tflop_per_s fp32" with the usual units."""
    rate, _, dtype = name.partition(" ")
    return f"{value:.3g} {rate.replace('gb', 'GB').replace('tflop', 'TFLOP').replace('_per_', '/')} {dtype}".rstrip()


def _format(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
