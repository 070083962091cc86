"""Chooses the fastest of several implementations of an op by measurement on this GPU.

    choose("conv2d", (64, "relu"), {"stock": lambda: ..., "triton": lambda: ...}, work=pixels, like=x)

The candidate "stock" is PyTorch's implementation. Another is chosen only if its measured time is shorter; a difference
within `TIE` is a tie, and ties go to stock. Times are measured once per op, key and amount of work (`measurements.py`:
a measurement covers similar amounts) and stored on disk, so that later processes, and all processes of a job, make the
same choice.

A candidate that raises (a compiler that fails, a chip without a feature) is excluded: one warning names op, key and
cause, stock computes the op, and `gigamorph doctor` reports it.

Nothing is measured during CUDA graph capture, on fake and meta tensors, or on the CPU: the choice is then an earlier
one, or stock. `override` or the environment variable GIGAMORPH_KERNELS forces a choice: "stock", "triton" (the first of
the others; on any device, and its errors are raised), or "auto".
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .measurements import Measurement, MeasurementFile, Times, label, measurement_file
from .torch_private import FakeTensor, keep_busy

MODES = ("auto", "stock", "triton")
TIE = 0.99  # ours must take less than this fraction of stock's time
WARM_UPS = 2  # the first call compiles
ROUNDS = 9
HEAD_START = 1_000_000  # GPU cycles, about half a millisecond
MOST_HEAD_START = 64_000_000

log = logging.getLogger("gigamorph")

Result = TypeVar("Result")
Candidates = Mapping[str, Callable[[], object]]

_lock = threading.RLock()  # backward passes choose on other threads
_forced: list[str] = []
_files: dict[Path, MeasurementFile] = {}
_chosen: dict[tuple, str] = {}  # measured choices, looked up before anything slow


def choose(op: str, key: Any, candidates: Candidates, work: int = 0, like: Tensor | None = None) -> str:
    """The name of the candidate to use.

    Args:
        op: name of the operation.
        key: tuple or dict with everything but the work that the time depends on: channels, dtype, options. Hashable.
        candidates: by name, calls that compute the op once on given tensors; "stock" is required. They are timed
            without autocast and autograd, so their tensors must have the dtype to compute in.
        work: pixels of the map that is read.
        like: one of these tensors; None assumes the current GPU, if there is one.
    """
    if "stock" not in candidates:
        raise ValueError(
            f'{op}: no candidate is called "stock", only {", ".join(candidates)}; add PyTorch\'s own implementation'
        )
    mode, device = current_mode(), _gpu(like)
    if mode == "triton":
        return next((name for name in candidates if name != "stock"), "stock")
    if mode == "stock" or device is None:
        return "stock"
    known = (device, op, tuple(key.items()) if isinstance(key, dict) else key, work, *candidates)
    if known in _chosen:
        return _chosen[known]
    with _lock:
        file = _file(device)
        times = file.find(op, key, candidates, work)
        usable = {name: run for name, run in candidates.items() if name not in file.failed.get(label(op, key), ())}
        if times is None and len(usable) > 1 and _may_measure(like):
            with torch.cuda.device(device):
                measured = _measure(file, op, key, usable, work)
            if not measured:
                _chosen[known] = "stock"  # in this process: no memory for trials
            times = file.find(op, key, candidates, work)
    if times is None:  # never measured
        return "stock"
    _chosen[known] = fastest(times)
    return _chosen[known]


def run_fastest(
    op: str,
    like: Tensor,
    settings: tuple[Any, ...],
    ours: Callable[[], Result],
    stock: Callable[[], Result],
    trial: Candidates | None = None,
) -> Result:
    """Compute an op by our kernel or by PyTorch, whichever is faster; by PyTorch if ours fails.

    Args:
        like: the map that is read; its channels, dtype and memory order are part of the key, its pixels are the work.
        settings: the rest of the key.
        trial: candidates to measure instead, for ops that add to a tensor.
    """
    key, work = (*map_key(like), *settings), like.numel() // max(1, like.shape[1])
    chosen = choose(op, key, trial or {"triton": ours, "stock": stock}, work, like)
    if chosen == "stock":
        return stock()
    try:
        return ours()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if current_mode() == "triton" or capturing:  # the whole capture is invalid
            raise
        _exclude(op, key, like, work, chosen, error)
        return stock()


def map_key(x: Tensor) -> tuple:
    """The part of a key that follows from a map: channels, memory form and dtype.

    A window of a larger buffer costs stock a copy, so it has a separate key.
    """
    window = "dense" if x.is_contiguous(memory_format=torch.channels_last) else "window"
    return x.shape[1], window, str(x.dtype).removeprefix("torch.")


@contextlib.contextmanager
def override(mode: str) -> Iterator[None]:
    """Context manager that sets the mode: "stock", "triton" or "auto". It overrides the environment variable."""
    _forced.append(_known(mode, "override"))
    try:
        yield
    finally:
        _forced.pop()


def current_mode() -> str:
    """The current mode of `choose`: "auto", "stock" or "triton"."""
    return _forced[-1] if _forced else _known(os.environ.get("GIGAMORPH_KERNELS") or "auto", "GIGAMORPH_KERNELS")


def _known(mode: str, where: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{where}: unknown mode {mode!r}; use one of {', '.join(MODES)}")
    return mode


def fastest(times: Times) -> str:
    """The candidate with the smallest median time; stock unless another is faster by more than a tie."""
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    best = min(medians, key=medians.__getitem__)
    return best if medians[best] < TIE * medians["stock"] else "stock"


def measure(candidates: Candidates) -> tuple[Times, dict[str, Exception]]:
    """Milliseconds of every usable candidate on the current GPU, and the errors of the others.

    Rounds interleave the candidates, so that a change of clocks affects all.
    """
    failed: dict[str, Exception] = {}
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        for name, run in candidates.items():
            try:
                for _ in range(WARM_UPS):
                    run()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if name == "stock":
                    raise
                failed[name] = error
        running = {name: run for name, run in candidates.items() if name not in failed}
        rounds = [{name: elapsed(run) for name, run in running.items()} for _ in range(ROUNDS)]
    return {name: [times_of_round[name] for times_of_round in rounds] for name in running}, failed


def elapsed(run: Callable[[], object]) -> float:
    """Milliseconds of GPU time of one call.

    The GPU is busy during the launches, so that launch time does not count. If it becomes idle before the last launch,
    the call is repeated after a longer wait.
    """
    head = HEAD_START
    while True:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        keep_busy(head)
        start.record()
        run()
        end.record()
        launched_in_time = not start.query()
        end.synchronize()
        if launched_in_time or head >= MOST_HEAD_START:
            return start.elapsed_time(end)
        head *= 2


def _measure(file: MeasurementFile, op: str, key: Any, candidates: Candidates, work: int) -> bool:
    """Add a measurement to the file; returns False if memory does not suffice."""
    try:
        times, failed = measure(candidates)
    except torch.OutOfMemoryError:
        return False
    for name, error in failed.items():
        _warn(op, key, name, error)
    file.add(Measurement(op, key, work, times, {name: reason(error) for name, error in failed.items()}))
    return True


def _exclude(op: str, key: Any, like: Tensor, work: int, name: str, error: Exception) -> None:
    """Exclude a candidate that failed outside of a measurement, in this process and in later ones."""
    device = _gpu(like)
    _warn(op, key, name, error)
    with _lock:
        for known in [known for known in _chosen if known[1:3] == (op, key)]:
            del _chosen[known]
        if device is not None:
            _file(device).add(Measurement(op, key, work, {}, {name: reason(error)}))


def reason(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:300]


def _warn(op: str, key: Any, name: str, error: Exception) -> None:
    log.warning("kernel %s (%s) of %s failed; PyTorch's own op is used: %s", op, name, key, reason(error))


def _gpu(like: Tensor | None) -> int | None:
    """The index of the GPU to choose for; None if there is none."""
    if not torch.cuda.is_available() or (like is not None and like.device.type == "cpu"):
        return None
    index = like.device.index if like is not None and like.device.type == "cuda" else None
    return torch.cuda.current_device() if index is None else index


def _file(device: int | None) -> MeasurementFile:
    path = measurement_file(torch.cuda.get_device_name(device))
    if path not in _files:
        _files[path] = MeasurementFile(path)
    return _files[path]


def _may_measure(like: Tensor | None) -> bool:
    return (
        (like is None or like.device.type == "cuda")
        and not any(isinstance(one, FakeTensor) for one in (like, torch.empty(0)))  # the latter in a FakeTensorMode
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


@dataclass(frozen=True)
class CachedChoice:
    """One cached choice, for display.

    Attributes:
        op, key, work: as given to `choose`; the key as JSON.
        chosen: the candidate that is used.
        ms: median milliseconds of each candidate.
        ratio: time of our fastest candidate divided by stock's; below 1 ours is faster.
    """

    op: str
    key: str
    work: int
    chosen: str
    ms: dict[str, float]
    ratio: float


def table() -> list[CachedChoice]:
    """All choices measured on the current GPU with these versions, by op, key and work; empty without a GPU."""
    choices = []
    for row in sorted(_rows(), key=lambda row: (row.label, row.work)):
        ms = {name: statistics.median(samples) for name, samples in row.ms.items()}
        if len(ms) > 1:
            ratio = min(t for name, t in ms.items() if name != "stock") / ms["stock"]
            choices.append(CachedChoice(row.op, row.label.partition(" ")[2], row.work, fastest(row.ms), ms, ratio))
    return choices


def _rows() -> list[Measurement]:
    if not torch.cuda.is_available():
        return []
    with _lock:
        return [row for group in _file(None).rows.values() for row in group]


def failures() -> dict[str, dict[str, str]]:
    """By op and key, the candidates that failed on the current GPU, with reasons; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    with _lock:
        return {name: dict(reasons) for name, reasons in _file(None).failed.items() if reasons}
