"""The rows of the compile gate: the needs and faults of each compiled kernel, as a table and as a file.

The whole gate takes hours: with a file, an interrupted run continues where it stopped.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import json
import pkgutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import triton
from recorded_step import Launch
from rich.table import Table
from triton.runtime.jit import JITFunction

from gigamorph import kernels
from gigamorph.cli.table import rows_table


@dataclass
class CompiledKernel:
    """One compiled kernel and its faults."""

    case: str  # the first call that launches it
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
    """Return a hash of what is compiled for a launch, independent of the chip."""
    return hashlib.sha256(f"{launch.kernel} {launch.specialization}".encode()).hexdigest()[:16]


@functools.cache
def _sources() -> dict[str, str]:
    """Return the hash of each kernel's code and callees by name; "", for rows that did not compile, has all."""
    modules = (importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__))
    found = {
        value.__name__.strip("_"): value.cache_key
        for module in modules
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }
    return found | {"": " ".join(sorted(found.values()))}


def _code(names: Iterable[str]) -> str:
    """Return the hash of what determines these kernels' rows: their code, the code that judges it, Triton."""
    code = hashlib.sha256(triton.__version__.encode())
    code.update(Path(__file__).with_name("compile_only.py").read_bytes())
    for name in sorted(set(names)):
        code.update(f"{name} {_sources().get(name)}".encode())
    return code.hexdigest()[:16]


class CompiledCalls(NamedTuple):
    """Some calls that were compiled together: the keys of their new launches, and the rows."""

    chip: int
    keys: frozenset[str]
    rows: list[CompiledKernel]

    @property
    def code(self) -> str:
        return _code(row.kernel for row in self.rows)

    def line(self) -> str:
        entry = {"chip": self.chip, "keys": sorted(self.keys), "rows": [asdict(row) for row in self.rows]}
        return json.dumps({"code": self.code} | entry)


class RowFile:
    """A file of compiled rows, one line for some calls; lines of older code or another Triton are ignored."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.compiled: list[CompiledCalls] = []
        for line in path.read_text().splitlines() if path and path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # interrupted while it was written
                continue
            rows = [CompiledKernel(**row | {"faults": tuple(row["faults"])}) for row in entry["rows"]]
            found = CompiledCalls(entry["chip"], frozenset(entry["keys"]), rows)
            if entry["code"] == found.code:
                self.compiled.append(found)

    def rows(self, chip: int) -> list[CompiledKernel]:
        return [row for one in self.compiled if one.chip == chip for row in one.rows]

    def keys(self, chip: int) -> set[str]:
        """Return the keys of launches that need not be compiled again."""
        return {key for one in self.compiled if one.chip == chip for key in one.keys}

    def add(self, chip: int, keys: Iterable[str], rows: list[CompiledKernel]) -> None:
        self.compiled.append(CompiledCalls(chip, frozenset(keys), rows))
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write("\n" + self.compiled[-1].line())  # the previous line may be incomplete

    def leave_out(self, chip: int, launched: set[str]) -> None:
        """Remove a chip's entries that contain a launch which is not in `launched`, that is, in no current step."""
        self.compiled = [one for one in self.compiled if one.chip != chip or one.keys <= launched]
        if self.path and self.path.exists():
            whole = self.path.with_name(self.path.name + ".new")
            whole.write_text("\n".join(one.line() for one in self.compiled))
            whole.replace(self.path)


def table(rows: list[CompiledKernel]) -> Table:
    verdicts = [f"[red]{'; '.join(row.faults)}[/red]" if row.faults else "ok" for row in rows]
    return rows_table([asdict(row) | {"faults": verdict} for row, verdict in zip(rows, verdicts, strict=True)])


def by_kernel(rows: list[CompiledKernel]) -> Table:
    """Return for each kernel and chip the number of compilations, the worst figures, and the number with faults."""
    built = sorted((row for row in rows if row.kernel), key=lambda row: (row.chip, row.kernel))
    result = []
    for (chip, kernel), group in itertools.groupby(built, key=lambda row: (row.chip, row.kernel)):
        same = list(group)
        result.append(
            {
                "sm": chip,
                "kernel": kernel,
                "compiled": len(same),
                "shared": f"{max(row.shared for row in same):,}",
                "regs": max(row.registers for row in same),
                "blocks": min(row.blocks for row in same),
                "matrix": " ".join(sorted({row.matrix for row in same} - {""})),
                "TMA": sum(row.loads > 0 for row in same),
                "faults": sum(bool(row.faults) for row in same),
            }
        )
    return rows_table(result)


def summary(rows: list[CompiledKernel], seconds: float) -> str:
    """Return the worst figures in one line."""
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
