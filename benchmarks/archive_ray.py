"""Kills at random moments in runs of `gigamorph predict --engine ray`: of actors, nodes, or the command itself.

    python benchmarks/archive_ray.py --kills 60

A head and two nodes are processes of this machine, each with its own worker processes. A small real network, slowed so
that kills fall between images, predicts 60 images. A killed actor or node comes back, and the run must continue; if it
ends, or was killed itself, it is started again with --resume. No row may be lost or doubled, and the tables must equal
those of an embedded run bit for bit. Written to benchmarks/results/archive_kills_ray.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "helpers"))

import archives  # noqa: E402
from archive import RESULTS  # noqa: E402

from gigamorph.engine.errors import GigamorphError  # noqa: E402
from gigamorph.engine.predict.parts import read_parts  # noqa: E402
from gigamorph.engine.predict.run import Options, predict  # noqa: E402

IMAGES, SECONDS = 60, 0.15
TABLES = "predictions.csv", "breasts.csv", "quarantine.csv"
KINDS = "actor", "node", "command"
ENDED = 3  # exit status of a run that reports why it cannot continue


def run(table: Path, out: Path, address: str) -> int:
    """One run with --resume, in a separate process."""
    options = Options("m", workers=0, max_failures=0.5, resume=True, engine="ray", devices=2, address=address)
    try:
        predict(functools.partial(archives.slow, seconds=SECONDS), [table], out, options)
    except GigamorphError as error:
        print(error, file=sys.stderr)
        return ENDED
    return 0


def strike(kind: str, cluster: Any, command: subprocess.Popen[str], drawn: random.Random) -> bool:
    """Kill an actor, a node or the command; return whether there was one to kill."""
    if kind == "command":
        command.kill()
        return command.wait() == -signal.SIGKILL
    if kind == "node":
        node = drawn.choice(sorted(cluster.worker_nodes, key=str))
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        return True
    living = archives.ray_actors()
    if not living:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(drawn.choice(living), signal.SIGKILL)
        return True
    return False


def kills(count: int, seed: int, folder: Path, cluster: Any) -> dict[str, Any]:
    """Start runs until `count` kills; compare the rows of each run after each of its processes."""
    table = archives.make_archive(folder / "images", IMAGES)
    (folder / "images" / "0017.npy").write_bytes(b"damaged")
    predict(archives.tiny, [table], folder / "whole", Options("m", workers=0, max_failures=0.5))
    whole = [(folder / "whole" / name).read_bytes() for name in TABLES]
    drawn = random.Random(seed)
    found: dict[str, Any] = {"kills": 0} | dict.fromkeys(KINDS, 0)
    found |= {"runs": 0, "lost": 0, "doubled": 0, "different": 0, "said": {}, "kills_per_run": []}
    while found["kills"] < count:
        out, own, kept = folder / f"run{found['runs']}", 0, set[str]()
        status = None
        while status != 0:
            words = [sys.executable, __file__, "--table", str(table), "--out", str(out), "--address", cluster.address]
            command = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
            while command.poll() is None and found["kills"] < count:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    command.wait(drawn.uniform(1, 20))
                    break
                kind = drawn.choice(KINDS)
                if strike(kind, cluster, command, drawn):
                    found["kills"] += 1
                    found[kind] += 1
                    own += 1
            said = (command.communicate()[1].splitlines() or [""])[-1]
            status = command.returncode
            if status == ENDED:
                found["said"][said] = found["said"].get(said, 0) + 1
            elif status not in (0, -signal.SIGKILL):
                raise SystemExit(f"a run failed with status {status}: {said}")
            keys = [row["key"] for rows in read_parts(out / "parts") for row in rows] if out.exists() else []
            found["lost"] += len(kept - set(keys))
            found["doubled"] += len(keys) - len(set(keys))
            kept = set(keys)
        found["different"] += [(out / name).read_bytes() for name in TABLES] != whole
        found["runs"] += 1
        found["kills_per_run"].append(own)
        print({key: value for key, value in found.items() if key != "kills_per_run"}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("--table", "--out"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)  # as in the actors
    if given.address:
        raise SystemExit(run(given.table, given.out, given.address))
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "helpers"), *sys.path])
    import ray  # pyright: ignore[reportMissingImports]  (extra [ray])
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    began, load, args = time.monotonic(), os.getloadavg(), {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **args})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **args)
    with tempfile.TemporaryDirectory() as name:
        try:
            found = kills(given.kills, given.seed, Path(name), cluster)
        finally:
            cluster.shutdown()
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    machine |= {"ray": ray.__version__, "load_before": load, "load_after": os.getloadavg()}
    machine["seconds"] = round(time.monotonic() - began, 1)
    path = RESULTS / "archive_kills_ray.json"
    path.write_text(json.dumps({"machine": machine, "seed": given.seed, **found}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
