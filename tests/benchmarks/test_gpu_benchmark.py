"""benchmarks/gpu.py without a GPU: the whole script on tiny sizes, and that one bad item costs one item."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_ops  # noqa: E402
import gpu_steps  # noqa: E402
import gpu_worker  # noqa: E402

WORKER = """
import os, sys, time
class Server:
    def work(self, section, name):
        if name == "hangs":
            time.sleep(60)
        if name == "dies":
            print("the reason", file=sys.stderr, flush=True)
            os._exit(7)
        return {"row": {"pid": os.getpid(), "do": section}}
"""


@pytest.fixture
def workers(monkeypatch, tmp_path):
    """Workers that run the server above instead of that of gpu_worker.py."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(gpu, "WORKER", script)
    found = [gpu.Worker(False, tmp_path / "log") for _ in range(2)]
    yield found
    for worker in found:
        worker.stop()


def run(workers, report, names, *, limit=20.0, deadline=20.0, end=20.0):
    now = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu.LIMIT, "checks", limit)
        gpu.run_items([("checks", name) for name in names], workers, report, now + deadline, now + end)
    return json.loads(report.path.read_text())


def test_an_item_that_dies_or_hangs_costs_one_item(workers, tmp_path):
    report = gpu.ResultsFile(tmp_path / "out.json", time.monotonic())
    data = run(workers[:1], report, ["a", "dies", "b", "hangs", "c"], limit=3)
    rows = data["checks"]
    assert rows["dies"]["error"] == "process died" and "the reason" in rows["dies"]["message"]
    assert "exit code 7" in rows["dies"]["message"] and rows["hangs"]["error"] == "timed out"
    assert len({rows[name]["pid"] for name in "abc"}) == 3, "a new process after each"
    assert not data["skipped"]


def test_what_time_does_not_reach_is_listed(workers, tmp_path):
    report = gpu.ResultsFile(tmp_path / "out.json", time.monotonic())
    data = run(workers[:1], report, ["hangs", "a", "b"], deadline=1, end=2)
    assert data["checks"]["hangs"]["error"] == "timed out"
    assert data["skipped"] == ["checks: a", "checks: b"]


def test_every_item_once_with_several_workers(workers, tmp_path):
    report = gpu.ResultsFile(tmp_path / "out.json", time.monotonic())
    names = [str(i) for i in range(20)]
    data = run(workers, report, names)
    assert sorted(data["checks"], key=int) == names and {row["do"] for row in data["checks"].values()} == {"checks"}


def test_a_later_command_goes_on_where_the_file_ends(workers, tmp_path):
    path = tmp_path / "out.json"
    run(workers[:1], gpu.ResultsFile(path, time.monotonic()), ["a", "dies"])
    report = gpu.ResultsFile(path, time.monotonic())
    assert report.has("checks", "a") and not report.has("checks", "dies") and not report.has("ops", "a")
    data = run(workers[:1], report, ["b"])
    assert set(data["checks"]) == {"a", "dies", "b"} and data["checks"]["a"]["do"] == "checks"


def test_clocks_that_cannot_be_read_cost_nothing(monkeypatch):
    def broken():
        raise OSError("NVML: Unknown Error")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("pynvml.nvmlInit", broken)
    assert gpu_worker.clocks() == {"nvml": "OSError: NVML: Unknown Error"}


def test_a_check_sees_wrong_values_and_unequal_runs():
    oracle = torch.randn(1, 8, 16, 16, dtype=torch.float64)
    good = oracle.to(torch.bfloat16)
    wrong, unwritten = good.clone(), good.clone()
    wrong[0, 3, 5, 7] += 0.1
    unwritten[0, 0, 0, 0] = float("nan")
    for result, ok in ((good, True), (wrong, False), (unwritten, False)):
        bench = gpu_checks.Bench(torch.bfloat16)
        bench.compare("y", result, oracle)
        assert bench.row["ok"] == ok, bench.row
    bench = gpu_checks.Bench(torch.bfloat16)
    runs = iter([(good,), (good + 2**-7,)])
    bench.twice(lambda: next(runs))
    assert not bench.row["reproducible"] and not bench.row["ok"]


def test_every_family_that_is_sanitized_has_a_check():
    names = list(gpu_checks.checks(dry=True))
    assert all(any(name.startswith(family) for name in names) for family in gpu_worker.SANITIZED)


