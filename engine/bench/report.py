"""A page, pictures and tables of any set of results.

`report.html` holds everything in one file; `report.md` is the same for where Markdown is read, beside the PNGs.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..errors import GigamorphError
from . import plots
from .read import read
from .results import (
    EQUAL_MEMORY,
    FAILED,
    NOT_RUN,
    OK,
    OUT_OF_MEMORY,
    WRONG,
    DeclaredRow,
    KernelRow,
    LimitRow,
    MorphRow,
    Results,
    StepRow,
    Task,
)

Cells = list[str]
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2833; }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.88rem; display: block; overflow-x: auto; }
td, th { padding: 0.2rem 0.7rem; border-bottom: 1px solid #d5d8dc; text-align: right; white-space: nowrap; }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left; white-space: normal; }
"""


@dataclass
class Section:
    """A heading, a few sentences, pictures by file name, and a table."""

    title: str
    text: str = ""
    pictures: dict[str, Figure] = field(default_factory=dict)
    head: Cells = field(default_factory=list)
    rows: list[Cells] = field(default_factory=list)


def write_report(paths: Sequence[Path], folder: Path) -> Path:
    """Write `report.html`, `report.md` and the PNGs into a folder; returns the page.

    Raises:
        DataError: if a file holds no results.
        GigamorphError: if there are none at all.
    """
    runs = [read(path) for path in paths]
    sections = [
        *_steps(runs),
        *_limits(runs),
        *_kernels(runs),
        *_morphs(runs),
        *_declared(runs),
    ]
    if not sections:
        raise GigamorphError("these results hold no rows; measure something with gigamorph bench first")
    sections.append(_runs(runs))
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: plots.png(figure) for one in sections for name, figure in one.pictures.items()}
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)
    (folder / "report.md").write_text(_markdown(sections))
    (folder / "report.html").write_text(_html(sections, pictures))
    return folder / "report.html"


# -- what is shown ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Rows that differ in size and peer only, of one machine; `number` tells machines apart in file names."""

    task: Task
    machine: str
    number: int

    @property
    def title(self) -> str:
        precision = {"fp32": "float32", "bf16": "bfloat16 autocast", "fp64": "float64"}[self.task.precision]
        what = "One training step" if self.task.training else "Inference"
        n, channels = self.task.image[:2]
        images = (
            "" if (n, channels) == (1, 3) else f", {n} image{'s' * (n > 1)} of {channels} channel{'s' * (channels > 1)}"
        )
        return f"{what} of {self.task.model}{images}: {precision}, {self.task.batch_norm} BatchNorm, {self.machine}"

    @property
    def name(self) -> str:
        n, channels = self.task.image[:2]
        parts = [self.task.model, self.task.mode, self.task.batch_norm, self.task.precision, self.task.device]
        parts += [f"{n}x{channels}"] if (n, channels) != (1, 3) else []
        parts += [str(self.number)] if self.number else []
        return re.sub(r"[^a-z0-9]+", "_", " ".join(parts).lower())


def _machine(run: Results) -> str:
    made = run.provenance
    return made.get("gpu") or f"{made.get('cpu', 'CPU')}, {made.get('threads', '?')} threads"


def _grouped(runs: Sequence[Results], rows: Callable[[Results], Sequence[Any]]) -> dict[_Group, list[tuple[int, Any]]]:
    """Rows with the number of their run."""
    groups: dict[_Group, list[tuple[int, Any]]] = {}
    machines = list(dict.fromkeys(map(_machine, runs)))
    for number, run in enumerate(runs, 1):
        machine = _machine(run)
        for row in rows(run):
            task = dataclasses.replace(row.task, image=(*row.task.image[:2], 0, 0))
            groups.setdefault(_Group(task, machine, machines.index(machine)), []).append((number, row))
    return groups


