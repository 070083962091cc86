"""Choice by measurement, with a made-up GPU and a made-up clock: what is chosen, kept, shared and never measured."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import triton
from forked import Forked
from torch._subclasses import FakeTensorMode

from gigamorph import kernels
from gigamorph.kernels import choice, measurements

KEY = ((1, 64, 32, 32), torch.bfloat16, None)


class Clock:
    """Stands for a GPU that works off what the host launches: both have a time, in cycles of the GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launches: Iterable[int], work: int):
        self.host = self.gpu = 0
        self.launches, self.work = iter(launches), work
        self.heads: list[int] = []
        clock = self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self) -> None:
                self.time = clock.gpu = max(clock.gpu, clock.host)

            def query(self) -> bool:
                return self.time <= clock.host

            def synchronize(self) -> None:
                clock.host = max(clock.host, self.time)

            def elapsed_time(self, end: Event) -> float:
                return end.time - self.time

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)

    def sleep(self, cycles: int) -> None:
        self.heads.append(cycles)
        self.gpu = max(self.gpu, self.host) + cycles

    def run(self) -> None:
        """An op whose kernel is launched after some time of the host's."""
        self.host += next(self.launches)
        self.gpu = max(self.gpu, self.host) + self.work


@pytest.mark.parametrize(
    ("launches", "heads"),
    [
        ([0.1], [1]),  # a fast host
        ([2.5, 0.1], [1, 2]),  # slow once
        ([5, 5, 5, 5], [1, 2, 4, 8]),  # always, but there is a head start that is longer
        ([1000] * 7, [1, 2, 4, 8, 16, 32, 64]),  # longer than any
    ],
)
def test_launching_is_not_timed(monkeypatch: pytest.MonkeyPatch, launches: list[float], heads: list[int]) -> None:
    """A call whose launch outlasts the head start is measured again with a longer one, up to a limit."""
    start, work = choice.HEAD_START, 1000
    clock = Clock(monkeypatch, (int(launch * start) for launch in launches), work)
    found = choice.elapsed(clock.run)
    assert clock.heads == [head * start for head in heads] and heads[-1] * start <= choice.MOST_HEAD_START
    assert not list(clock.launches), "each head start is tried once"
    assert found == work if launches[-1] < heads[-1] else found > work


