"""Everything that is measured on a GPU, in commands of under nine minutes that write one JSON.

    python benchmarks/gpu.py --json gpu.json --cache cache --only ceilings,tests,checks      is it right?
    python benchmarks/gpu.py --json gpu.json --cache cache --only ceilings,ops,tiles         which kernels are faster?
    python benchmarks/gpu.py --json gpu.json --cache cache --only ceilings,steps             are whole steps?
    python benchmarks/gpu.py --json gpu.json --cache cache --only ceilings,limits            how large may images be?
    gigamorph bench report gpu.json --out report                                  plots and tables of what was found
    python benchmarks/gpu.py --json dry.json --dry            on the CPU, tiny, to see that this script works

A command goes on where the file ends: what it holds without an error is not measured again. `--cache` is a folder for
compiled kernels and measured choices, which later commands, on a fresh machine too, begin with.

Sections, in order: `ceilings` (copy bandwidth and matrix rate), `tests` (tests/gpu, and compute-sanitizer if there is
one), `checks` (every kernel against float64, twice, with 4 and 8 warps), `ops` (the layers of ResNet-50 and ConvNeXt-T
against cuDNN, eager and torch.compile), `tiles` (the forward in alternative tiles), `steps` (whole training steps and
inference), `limits` (the largest images). See gpu_tests.py, gpu_checks.py, gpu_ops.py and gpu_steps.py.

Items run in worker processes, so that a kernel that hangs or corrupts the context costs one item. Checks run side by
side, and beside them whatever the timed sections will need is compiled; timed items run alone. The JSON is written
anew after every item. What a section's time did not reach is listed under "skipped".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("ceilings", "tests", "checks", "ops", "tiles", "steps", "limits")
# Seconds: of a section, and of one item before its process is ended. `steps` gets whatever the others leave.
BUDGET = {"ceilings": 40, "tests": 240, "checks": 140, "ops": 110, "tiles": 30, "steps": 1e9, "limits": 1e9}
LIMIT = {
    "ceilings": 40,
    "tests": 150,
    "checks": 60,
    "prepare": 130,
    "ops": 25,
    "tiles": 30,
    "steps": 90,
    "limits": 150,
}
ALWAYS = ("machine", "ceilings", "choices")  # whatever --match says
WORKERS = 14
BOX = 8.0  # seconds of timed steps in one entry

Row = dict[str, Any]
Item = tuple[str, str]  # what to do (a section, or "prepare"), and its name


# -- a worker -----------------------------------------------------------------------------------------------------


def registry(dry: bool) -> dict[str, dict[str, Callable[[], Row]]]:
    """Every item by section and name."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    sys.path.insert(0, str(ROOT))  # what this checkout holds, installed or not
    if dry:
        import interpreter

        interpreter.install()
    import gpu_checks
    import gpu_ops
    import gpu_steps
    import gpu_tests

    timer = gpu_ops.Timer(seconds=0.01, least=1, most=2) if dry else gpu_ops.Timer()
    once = gpu_ops.Timer(prepare=True)
    ops, tiles = gpu_ops.op_cases(dry), gpu_ops.config_cases(dry)
    # A name in `prepare` says which section it is for.
    prepare = {f"steps: {n}": run for n, run in gpu_steps.preparations(dry).items()}
    if not dry:
        for section, cases in (("ops", ops), ("tiles", tiles)):
            prepare |= {f"{section}: {n}": lambda case=case: once.row(case()) for n, case in cases.items()}
    return {
        "ceilings": {"machine": machine, "ceilings": lambda: gpu_ops.ceilings(dry)},
        "tests": gpu_tests.suites(dry),
        "checks": gpu_checks.checks(dry),
        "prepare": prepare,
        "ops": {n: lambda case=case: timer.row(case()) for n, case in ops.items()},
        "tiles": {n: lambda case=case: timer.row(case()) for n, case in tiles.items()},
        "steps": {**gpu_steps.runs(gpu_steps.steps(dry), dry, 0.1 if dry else BOX), "choices": choices},
        "limits": gpu_steps.runs(gpu_steps.limits(dry), dry, 0.1 if dry else BOX),
    }


