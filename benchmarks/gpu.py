"""All measurements on a GPU, in commands of under nine minutes that write one JSON.

    python benchmarks/gpu.py --json gpu.json --cache cache --only ceilings,tests,checks      correct results?
    python benchmarks/gpu.py --json gpu.json --cache cache --only ceilings,ops               faster kernels?
    python benchmarks/gpu.py --json gpu.json --cache cache --only ceilings,steps,traces      faster steps?
    python benchmarks/gpu.py --json gpu.json --cache cache --only ceilings,front             ahead of an expert?
    python benchmarks/gpu.py --json gpu.json --cache cache --only ceilings,limits            largest images?
    gigamorph bench report gpu.json --out report                                  plots and tables of the results
    python benchmarks/gpu.py --json dry.json --dry            on the CPU, tiny, to test this script

A command continues where the file ends: items without an error are not measured again. `--cache` is a folder of
compiled kernels and measured choices, with which later commands start, also on another machine.

Sections, in order: `ceilings` (copy bandwidth and matrix rate), `tests` (tests/gpu), `checks` (every kernel against
float64, twice, with 4 and 8 warps), `sanitizer` (one check per family under compute-sanitizer, if it is installed),
`ops` (the layers of ResNet-50 and ConvNeXt-T against cuDNN, eager and torch.compile), `steps` (whole training steps
and inference), `front` (training steps at several budgets against all ways of stock), `traces` (every kernel of some
steps), `limits` (the largest images). The exit code is 1 if an item failed. See gpu_worker.py, gpu_checks.py,
gpu_ops.py and gpu_steps.py.

Items run in worker processes, so that a kernel that hangs or corrupts the context costs one item. Tests and checks run
in parallel, together with compilations for the timed sections; timed items run alone. The JSON is rewritten after every
item. Items for which a section had no time are listed under "skipped".
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # use this checkout, installed or not
from gigamorph.engine.bench.process import Process  # noqa: E402
from gigamorph.engine.bench.results import NOT_RUN, OK  # noqa: E402
from gigamorph.engine.files import write_json  # noqa: E402

WORKER = Path(__file__).with_name("gpu_worker.py")
# In this order: seconds of a section, where some get the remaining time, and of one item before its process is killed.
SECONDS = {
    "ceilings": (40, 40),
    "tests": (420, 300),
    "checks": (420, 90),
    "sanitizer": (400, 120),
    "ops": (110, 25),
    "steps": (1e9, 90),
    "front": (1e9, 150),
    "traces": (120, 60),
    "limits": (1e9, 150),
}
SECTIONS = tuple(SECONDS)
LIMIT = {section: limit for section, (_, limit) in SECONDS.items()} | {"prepare": 170}
# Sections of one group run in parallel on all workers.
GROUPS = (("ceilings",), ("tests", "checks"), *((section,) for section in SECTIONS[3:]))
ALWAYS = ("machine", "ceilings", "choices")  # not affected by --match
WORKERS = 14
COMPILERS = 5  # of these, as many as steps fit a GPU's memory in parallel

Row = dict[str, Any]
Item = tuple[str, str]  # section or "prepare", name


class Worker:
    """A process that runs items; it is started on first use, and again after it has died."""

    def __init__(self, dry: bool, log: Path, cache: Path | None = None):
        self.log = log
        # Parallel workers share the cores; timed work is on the GPU.
        self.env = {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2"}
        if cache is not None:
            paths = {"GIGAMORPH_CACHE": "choices", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
            self.env |= {name: str(cache / folder) for name, folder in paths.items()}
        if dry:
            self.env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.process: Process | None = None

    def ask(self, do: str, name: str, seconds: float) -> Row:
        """Return one item's row; an error if it takes too long or the process dies."""
        process = self.process = self.process or Process(WORKER.stem, folder=WORKER.parent, env=self.env, log=self.log)
        process.longest = seconds
        answer = process.ask("work", section=do, name=name)
        if answer["status"] != OK:
            self.stop()
        if "row" in answer:
            return answer["row"]
        error = "timed out" if answer["status"] == NOT_RUN else "process died"
        return {"error": error, "message": answer["reason"]}

    def stop(self) -> None:
        if self.process is not None:
            self.process.__exit__()
            self.process = None


