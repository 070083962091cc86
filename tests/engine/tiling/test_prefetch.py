"""Reading ahead on a GPU, by what a double of PyTorch's streams is told: who waits for whom, and on which stream.

And on a CPU: who reads.
"""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.execution.image_batch import ImageTensor
from gigamorph.engine.tiling import prefetch
from gigamorph.engine.tiling.prefetch import Prefetch
from gigamorph.engine.tiling.scan import Scan, StoredMap

GPU = torch.device("cuda", 0)


class Stream:
    def __init__(self, log: list, name: str):
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        return f"the upload on {self.name}"


class Pixels:
    """Stands for pixels: on the device or not."""

    def __init__(self, log: list, is_cuda: bool):
        self.log, self.is_cuda, self.device = log, is_cuda, GPU

    def pin_memory(self) -> Pixels:
        return self

    def record_stream(self, stream: Stream) -> None:
        self.log.append(f"kept for {stream.name}")


@pytest.fixture
def log(monkeypatch):
    """What happens, in order."""
    log, made, main = [], [], threading.current_thread()
    running: dict[int, Stream] = {}

    def current(device=None) -> Stream:
        thread = threading.current_thread()
        own = Stream(log, "the user's stream" if thread is main else "the reader's default stream")
        return running.get(thread.ident, own)

    @contextlib.contextmanager
    def entered(stream: Stream):
        running[threading.get_ident()] = stream
        yield
        del running[threading.get_ident()]

    def new(device=None) -> Stream:
        made.append(Stream(log, f"upload stream {len(made) + 1}"))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", new)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    prefetch._upload_stream.cache_clear()
    yield log
    prefetch._upload_stream.cache_clear()


def read(log: list, is_cuda: bool) -> None:
    def fetch(source, rect):
        log.append(f"read {rect}")
        return Pixels(log, is_cuda)

    def convert(source, pixels):
        log.append(f"upload on {torch.cuda.current_stream().name}")
        return pixels

    with Prefetch(fetch, convert, GPU, [[(0, "a")]]) as pixels:
        pixels.advance()
        pixels(0, "a")


@pytest.mark.parametrize("is_cuda", [False, True])
def test_an_upload_waits_for_what_made_the_pixels(log, is_cuda):
    """Pixels that were made on the device a moment ago, by the user's stream or by the source itself."""
    read(log, is_cuda)
    upload = log.index("upload on upload stream 1")
    for before in ("upload stream 1 waits for the user's stream", "read a"):
        assert log.index(before) < upload
    assert "upload stream 1 waits for the reader's default stream" in log[log.index("read a") : upload]
    assert log[upload + 1 :] == [
        "the user's stream waits for the upload on upload stream 1",
        "kept for the user's stream",
    ]


def test_one_upload_stream_for_all_passes(log):
    """PyTorch deals out 32 streams in turn: a new one for each pass would be that of the captures now and then."""
    for _ in range(40):
        read(log, False)
    assert "upload stream 1 waits for the user's stream" in log and "upload stream 2" not in " ".join(log)


@pytest.mark.parametrize("kind", [ImageTensor, lambda t: StoredMap(t, (2, 3))])
def test_what_is_on_the_device_is_read_by_the_stream_that_computes(kind):
    class OnGpu:
        shape, device = (1, 1, 4, 4), GPU

    scan = Scan.__new__(Scan)
    object.__setattr__(scan, "sources", {0: kind(OnGpu()), 1: ImageTensor(torch.zeros(1, 1, 4, 4))})
    object.__setattr__(scan, "device", GPU)
    assert scan._on_device(0) and not scan._on_device(1)


def test_an_image_in_memory_is_read_on_the_cpu_without_a_thread(monkeypatch):
    """Blocks of threads lie in heaps of their own, which stay: up to two tiles for each, beyond any budget."""
    started = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    net = accelerate(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), memory_budget="64MiB", tile=32)
    net(torch.rand(1, 1, 90, 70)).sum().backward()
    assert not started


def test_a_cpu_reads_ahead_from_the_first_read_on_that_takes_long():
    """Until then the thread that computes reads; none is read twice, and no two read at once."""
    read, busy = [], threading.Lock()

    def fetch(source, rect):
        assert busy.acquire(blocking=False), "two read at once"
        time.sleep(0.03 if rect[0] == 2 else 0)
        read.append((rect, threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        busy.release()
        return torch.full((1,), float(rect[0]))

    tiles = [[(0, (tile, part)) for part in range(2)] for tile in range(6)]
    threads = torch.get_num_threads()
    with Prefetch(fetch, lambda source, pixels: pixels, torch.device("cpu"), tiles) as pixels, torch.enable_grad():
        for tile in range(6):
            pixels.advance()
            for part in range(2):
                assert float(pixels(0, (tile, part))) == tile
    assert [rect for rect, _, _ in read] == [rect for tile in tiles for _, rect in tile]
    here = {rect: main for rect, main, _ in read}
    assert all(here[tile, part] for tile in (0, 1) for part in (0, 1)) and here[2, 0]
    assert not any(here[tile, part] for tile in (3, 4, 5) for part in (0, 1)) and not here[2, 1]
    assert all(count == (threads if main else 1) for _, main, count in read)
    assert torch.get_num_threads() == threads


def test_pixels_are_read_in_the_modes_of_a_thread_of_its_own():
    """Whatever is on where the step is computed: a source may keep what it makes."""
    seen = []

    def fetch(source, rect):
        made = torch.zeros(1)
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), made.is_inference(), made.device.type))
        return made

    made = Prefetch(fetch, lambda source, pixels: pixels, torch.device("cpu"), [[(0, 0)]])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"), made as here:
        here.advance()
        here(0, 0)
        assert torch.is_inference_mode_enabled() and torch.zeros(1).is_meta
    assert seen == [(False, False, False, "cpu")]