class Gpu:
    """Stands for a GPU: every candidate returns its own time, and calls are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        self.calls: list[str] = []
        self.capturing = False
        self.name = "NVIDIA H200"
        monkeypatch.setenv("GIGAMORPH_CACHE", str(folder))
        monkeypatch.delenv("GIGAMORPH_KERNELS", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: self.name)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)  # a CUDA build looks for a GPU first
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        monkeypatch.setattr(choice, "elapsed", lambda run: run())
        self.restart()

    def restart(self) -> None:
        """As in a new process: nothing is remembered but what is on disk."""
        for memory in (choice._files, choice._chosen, measurements._warn_once.cache_clear()):
            if memory is not None:
                memory.clear()

    def candidates(self, **ms: float | Exception) -> dict:
        def candidate(name: str):
            def run() -> float:
                self.calls.append(name)
                if isinstance(ms[name], Exception):
                    raise ms[name]
                return ms[name]

            return run

        return {name: candidate(name) for name in ms}

    def choose(self, key=KEY, op: str = "conv2d", like=None, work: int = 10**6, **ms: float | Exception) -> str:
        return choice.choose(op, key, self.candidates(**ms), work, like)

    @property
    def file(self) -> Path:
        return measurements.measurement_file(self.name)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake = Gpu(monkeypatch, tmp_path)
    yield fake
    fake.restart()


@pytest.mark.parametrize(
    ("stock", "triton", "chosen"),
    [(2.0, 1.0, "triton"), (1.0, 2.0, "stock"), (1.0, 1.0, "stock"), (1.0, 0.995, "stock"), (1.0, 0.98, "triton")],
)
def test_the_faster_one_and_ties_to_stock(gpu, stock, triton, chosen):
    assert gpu.choose(stock=stock, triton=triton) == chosen
    assert gpu.choose(triton=triton, stock=stock) == chosen  # whatever the order


def test_fastest_of_several(gpu):
    assert gpu.choose(stock=3.0, pointer=2.0, descriptor=1.0) == "descriptor"
    assert gpu.choose(("other",), stock=1.0, pointer=2.0, descriptor=1.5) == "stock"


def test_median_not_mean(gpu, monkeypatch):
    rounds = [(2.0, 1.0)] * (choice.ROUNDS - 1) + [(2.0, 500.0)]
    clock = iter([t for turn in rounds for t in turn])
    monkeypatch.setattr(choice, "elapsed", lambda run: next(clock))
    assert gpu.choose(stock=0.0, triton=0.0) == "triton"


def test_measured_once_per_op_and_key(gpu):
    gpu.choose(stock=2.0, triton=1.0)
    count = len(gpu.calls)
    assert count == 2 * (choice.WARM_UPS + choice.ROUNDS)
    assert gpu.choose(stock=1.0, triton=2.0) == "triton", "the first measurement stands"
    assert len(gpu.calls) == count
    assert gpu.choose(op="pool", stock=1.0, triton=2.0) == "stock"
    assert gpu.choose((*KEY[:-1], 1), stock=1.0, triton=2.0) == "stock"
    assert gpu.choose({"x": (1, 2), "dtype": torch.float32}, stock=2.0, triton=1.0) == "triton"
    assert gpu.choose({"x": (1, 2), "dtype": torch.float16}, stock=1.0, triton=2.0) == "stock"


def test_kept_on_disk_for_the_next_process(gpu):
    gpu.choose(stock=2.0, triton=1.0)
    gpu.restart()
    gpu.calls.clear()
    assert gpu.choose(stock=1.0, triton=2.0) == "triton"
    assert not gpu.calls
    (stored,) = map(json.loads, gpu.file.read_text().splitlines())
    assert [len(samples) for samples in stored["ms"].values()] == [choice.ROUNDS] * 2
    assert (stored["op"], stored["work"]) == ("conv2d", 10**6)


def test_another_gpu_or_version_is_another_file(gpu, monkeypatch):
    gpu.choose(stock=2.0, triton=1.0)
    first = gpu.file
    assert first.name.startswith("NVIDIA-H200_torch") and "_triton" in first.name and "_cudnn" in first.name
    gpu.name = "NVIDIA A100/80GB: PCIe"
    assert gpu.file.parent == first.parent != gpu.file
    gpu.restart()
    assert gpu.choose(stock=1.0, triton=2.0) == "stock"
    for module, name in ((torch, "__version__"), (triton, "__version__")):
        with monkeypatch.context() as patch:
            before = gpu.file
            patch.setattr(module, name, "99.0")
            assert gpu.file != before
    with monkeypatch.context() as patch:
        patch.setattr(measurements, "_source_version", lambda: "another")
        assert gpu.file.name.endswith("_gigamorphanother.jsonl")


def test_cache_folder(gpu, monkeypatch, tmp_path):
    assert gpu.file.parent == tmp_path / "gigamorph" / "kernels"
    monkeypatch.delenv("GIGAMORPH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gpu.file.parent == tmp_path / "xdg" / "gigamorph" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gpu.file.parent == Path.home() / ".cache" / "gigamorph" / "kernels"


WHOLE = '{"op": "conv2d", "key": [], "work": 1, "ms": {"stock": [1.0], "triton": [2.0]}, "failed": {}}'
DAMAGED = [
    "{",
    "[]",
    "1",
    '{"op": "conv2d"}',
    WHOLE.replace("[1.0]", '["a"]'),
    WHOLE.replace("[1.0]", "[]"),
    WHOLE.replace('"stock": [1.0], ', ""),
    WHOLE.replace('"work": 1', '"work": -1'),
    WHOLE[:50],
    "\x00\xff",
]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_line_is_ignored_with_a_warning(gpu, caplog, text):
    gpu.file.parent.mkdir(parents=True)
    gpu.file.write_bytes((WHOLE + "\n" + text).encode("latin-1"))  # as a kill in the middle of a line leaves it
    with caplog.at_level(logging.WARNING, "gigamorph"):
        assert gpu.choose(stock=2.0, triton=1.0) == "triton"
        assert gpu.choose(("b",), stock=2.0, triton=1.0) == "triton"
        assert gpu.choose((), work=1, stock=2.0, triton=1.0) == "stock", "the whole line counts"
    assert len(caplog.records) == 1 and str(gpu.file) in caplog.text
    gpu.restart()
    assert len(choice.table()) == 3


def test_a_measurement_serves_nearly_equal_work(gpu):
    gpu.choose(work=10**6, stock=2.0, triton=1.0)
    count = len(gpu.calls)
    for work in (600_000, 10**6, 1_700_000):
        assert gpu.choose(work=work, stock=1.0, triton=2.0) == "triton"
    assert len(gpu.calls) == count
    assert gpu.choose(work=3 * 10**6, stock=1.0, triton=2.0) == "stock" and len(gpu.calls) == 2 * count
    assert gpu.choose(work=2 * 10**6, stock=0.0, triton=0.0) == "stock", "the nearer of two"
    assert gpu.choose(work=1_600_000, stock=0.0, triton=0.0) == "triton"
    assert gpu.choose(work=100, stock=2.0, triton=1.0) == gpu.choose(work=1, stock=1.0, triton=2.0) == "triton"
    assert len(gpu.calls) == 3 * count, "little work takes the time of a launch"


def test_the_file_is_only_appended_to(gpu):
    """A thousand measurements take a thousand lines, not half a million."""
    written = []
    for key in range(50):
        gpu.choose((key,), stock=1.0, triton=2.0)
        written.append(gpu.file.read_bytes())
    assert all(after.startswith(before) for before, after in itertools.pairwise(written))
    assert len(written[-1].splitlines()) == 50


# -- what fails ---------------------------------------------------------------------------------------------------


def test_a_candidate_that_raises_is_out_of_the_running(gpu, caplog):
    bad = RuntimeError("ptxas: no such chip\nand much more")
    with caplog.at_level(logging.WARNING, "gigamorph"):
        assert gpu.choose(stock=2.0, triton=bad) == "stock"
        assert gpu.choose(work=10, stock=2.0, triton=1.0) == "stock", "whatever the work"
        assert gpu.choose(("b",), stock=2.0, triton=bad, other=1.0) == "other"
    assert len(caplog.records) == 2
    for part in ("conv2d", "triton", "torch.bfloat16", "RuntimeError: ptxas: no such chip"):
        assert part in caplog.messages[0]
    gpu.restart()
    gpu.calls.clear()
    assert gpu.choose(stock=2.0, triton=1.0) == "stock" and "triton" not in gpu.calls, "in the next process, too"
    assert "ptxas: no such chip" in str(choice.failures())
    assert [row.op for row in choice.table()] == ["conv2d"], "one that failed alone has no ratio"


def test_a_failure_of_stock_is_raised(gpu):
    with pytest.raises(ValueError, match="not for us"):
        gpu.choose(stock=ValueError("not for us"), triton=1.0)


def test_no_memory_for_a_trial_means_stock_for_this_process(gpu):
    assert gpu.choose(stock=2.0, triton=torch.OutOfMemoryError("full")) == "stock"
    assert gpu.choose(stock=2.0, triton=1.0) == "stock" and not choice.failures()
    gpu.restart()
    assert gpu.choose(stock=2.0, triton=1.0) == "triton"


def test_stock_does_the_work_of_a_kernel_that_fails_when_it_is_wanted(gpu, monkeypatch, caplog):
    x = torch.zeros(1, 3, 8, 8)
    monkeypatch.setattr(choice, "_gpu", lambda like: 0)
    monkeypatch.setattr(choice, "_may_measure", lambda like: True)
    broken, calls = [False], []

    def ours() -> float:
        calls.append("ours")
        if broken[0]:
            raise RuntimeError("an illegal instruction")
        return 1.0

    run = lambda: choice.run_fastest("pool", x, ("relu",), ours, lambda: 2.0)  # noqa: E731
    assert run() == 1.0
    broken[0] = True
    with caplog.at_level(logging.WARNING, "gigamorph"):
        assert run() == 2.0
        calls.clear()
        assert run() == 2.0 and not calls
    assert len(caplog.records) == 1 and "an illegal instruction" in caplog.text
    gpu.restart()
    assert run() == 2.0 and not calls
    with choice.override("triton"), pytest.raises(RuntimeError, match="an illegal instruction"):
        run()


def test_without_a_compiler_stock(monkeypatch, caplog):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.delenv("GIGAMORPH_KERNELS", raising=False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    kernels.missing.cache_clear()
    with caplog.at_level(logging.WARNING, "gigamorph"):
        assert not kernels.enabled(cuda) and not kernels.enabled(cuda) and not kernels.enabled(cpu)
    assert len(caplog.records) == 1 and "C compiler" in caplog.text
    monkeypatch.setattr(kernels.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    kernels.missing.cache_clear()
    assert kernels.enabled(cuda) and not kernels.enabled(cpu)
    kernels.missing.cache_clear()


TF32 = {
    "fp32_precision = 'tf32'": "tf32",
    "fp32_precision = 'ieee'": "ieee",
    "cudnn.fp32_precision = 'ieee'": "ieee",
    "cudnn.conv.fp32_precision = 'ieee'": "ieee",
    "cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "cudnn.allow_tf32 = False": "ieee",
    "cuda.matmul.allow_tf32 = True": "tf32",
    "cudnn.allow_tf32 = True": "tf32",
}
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):  # cuDNN does not hear of it (pytorch/pytorch#179445)
    TF32 |= dict.fromkeys(("fp32_precision = 'ieee'", "cudnn.fp32_precision = 'ieee'"), "tf32")


def test_float32_is_multiplied_as_stock_may():
    """In the old and in the new spelling of PyTorch's settings, which refuse to be read by each other."""
    code = f"""
import os, torch
from gigamorph.kernels.precision import dot_precision
for setting in {list(TF32)}:
    if not os.fork():  # settings do not forget
        exec("torch.backends." + setting)
        found = dot_precision(torch.float32), dot_precision(torch.bfloat16)
        print(setting, *found, sep="; ", flush=True)
        os._exit(0)
    os.wait()
"""
    process = Forked(exec, code, {})
    assert process.wait() == 0, process.error
    assert process.output.splitlines() == ["; ".join((setting, found, "ieee")) for setting, found in TF32.items()]


