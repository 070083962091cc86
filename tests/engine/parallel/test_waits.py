"""No process waits for another for ever, and the error names the one to look at."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.parallel import launch
from gigamorph.engine.parallel.process_registry import Roll

SECONDS = 3.0


def together(folder: Path, work: list[Callable[[], object]], size: int | None = None) -> list[str]:
    """What each of some forked processes of a group ends with, and whether it was in time."""
    size = size or len(work)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank, own in enumerate(work):
        child = os.fork()
        if not child:
            text = ""
            try:
                torch.set_num_threads(1)
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), TORCHELASTIC_USE_AGENT_STORE="True")
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
                with launch.process_group("cpu", timeout=SECONDS):
                    own()
            except GigamorphError as error:
                text = str(error)
            except BaseException as error:
                text = repr(error)
            finally:
                (folder / f"{rank}.json").write_text(json.dumps(text))
                os._exit(0)
        children.append(child)
    deadline = time.monotonic() + 60
    while len(children) > work.count(hang) and time.monotonic() < deadline:
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
        time.sleep(0.02)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = [folder / f"{rank}.json" for rank in range(len(work))]
    return [json.loads(path.read_text()) if path.exists() else "no end" for path in found]


def meet() -> None:
    dist.all_reduce(torch.ones(1))


def meet_twice() -> None:
    meet()
    meet()


def hang() -> None:
    meet()
    time.sleep(90)


def die() -> None:
    meet()
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    meet()
    raise DataError("b.dcm: is truncated; fetch the file again")


def test_all_is_well(tmp_path):
    assert together(tmp_path, [meet_twice, meet_twice]) == ["", ""]


def test_a_group_ends_with_its_threads():
    """They ran on until the process ended, for functions imported meanwhile had the group as a default."""
    code = """
import time
from pathlib import Path
from torch import nn
from gigamorph import accelerate
from gigamorph.engine.parallel.launch import process_group

def names():
    for task in Path("/proc/self/task").iterdir():
        try:
            yield (task / "comm").read_text()
        except (FileNotFoundError, ProcessLookupError):
            pass  # it ended meanwhile

def wait_for_gloo(there):  # a thread names itself after it has begun, and is listed for a moment after its end
    deadline = time.monotonic() + 30
    while any("gloo" in name for name in names()) is not there:
        assert time.monotonic() < deadline, list(names())
        time.sleep(0.01)

wait_for_gloo(False)
with process_group("cpu"):
    accelerate(nn.Conv2d(1, 1, 3), tile=64)
    wait_for_gloo(True)
wait_for_gloo(False)
"""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    env = {**os.environ, **given, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_a_process_that_hangs_is_named_by_all_that_wait_for_it(tmp_path):
    found = together(tmp_path, [meet_twice, meet_twice, hang])
    for text in found[:2]:
        assert text.startswith("process 2 of 3 (") and "gave no answer within 3 s" in text and "--timeout" in text
    assert found[2] == "no end"


def test_who_was_cut_off_by_one_that_waited_too_long_names_the_same_process(monkeypatch):
    monkeypatch.setattr("gigamorph.engine.parallel.process_registry._MOMENT", 0.2)
    store, errors = dist.HashStore(), ("Timed out waiting 3000ms for recv", "Connection closed by peer")
    waiting = [Roll(store, rank, 3, timedelta(seconds=SECONDS), again=False) for rank in range(2)]
    for rank in range(3):
        store.set(f"here/{rank}", f"host, pid {rank}")
    for roll, text in zip(waiting, errors, strict=True):
        roll.end(RuntimeError(text))
    for roll, text in zip(waiting, errors, strict=True):
        assert roll.blame(RuntimeError(text)).startswith("process 2 of 3 (host, pid 2) gave no answer within 3 s")


def test_a_process_that_dies_is_named_at_once(tmp_path):
    began = time.monotonic()
    found = together(tmp_path, [meet_twice, die])
    assert found[0].startswith("process 1 of 2 (") and "has ended; --resume continues" in found[0]
    assert time.monotonic() - began < 20


def test_a_process_that_fails_tells_the_others_why(tmp_path):
    found = together(tmp_path, [fail, meet_twice])
    assert "b.dcm: is truncated" in found[0]
    assert found[1].startswith("process 0 of 2 (") and found[1].endswith(f"failed: {found[0]}")


def test_a_process_that_does_not_come_is_named(tmp_path):
    [text] = together(tmp_path, [meet], size=3)
    assert text.startswith("process 1, 2 of 3 did not start within 3 s")


def test_no_process_to_meet(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "9")
    with (
        pytest.raises(GigamorphError, match="process 1 of 2 cannot reach the store of the group"),
        launch.process_group("cpu", timeout=1),
    ):
        raise AssertionError("not reached")


def sleep_until_interrupted(ready: Any) -> None:
    try:
        # A shell that runs tests in the background has switched Ctrl-C off for all that they start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ready.set()
        time.sleep(60)
    except KeyboardInterrupt:
        os._exit(3)


def test_sigterm_is_passed_on_as_a_ctrl_c(monkeypatch):
    """It ended the process that had started the others, before they had written anything."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=sleep_until_interrupted, args=(ready,))
    child.start()
    assert ready.wait(30)

    class Started:
        processes = (child,)
        asked = False

        def join(self, grace_period: float) -> bool:
            if not self.asked:
                self.asked = True
                os.kill(os.getpid(), signal.SIGTERM)
            child.join(30)
            return True

    monkeypatch.setattr(launch.torch_processes, "start_processes", lambda *_args, **_kwargs: Started())
    with pytest.raises(KeyboardInterrupt):
        launch.launch(meet, 1, "cpu")
    assert child.exitcode == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
