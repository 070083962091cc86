"""Peers take turns, and every one that fails is told apart from those that do not."""

import dataclasses

import pytest
import torch
from torch import nn

from gigamorph.engine.bench import step as bench_step
from gigamorph.engine.bench.peers import PEERS
from gigamorph.engine.bench.process import Child
from gigamorph.engine.bench.results import EQUAL_MEMORY, FAILED, NOT_RUN, OK, OUT_OF_MEMORY, REFUSED, WRONG, BenchTask
from gigamorph.engine.bench.step import StepOptions, measure
from gigamorph.engine.bench.work import PeerWork, build

TASK = BenchTask("lesionnet", (1, 1, 96, 64))


def test_a_network_for_masks_has_no_thousand_maps():
    """They took 3 GB of a 0.8 megapixel image, where `gigamorph plan` said 134 MiB."""
    network = build(BenchTask("unet?width=2&depth=1", (1, 1, 8, 8)))
    assert network(torch.zeros(1, 1, 8, 8)).shape == (1, 2, 8, 8)


class Pretended:
    """Stands in for a process: seconds and results by peer, in the order in which they are asked for."""

    log: list[str] = []  # noqa: RUF012

    def __init__(self, longest):
        self.peer = ""

    def __exit__(self, *error):
        self.log.append(f"{self.peer} ends")

    def __enter__(self):
        return self

    def start(self, task, peer, settings, cap):
        self.peer = peer
        if peer == "compile":
            return {"status": FAILED, "reason": "no compiler"}
        return {"status": OK, "prepare_seconds": 0.5}

    def run(self, steps, warm=0):
        self.log.append(self.peer)
        if self.peer == "channels-last":
            return {"status": OUT_OF_MEMORY, "reason": "no room"}
        peak = 5000 if self.peer == "checkpoint" else 900
        times = {"seconds": [1.0], "cpu_seconds": [1.5]}
        return {"status": OK, **times, "peak_bytes": peak, "process_bytes": 9000, "nvml_bytes": None}

    def ask(self, do, path):
        assert do == "save"
        value = 2.0 if self.peer == "gigamorph" else 1.0
        tensors = {"outputs": {"output": torch.tensor([value])}, "gradients": {"w": torch.ones(1)}, "buffers": {}}
        torch.save(tensors, path)
        return {"status": OK}


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(bench_step, "Child", Pretended)
    monkeypatch.setattr(Pretended, "log", [])
    return Pretended


def test_peers_take_turns_and_keep_their_status(pretended):
    peers = ("stock", "channels-last", "compile", "checkpoint", "gigamorph", "lightstream")
    live = dataclasses.replace(TASK, batch_norm="live")
    said = []
    rows = measure(live, StepOptions(peers, rounds=2, cap=1000), {}, said.append)
    status = {row.peer: row.status for row in rows}
    assert status == {
        "stock": OK,
        "channels-last": OUT_OF_MEMORY,
        "compile": FAILED,
        "checkpoint": OUT_OF_MEMORY,
        "gigamorph": WRONG,
        "lightstream": NOT_RUN,
    }
    reasons = {row.peer: row.reason or "" for row in rows}
    assert "exceeds the cap" in reasons["checkpoint"] and "the output differs" in reasons["gigamorph"]
    assert sorted(row.peer for row in said) == sorted(peers)
    # First steps one after the other, then by turns: stock, gigamorph, stock, gigamorph.
    turns = [name for name in pretended.log if not name.endswith("ends")]
    assert turns == ["stock", "channels-last", "checkpoint", "gigamorph", *("stock", "gigamorph") * 2]
    assert all(row.seconds == [1.0, 1.0] for row in rows if row.status in (OK, WRONG))
    assert [row.first_seconds for row in rows if row.peer == "stock"] == [1.5]


@pytest.mark.parametrize("box, turns", [(0.1, 1), (1.5, 1), (2.5, 2)])
def test_a_box_of_time_ends_the_turns_but_not_before_the_first(pretended, box, turns):
    (row,) = measure(TASK, StepOptions(("stock",), rounds=9, box=box), {})
    assert len(row.seconds) == turns