def test_summary_tells_what_is_wrong():
    data = {
        "ceilings": {},
        "skipped": ["ops: b"],
        "seconds": {"all": 1.0},
        "checks": {
            "conv": {"ok": False, "errors": {"y": [0.5, 3.0]}, "reproducible": False},
            "pool": {"ok": True, "errors": {}, "reproducible": True},
            "stem": {"error": "timed out"},
        },
        "ops": {
            "3x3": {"flops": 1, "bytes": 1, "ms": {"cudnn": 1.0}, "failed": {"ours": "OutOfResources: shared"}},
        },
        "steps": {},
    }
    text = "\n".join(gpu.summary(data))
    assert "checks: 1 of 3 passed" in text and "WRONG conv: y: [0.5, 3.0]; two runs differ" in text
    assert "WRONG stem: timed out" in text and "FAILED 3x3: ours: OutOfResources" in text
    assert "skipped for lack of time: 1" in text
    assert gpu.failures(data) == ["checks: conv", "checks: stem", "ops: 3x3"]


def test_traces_are_of_the_gpu_alone_and_tell_when_it_was_idle():
    kernel = {"ph": "X", "cat": "kernel", "name": "a", "dur": 5.0, "args": {"grid": [1, 2, 3]}}
    copied = {"ph": "X", "cat": "gpu_memcpy", "name": "copy", "ts": 12.0, "dur": 1.0, "args": {"bytes": 3}}
    other = {"ph": "X", "cat": "cpu_op", "name": "host", "ts": 0.0, "dur": 90.0}
    row = gpu_steps.summarized([other, {**kernel, "ts": 20.0}, copied, {**kernel, "ts": 10.0}])
    assert (row["span_us"], row["busy_us"], row["names"]) == (15.0, 10.0, ["a", "copy"])
    assert [number for number, *_ in row["kernels"]] == [0, 1, 0]
    lines = gpu._trace_lines({"step": row})
    assert "3 kernels, busy 10 of 15 us" in lines[0] and "10 us in    2  a" in lines[1]


def test_layers_are_those_of_the_networks():
    """The convolutions of ResNet-50 by shape: 23 distinct ones behind the stem, and their arithmetic in all."""
    from gigamorph.engine.models import resnet50

    with torch.device("meta"):
        network = resnet50(num_classes=2, in_channels=1)
        seen = set()
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Conv2d) and name != "conv1":
                module.register_forward_hook(
                    lambda m, args, _: seen.add((*m.weight.shape[:3], m.stride[0], args[0].shape[-1]))
                )
        network(torch.empty(1, 1, 2048, 2048))
    listed = {(layer.cout, layer.cin, layer.kernel, layer.stride, layer.side) for layer in gpu_ops.resnet50()}
    assert listed == seen
    layer = gpu_ops.Layer(64, 128, 3, 2, 512)
    assert layer.flops == 2 * 256**2 * 128 * 64 * 9 and layer.bytes == 2 * (512**2 * 64 + 256**2 * 128)


@pytest.mark.parametrize("training", [True, False])
def test_a_step_is_timed_without_what_is_told_of_it(monkeypatch, training):
    """Reading loss and gradients waits for the GPU, and a norm for each parameter is launched."""
    timing, read = [], []

    def time_call(call, device):
        timing.append(True)
        call()
        timing.pop()
        return 1.0, 1.0

    def untimed(method):
        def called(*given):
            read.append(method.__name__)
            assert not timing
            return method(*given)

        return called

    monkeypatch.setattr(gpu_steps, "time_call", time_call)
    for name in ("item", "norm"):
        monkeypatch.setattr(torch.Tensor, name, untimed(getattr(torch.Tensor, name)))
    row = gpu_steps.measure(gpu_steps.GpuStep("small", training, 64, "ours_auto"), 48, 3.0)
    other = gpu_steps.measure(gpu_steps.GpuStep("small", training, 64, "channels_last"), 48, 3.0)
    assert len(row["seconds"]) == 2 and row["mpx_per_s"] == 64**2 / 1e6 and set(read) <= {"item", "norm"}
    assert "stock_bytes" not in row and ("gradient" in row) == training
    for key in ("loss", "gradient") if training else ("loss",):
        assert row[key] == pytest.approx(other[key], rel=0.03)


def test_unknown_section_is_an_error(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--json", str(tmp_path / "a.json"), "--only", "all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "all unknown; sections are ceilings" in done.stderr


def test_dry_run(tmp_path):
    """Every section's code, on the CPU and in the interpreter."""
    path = tmp_path / "dry.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GIGAMORPH_CACHE": str(tmp_path)}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--json", str(path), "--dry", "--cache", str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(path.read_text())
    assert not data["skipped"]
    assert not gpu.failures(data), path.with_suffix(".log").read_text()
    wrong = {name: row for name, row in data["checks"].items() if not (row["ok"] and row["reproducible"])}
    assert not wrong
    assert all({"ours"} < set(row["ms"]) for row in data["ops"].values())
    assert data["ceilings"]["machine"]["triton"] and data["ceilings"]["ceilings"]["gb_per_s"] > 0
    assert "checks: " in done.stdout and "DIFFERS" not in done.stdout
    assert data["steps"]["small train 32 ours"]["mpx_per_s"] > 0
