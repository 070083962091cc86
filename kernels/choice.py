"""Choice by measurement: for one op on one amount of work, the fastest of several ways to compute it on this GPU.

    choose("conv2d", (64, "relu"), {"stock": lambda: ..., "triton": lambda: ...}, work=pixels, like=x)

The candidate called "stock" is PyTorch's own way. Another is chosen only if it was measured to be faster; a difference
within `TIE` is a tie, and ties go to stock. Times are taken once per op, key and amount of work (`measurements.py`: a
measurement serves all work that is nearly equal), and kept on disk, so that later processes, and all processes of one
job, choose alike.

A candidate that raises (a compiler that fails, a chip that lacks something) is out of the running: one warning names
op, key and cause, stock does the work, and `gigamorph doctor` tells it.

Nothing is measured while a CUDA graph is captured, on fake and meta tensors, and on the CPU: there the answer is what
was measured before, or stock. `override` or the environment variable GIGAMORPH_KERNELS forces a choice: "stock",
"triton" (the fastest of the others, or the first where none was measured; on any device, and its errors are raised), or
"auto".
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
from torch._guards import detect_fake_mode

from .measurements import Measurement, MeasurementFile, Times, label, measurement_file

MODES = ("auto", "stock", "triton")
TIE = 0.99  # ours must take less than this part of stock's time
WARM_UPS = 2  # the first call compiles
ROUNDS = 9
HEAD_START = 1_000_000  # GPU cycles, about half a millisecond
MOST_HEAD_START = 64_000_000

log = logging.getLogger("gigamorph")

Result = TypeVar("Result")
Candidates = Mapping[str, Callable[[], object]]

_lock = threading.RLock()  # backward passes choose on threads of their own
_forced: list[str] = []
_files: dict[Path, MeasurementFile] = {}
_chosen: dict[tuple, str] = {}  # what a measured choice came to; looked at before anything slow


def choose(op: str, key: Any, candidates: Candidates, work: int = 0, like: Tensor | None = None) -> str:
    """The name of the candidate to use.

    Args:
        op: name of the operation.
        key: tuple or dict of all that the time depends on besides the work: channels, dtype, options. Hashable values.
        candidates: name to a call that computes the op once on the tensors at hand; "stock" is one of them. They are
            timed without autocast and without autograd: give them tensors of the dtype they compute in.
        work: pixels of the map that is read.
        like: one of those tensors; without it they are taken to be on the current GPU, if there is one.
    """
    if "stock" not in candidates:
        raise ValueError(f'{op}: no candidate is called "stock", only {", ".join(candidates)}; add PyTorch\'s own way')
    ours = [name for name in candidates if name != "stock"]
    mode = current_mode()
    device = _gpu(like)
    if not ours or mode == "stock" or (mode == "auto" and device is None):
        return "stock"
    known = (device, op, tuple(key.items()) if isinstance(key, dict) else key, work, *candidates)
    if mode == "auto" and known in _chosen:
        return _chosen[known]
    times = None
    if device is not None:
        with _lock:
            file = _file(device)
            times = file.find(op, key, candidates, work)
            usable = {name: run for name, run in candidates.items() if name not in file.failed.get(label(op, key), ())}
            if times is None and mode == "auto" and len(usable) > 1 and _may_measure(like):
                with torch.cuda.device(device):
                    measured = _measure(file, op, key, usable, work)
                if not measured:
                    _chosen[known] = "stock"  # for this process: there is no memory for trials
                times = file.find(op, key, candidates, work)
    if mode == "triton":
        timed = {name: statistics.median(times[name]) for name in ours if times and name in times}
        return min(timed, key=timed.__getitem__) if timed else ours[0]
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
    """Compute an op by our kernel or by PyTorch, whichever was measured to be faster; by PyTorch if ours fails.

    Args:
        like: the map that is read; its channels, dtype and memory order are part of the key, its pixels are the work.
        settings: what else the time depends on.
        trial: what is measured in their place, of ops that add to a tensor.
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
        if current_mode() == "triton" or capturing:  # what is captured is spoilt as a whole
            raise
        _out_of_the_running(op, key, like, work, chosen, error)
        return stock()


def map_key(x: Tensor) -> tuple:
    """What the time of an op on a map depends on besides its pixels.

    A window of a larger buffer costs stock a copy: another case.
    """
    window = "dense" if x.is_contiguous(memory_format=torch.channels_last) else "window"
    return x.shape[1], window, str(x.dtype).removeprefix("torch.")


