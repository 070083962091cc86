"""Choice by measurement: for one op on one shape, the fastest of several ways to compute it on this GPU.

    choose("conv2d", (x.shape, x.stride(), x.dtype, "relu"), {"stock": lambda: ..., "triton": lambda: ...}, like=x)

The candidate called "stock" is PyTorch's own way. Another is chosen only if it was measured to be faster; a difference
within `TIE` is a tie, and ties go to stock. Times are taken once per op, shape and dtype, and kept on disk under the
names of the GPU and the versions, so that later processes, and all processes of one job, choose alike.

Nothing is measured while a CUDA graph is captured, on fake and meta tensors, and on the CPU: there the answer is what
was measured before, or stock. `override` or the environment variable GIGAMORPH_KERNELS forces a choice: "stock",
"triton" (the fastest of the others, or the first where none was measured; on any device), or "measured".
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

MODES = ("measured", "stock", "triton")
TIE = 0.99  # ours must take less than this part of stock's time
WARM_UPS = 2  # the first call compiles
ROUNDS = 9
HEAD_START = 1_000_000  # GPU cycles, about half a millisecond

log = logging.getLogger("gigamorph")

Result = TypeVar("Result")
Times = dict[str, list[float]]  # candidate -> milliseconds of each round

_lock = threading.RLock()  # backward passes choose on threads of their own
_forced: list[str] = []
_files: dict[Path, dict[str, Times]] = {}
_chosen: dict[tuple, str] = {}  # what a measured choice came to; looked at before anything slow


def choose(op: str, key: Any, candidates: dict[str, Callable[[], object]], like: Tensor | None = None) -> str:
    """The name of the candidate to use.

    Args:
        op: name of the operation.
        key: tuple or dict of all that the time depends on: shapes, strides, dtype, options. Hashable values.
        candidates: name to a call that computes the op once on the tensors at hand; "stock" is one of them. They are
            timed without autocast and without autograd: give them tensors of the dtype they compute in.
        like: one of those tensors; without it they are taken to be on the current GPU, if there is one.
    """
    if "stock" not in candidates:
        raise ValueError(f'{op}: no candidate is called "stock", only {", ".join(candidates)}; add PyTorch\'s own way')
    ours = [name for name in candidates if name != "stock"]
    mode = current_mode()
    on_gpu = torch.cuda.is_available() and (like is None or like.device.type != "cpu")
    if not ours or mode == "stock" or (mode == "measured" and not on_gpu):
        return "stock"
    device = torch.cuda.current_device() if on_gpu else None
    if like is not None and like.device.type == "cuda":
        device = like.device.index
    known = (device, op, tuple(key.items()) if isinstance(key, dict) else key, *candidates)
    if mode == "measured" and known in _chosen:
        return _chosen[known]
    times: Times = {}
    if device is not None:
        path, label = cache_file(torch.cuda.get_device_name(device)), _label(op, key)
        with _lock:
            times = _entries(path).get(label, {})
            if mode == "measured" and not candidates.keys() <= times.keys() and _may_measure(like):
                with torch.cuda.device(device):
                    times = _keep(path, label, measure(candidates))
    if not candidates.keys() <= times.keys():  # never measured
        return ours[0] if mode == "triton" else "stock"
    if mode == "triton":
        return min(ours, key=lambda name: statistics.median(times[name]))
    _chosen[known] = fastest({name: times[name] for name in candidates})
    return _chosen[known]


def run_fastest(
    op: str, like: Tensor, settings: Any, ours: Callable[[], Result], stock: Callable[[], Result]
) -> Result:
    """Compute an op by our kernel or by PyTorch, whichever was measured to be faster.

    Args:
        like: the map that is read; its shape, dtype and memory order are part of the key.
        settings: tuple of what else the time depends on.
    """
    candidates = {"triton": ours, "stock": stock}
    return candidates[choose(op, (*map_key(like), *settings), candidates, like)]()


def map_key(x: Tensor) -> tuple:
    """What the time of an op on a map depends on. A window of a larger buffer costs stock a copy: another case."""
    window = "dense" if x.is_contiguous(memory_format=torch.channels_last) else "window"
    return tuple(x.shape), window, str(x.dtype).removeprefix("torch.")


@contextlib.contextmanager
def override(mode: str) -> Iterator[None]:
    """Force "stock" or "triton", or choose as "measured", inside; stands above the environment variable."""
    _forced.append(_known(mode, "override"))
    try:
        yield
    finally:
        _forced.pop()


def current_mode() -> str:
    """What `choose` goes by now: "measured", "stock" or "triton"."""
    return _forced[-1] if _forced else _known(os.environ.get("GIGAMORPH_KERNELS") or "measured", "GIGAMORPH_KERNELS")


def _known(mode: str, where: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{where}: {mode!r} is not known; give one of {', '.join(MODES)}")
    return mode


def fastest(times: Times) -> str:
    """The candidate of the smallest median; stock unless another is faster by more than a tie."""
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    best = min(medians, key=medians.__getitem__)
    return best if medians[best] < TIE * medians["stock"] else "stock"


def measure(candidates: dict[str, Callable[[], object]]) -> Times:
    """Milliseconds of every candidate on the current GPU; they take turns, so that a change of clocks meets all."""
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        for run in candidates.values():
            for _ in range(WARM_UPS):
                run()
        rounds = [{name: elapsed(run) for name, run in candidates.items()} for _ in range(ROUNDS)]
    return {name: [turn[name] for turn in rounds] for name in candidates}


def elapsed(run: Callable[[], object]) -> float:
    """Milliseconds of GPU time of one call. The GPU is kept busy first, so that launching is not counted."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


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
        op, key: as given to `choose`; the key as JSON.
        chosen: the candidate that is used.
        ms: median milliseconds of each candidate.
        ratio: time of the fastest of ours over stock's; below 1 ours is faster.
    """

    op: str
    key: str
    chosen: str
    ms: dict[str, float]
    ratio: float


def table() -> list[Choice]:
    """Every choice measured so far on the current GPU with these versions, by op and key; empty without a GPU."""
    if not torch.cuda.is_available():
        return []
    rows = []
    with _lock:
        entries = sorted(_entries(cache_file(torch.cuda.get_device_name())).items())
    for label, times in entries:
        op, _, key = label.partition(" ")
        ms = {name: statistics.median(samples) for name, samples in times.items()}
        ratio = min(t for name, t in ms.items() if name != "stock") / ms["stock"]
        rows.append(Choice(op, key, fastest(times), ms, ratio))
    return rows


def cache_file(gpu: str) -> Path:
    """Where the times of a GPU are kept: a file for each combination of GPU, versions and kernel sources."""
    import triton  # here, because whoever only asks for the mode (a CPU run) need not load it

    base = os.environ.get("GIGAMORPH_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parts = [
        gpu,
        f"torch{torch.__version__}",
        f"triton{triton.__version__}",
        f"cudnn{torch.backends.cudnn.version()}",
        f"gigamorph{_source_version()}",
    ]
    return Path(base) / "gigamorph" / "kernels" / (re.sub(r"[^\w.+-]+", "-", "_".join(parts)) + ".json")


@functools.cache
def _source_version() -> str:
    """A digest of the kernels' sources: it changes with every release, and with every edit of a kernel."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def _label(op: str, key: Any) -> str:
    return f"{op} {json.dumps(key, default=str, separators=(',', ':'))}"


def _entries(path: Path) -> dict[str, Times]:
    if path not in _files:
        _files[path] = _read(path)
    return _files[path]


def _read(path: Path) -> dict[str, Times]:
    """The times in a file; none if it is missing, or damaged, which is said once per process."""
    try:
        entries = json.loads(path.read_text())
        for times in entries.values():
            fastest({name: [float(t) for t in samples] for name, samples in times.items()})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        _warn_once(path, f"{path}: kernel choices cannot be read ({type(error).__name__}: {error}); measuring again")
        return {}
    return entries


def _keep(path: Path, label: str, times: Times) -> Times:
    """Add an entry to the file. What another process has put there in the meantime stands, so that all choose alike."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = {**_files.get(path, {}), **_read(path)}
            entries[label] = {**times, **entries.get(label, {})}
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
                json.dump(entries, file, indent=0)
            os.replace(file.name, path)
    except OSError as error:
        _warn_once(path, f"{path}: kernel choices cannot be stored ({error}); they are measured again in each process")
        entries = {**_files.get(path, {}), label: times}
    _files[path] = entries
    return entries[label]


@functools.cache
def _warn_once(path: Path, message: str) -> None:
    log.warning("%s", message)
