"""Choice by measurement, with a made-up GPU and a made-up clock: what is chosen, kept, shared and never measured."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import triton
from torch._subclasses import FakeTensorMode

from gigamorph.kernels import choice

KEY = ((1, 64, 32, 32), torch.bfloat16, None)


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
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        monkeypatch.setattr(choice, "elapsed", lambda run: run())
        self.restart()

    def restart(self) -> None:
        """As in a new process: nothing is remembered but what is on disk."""
        for memory in (choice._files, choice._chosen, choice._warn_once.cache_clear()):
            if memory is not None:
                memory.clear()

    def candidates(self, **ms: float) -> dict:
        def candidate(name: str):
            def run() -> float:
                self.calls.append(name)
                return ms[name]

            return run

        return {name: candidate(name) for name in ms}

    def choose(self, key=KEY, op: str = "conv2d", like=None, **ms: float) -> str:
        return choice.choose(op, key, self.candidates(**ms), like)

    @property
    def file(self) -> Path:
        return choice.cache_file(self.name)


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
    stored = json.loads(gpu.file.read_text())
    assert [len(samples) for times in stored.values() for samples in times.values()] == [choice.ROUNDS] * 2
    assert not list(gpu.file.parent.glob("*.tmp"))


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
        patch.setattr(choice, "_source_version", lambda: "another")
        assert gpu.file.name.endswith("_gigamorphanother.json")


def test_cache_folder(gpu, monkeypatch, tmp_path):
    assert gpu.file.parent == tmp_path / "gigamorph" / "kernels"
    monkeypatch.delenv("GIGAMORPH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gpu.file.parent == tmp_path / "xdg" / "gigamorph" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gpu.file.parent == Path.home() / ".cache" / "gigamorph" / "kernels"


DAMAGED = [
    "",
    "{",
    "[]",
    '{"conv2d []": 1}',
    '{"conv2d []": {"stock": ["a"]}}',
    '{"conv2d []": {"stock": []}}',
    '{"conv2d []": {"triton": [1.0]}}',
    '{"conv2d []": {}}',
    "\x00\xff",
]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_file_is_ignored_with_one_warning(gpu, caplog, text):
    gpu.file.parent.mkdir(parents=True)
    gpu.file.write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "gigamorph"):
        assert gpu.choose(stock=2.0, triton=1.0) == "triton"
        assert gpu.choose(("b",), stock=2.0, triton=1.0) == "triton"
    assert len(caplog.records) == 1 and str(gpu.file) in caplog.text
    gpu.restart()
    assert len(choice.table()) == 2, "the file is whole again"


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


def test_not_on_cpu_meta_or_fake_tensors(gpu):
    for like in (torch.zeros(2), torch.zeros(2, device="meta")):
        assert gpu.choose(like=like, stock=2.0, triton=1.0) == "stock"
    with FakeTensorMode():
        assert gpu.choose(stock=2.0, triton=1.0) == "stock"
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
    with choice.override("measured"):
        assert gpu.choose(stock=1.0, triton=2.0) == "stock" and gpu.calls
    monkeypatch.setenv("GIGAMORPH_KERNELS", "stock")
    assert gpu.choose(stock=2.0, triton=1.0) == "stock"
    monkeypatch.setenv("GIGAMORPH_KERNELS", "")
    assert choice.current_mode() == "measured"


def test_forced_triton_takes_the_fastest_of_ours(gpu):
    assert gpu.choose(stock=1.0, pointer=3.0, descriptor=2.0) == "stock"
    with choice.override("triton"):
        assert gpu.choose(stock=1.0, pointer=3.0, descriptor=2.0) == "descriptor"
        assert gpu.choose(stock=1.0) == "stock"


def test_override_reaches_the_threads_of_a_backward(gpu):
    found = []
    with choice.override("triton"):
        thread = threading.Thread(target=lambda: found.append(gpu.choose(stock=1.0, triton=2.0)))
        thread.start()
        thread.join()
    assert found == ["triton"]


def test_mistakes_are_named(gpu, monkeypatch):
    with pytest.raises(ValueError, match=r"override: 'cudnn' is not known; give one of measured, stock, triton"):
        choice.override("cudnn").__enter__()
    monkeypatch.setenv("GIGAMORPH_KERNELS", "fast")
    with pytest.raises(ValueError, match="GIGAMORPH_KERNELS: 'fast'"):
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
import contextlib, sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_name = lambda index=None: "Fake"
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.device = lambda index: contextlib.nullcontext()
from gigamorph.kernels import choice
choice.elapsed = lambda run: run()
ours = float(sys.argv[1])
print(*[choice.choose("op", (i,), {"stock": lambda: 1.0, "triton": lambda: ours}) for i in range(40)])
"""


def test_processes_that_measure_together_choose_alike(tmp_path):
    """One process finds ours faster, the other stock: who is first decides each entry for both, and none is lost."""
    environment = {**os.environ, "GIGAMORPH_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, ms], env=environment, stdout=subprocess.PIPE, text=True)
        for ms in ("0.5", "2.0")
    ]
    chosen = [worker.communicate(timeout=120)[0].split() for worker in workers]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 40
    (file,) = (tmp_path / "gigamorph" / "kernels").glob("*.json")
    assert len(json.loads(file.read_text())) == 40