def test_unwritable_folder_is_told_once(gpu, caplog, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GIGAMORPH_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "gigamorph"):
        assert gpu.choose(stock=2.0, triton=1.0) == "triton"
        assert gpu.choose(("b",), stock=2.0, triton=1.0) == "triton"
        assert gpu.choose(stock=1.0, triton=2.0) == "triton"
    assert [("read" in m or "stored" in m) for m in caplog.messages] == [True] * len(caplog.messages)
    assert len(caplog.messages) <= 2
    assert len(gpu.calls) == 4 * (choice.WARM_UPS + choice.ROUNDS)


def test_candidate_that_is_new_is_measured(gpu):
    gpu.choose(stock=2.0, triton=3.0)
    assert gpu.choose(stock=2.0, triton=3.0, fused=1.0) == "fused"
    assert gpu.choose(stock=2.0, triton=3.0) == "stock"
    gpu.restart()
    gpu.calls.clear()
    assert gpu.choose(stock=2.0, triton=3.0, fused=1.0) == "fused" and not gpu.calls


# -- never measured -----------------------------------------------------------------------------------------------


def test_not_while_a_graph_is_captured(gpu):
    gpu.capturing = True
    assert gpu.choose(stock=2.0, triton=1.0) == "stock" and not gpu.calls
    gpu.capturing = False
    assert gpu.choose(stock=2.0, triton=1.0) == "triton"
    gpu.capturing = True
    gpu.restart()
    gpu.calls.clear()
    assert gpu.choose(stock=2.0, triton=1.0) == "triton" and not gpu.calls, "what is cached serves"