class ResultsFile:
    """The results so far, written to disk after every item; it starts with the file's content."""

    def __init__(self, path: Path, begun: float):
        self.path, self.begun = path, begun
        self.data: dict[str, Any] = {s: {} for s in SECTIONS} | {"skipped": [], "seconds": {}, "commands": []}
        if path.exists():
            self.data |= json.loads(path.read_text())
            self.data["skipped"] = []
        self._lock = threading.Lock()

    def has(self, section: str, name: str) -> bool:
        """Whether an item was measured before, without an error."""
        return "error" not in self.data[section].get(name, {"error": ""})

    def add(self, section: str, name: str, row: Row) -> None:
        with self._lock:
            self.data.setdefault(section, {})[name] = row
            self.write()

    def skip(self, section: str, names: Iterable[str]) -> None:
        with self._lock:
            self.data["skipped"] += [f"{section}: {name}" for name in names]
            self.write()

    def took(self, section: str, seconds: float) -> None:
        with self._lock:
            self.data["seconds"][section] = round(seconds, 1)
            self.data["seconds"]["all"] = round(time.monotonic() - self.begun, 1)
            self.write()

    def write(self) -> None:
        write_json(self.path, self.data, "results")


def run_items(items: list[Item], workers: list[Worker], report: ResultsFile, deadline: float, end: float) -> None:
    """Run items in order; start none after the deadline, and stop running ones at the end."""
    waiting = queue.SimpleQueue()
    for item in items:
        waiting.put(item)

    def serve(worker: Worker) -> None:
        while True:
            try:
                do, name = waiting.get_nowait()
            except queue.Empty:
                return
            left = end - time.monotonic()
            if time.monotonic() >= deadline or left < 1:
                report.skip(do, [name])
                continue
            row = worker.ask(do, name, min(LIMIT[do], left))
            report.add(do, name, row)
            if "error" in row:
                print(f"{do}: {name}: {row['error']}: {row.get('message', '')[:160]}", flush=True)

    threads = [threading.Thread(target=serve, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def summary(data: dict[str, Any]) -> list[str]:
    """Return lines on what failed, and the kernels of traces."""
    lines = [""]
    peak = data["ceilings"].get("ceilings", {})
    where = data["ceilings"].get("machine", {})
    if where:
        lines.append("  ".join(f"{k} {where[k]}" for k in ("gpu", "driver", "torch", "triton", "cudnn") if k in where))
    if "gb_per_s" in peak:
        lines.append(f"ceilings: {peak['gb_per_s']:.0f} GB/s, {peak['tflop_per_s']:.0f} TFLOP/s")
    for name, row in data.get("tests", {}).items():
        lines.append(f"tests: {name}: {row.get('result') or row.get('error')}")
    if checks := data["checks"]:
        bad = [name for name, row in checks.items() if not row.get("ok")]
        lines.append(f"checks: {len(checks) - len(bad)} of {len(checks)} passed")
        lines += [f"  WRONG {n}: {_complaint(checks[n])}" for n in bad[:25]]
    failed = [(name, how, why) for name, row in data["ops"].items() for how, why in row.get("failed", {}).items()]
    lines += [f"FAILED {name}: {how}: {why[:120]}" for name, how, why in failed[:20]]
    lines += _trace_lines(data.get("traces", {}))
    table = data["steps"].get("choices", {}).get("choices", [])
    if table:
        ours = sum(row["chosen"] != "stock" for row in table)
        lines.append(f"choices in the steps: ours for {ours} of {len(table)} shapes")
    lines.append(f"skipped for lack of time: {len(data['skipped'])}; seconds: {data['seconds']}")
    return lines


def failures(data: dict[str, Any]) -> list[str]:
    """Return the names of items that failed or were wrong."""
    rows = {f"{section}: {name}": row for section in SECTIONS for name, row in data.get(section, {}).items()}
    return [name for name, row in rows.items() if "error" in row or row.get("failed") or not row.get("ok", True)]


def _complaint(row: Row) -> str:
    if "error" in row:
        return f"{row['error']}: {row.get('message', '')[:120]}"
    worst = max(row["errors"].items(), key=lambda e: math.inf if isinstance(e[1], str) else e[1][1])
    return f"{worst[0]}: {worst[1]}{'' if row['reproducible'] else '; two runs differ'}"


def _trace_lines(traces: dict[str, Row]) -> list[str]:
    """Return for each step the time on the GPU, and the kernels that take most of it."""
    lines = []
    for name, row in traces.items():
        if "kernels" not in row:
            continue
        total: dict[str, list[float]] = defaultdict(list)
        for number, *_, microseconds in row["kernels"]:
            total[row["names"][number]].append(microseconds)
        lines.append(f"{name}: {len(row['kernels'])} kernels, busy {row['busy_us']:.0f} of {row['span_us']:.0f} us")
        most = sorted(total.items(), key=lambda kernel: -sum(kernel[1]))
        lines += [f"    {sum(times):8.0f} us in {len(times):4}  {kernel[:70]}" for kernel, times in most[:10]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of results, rewritten after every item")
    parser.add_argument("--cache", type=Path, help="folder of compiled kernels and measured choices")
    parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated sections to run")
    parser.add_argument("--match", default="", help="only items whose name matches this regular expression")
    parser.add_argument("--seconds", type=float, default=520, help="time for everything")
    parser.add_argument("--commit", help="stored as the commit, if the checkout has no .git")
    parser.add_argument("--dry", action="store_true", help="every section on the CPU with tiny sizes")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; sections are {', '.join(SECTIONS)}")

    begun = time.monotonic()
    end = begun + options.seconds
    report = ResultsFile(options.json, begun)
    log = options.json.with_suffix(".log")
    log.write_text("")
    workers = [Worker(options.dry, log, options.cache) for _ in range(1 if options.dry else WORKERS)]
    report.data["commands"].append(sys.argv[1:])
    try:
        listed = workers[0].ask("list", "", min(90, options.seconds))
        if "error" in listed:
            sys.exit(f"no worker could be started: {listed['message']}")
        for group in GROUPS:
            sections = [section for section in group if section in wanted]
            if not sections:
                continue
            items = [(s, n) for s in sections for n in listed[s] if re.search(options.match, n) or n in ALWAYS]
            items = [(s, n) for s, n in items if n in ALWAYS or not report.has(s, n)]
            started = time.monotonic()
            deadline = min(end, started + max(SECONDS[section][0] for section in sections))
            if sections[0] in ("tests", "checks", "sanitizer"):
                prepared = listed["prepare"] if "checks" in sections else []
                ahead = [("prepare", n) for n in prepared if n.partition(":")[0] in wanted]
                ahead = [(do, n) for do, n in ahead if re.search(options.match, n)]
                compilers = workers[:COMPILERS] if ahead else []
                compiling = threading.Thread(
                    target=run_items, args=(ahead, compilers, report, deadline, min(end, deadline + 15))
                )
                compiling.start()
                run_items(items, workers[len(compilers) :], report, deadline, min(end, deadline + 15))
                compiling.join()
            elif sections[0] in ("steps", "front", "traces", "limits"):
                for worker in [] if options.dry else workers:  # memory left over by earlier items would count
                    worker.stop()
                # The choices are read at the end, for which a little time is reserved.
                last = items[-1:] if sections[0] == "steps" else []
                timed = items[: len(items) - len(last)]
                run_items(timed, workers[:1], report, deadline - 15, end - 8)
                run_items(last, workers[:1], report, end, end)
            else:
                for spare in workers[1:]:
                    spare.stop()
                run_items(items, workers[:1], report, deadline, end)
            if group == ("ceilings",) and options.commit:
                report.add("ceilings", "machine", {**report.data["ceilings"]["machine"], "commit": options.commit})
            for section in sections:
                report.took(section, time.monotonic() - started)
    finally:
        for worker in workers:
            worker.stop()
    print("\n".join(summary(report.data)))
    if failures(report.data):
        sys.exit(1)


if __name__ == "__main__":
    main()
