"""The meter sees what a call allocates and how long it takes, and threads that watch end with what they watch."""

import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import torch

from gigamorph.engine.bench import meter
from gigamorph.engine.bench.meter import NvmlPeak, measure, repeatedly, time_call

MIB = 2**20


def test_time_is_that_of_the_call():
    seconds, cpu_seconds = time_call(lambda: time.sleep(0.05))
    assert 0.05 <= seconds < 5 and 0 <= cpu_seconds <= seconds + 0.05


def test_peak_and_curve_are_of_the_calls():
    kept = torch.ones(64 * MIB // 4)
    calls = []

    def call():
        calls.append(torch.ones(128 * MIB // 4).sum().item())
        time.sleep(0.05)

    cost = measure(call, times=2, warm=1, curve=True)
    assert len(calls) == 3 and len(cost.seconds) == len(cost.cpu_seconds) == 2
    assert 100 * MIB < cost.added_bytes < 200 * MIB and cost.peak_bytes > cost.before_bytes > kept.nbytes
    assert cost.nvml_bytes is None
    assert [when for when, _ in cost.curve] == sorted(when for when, _ in cost.curve) and len(cost.curve) > 3
    assert max(size for _, size in cost.curve) <= cost.added_bytes + 2 * MIB  # the kernel counts in batches


def test_a_watching_thread_ends_with_the_block():
    before, seen = threading.active_count(), []
    with repeatedly(lambda: seen.append(1), 0.001):
        while not seen:
            time.sleep(0.001)
    assert threading.active_count() == before


def test_memory_of_the_gpu_counts_from_when_the_watch_was_made(monkeypatch):
    """What the network takes before the steps is in it: captured graphs, workspaces, what the allocator keeps."""
    used = SimpleNamespace(bytes=100)
    nvml = ModuleType("pynvml")
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=used.bytes)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    watch = NvmlPeak("cuda")
    used.bytes = 250
    with watch:
        while not watch.bytes:
            time.sleep(0.001)
    used.bytes = 900
    assert watch.bytes == 150
    monkeypatch.setattr(meter, "used_bytes", lambda device: 0)
    monkeypatch.setattr(meter, "peak_bytes", lambda device: 0)
    monkeypatch.setattr(meter, "reset_peak", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for found in (800, 800):  # a second turn of the same process takes nothing that is new
        cost = measure(lambda: time.sleep(0.05), "cuda", nvml=watch)
        assert cost.nvml_bytes == found
    with NvmlPeak("cpu") as nothing:
        assert nothing.bytes is None