def test_not_on_cpu_meta_or_fake_tensors(gpu, monkeypatch):
    for like in (torch.zeros(2), torch.zeros(2, device="meta")):
        assert gpu.choose(like=like, stock=2.0, triton=1.0) == "stock"
    with FakeTensorMode():
        assert gpu.choose(stock=2.0, triton=1.0) == "stock"
        with monkeypatch.context() as patch:  # PyTorch 2.11 looks for a real GPU
            patch.setattr(torch.cuda, "is_available", lambda: False)
            fake = torch.empty(2, device="cuda:0")
    assert gpu.choose(like=fake, stock=2.0, triton=1.0) == "stock"
    assert not gpu.calls
    gpu.choose(stock=2.0, triton=1.0)
    gpu.calls.clear()
    assert gpu.choose(like=torch.zeros(2, device="meta"), stock=2.0, triton=1.0) == "triton"
    assert gpu.choose(like=fake, stock=2.0, triton=1.0) == "triton"
    assert gpu.choose(like=torch.zeros(2), stock=2.0, triton=1.0) == "stock"
    assert not gpu.calls


def test_without_a_gpu_stock(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.choose(stock=2.0, triton=1.0) == "stock"
    with choice.override("triton"):
        assert gpu.choose(stock=2.0, triton=1.0, other=0.5) == "triton"
    assert not gpu.calls and choice.table() == []


def test_measured_without_autograd_and_autocast(gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(choice, "elapsed", lambda run: run() or 1.0)
    look = lambda: seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cuda")))  # noqa: E731
    with torch.autocast("cuda", dtype=torch.float16), torch.enable_grad():
        choice.choose("op", (), {"stock": look, "triton": look})
        assert torch.is_autocast_enabled("cuda") and torch.is_grad_enabled()
    assert set(seen) == {(False, False)}


# -- override -----------------------------------------------------------------------------------------------------


def test_override_and_environment(gpu, monkeypatch):
    with choice.override("triton"):
        assert gpu.choose(stock=1.0, triton=2.0) == "triton"
        with choice.override("stock"):
            assert gpu.choose(stock=2.0, triton=1.0) == "stock"
        assert gpu.choose(stock=1.0, triton=2.0) == "triton"
    assert not gpu.calls, "what is forced is not measured"
    monkeypatch.setenv("GIGAMORPH_KERNELS", "triton")
    assert gpu.choose(stock=1.0, triton=2.0) == "triton" and not gpu.calls
    with choice.override("auto"):
        assert gpu.choose(stock=1.0, triton=2.0) == "stock" and gpu.calls
    monkeypatch.setenv("GIGAMORPH_KERNELS", "stock")
    assert gpu.choose(stock=2.0, triton=1.0) == "stock"
    monkeypatch.setenv("GIGAMORPH_KERNELS", "")
    assert choice.current_mode() == "auto"


def test_forced_triton_takes_ours_if_there_is_one(gpu):
    with choice.override("triton"):
        assert gpu.choose(stock=1.0, descriptor=2.0) == "descriptor"
        assert gpu.choose(stock=1.0) == "stock"


def test_override_reaches_the_threads_of_a_backward(gpu):
    found = []
    with choice.override("triton"):
        thread = threading.Thread(target=lambda: found.append(gpu.choose(stock=1.0, triton=2.0)))
        thread.start()
        thread.join()
    assert found == ["triton"]


def test_mistakes_are_named(gpu, monkeypatch):
    with pytest.raises(ValueError, match=r"override: unknown mode 'cudnn'; use one of auto, stock, triton"):
        choice.override("cudnn").__enter__()
    monkeypatch.setenv("GIGAMORPH_KERNELS", "fast")
    with pytest.raises(ValueError, match="GIGAMORPH_KERNELS: unknown mode 'fast'"):
        gpu.choose(stock=1.0, triton=1.0)
    with pytest.raises(ValueError, match='conv2d: no candidate is called "stock"'):
        gpu.choose(ours=1.0)


# -- what is shown, and who shares it -----------------------------------------------------------------------------


def test_table(gpu):
    assert choice.table() == []
    gpu.choose(stock=4.0, triton=1.0)
    gpu.choose(op="add", stock=1.0, triton=2.0, other=3.0)
    added, conv = choice.table()
    assert (added.op, added.chosen, added.ms, added.ratio) == ("add", "stock", {"stock": 1, "triton": 2, "other": 3}, 2)
    assert (conv.op, conv.chosen, conv.ratio) == ("conv2d", "triton", 0.25)
    assert conv.key == '[[1,64,32,32],"torch.bfloat16",null]'


WORKER = """
import contextlib, torch
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_name = lambda index=None: "Fake"
torch.backends.cudnn.version = lambda: 91900
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.device = lambda index: contextlib.nullcontext()
from gigamorph import kernels
from gigamorph.kernels import choice, measurements, precision
choice.elapsed = lambda run: run()
print(*[choice.choose("op", (i,), {"stock": lambda: 1.0, "triton": lambda: ours}) for i in range(40)])
"""


def test_processes_that_measure_together_choose_alike(tmp_path):
    """One process finds ours faster, the other stock: who is first decides each entry for both, and none is lost."""
    environment = {"GIGAMORPH_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    workers = [Forked(exec, WORKER, {"ours": ms}, env=environment) for ms in (0.5, 2.0)]
    assert [worker.wait() for worker in workers] == [0, 0], [worker.error for worker in workers]
    chosen = [worker.output.split() for worker in workers]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 40
    (file,) = (tmp_path / "gigamorph" / "kernels").glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 40
