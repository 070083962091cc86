"""A run that is killed at random moments, again and again, ends with what a run without kills has."""

import csv
import functools
import os
import random
import shutil
import signal
import sys
import time

import archives
import pyarrow.parquet as pq
import pytest

from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.predict import parts as parts_module
from gigamorph.engine.predict import runner as run_module
from gigamorph.engine.predict.parts import read_parts
from gigamorph.engine.predict.run import PredictOptions, predict

IMAGES = 40


def in_child(work) -> int:
    """The process id of a forked child that does this and ends."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        code = 0
    except GigamorphError:
        code = 2
    finally:
        sys.stdout.flush()
        os._exit(code)


def children(of: int) -> list[int]:
    with open(f"/proc/{of}/task/{of}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.parametrize("workers", [0, 1], ids=["reading itself", "reading ahead"])
def test_runs_that_are_killed_at_random_moments_lose_and_double_nothing(tmp_path, monkeypatch, workers):
    """Until five of them fell while images were being kept, in small parts: kills fall between all of their writes."""
    monkeypatch.setattr(parts_module, "ROWS", 5)
    monkeypatch.setattr(run_module, "Parts", functools.partial(parts_module.Parts, rows=5))
    table = archives.make_archive(tmp_path / "images", IMAGES)
    (tmp_path / "images" / "0007.npy").write_bytes(b"damaged")
    opener = functools.partial(archives.stub, seconds=0.005)  # a network would be recorded in each run
    expected = predict(opener, [table], tmp_path / "whole", PredictOptions("m", max_failures=0.5, workers=0))
    began = time.monotonic()
    predict(opener, [table], tmp_path / "again", PredictOptions("m", max_failures=0.5, workers=workers))
    longest = time.monotonic() - began
    assert (expected.done, expected.failed) == (IMAGES - 1, 1)
    options = PredictOptions("m", max_failures=0.5, workers=workers, resume=True)
    out, drawn = tmp_path / "out", random.Random(workers)
    before: list[str] = []
    kills = kept = 0
    while kept < 5 and kills < 30:
        child = in_child(lambda: predict(opener, [table], out, options))
        time.sleep(drawn.uniform(0.02, 0.35) * longest)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
        keys = [row["key"] for rows in read_parts(out / "parts") for row in rows]
        assert keys[: len(before)] == before and len(set(keys)) == len(keys)  # what was kept stays, in its order
        grown = len(keys) > len(before)
        kept += os.WIFSIGNALED(status) and grown
        longest *= 1.0 if grown else 1.1  # a machine that is busier than it was: later kills
        before = keys
        if os.WIFEXITED(status):  # all is done: begin anew; less busy: earlier kills
            shutil.rmtree(out)
            before, longest = [], longest * 0.7
    assert kept == 5
    predict(opener, [table], out, options)
    for name in ("predictions.csv", "breasts.csv", "quarantine.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    found = pq.read_table(out / "parts").to_pylist()
    assert len({row["key"] for row in found}) == len(found) == IMAGES - 1
    assert len(pq.read_table(out / "quarantine")) == 1


class Killed(BaseException):
    """What a kill is in this process."""


def test_a_kill_at_every_write_of_a_run(tmp_path, monkeypatch):
    """Calls of the system that change files, each once the last one of a run."""
    table = archives.make_archive(tmp_path / "images", 5)
    (tmp_path / "images" / "0003.npy").write_bytes(b"damaged")
    options = PredictOptions("m", max_failures=0.5, workers=0, resume=True)
    predict(archives.stub, [table], tmp_path / "whole", options)
    monkeypatch.setattr(run_module, "Parts", functools.partial(parts_module.Parts, rows=2))
    names = ("write", "fsync", "replace", "link", "ftruncate", "unlink", "pwrite")
    for fault in range(300):
        out, left = tmp_path / str(fault), [fault]

        def failing(real, left=left):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real(*args, **kwargs)

            return call

        killed = False
        with monkeypatch.context() as patched:
            for name in names:
                patched.setattr(os, name, failing(getattr(os, name)))
            try:
                predict(archives.stub, [table], out, options)
            except Killed:
                killed = True
        predict(archives.stub, [table], out, options)
        for name in ("predictions.csv", "breasts.csv", "quarantine.csv"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), fault
        found = pq.read_table(out / "parts").to_pylist()
        assert len({row["key"] for row in found}) == len(found) == 4
        if not killed:
            break
    assert not killed and fault > 30


def test_processes_that_read_end_when_the_run_is_killed(tmp_path):
    table = archives.make_archive(tmp_path / "images", 4)
    opener = functools.partial(archives.stub, seconds=30)
    child = in_child(lambda: predict(opener, [table], tmp_path / "out", PredictOptions("m", workers=2)))
    readers: list[int] = []
    deadline = time.monotonic() + 30
    while len(readers) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
        readers = children(child)
    assert len(readers) == 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while any(os.path.exists(f"/proc/{reader}") for reader in readers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{reader}") for reader in readers)


def test_a_second_run_says_which_process_writes_there(tmp_path):
    table = archives.make_archive(tmp_path / "images", 3)
    out = tmp_path / "out"
    opener = functools.partial(archives.stub, seconds=30)
    child = in_child(lambda: predict(opener, [table], out, PredictOptions("m", workers=0)))
    try:
        deadline = time.monotonic() + 30
        while not (out / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for options in (PredictOptions("m", resume=True), PredictOptions("m", shard=(2, 3), resume=True)):
            with pytest.raises(GigamorphError, match=rf"out: process {child} on .* writes to it; wait for it"):
                predict(archives.stub, [table], out, options)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert predict(archives.stub, [table], out, PredictOptions("m", workers=0, resume=True)).done == 3
    with (out / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