def _steps(runs: Sequence[Results]) -> list[Section]:
    sections = []
    exact = [
        (number, row)
        for number, run in enumerate(runs, 1)
        for row in run.steps
        if row.task.precision == "fp64" and row.check is not None
    ]
    for group, numbered in _grouped(runs, lambda run: [r for r in run.steps if r.task.precision != "fp64"]).items():
        rows: list[StepRow] = [row for _, row in numbered]
        # Times of one run alone are compared: of the one with the most rows, of several such the last.
        sizes = Counter(number for number, _ in numbered)
        fullest = max(sizes, key=lambda number: (sizes[number], number))
        one = [row for number, row in numbered if number == fullest]
        section = Section(group.title, _headline(one, [row for _, row in exact if row.task.model == group.task.model]))
        several = len({(row.task.image, row.peer) for row in rows}) > 1
        if several and any(row.peak_bytes for row in rows):
            section.pictures[f"memory_{group.name}.png"] = plots.memory_figure(rows, group.title)
        if several and any(row.seconds for row in rows):
            section.pictures[f"speed_{group.name}.png"] = plots.throughput_figure(rows, group.title)
        if several and any(row.roofline_share and row.status in (OK, WRONG) for row in rows):
            section.pictures[f"roofline_{group.name}.png"] = plots.roofline_figure(rows, group.title)
        section.head = [
            "image",
            "peer",
            "status",
            "time, s (spread)",
            "CPU time, s",
            "Mpx/s",
            "peak, GB",
            "whole process, GB",
            "bytes per pixel",
            "predicted / peak",
            "of the roofline",
            "first step, s",
            "differs from",
            "run",
            "remarks",
        ]
        references = {(row.task, row.check.against) for row in rows if row.check is not None}
        section.rows = [_step_cells(number, row, (row.task, row.peer) in references) for number, row in numbered]
        sections.append(section)
    if exact:
        rows_ = [
            [
                row.task.model,
                row.task.mode,
                f"{row.task.image[2]} × {row.task.image[3]}",
                row.task.batch_norm,
                plots.label(row.peer),
                _tile(row.settings),
                f"{row.check.outputs:.0e}",
                _number(row.check.gradients, ".0e"),
                str(number),
                row.reason or row.status,
            ]
            for number, row in exact
            if row.check
        ]
        head = ["network", "step", "image", "BatchNorm", "peer", "tile", "outputs", "gradients", "run", "status"]
        sections.append(Section("Exactness: float64, relative difference from stock PyTorch", head=head, rows=rows_))
    return sections


def _headline(rows: Sequence[StepRow], exact: Sequence[StepRow]) -> str:
    """What the rows say of gigamorph, in sentences: at the largest size that others reached, too."""
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
            side = f"{ours.task.image[2]} × {ours.task.image[3]}"
            by_cpu = ""
            if other.median_cpu_seconds and ours.median_cpu_seconds:
                by_cpu = f" ({other.median_cpu_seconds / ours.median_cpu_seconds:.2g} by CPU time)"
            lines.append(
                f"At {side} gigamorph is {speed:.2g} times as fast as {plots.label(peer)}{by_cpu} "
                f"and takes {memory:.2g} times its memory."
            )
    short = [row.task for row in rows if row.peer == EQUAL_MEMORY and row.status == OUT_OF_MEMORY]
    if short:
        sides = ", ".join(f"{task.image[2]} × {task.image[3]}" for task in short)
        lines.append(f"In the memory that gigamorph took lightstream cannot run at {sides}.")
    errors = [r.check.gradients for r in exact if r.peer == "gigamorph" and r.check and r.check.gradients is not None]
    if errors:
        lines.append(f"In float64 its gradients differ from stock's by {max(errors):.0e} at most.")
    return " ".join(lines)