@contextlib.contextmanager
def override(mode: str) -> Iterator[None]:
    """Force "stock" or "triton", or choose by "auto", inside; stands above the environment variable."""
    _forced.append(_known(mode, "override"))
    try:
        yield
    finally:
        _forced.pop()


def current_mode() -> str:
    """What `choose` goes by now: "auto", "stock" or "triton"."""
    return _forced[-1] if _forced else _known(os.environ.get("GIGAMORPH_KERNELS") or "auto", "GIGAMORPH_KERNELS")


def _known(mode: str, where: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{where}: {mode!r} is not known; give one of {', '.join(MODES)}")
    return mode


def fastest(times: Times) -> str:
    """The candidate of the smallest median; stock unless another is faster by more than a tie."""
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    best = min(medians, key=medians.__getitem__)
    return best if medians[best] < TIE * medians["stock"] else "stock"


def measure(candidates: Candidates) -> tuple[Times, dict[str, Exception]]:
    """Milliseconds of every candidate on the current GPU, and what those that cannot be used have raised.

    They take turns, so that a change of clocks meets all.
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
    return {name: [turn[name] for turn in rounds] for name in running}, failed


def elapsed(run: Callable[[], object]) -> float:
    """Milliseconds of GPU time of one call.

    The GPU is kept busy first, so that launching is not counted: if it was done with that before all was launched, the
    call is made again after a longer wait.
    """
    head = HEAD_START
    while True:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(head)
        start.record()
        run()
        end.record()
        launched_in_time = not start.query()
        end.synchronize()
        if launched_in_time or head >= MOST_HEAD_START:
            return start.elapsed_time(end)
        head *= 2


def _measure(file: MeasurementFile, op: str, key: Any, candidates: Candidates, work: int) -> bool:
    """Add a measurement to the file; False where there is no memory for one."""
    try:
        times, failed = measure(candidates)
    except torch.OutOfMemoryError:
        return False
    for name, error in failed.items():
        _warn(op, key, name, error)
    file.add(Measurement(op, key, work, times, {name: reason(error) for name, error in failed.items()}))
    return True


def _out_of_the_running(op: str, key: Any, like: Tensor, work: int, name: str, error: Exception) -> None:
    """A candidate failed when its result was wanted: from now on stock, in this process and in later ones."""
    device = _gpu(like)
    _warn(op, key, name, error)
    with _lock:
        for known in [known for known in _chosen if known[1:3] == (op, key)]:
            del _chosen[known]
        if device is not None:
            _file(device).add(Measurement(op, key, work, {}, {name: reason(error)}))


def reason(error: Exception) -> str:
    """What an error is and the first line that it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:300]


def _warn(op: str, key: Any, name: str, error: Exception) -> None:
    log.warning("kernel %s (%s) of %s fails; PyTorch's own is used: %s", op, name, key, reason(error))


def _gpu(like: Tensor | None) -> int | None:
    """The index of the GPU that is chosen for."""
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
        and detect_fake_mode([like]) is None
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


@dataclass(frozen=True)
class Choice:
    """One cached choice, for display.

    Attributes:
        op, key, work: as given to `choose`; the key as JSON.
        chosen: the candidate that is used.
        ms: median milliseconds of each candidate.
        ratio: time of the fastest of ours over stock's; below 1 ours is faster.
    """

    op: str
    key: str
    work: int
    chosen: str
    ms: dict[str, float]
    ratio: float


def table() -> list[Choice]:
    """Every choice measured so far on the current GPU with these versions, by op, key and work; empty without a GPU."""
    choices = []
    for row in sorted(_rows(), key=lambda row: (row.label, row.work)):
        ms = {name: statistics.median(samples) for name, samples in row.ms.items()}
        if len(ms) > 1:
            ratio = min(t for name, t in ms.items() if name != "stock") / ms["stock"]
            choices.append(Choice(row.op, row.label.partition(" ")[2], row.work, fastest(row.ms), ms, ratio))
    return choices


def _rows() -> list[Measurement]:
    if not torch.cuda.is_available():
        return []
    with _lock:
        return [row for group in _file(None).rows.values() for row in group]


def failures() -> dict[str, dict[str, str]]:
    """By op and key, the candidates that have failed on the current GPU, and why; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    with _lock:
        return {name: dict(reasons) for name, reasons in _file(None).failed.items() if reasons}