def machine() -> Row:
    """Where the figures come from."""
    import torch
    import triton

    from gigamorph.engine.bench.machine import provenance

    return {
        **provenance(),
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **clocks(),
    }


def clocks() -> Row:
    """Driver, clocks, power and temperature as seen now; nothing without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    try:
        return _clocks()
    except Exception as error:  # whatever NVML does not tell costs no measurement
        return {"nvml": f"{type(error).__name__}: {error}"[:200]}


def _clocks() -> Row:
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return {
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "gpu_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        "gpu_bytes_used": pynvml.nvmlDeviceGetMemoryInfo(handle).used,
    }


def choices() -> Row:
    """What was chosen for each op and shape during the steps."""
    from dataclasses import asdict

    from gigamorph.kernels import choice, measurements

    rows = [asdict(row) for row in choice.table()]
    return {"file": measurements.measurement_file("").name, "choices": rows, "failed": choice.failures()}


def work(dry: bool) -> None:
    """Answer requests, a line of JSON each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to the log
    import torch

    items = registry(dry)
    torch.manual_seed(0)
    for line in sys.stdin:
        request = json.loads(line)
        row: Row = {}
        if request["do"] == "list":
            row = {section: list(found) for section, found in items.items()}
        else:
            started = time.perf_counter()
            try:
                row = items[request["do"]][request["name"]]()
            except Exception as error:
                kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
                row = {"error": kind, "message": str(error)[:600]}
            if request["do"] in ("ops", "steps", "limits", "ceilings"):
                row |= {"clocks": clocks()}
            row["item_seconds"] = round(time.perf_counter() - started, 3)
        fatal = torch.cuda.is_available() and _context_is_lost()
        print(json.dumps(row, default=str), file=answers, flush=True)
        if fatal:
            os._exit(1)


def _context_is_lost() -> bool:
    """Whether an illegal access has ended this process's use of the GPU; if not, free memory for the next item."""
    import gc

    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    gc.collect()
    torch.cuda.empty_cache()
    return False


# -- the parent ---------------------------------------------------------------------------------------------------