def _step_cells(number: int, row: StepRow, reference: bool) -> Cells:
    n, _, height, width = row.task.image
    time = _number(row.median_seconds, ".2f") + (f" ({row.spread:.0%})" if len(row.seconds) > 1 else "")
    ratio = row.predicted_bytes / row.peak_bytes if row.predicted_bytes and row.peak_bytes else None
    against = ""
    if row.check is not None:
        error = row.check.outputs if row.check.gradients is None else row.check.gradients
        against = f"{plots.label(row.check.against)} by {error:.0e}"
    remarks = [_tile(row.settings), row.reason or ""]
    if row.check is not None and row.check.missing:
        remarks.append(f"{row.check.missing} parameters are not trained")
    if row.status == OK and row.check is None:
        remarks.append("the others are compared with it" if reference else "its result was not compared")
    return [
        f"{f'{n} × ' if n > 1 else ''}{height} × {width}",
        plots.label(row.peer),
        row.status,
        time,
        _number(row.median_cpu_seconds, ".2f"),
        _number(row.mpx_per_s, ".3g"),
        _number(row.peak_bytes and row.peak_bytes / 1e9, ".2f"),
        _number(row.process_bytes and row.process_bytes / 1e9, ".2f"),
        _number(row.bytes_per_pixel, ".0f"),
        _number(ratio, ".2f"),
        _number(row.roofline_share, ".0%"),
        _number(row.first_seconds, ".1f"),
        against,
        str(number),
        "; ".join(part for part in remarks if part),
    ]


def _tile(settings: dict[str, Any]) -> str:
    tile = settings.get("tile")
    if not tile:
        return ""
    return f"tile {tile[0]} × {tile[1]}" if isinstance(tile, (list, tuple)) else f"tile {tile}"


def _limits(runs: Sequence[Results]) -> list[Section]:
    sections = []
    groups: dict[tuple[_Group, int], list[tuple[int, LimitRow]]] = {}
    for group, numbered in _grouped(runs, lambda run: run.limits).items():
        for number, row in numbered:
            groups.setdefault((group, row.cap_bytes), []).append((number, row))
    for (group, cap), numbered in groups.items():
        title = f"Largest image in {cap / 2**30:.3g} GiB. {group.title}"
        section = Section(title)
        section.head = [
            "peer",
            "status",
            "largest, pixels",
            "Mpx",
            "fails at",
            "by plan()",
            "found / planned pixels",
            "time there, s",
            "run",
            "remarks",
        ]
        for number, row in numbered:
            there = next((one for one in row.tries if one.side == row.side), None)
            section.rows.append(
                [
                    plots.label(row.peer),
                    row.status,
                    f"{row.side} × {row.side}" if row.side else "",
                    _number(row.side and row.side**2 / 1e6, ".3g"),
                    str(row.too_large or ""),
                    str(row.predicted_side or ""),
                    _number(row.agreement, ".2f"),
                    _number(there and there.seconds, ".1f"),
                    str(number),
                    row.reason or "",
                ]
            )
        if any(row.side for _, row in numbered):
            name = f"limits_{group.name}_{cap / 2**20:.0f}mib.png"
            section.pictures[name] = plots.limits_figure([row for _, row in numbered], title)
        sections.append(section)
    return sections


def _kernels(runs: Sequence[Results]) -> list[Section]:
    rows: list[Cells] = []
    names: list[str] = []
    for run in runs:
        names += [name for row in run.kernels for name in row.ms if name not in names]
    for number, run in enumerate(runs, 1):
        for row in run.kernels:
            floor = _floor(row, run.ceilings)
            share = floor / row.ms["ours"] if floor and "ours" in row.ms else None
            rows.append(
                [
                    row.op,
                    row.dtype,
                    *(_number(row.ms.get(name), ".3f") for name in names),
                    _number(floor, ".3f"),
                    _number(share, ".0%"),
                    str(number),
                    row.reason or "",
                ]
            )
    if not rows:
        return []
    head = ["op and shape", "dtype", *(f"{name}, ms" for name in names), "floor, ms", "ours: of the floor", "run", ""]
    text = "The floor is arithmetic over rate or traffic over bandwidth, whichever is more."
    return [Section("Kernels", text, head=head, rows=rows)]


def _floor(row: KernelRow, ceilings: dict[str, float]) -> float | None:
    rate, bandwidth = ceilings.get(f"tflop_per_s {row.dtype}"), ceilings.get("gb_per_s")
    return row.floor_ms({"tflop_per_s": rate, "gb_per_s": bandwidth}) if rate and bandwidth else None


