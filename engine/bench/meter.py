"""The step meter: time and memory of calls in this process, for all that this project measures."""

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
    """Seconds of one call by the clock, and of all threads of the process; on a GPU until all is computed."""
    cpu_started, started = time.process_time(), time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - cpu_started


@dataclass
class Cost:
    """What some calls took. Bytes are as `used_bytes` counts them.

    Attributes:
        seconds, cpu_seconds: of each timed call, as `time_call` has them.
        before_bytes: in use before the first.
        peak_bytes: in use at most during all, those that were not timed too.
        nvml_bytes: growth of the GPU's memory in use since `nvml` was made, by NVML; None on the CPU.
        curve: (seconds since the first began, bytes above those before), if asked for.
    """

    before_bytes: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    nvml_bytes: int | None = None
    curve: list[tuple[float, int]] = field(default_factory=list)

    @property
    def added_bytes(self) -> int:
        """What the calls took above what was there."""
        return self.peak_bytes - self.before_bytes


def measure(
    call: Callable[[], Any],
    device: str = "cpu",
    times: int = 1,
    warm: int = 0,
    curve: bool = False,
    nvml: NvmlPeak | None = None,
) -> Cost:
    """Call again and again, the first `warm` times untimed."""
    nvml = nvml or NvmlPeak(device)
    cost = Cost(used_bytes(device))
    reset_peak(device)
    started = time.perf_counter()

    def look() -> None:
        cost.curve.append((round(time.perf_counter() - started, 4), used_bytes(device) - cost.before_bytes))

    watch = repeatedly(look, _CURVE_EVERY) if curve else contextlib.nullcontext()
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
    """Within it, a thread calls again and again, with a pause of some seconds before each."""
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
    """How much more of the GPU's memory is in use while it is open than when it was made, by NVML; None on the CPU."""

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
            self.enter_context(repeatedly(self._look, _NVML_EVERY))
        return self

    def _look(self) -> None:
        self.bytes = max(self.bytes or 0, self._used() - self._before)
