"""Stores measurements on a GPU in an append-only file, one line of JSON for each op, key and amount of work.

    {"op": "conv2d_forward", "key": [64, "dense", "bfloat16", ...], "work": 262144,
     "ms": {"stock": [0.21, ...], "triton": [0.17, ...]}, "failed": {}}

There is a file for each combination of GPU, versions and kernel sources. All processes of a job share it: the first
measurement decides for all. If a process is killed while it writes, only that line is lost.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .cache import cache_folder, is_private, make_private

Times = dict[str, list[float]]  # candidate -> milliseconds of each round

# A measurement covers work up to this many times larger or smaller.
NEAR = 1.75
# Smaller work takes the time of a launch.
LEAST_WORK = 4096

log = logging.getLogger("gigamorph")


@dataclass(frozen=True)
class Measurement:
    """Times, or failures, of the candidates for one op on one amount of work.

    Attributes:
        key: everything else that the time depends on, as JSON.
        work: pixels of the map that is read.
        ms: milliseconds of each round, by candidate.
        failed: candidates that cannot be used for any work, with the first line of their error.
    """

    op: str
    key: Any
    work: int
    ms: Times
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        times = [statistics.median(map(float, samples)) for samples in self.ms.values()]
        if self.work < 0 or (times and "stock" not in self.ms) or not (times or self.failed):
            raise ValueError('a measurement needs times with "stock", or failures')

    @property
    def label(self) -> str:
        return label(self.op, self.key)

    def distance(self, work: int) -> float:
        return abs(math.log(max(work, LEAST_WORK) / max(self.work, LEAST_WORK)))


def label(op: str, key: Any) -> str:
    return f"{op} {json.dumps(key, default=str, separators=(',', ':'))}"


class MeasurementFile:
    """The measurements in a file, and those of this process if it cannot be written.

    Attributes:
        rows: by label, the measurements with times, in chronological order.
        failed: by label, the candidates that cannot be used, with reasons.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._read_to = path, 0
        self.rows: dict[str, list[Measurement]] = {}
        self.failed: dict[str, dict[str, str]] = {}
        self._read()

    def find(self, op: str, key: Any, candidates: Iterable[str], work: int) -> Times | None:
        """Times of the usable candidates for the nearest work; the earliest of equally near measurements."""
        named = label(op, key)
        usable = [name for name in candidates if name not in self.failed.get(named, ())]
        rows = [row for row in self.rows.get(named, ()) if set(usable) <= set(row.ms)]
        row = min(rows, key=lambda row: row.distance(work), default=None)
        if row is None or row.distance(work) > math.log(NEAR):
            return None
        return {name: row.ms[name] for name in usable}

    def add(self, new: Measurement) -> None:
        """Append a measurement, unless another process has added one, which is then used so that all choices agree."""
        try:
            make_private(self.path.parent)
            with open(self.path, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._read()
                if new.ms and self.find(new.op, new.key, new.ms, new.work) is not None:
                    return
                begin = b"" if self._ends_with_newline() else b"\n"  # after a line that was cut off
                file.write(begin + json.dumps(asdict(new), default=str).encode() + b"\n")
                file.flush()
                self._read()
        except OSError as error:
            _warn_once(
                self.path, f"{self.path}: kernel choices cannot be stored ({error}); they are measured in each process"
            )
            self._take(new)

    def _take(self, row: Measurement) -> None:
        if row.ms:
            self.rows.setdefault(row.label, []).append(row)
        self.failed.setdefault(row.label, {}).update(row.failed)

    def _ends_with_newline(self) -> bool:
        with open(self.path, "rb") as file:
            if not file.seek(0, os.SEEK_END):
                return True
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def _read(self) -> None:
        """Read the lines that were added since the last call."""
        try:
            if not is_private(self.path):
                _warn_once(
                    self.path, f"{self.path}: other accounts can write to it; set GIGAMORPH_CACHE to a private folder"
                )
                return
            with open(self.path, "rb") as file:
                file.seek(self._read_to)
                text = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            _warn_once(self.path, f"{self.path}: kernel choices cannot be read ({error}); measuring again")
            return
        self._read_to += len(text)
        for line in text.splitlines():
            try:
                row = Measurement(**json.loads(line)) if line.strip() else None
            except (ValueError, TypeError, AttributeError) as error:
                _warn_once(self.path, f"{self.path}: cannot read a line ({error}); its op is measured again")
                continue
            if row is not None:
                self._take(row)


def measurement_file(gpu: str) -> Path:
    """The file with the times of a GPU."""
    import triton  # imported here, because CPU runs only ask for the mode and need not load it

    parts = [
        gpu,
        f"torch{torch.__version__}",
        f"triton{triton.__version__}",
        f"cudnn{torch.backends.cudnn.version()}",
        f"gigamorph{_source_version()}",
    ]
    return cache_folder() / "kernels" / (re.sub(r"[^\w.+-]+", "-", "_".join(parts)) + ".jsonl")


@functools.cache
def _source_version() -> str:
    """A digest of the kernels' sources, which changes with every release and every edit of a kernel."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


@functools.cache
def _warn_once(_path: Path, message: str) -> None:
    log.warning("%s", message)