class Worker:
    """A process that runs items; it is started when it is first needed, and again after it has died."""

    def __init__(self, dry: bool, log: Path, cache: Path | None = None):
        self.dry, self.log, self.cache = dry, log, cache
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        if self.cache is not None:
            places = {"GIGAMORPH_CACHE": "choices", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
            environment |= {name: str(self.cache / folder) for name, folder in places.items()}
        if self.dry:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-u", __file__, "--worker", *(["--dry"] if self.dry else [])]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            text=True,
            env=environment,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self.answers), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put("")

    def ask(self, do: str, name: str, seconds: float) -> Row:
        """One item's row; an error if it takes too long or the process dies."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        assert self.process is not None and self.process.stdin is not None
        try:
            print(json.dumps({"do": do, "name": name}), file=self.process.stdin, flush=True)
            line = self.answers.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            return {"error": "timed out", "message": f"no result after {seconds:.0f} s"}
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            return {"error": "process died", "message": f"exit code {code}; the last lines of the log: {self._tail()}"}
        return json.loads(line)

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-400:]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Report:
    """What is known so far, written to disk after every item; it begins with what the file holds."""

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
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self.path)


def run_items(items: list[Item], workers: list[Worker], report: Report, deadline: float, end: float) -> None:
    """Run items, first come first served, starting none after the deadline, and none running on after the end."""
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


def interleave(first: list[Item], second: list[Item]) -> list[Item]:
    """By turns, then the rest of the longer one."""
    both = [item for pair in zip(first, second, strict=False) for item in pair]
    return both + first[len(second) :] + second[len(first) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where results go, anew after every item; goes on")
    parser.add_argument("--cache", type=Path, help="folder of compiled kernels and measured choices")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections to run, with commas between")
    parser.add_argument("--match", default="", help="of these, items whose name contains this text")
    parser.add_argument("--seconds", type=float, default=520, help="time for everything")
    parser.add_argument("--commit", help="stored as the commit, where the checkout has no .git")
    parser.add_argument("--dry", action="store_true", help="every section on the CPU with tiny sizes")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; sections are {', '.join(SECTIONS)}")

    begun = time.monotonic()
    end = begun + options.seconds
    report = Report(options.json, begun)
    log = options.json.with_suffix(".log")
    log.write_text("")
    workers = [Worker(options.dry, log, options.cache) for _ in range(1 if options.dry else WORKERS)]
    report.data["commands"].append(sys.argv[1:])
    try:
        listed = workers[0].ask("list", "", min(90, options.seconds))
        if "error" in listed:
            sys.exit(f"no worker could be started: {listed['message']}")
        for section in (s for s in SECTIONS if s in wanted):
            items = [(section, n) for n in listed[section] if options.match in n or n in ALWAYS]
            items = [(section, n) for _, n in items if n in ALWAYS or not report.has(section, n)]
            started = time.monotonic()
            deadline = min(end, started + BUDGET[section])
            if section == "checks":
                ahead = [
                    ("prepare", n) for n in listed["prepare"] if n.partition(":")[0] in wanted and options.match in n
                ]
                run_items(interleave(ahead, items), workers, report, deadline, min(end, deadline + 15))
                for spare in workers[1:]:  # their memory would count as in use
                    spare.stop()
            elif section in ("steps", "limits"):
                workers[0].stop()  # what earlier items left in memory would count, too
                # What was chosen is read at the end, for which a little time is kept.
                last = items[-1:] if section == "steps" else []
                timed = items[: len(items) - len(last)]
                run_items(timed, workers[:1], report, deadline - 15, end - 8)
                run_items(last, workers[:1], report, end, end)
            else:
                run_items(items, workers[:1], report, deadline, end)
            if section == "ceilings" and options.commit:
                report.add("ceilings", "machine", {**report.data["ceilings"]["machine"], "commit": options.commit})
            report.took(section, time.monotonic() - started)
    finally:
        for worker in workers:
            worker.stop()
    lines = summary(report.data)  # it adds derived figures to the rows
    report.write()
    print("\n".join(lines))


# -- the summary --------------------------------------------------------------------------------------------------


def derive(row: Row, peak: Row) -> Row:
    """Of each candidate: TFLOP/s, GB/s and the share of the roofline, max(flops / rate, bytes / bandwidth)."""
    floor = max(row["flops"] / peak["tflop_per_s"] / 1e9, row["bytes"] / peak["gb_per_s"] / 1e6)  # ms
    return {
        name: {"tflop_per_s": row["flops"] / ms / 1e9, "gb_per_s": row["bytes"] / ms / 1e6, "roofline": floor / ms}
        for name, ms in row["ms"].items()
    }


def speed(row: Row, ours: str, other: str) -> float | None:
    """Time of another candidate over ours: above 1 ours is faster."""
    ms = row.get("ms", {})
    return ms[other] / ms[ours] if ours in ms and other in ms else None


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mean(values: list[float]) -> str:
    """Geometric mean, least and most."""
    if not values:
        return f"{'-':>6} {'':14}"
    mean = math.exp(statistics.fmean(map(math.log, values)))
    return f"{mean:6.2f} {f'({min(values):.2f}-{max(values):.2f})':14}"


def summary(data: dict[str, Any]) -> list[str]:
    """A short table of everything; ratios are speeds, so above 1 ours is faster."""
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
        lines.append(f"checks: {len(checks) - len(bad)} of {len(checks)} hold")
        lines += [f"  WRONG {n}: {_complaint(checks[n])}" for n in bad[:25]]
    lines += (
        _op_lines(data["ops"], peak)
        + _tile_lines(data["tiles"], peak)
        + _step_lines({**data["steps"], **data.get("limits", {})})
    )
    table = data["steps"].get("choices", {}).get("choices", [])
    if table:
        ours = sum(row["chosen"] != "stock" for row in table)
        lines.append(f"choices in the steps: ours for {ours} of {len(table)} shapes")
    lines.append(f"skipped for want of time: {len(data['skipped'])}; seconds: {data['seconds']}")
    return lines


def _complaint(row: Row) -> str:
    if "error" in row:
        return f"{row['error']}: {row.get('message', '')[:120]}"
    worst = max(row["errors"].items(), key=lambda e: math.inf if isinstance(e[1], str) else e[1][1])
    return f"{worst[0]}: {worst[1]}{'' if row['reproducible'] else '; two runs differ'}"


def _op_lines(ops: dict[str, Row], peak: Row) -> list[str]:
    rows = {name: row for name, row in ops.items() if row.get("ms", {}).get("ours")}
    lines = [
        f"FAILED {name}: {n}: {why[:120]}" for name, row in ops.items() for n, why in row.get("failed", {}).items()
    ]
    if not rows:
        return lines[:20]
    head = f"{'op':34} {'ours ms':>8} {'stock':>8} {'speed':>6} {'fused':>6} {'compile':>7} {'roof%':>6} {'host us':>7}"
    lines = [*lines[:20], head]
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, row in rows.items():
        if peak:
            row["derived"] = derive(row, peak)
        stock = "cudnn" if "cudnn" in row["ms"] else next((n for n in row["ms"] if n.startswith("eager")), "")
        found = {
            "speed": speed(row, "ours", stock),
            "fused": speed(row, "ours_fused", "eager_fused"),
            "compile": speed(row, "ours_fused", "compile_fused") or speed(row, "ours", "compile"),
            "roof": 100 * row["derived"]["ours"]["roofline"] if peak else None,
        }
        group = name.split()[-1] if "cudnn" in row["ms"] else "others"
        for column, value in found.items():
            if value is not None:
                groups[f"{'depthwise ' if 'depthwise' in name else ''}{group}"][column].append(value)
        lines.append(
            f"{name:34} {row['ms']['ours']:8.3f} {_number(row['ms'].get(stock), 3):>8} {_number(found['speed']):>6} "
            f"{_number(found['fused']):>6} {_number(found['compile']):>7} {_number(found['roof'], 0):>6} "
            f"{row['host_us']['ours']:7.0f}"
        )
    lines.append("\nspeed of ours, geometric mean (least-most):      bare                 fused                compile")
    for group, columns in groups.items():
        lines.append(f"  {group:32}" + " ".join(_mean(columns[c]) for c in ("speed", "fused", "compile")))
    return lines


def _tile_lines(tiles: dict[str, Row], peak: Row) -> list[str]:
    lines = []
    for name, row in tiles.items():
        if not row.get("ms", {}).get("cudnn"):
            continue
        if peak:
            row["derived"] = derive(row, peak)
        cudnn = row["ms"]["cudnn"]
        others = sorted((ms, n) for n, ms in row["ms"].items() if n != "cudnn")
        ranked = ", ".join(f"{n} {cudnn / ms:.2f}" for ms, n in others[:4])
        lines.append(f"{name}: cuDNN {cudnn:.3f} ms; speed: {ranked}")
    return lines


def _step_lines(steps: dict[str, Row]) -> list[str]:
    entries: dict[str, dict[str, Row]] = defaultdict(dict)
    for name, row in steps.items():
        if name != "choices":
            what, _, how = name.rpartition(" ")
            entries[what][how] = row
    if not entries:
        return []
    lines = ["", "steps: Mpx/s (torch peak GiB); then speed of ours to channels-last, eager and compile"]
    for what, rows in entries.items():
        parts = [
            f"{how} {row['error']}"
            if "error" in row
            else f"{how} {row['mpx_per_s']:.0f} ({(row['peak_bytes'] - row['left_bytes']) / 2**30:.1f})"
            for how, row in rows.items()
        ]
        ratios = [
            _number(rows["ours"]["mpx_per_s"] / rows[how]["mpx_per_s"])
            if "mpx_per_s" in rows.get("ours", {}) and "mpx_per_s" in rows.get(how, {})
            else "-"
            for how in ("channels_last", "eager", "compile")
        ]
        lines.append(f"{what}: {', '.join(parts)}; {' '.join(ratios)}{_disagreement(rows)}")
    return lines


def _disagreement(rows: dict[str, Row]) -> str:
    """A warning where ours and stock do not compute the same, beyond bfloat16."""
    ours, stock = rows.get("ours", {}), rows.get("channels_last", {})
    for key in ("loss", "gradient") if ours.get("image_bytes") else ():  # else the images are not the same
        if key in ours and key in stock and not abs(ours[key] - stock[key]) <= 0.03 * abs(stock[key]):
            return f"  {key.upper()} DIFFERS: {ours[key]:.4g}, stock {stock[key]:.4g}"
    return ""


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work("--dry" in sys.argv)
    else:
        main()
