"""`gigamorph train --devices`: the processes that it starts, what they leave, and how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from commands import run
from exactness import errors
from forked import Forked, devices, gigamorph

from gigamorph.engine.mammography.phantom import write_phantoms

pytestmark = pytest.mark.usefixtures("undrawn")
FAST = ["--model", "training:live", "--epochs", "3", "--accumulate", "4"]
SPLIT = ["--devices", "2", "--split-image"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), patients=8, height=128, width=96, seed=1)


def forked(*words: object) -> Forked:
    """`gigamorph WORDS`, whose processes are not begun anew: that takes seconds, and one test does it."""
    return Forked(devices, [str(word) for word in words])


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)


def processes() -> dict[int, int]:
    """The running processes of this machine, and which process has started each."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = file.read_text().split(" ", 1)
        except OSError:  # it has ended
            continue
        state, parent = rest.rpartition(")")[2].split()[:2]
        if state != "Z":
            found[int(number)] = int(parent)
    return found


def test_ctrl_c_stops_all_and_the_resumed_run_is_that_of_one_process(phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train", phantoms, *FAST, "--epochs", "4", "--out"]
    assert run(*command, tmp_path / "alone") == 0
    (tmp_path / "slow.py").write_text(  # an epoch takes milliseconds, and this process may have to wait for longer
        "import os, time\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Slow(Callback):\n"
        "    def on_train_batch_start(self, trainer, *others):\n"
        "        time.sleep('SLOW' in os.environ and trainer.current_epoch > 0)\n"
    )
    # The processes that it starts find modules on this path.
    helpers = str(Path(__file__).parents[1] / "helpers")
    path = {"PYTHONPATH": f"{helpers}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    slow = [*command, tmp_path / "split", *SPLIT, "--callback", "slow:Slow"]
    child = Forked(gigamorph, [str(word) for word in slow], env={**path, "SLOW": "1"})
    started: set[int] = set()
    last = tmp_path / "split" / "last.ckpt"
    while not last.exists():  # three slow epochs are left then
        assert child.poll() is None, child.error
        if len(started) < 2:  # the look at all processes takes long where there are many
            started |= {number for number, parent in processes().items() if parent == child.pid}
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    assert len(started) == 2
    assert child.wait() == 130, child.error
    assert child.error == f"stopped; the same command with --resume continues from {last}\n"
    assert child.output.count("in 2 processes") == 1
    assert not (tmp_path / "split" / "metrics.json").exists()
    end = time.monotonic() + 30
    while started & processes().keys() and time.monotonic() < end:
        time.sleep(0.1)
    assert not started & processes().keys()

    resumed = forked(*command, tmp_path / "split", *SPLIT, "--resume")
    assert resumed.wait() == 0, resumed.error
    assert resumed.output.count("train 4/4  loss") == 1 and not resumed.error
    first, second = (checkpoint(tmp_path / name)["state_dict"] for name in ("alone", "split"))
    assert max(errors(first, second).values()) < 1e-9
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("alone", "split")]
    assert metrics[0]["test"] == metrics[1]["test"] and metrics[0]["best_epoch"] == metrics[1]["best_epoch"]


def test_an_error_in_one_process_ends_all_with_one_line(phantoms, tmp_path):
    """Of a file that only one process opens; the others wait for it."""
    victim = sorted((phantoms.parent / "images").iterdir())[0]
    table = phantoms.with_name("damaged.csv")
    lines = phantoms.read_text().splitlines()
    table.write_text("\n".join(line.replace(victim.name, "damaged.dcm") for line in lines))
    damaged = victim.with_name("damaged.dcm")
    damaged.write_bytes(victim.read_bytes()[:2000])
    child = forked("train", table, *FAST, "--out", tmp_path / "run", "--devices", "2", "--batch-norm", "frozen")
    assert child.wait() == 2
    assert child.error.startswith("error: ") and "damaged.dcm" in child.error and child.error.count("\n") == 1


def test_a_process_that_a_launcher_has_started(phantoms, tmp_path, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    command = ["train", phantoms, *FAST, "--epochs", "1", "--out", tmp_path / "run"]
    assert run(*command, "--devices", "2") == 2
    assert "--devices 2 contradicts the launcher, which started 1" in capsys.readouterr().err
    assert run(*command, "--split-image") == 0
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_what_cannot_be(phantoms, tmp_path, capsys):
    command = ["train", phantoms, *FAST, "--out", tmp_path / "run"]
    assert run(*command, "--split-image") == 2
    assert "give their number with --devices" in capsys.readouterr().err
    unread = phantoms.with_name("unread.csv")  # is told before any image is looked for
    unread.write_text("image_path,label,patient_id\nnone.png,0,p\n")
    child = forked("train", unread, *command[2:], "--accumulate", "3", "--devices", "2")
    assert child.wait() == 2
    assert "3 images per optimizer step cannot be distributed to 2 processes" in child.error
    assert child.error.count("\n") == 1


def test_more_processes_than_the_memory_has_room_for(phantoms, tmp_path, monkeypatch, capsys):
    """Ninety-nine of them kept a machine busy for minutes before anything was said."""
    monkeypatch.setattr("gigamorph.engine.tiling.memory.available_bytes", lambda: 8 * 2**30)
    assert run("train", phantoms, "--devices", "99", "--out", tmp_path / "run") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "--devices 99: these processes need 29.0 GiB at start, but only 8.00 GiB are free" in told
    assert not (tmp_path / "run").exists()
