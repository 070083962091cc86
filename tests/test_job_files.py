"""The job files of examples/, run as the schedulers would run them: a process for each shard."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from forked import Forked, gigamorph

from gigamorph.cli.main import main
from gigamorph.engine.mammography.phantom import write_phantoms

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(*args: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in args])
    assert ended.value.code == 0


def test_an_array_of_slurm_and_an_indexed_job_of_kubernetes_are_one_run(tmp_path, monkeypatch):
    """The first of two shards as a task of the array, the second as a pod, at the same time, into one folder."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    table = write_phantoms(tmp_path / "p", patients=6, height=128, width=96, seed=1)
    run("train", table, "--out", tmp_path / "run", "--model", "lesionnet?stages=1", "--epochs", "1")
    checkpoint, out = tmp_path / "run" / "best.ckpt", tmp_path / "predictions"
    command = tmp_path / "bin" / "gigamorph"
    command.parent.mkdir()
    command.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {tmp_path}/$SHARD\n")  # what it is to do is done below
    command.chmod(0o755)
    env = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    task = ["bash", EXAMPLES / "slurm_array.sh", checkpoint, table, out, "2"]
    [pod] = yaml.safe_load((EXAMPLES / "kubernetes_predict.yaml").read_text())["spec"]["template"]["spec"]["containers"]
    assert {one["name"] for one in pod["env"]} == {"CHECKPOINT", "TABLE", "OUT", "SHARDS"}
    given = {"CHECKPOINT": str(checkpoint), "TABLE": str(table), "OUT": str(out), "SHARDS": "2"}
    subprocess.run(task, env={**env, "SHARD": "1", "SLURM_ARRAY_TASK_ID": "1"}, check=True)
    own = {**env, **given, "SHARD": "2", "JOB_COMPLETION_INDEX": "1"}
    subprocess.run([*pod["command"], *pod["args"]], env=own, check=True)
    words = [(tmp_path / shard).read_text().split("\0")[:-1] for shard in ("1", "2")]
    started = [Forked(gigamorph, each) for each in words]
    assert [process.wait() for process in started] == [0, 0], [process.error for process in started]
    run("predict", checkpoint, table, "--out", tmp_path / "whole")
    for name in ("predictions.csv", "breasts.csv"):
        lines = [(folder / name).read_text().splitlines() for folder in (out, tmp_path / "whole")]
        assert [line.split(",")[0] for line in lines[0]] == [line.split(",")[0] for line in lines[1]]
        odds = [[float(line.rsplit(",", 1)[1]) for line in some[1:]] for some in lines]
        assert odds[0] == pytest.approx(odds[1], rel=1e-4, abs=1e-5)  # the threads are not as many


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_every_script_is_one_that_bash_understands(script):
    found = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
