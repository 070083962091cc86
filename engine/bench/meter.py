"""The step meter: time and memory of calls in this process, for all measurements of the project."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..tiling.memory import peak_bytes, reset_peak, used_bytes

_NVML_EVERY, _CURVE_EVERY = 0.002, 0.004  # seconds


def time_call(call: Callable[[], Any], device: str = "cpu") -> tuple[float, float]:
    """Return wall-clock seconds and CPU seconds of all threads for one call, with synchronisation on a GPU."""
    cpu_started, started = time.process_time(), time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - cpu_started


@dataclass
class CallCost:
    """Time and memory of some calls. Bytes are those of `used_bytes`.

    Attributes:
        seconds, cpu_seconds: per timed call, see `time_call`.
        before_bytes: bytes in use before the first call.
        peak_bytes: maximum in use during all calls, including untimed ones.
        nvml_bytes: growth of the GPU's memory in use since `nvml` was created, by NVML; None on the CPU.
        curve: (seconds since the first call began, bytes above `before_bytes`), if requested.
    """

    before_bytes: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    nvml_bytes: int | None = None
    curve: list[tuple[float, int]] = field(default_factory=list)

    @property
    def added_bytes(self) -> int:
        """Bytes that the calls added at their peak."""
        return self.peak_bytes - self.before_bytes


def measure(
    call: Callable[[], Any],
    device: str = "cpu",
    times: int = 1,
    warm: int = 0,
    curve: bool = False,
    nvml: NvmlPeak | None = None,
) -> CallCost:
    """Call repeatedly, the first `warm` times untimed."""
    nvml = nvml or NvmlPeak(device)
    cost = CallCost(used_bytes(device))
    reset_peak(device)
    started = time.perf_counter()

    def sample() -> None:
        cost.curve.append((round(time.perf_counter() - started, 4), used_bytes(device) - cost.before_bytes))

    watch = repeatedly(sample, _CURVE_EVERY) if curve else contextlib.nullcontext()
    with nvml, watch:
        for number in range(warm + times):
            seconds, cpu_seconds = time_call(call, device)
            if number >= warm:
                cost.seconds.append(seconds)
                cost.cpu_seconds.append(cpu_seconds)
    cost.peak_bytes, cost.nvml_bytes = peak_bytes(device), nvml.bytes
    return cost


@contextlib.contextmanager
def repeatedly(call: Callable[[], object], every: float) -> Iterator[None]:
    """Call a function in a background thread, with a pause before each call, while the context is open."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(every):
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class NvmlPeak(contextlib.ExitStack):
    """Growth of the GPU's memory in use since creation, by NVML, sampled while it is open; None on the CPU."""

    def __init__(self, device: str):
        super().__init__()
        self.bytes: int | None = None
        if device == "cuda":
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            self._used = lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            self.bytes, self._before = 0, self._used()

    def __enter__(self) -> NvmlPeak:
        if self.bytes is not None:
            self.enter_context(repeatedly(self._sample, _NVML_EVERY))
        return self

    def _sample(self) -> None:
        self.bytes = max(self.bytes or 0, self._used() - self._before)