def test_lightstream_gets_a_second_row_in_what_gigamorph_took(pretended, monkeypatch):
    monkeypatch.setattr("gigamorph.engine.bench.peers.importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(bench_step, "tiles_to_try", lambda *_: [64])
    monkeypatch.setattr(bench_step, "tile_within", lambda network, task, budget: budget // 10)
    peers = ("stock", "lightstream", "gigamorph")
    rows = measure(TASK, StepOptions(peers, rounds=1, cap=1000), {})
    assert [row.peer for row in rows] == [*peers, EQUAL_MEMORY]
    assert [row.cap_bytes for row in rows] == [1000, 1000, 1000, 900]
    assert (rows[-1].settings, rows[-1].status, rows[-1].base_peer) == ({"tile": 90}, OK, "lightstream")
    monkeypatch.undo()
    monkeypatch.setattr(bench_step, "Child", Pretended)
    monkeypatch.setattr("gigamorph.engine.bench.peers.importlib.util.find_spec", lambda name: name)
    last = measure(TASK, StepOptions(peers, rounds=1, cap=10**9), {})[-1]
    assert last.status == OUT_OF_MEMORY and "no lightstream tile" in (last.reason or "") and not last.seconds
    monkeypatch.setattr("gigamorph.engine.bench.peers.importlib.util.find_spec", lambda name: None)
    assert [row.peer for row in measure(TASK, StepOptions(peers, rounds=1), {})] == list(peers)


def test_the_first_step_of_what_compiles_is_no_time_of_a_step(pretended, monkeypatch):
    monkeypatch.setattr(Pretended, "start", lambda self, *_: {"status": OK, "prepare_seconds": 0.0})
    monkeypatch.setattr(
        Pretended,
        "run",
        lambda self, steps, warm=0: {
            "status": OK,
            "seconds": [next(clock)],
            "cpu_seconds": [1.0],
            "peak_bytes": 1,
            "process_bytes": 1,
            "nvml_bytes": None,
        },
    )
    clock = iter((30.0, 2.0, 30.0))
    (row,) = measure(TASK, StepOptions(("compile",), rounds=1, box=1.0), {})
    assert (row.seconds, row.first_seconds) == ([2.0], 30.0)
    (row,) = measure(TASK, StepOptions(("stock",), rounds=1, box=1.0), {})
    assert row.seconds == [30.0]


def test_predictions_and_the_floor_stand_beside_the_measured(pretended):
    ceilings = {"gb_per_s": 1.0, "tflop_per_s fp32": 1e-3}
    stock, ours = measure(TASK, StepOptions(("stock", "gigamorph"), rounds=1, tile=32), ceilings)
    assert stock.predicted_bytes and ours.predicted_bytes and ours.settings["tile"] == [32, 32]
    assert stock.flops == ours.flops and stock.roofline_seconds
    assert stock.roofline_seconds >= (stock.flops or 0) / 1e9


@pytest.mark.usefixtures("forked_peers")
@pytest.mark.usefixtures("forked_peers")
def test_processes_agree_in_float64(tmp_path):
    """The whole way: processes, small tiles, results compared, a trace written."""
    task = dataclasses.replace(TASK, precision="fp64")
    options = StepOptions(("stock", "checkpoint", "gigamorph"), rounds=1, tile=32, cap=2**30, folder=tmp_path)
    stock, checkpoint, ours = measure(task, options, {})
    assert stock.status == OK and stock.check is None, stock.reason
    assert ours.status == OK and ours.check is not None, ours.reason
    assert 0 < (ours.check.gradients or 0) < 1e-12 and ours.check.against == "stock"
    assert checkpoint.status in (OK, REFUSED)
    assert stock.peak_bytes and ours.peak_bytes and ours.process_bytes and ours.process_bytes > ours.peak_bytes
    folder = next(path for path in tmp_path.iterdir() if "gigamorph" in path.name)
    assert {path.name for path in folder.iterdir()} == {"trace.json"}
    assert "tile done: backward" in (folder / "trace.json").read_text()


def test_a_process_that_is_ended_by_the_system_has_run_out_of_memory():
    with Child() as child:
        child._process.kill()
        assert child.run(1)["status"] == OUT_OF_MEMORY


@pytest.mark.usefixtures("forked_peers")
def test_a_step_that_takes_too_long_is_stopped():
    with Child(longest=0.05) as child:
        assert child.start(TASK, "stock", {}, None) == {"status": NOT_RUN, "reason": "stopped after 0 s"}
        assert child._process.wait(10) < 0


@pytest.mark.parametrize(
    "error, status",
    [
        (MemoryError(), OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), OUT_OF_MEMORY),
        (RuntimeError("std::bad_alloc"), OUT_OF_MEMORY),
        (RuntimeError("shapes cannot be multiplied"), FAILED),
    ],
)
def test_errors_have_a_status(error, status):
    from gigamorph.engine.bench.process import status_of

    assert status_of(error)[0] == status


def test_every_peer_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr("gigamorph.engine.bench.peers.importlib.util.find_spec", lambda name: None)
    inference = dataclasses.replace(TASK, training=False, precision="bf16")
    why = {name: peer.missing(inference) for name, peer in PEERS.items()}
    assert "pip install" in (why["lightstream"] or "") and "backward" in (why["checkpoint"] or "")
    assert "bf16" in (why["bf16"] or "") and why["stock"] is why["gigamorph"] is None


@pytest.mark.parametrize(
    ("peer", "dtype", "last", "limits"),
    [
        ("stock", torch.float32, False, (0.0, 0.0)),
        ("channels-last", torch.float32, True, (0.0, 1e-3)),
        ("bf16", torch.bfloat16, True, (1e-4, 0.1)),
    ],
)
def test_precision_and_memory_order_are_those_of_the_peers_name(peer, dtype, last, limits):
    ordinary, work = (PeerWork(TASK, name, {}, None) for name in ("stock", peer))
    seen = []

    def look(module: nn.Module, args: object, output: torch.Tensor) -> None:
        seen.append((output.dtype, output.stride(1) == 1))

    [*_, conv] = [module for module in work.network.modules() if isinstance(module, nn.Conv2d)]
    conv.register_forward_hook(look)
    for one in (ordinary, work):
        one.run(1)
    assert seen == [(dtype, last)]
    a, b = (torch.cat([p.grad.flatten() for p in one.network.parameters()]) for one in (ordinary, work))
    far = float((a - b).norm() / a.norm())
    assert limits[0] <= far <= limits[1]


def test_compiling_needs_a_compiler_on_the_cpu(monkeypatch):
    monkeypatch.setattr("gigamorph.engine.bench.peers.shutil.which", lambda name: None)
    assert "g++" in (PEERS["compile"].missing(TASK) or "")
    assert PEERS["compile"].missing(dataclasses.replace(TASK, device="cuda")) is None


@pytest.mark.usefixtures("forked_peers")
@pytest.mark.skipif(PEERS["compile"].missing(TASK) is not None, reason="no C++ compiler")
def test_real_processes_compile():
    task = BenchTask("unet?width=2&depth=1", (1, 1, 32, 32))  # inductor compiles each of a network's few kernels by g++
    stock, compiled = measure(task, StepOptions(("stock", "compile"), rounds=1), {})
    assert compiled.status == OK and compiled.seconds and compiled.check, compiled.reason
    assert compiled.check.against == "stock" and compiled.first_seconds > 2 * compiled.seconds[0]
    assert stock.status == OK


def test_checkpointing_a_vgg_keeps_its_function():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Module()
    net.features = nn.Sequential(*layers)
    net.forward = lambda x: net.features(x)
    image = torch.rand(1, 1, 20, 20)
    expected = net(image)
    _, run = PEERS["checkpoint"].prepare(net, TASK, {})
    assert torch.equal(run(image), expected)
    assert layers[0].weight.grad is not None and layers[3].weight.grad is not None


@pytest.mark.usefixtures("forked_peers")
def test_the_exactness_of_a_network_of_one_size_is_looked_at_on_that_size():
    model = "timm:vit_tiny_patch16_224?img_size=64&depth=1&embed_dim=24&num_heads=2&num_classes=2"
    rows = bench_step.exactness(BenchTask(model, (1, 1, 64, 64), training=False))
    assert {row.peer: row.status for row in rows} == {"stock": OK, "gigamorph": OK}
    assert all(row.task.image == (1, 1, 64, 64) and row.task.precision == "fp64" for row in rows)
