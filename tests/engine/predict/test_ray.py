"""The runner on a real Ray cluster of several processes on this machine: rows are those of the embedded one."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import archives
import pytest
import torch

from gigamorph.cli.main import main
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.predict import by_ray
from gigamorph.engine.predict.devices import DeviceSettings, Outcome
from gigamorph.engine.predict.parts import read_parts
from gigamorph.engine.predict.rows import Row, Work
from gigamorph.engine.predict.run import PredictOptions, predict

COUNT = 60
RAY = PredictOptions("m", workers=0, max_failures=0.5, engine="ray", devices=2)


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    table = archives.make_archive(tmp_path / "images", 2)
    with pytest.raises(GigamorphError, match=r"--engine ray needs Ray .*: pip install 'gigamorph\[ray\]'"):
        predict(archives.tiny, [table], tmp_path / "out", RAY)


def test_an_address_is_rays(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "x.ckpt", "a.dcm", "--out", str(tmp_path / "o"), "--address", "auto"])
    assert "--address needs --engine ray" in capsys.readouterr().err


class RayError(Exception):
    """A stand-in for Ray's."""


class TaskError(RayError):
    """A stand-in for what an actor has raised."""


def dealt(monkeypatch, tmp_path, *endings):
    """The outcomes of ten images with an actor whose calls end so: with results, or with such an error."""
    given = archives.make_archive(tmp_path / "images", 10).parent
    work = [Work(str(n), Row(Record(given / f"{n:04d}.npy", -1, f"p{n}"))) for n in range(10)]
    ended, calls = iter(endings), []

    def get(call):
        if call.given and (error := next(ended)) is not None:
            raise error("an actor has died")
        return [Outcome(one, {"key": one.key}) for one in call.given]

    class Call:
        def __init__(self, some):
            calls.append("".join(one.key for one in some))
            self.given = some

    actor = SimpleNamespace(compute=SimpleNamespace(remote=Call, options=lambda **_: SimpleNamespace(remote=Call)))
    fake = SimpleNamespace(
        exceptions=SimpleNamespace(RayError=RayError, RayTaskError=TaskError),
        is_initialized=lambda: True,
        remote=lambda **_: lambda kind: SimpleNamespace(remote=lambda *_: actor),
        wait=lambda given: (given[:1], given[1:]),
        get=get,
    )
    monkeypatch.setattr(by_ray, "_ray", lambda: fake)
    settings = DeviceSettings(0, tmp_path, True)
    return calls, by_ray.compute_by_ray(None, settings, iter(work), 1, None)  # pyright: ignore


def test_images_of_a_dead_actor_are_computed_again(monkeypatch, tmp_path):
    calls, found = dealt(monkeypatch, tmp_path, RayError, RayError, None, RayError, RayError, None)
    assert sorted(one.work.key for one in found) == list("0123456789")
    assert calls == ["", "01234567", "89", "", "89012345", "67", "", "67", "", "67"]


def test_deaths_without_results_and_errors_of_actors_end_the_run(monkeypatch, tmp_path):
    done = []
    calls, found = dealt(monkeypatch, tmp_path, None, *3 * [RayError])
    with pytest.raises(GigamorphError, match=r"^Ray: .*an actor has died; results so far are stored"):
        done.extend(one.work.key for one in found)
    assert done == list("01234567") and calls[3:] == ["", "89", "", "89"]
    calls, found = dealt(monkeypatch, tmp_path, TaskError)
    with pytest.raises(GigamorphError, match=r"^Ray: "):
        list(found)
    assert calls == ["", "01234567", "89"]


@pytest.fixture
def cluster(monkeypatch):
    """A head without images to compute and two nodes, each a process with processes of its own."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    here = Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here / "tests" / "helpers"), *sys.path]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **args})
    for _ in range(2):
        found.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    yield found
    found.shutdown()


@pytest.mark.slow
def test_an_actor_and_a_node_are_killed_and_the_rows_are_those_of_the_embedded_run(tmp_path, cluster):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the actors
    table = archives.make_archive(tmp_path / "images", COUNT)
    (tmp_path / "images" / "0017.npy").write_bytes(b"damaged")
    predict(archives.tiny, [table], tmp_path / "here", replace(RAY, engine="embedded", devices=1))
    torch.set_num_threads(threads)
    opener = functools.partial(archives.slow, seconds=0.1)
    done: list[str] = []

    def kept() -> int:
        return sum(len(rows) for rows in read_parts(tmp_path / "out" / "parts"))

    def kill() -> None:
        while kept() < 8:
            time.sleep(0.1)
        os.kill(archives.ray_actors()[0], signal.SIGKILL)
        done.append(f"actor after {kept()}")
        while kept() < 24:
            time.sleep(0.1)
        cluster.remove_node(sorted(cluster.worker_nodes, key=str)[-1], allow_graceful=False)
        done.append(f"node after {kept()}")

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    options = replace(RAY, address=cluster.address)
    found = predict(opener, [table], tmp_path / "out", options)
    killer.join(10)
    assert len(done) == 2 and (found.done, found.failed, found.complete) == (COUNT - 1, 1, True)
    for name in ("predictions.csv", "breasts.csv", "quarantine.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    keys = [row["key"] for rows in read_parts(tmp_path / "out" / "parts") for row in rows]
    assert len(set(keys)) == len(keys) == COUNT - 1
    # An image that kills whoever computes it ends the run, with what else is done, and in one line.
    with pytest.raises(GigamorphError, match=r"^Ray: .*; results so far are stored, --resume continues$"):
        predict(archives.deadly, [table], tmp_path / "deadly", options)
    # What is written is not done again: nothing is left for a cluster.
    again = predict(opener, [table], tmp_path / "out", replace(options, resume=True, address="127.0.0.1:9"))
    assert (again.computed, again.done) == (0, COUNT - 1)


@pytest.mark.slow
def test_the_command_starts_a_cluster_of_its_own(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray")
    from gigamorph.engine.mammography.phantom import write_phantoms

    here = Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here / "tests" / "helpers"), *sys.path]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = write_phantoms(tmp_path / "p", patients=6, height=128, width=96, seed=1)

    def run(*args: object) -> list[str]:
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in args])
        shown = capsys.readouterr()
        assert ended.value.code == 0, shown.err
        return shown.out.splitlines()

    run("train", table, "--out", tmp_path / "run", "--model", "lesionnet", "--epochs", "1")
    command = ["predict", tmp_path / "run" / "best.ckpt", table, "--out"]
    run(*command, tmp_path / "here")
    end = json.loads(run(*command, tmp_path / "ray", "--engine", "ray", "--workers", "1", "--json")[-1])
    torch.set_num_threads(threads)
    assert end["event"] == "end" and end["complete"] and end["done"] == 12
    for name in ("predictions.csv", "exams.csv"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
