"""The rows of the compile gate: what one compiled kernel needs and what is wrong with it, as a table and as a file.

The whole gate takes hours: with a file, a run that was cut off goes on where it was.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from recorded_step import Launch
from rich.table import Table


@dataclass
class Row:
    """One compiled kernel and what is wrong with it."""

    case: str  # the first call that needs it
    chip: int
    kernel: str
    launches: int = 1
    shared: int = 0
    registers: int = 0
    warps: int = 0
    blocks: int = 0
    matrix: str = ""
    loads: int = 0
    seconds: float = 0.0
    faults: tuple[str, ...] = ()


def key(launch: Launch) -> str:
    """What is compiled for a launch, but for the chip."""
    return hashlib.sha256(f"{launch.kernel} {launch.specialization}".encode()).hexdigest()[:16]


@functools.cache
def _code() -> str:
    """What rows stand for: the kernels, what judges them, Triton."""
    here = Path(__file__).parent
    files = [here / "compile_only.py", here / "compile_verdict.py", *sorted((here.parent / "kernels").rglob("*.py"))]
    code = hashlib.sha256(triton.__version__.encode())
    for file in files:
        code.update(file.read_bytes())
    return code.hexdigest()[:16]


class RowFile:
    """Rows and what they are of, a line for each few calls that were compiled; none of older code or another Triton.

    Attributes:
        rows: by chip.
        keys: by chip, of the launches that need not be compiled again.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[int, list[Row]] = {}
        self.keys: dict[int, set[str]] = {}
        for line in path.read_text().splitlines() if path and path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # cut off as it was written
                continue
            if entry["code"] == _code():
                rows = [Row(**row | {"faults": tuple(row["faults"])}) for row in entry["rows"]]
                self._take(entry["chip"], entry["keys"], rows)

    def add(self, chip: int, keys: Iterable[str], rows: list[Row]) -> None:
        keys = sorted(keys)
        self._take(chip, keys, rows)
        if self.path:
            entry = {"code": _code(), "chip": chip, "keys": keys, "rows": [asdict(row) for row in rows]}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write("\n" + json.dumps(entry))  # the line before may have been cut off

    def _take(self, chip: int, keys: Iterable[str], rows: list[Row]) -> None:
        self.rows.setdefault(chip, []).extend(rows)
        self.keys.setdefault(chip, set()).update(keys)


def table(rows: list[Row]) -> Table:
    result = Table(box=None, pad_edge=False)
    for heading in ("first call", "sm", "kernel", "times"):
        result.add_column(heading, justify="right" if heading in ("sm", "times") else "left", overflow="fold")
    for heading in ("shared", "regs", "warps", "blocks", "TMA"):
        result.add_column(heading, justify="right")
    for heading in ("matrix", "verdict"):
        result.add_column(heading, overflow="fold")
    for row in rows:
        verdict = f"[red]{'; '.join(row.faults)}[/red]" if row.faults else "ok"
        result.add_row(
            row.case,
            str(row.chip),
            row.kernel,
            str(row.launches),
            f"{row.shared:,}",
            str(row.registers),
            str(row.warps),
            str(row.blocks),
            str(row.loads),
            row.matrix,
            verdict,
        )
    return result


def by_kernel(rows: list[Row]) -> Table:
    """Of each kernel on each chip how often it was compiled, the most that any needs, and how many have faults."""
    result = Table(box=None, pad_edge=False)
    for heading in ("sm", "kernel", "compiled", "shared", "regs", "blocks", "matrix", "TMA", "faults"):
        result.add_column(heading, justify="left" if heading in ("kernel", "matrix") else "right")
    built = sorted((row for row in rows if row.kernel), key=lambda row: (row.chip, row.kernel))
    for (chip, kernel), group in itertools.groupby(built, key=lambda row: (row.chip, row.kernel)):
        same = list(group)
        result.add_row(
            str(chip),
            kernel,
            str(len(same)),
            f"{max(row.shared for row in same):,}",
            str(max(row.registers for row in same)),
            str(min(row.blocks for row in same)),
            " ".join(sorted({row.matrix for row in same} - {""})),
            str(sum(row.loads > 0 for row in same)),
            str(sum(bool(row.faults) for row in same)),
        )
    return result


def summary(rows: list[Row], seconds: float) -> str:
    """The worst figures, in one line."""
    bad = sum(bool(row.faults) for row in rows)
    built = [row for row in rows if row.kernel]
    shared = ", ".join(
        f"{max((row.shared for row in built if row.chip == chip), default=0):,} B (sm_{chip})"
        for chip in sorted({row.chip for row in built})
    )
    launches = sum(row.launches for row in built)
    return (
        f"{'FAIL' if bad or not built else 'ok'}: {len(built)} kernels for {launches} launches, {bad} with faults; "
        f"worst: shared {shared}, {max((r.registers for r in built), default=0)} registers, "
        f"{min((r.blocks for r in built), default=0)} blocks per multiprocessor; "
        f"triton {triton.__version__}, {seconds:.0f} s"
    )