def _morphs(runs: Sequence[Results]) -> list[Section]:
    numbered = [(number, row) for number, run in enumerate(runs, 1) for row in run.morphs]
    if not numbered:
        return []
    head = ["seed", "network", "morph, s", "accuracy aimed at", "reached after, s", "epochs", "run", "remarks"]
    return [
        Section(
            "Growing a trained network against training from scratch",
            head=head,
            rows=[_morph_cells(number, row) for number, row in numbered],
        )
    ]


def _morph_cells(number: int, row: MorphRow) -> Cells:
    return [
        str(row.seed),
        row.how,
        _number(row.morph_seconds, ".2f"),
        f"{row.accuracy:.1%}",
        _number(row.seconds, ".1f") or "never",
        "" if row.epochs is None else str(row.epochs),
        str(number),
        row.reason or "",
    ]


def _declared(runs: Sequence[Results]) -> list[Section]:
    rows: list[tuple[int, DeclaredRow]] = [(n, row) for n, run in enumerate(runs, 1) for row in run.declared]
    if not rows:
        return []
    cells = [[str(r.number), r.text, r.aim, r.status, str(n), r.found or r.reason or ""] for n, r in rows]
    head = ["", "row", "aim", "status", "run", "found"]
    return [Section("The declared list", "Each row is run where the machine allows.", head=head, rows=cells)]


def _runs(runs: Sequence[Results]) -> Section:
    rows = []
    for number, run in enumerate(runs, 1):
        made = run.provenance
        commit = str(made.get("commit") or "")[:12] + (", with changes" if made.get("uncommitted_changes") else "")
        versions = ", ".join(
            f"{name} {made[name]}" for name in ("torch", "triton", "lightstream", "python") if made.get(name)
        )
        machine = f"{_machine(run)}, {(made.get('memory_bytes') or 0) / 2**30:.0f} GiB of memory"
        machine += f", load {made['load']}" if "load" in made else ""
        ceilings = ", ".join(f"{name} {value:.3g}" for name, value in run.ceilings.items())
        rows.append([str(number), run.what, machine, versions, ceilings, commit, str(made.get("date", ""))[:10]])
    head = ["run", "command", "machine", "versions", "ceilings", "commit", "date"]
    return Section("Runs: machine and versions of each number", head=head, rows=rows)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# -- the two forms ------------------------------------------------------------------------------------------------

_INTRO = (
    "A step's peak is that of parameters, gradients and all that the step added; the image is not counted. Peers take "
    "turns, each in a process of its own; times are medians, the spread is largest minus smallest. Every result is "
    f'compared with another peer\'s; "{NOT_RUN}" and "{FAILED}" say why.'
)


def _markdown(sections: Sequence[Section]) -> str:
    lines = ["# Benchmarks", "", "Written by `gigamorph bench report`; do not edit.", "", _INTRO]
    for one in sections:
        lines += ["", f"## {one.title}", ""]
        if one.text:
            lines += [one.text, ""]
        lines += [f"![{one.title}]({name})" for name in one.pictures]
        if one.rows:
            lines += ["", "| " + " | ".join(one.head) + " |", "|" + "---|" * len(one.head)]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in one.rows]
    return "\n".join(lines) + "\n"


def _html(sections: Sequence[Section], pictures: dict[str, bytes]) -> str:
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>gigamorph: benchmarks</title>",
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head><body>",
        f"<h1>Benchmarks</h1><p>{html.escape(_INTRO)}</p>",
    ]
    for one in sections:
        parts.append(f"<h2>{html.escape(one.title)}</h2>")
        if one.text:
            parts.append(f"<p>{html.escape(one.text)}</p>")
        for name in one.pictures:
            data = base64.b64encode(pictures[name]).decode()
            parts.append(f"<p><img alt='{html.escape(one.title)}' src='data:image/png;base64,{data}'></p>")
        if one.rows:
            parts.append("<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in one.head) + "</tr>")
            parts += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in one.rows]
            parts.append("</table>")
    return "\n".join([*parts, "</body></html>"]) + "\n"
