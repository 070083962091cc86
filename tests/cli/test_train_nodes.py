"""`gigamorph train` over nodes: two launchers of two processes each on this machine, one of which is killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import time

import pytest
import torch
from exactness import errors
from forked import Forked, torchrun

from gigamorph.cli.main import main
from gigamorph.engine.mammography.phantom import write_phantoms

TRAIN = ["--model", "training:normed", "--epochs", "3", "--accumulate", "4"]


def test_two_nodes_with_two_processes_each_go_on_after_one_is_killed(tmp_path, capsys):
    """Pairs share each image, the pairs have different ones; torchrun starts all anew from the last checkpoint."""
    table = write_phantoms(tmp_path / "p", patients=4, height=128, width=96, seed=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "nodes"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    size = ["--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.2"]
    command = ["train", str(table), *TRAIN, "--out", str(out), "--devices-per-image", "2", "--timeout", "2min"]
    nodes = [Forked(torchrun, [*size, *meeting], command) for _ in range(2)]

    def said() -> str:
        return "\n".join(node.output + node.error for node in nodes)

    try:
        end = time.monotonic() + 240
        while not (out / "last.ckpt").exists():
            assert time.monotonic() < end and all(node.poll() is None for node in nodes), said()
            time.sleep(0.02)
        victim = re.findall(r"rank \d is process (\d+)", nodes[1].output)[-1]
        os.kill(int(victim), signal.SIGKILL)
        assert [node.wait() for node in nodes] == [0, 0], said()
    finally:
        for node in nodes:
            node.end()
    assert re.search(r"train 3/3 +loss", said()) and "already holds" not in said()
    assert said().count("in 4 processes") == 2  # it was begun anew once
    with pytest.raises(SystemExit) as ended:
        main(["train", str(table), *TRAIN, "--out", str(tmp_path / "alone")])
    assert ended.value.code == 0
    stored = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (tmp_path / "alone", out)]
    assert max(errors(stored[0]["state_dict"], stored[1]["state_dict"]).values()) < 1e-9
    rows = [[row.split(",")[:4] for row in (f / "log.csv").read_text().splitlines()] for f in (tmp_path / "alone", out)]
    assert len(rows[0]) == 4 and rows[0] == rows[1]
