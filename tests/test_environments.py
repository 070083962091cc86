"""gigamorph works in a container: no account, no home folder, no compiler, no network, paths with spaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Of each process: no account (as for a container's arbitrary uid), no network.
_SITE = """
import pwd, socket

def unknown(_uid):
    raise KeyError("uid not found")

def offline(*_arguments):
    raise OSError("Network is unreachable")

pwd.getpwuid = unknown
socket.socket.connect = offline
"""
_WORK = """
import sys
import torch
from gigamorph import accelerate, create_model
from gigamorph.cli.main import _run

net, x = create_model("lesionnet"), torch.rand(1, 1, 96, 80)
torch.testing.assert_close(accelerate(net, tile=32)(x), net(x))
assert _run(["doctor"]) == 0
assert _run("data phantom --patients 6 --size 128x96 --workers 1 --out".split() + ["my images"]) == 0
options = "--model lesionnet?stages=1 --mean 0.3 --std 0.1 --epochs 1 --memory-budget 64MiB --quiet --out"
assert _run(["train", "my images/phantoms.csv", *options.split(), "my run"]) == 0
assert _run(["predict", "my run/best.ckpt", "my images/phantoms.csv", "--out", "my predictions"]) == 0
"""


@pytest.mark.parametrize("home", [None, "/proc/none"], ids=["none", "not writable"])
def test_in_a_container(home: str | None, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "a folder with spaces"
    site.mkdir()
    work.mkdir()
    (site / "sitecustomize.py").write_text(_SITE)
    paths = [str(site), str(ROOT)]
    env = {"PATH": "/none", "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"} | ({"HOME": home} if home else {})
    before = {path for folder in ("engine", "kernels", "cli") for path in (ROOT / folder).rglob("*.so")}
    ran = subprocess.run(
        [sys.executable, "-B", "-c", _WORK], check=False, cwd=work, env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (work / "my predictions").is_dir()
    after = {path for folder in ("engine", "kernels", "cli") for path in (ROOT / folder).rglob("*.so")}
    assert after == before, "the package's own folder may be read-only"
