"""Measure every morph on real networks: architecture x transform x error, with the refusals and their reasons.

Networks have random weights and random statistics. The engine runs each transform, and this script measures it
independently: parent and child on the same random images, in eval mode, in train mode (dropout off), and in eval mode
with the running statistics after train mode. Errors are in float64, and in float32 as a multiple of the parent's own
noise: its float32 output against its float64 output, at least four roundoffs. A row is

    exact     float64 at most 1e-12, float32 at most 8 times the noise, no violation of the certificate
    refused   a MorphError with a reason, and the network did not change
    none      the transform does not apply to the network
    wrong     any other result, also if only the engine's last check stopped the morph

Each network runs in a separate process with bounded memory. The last line counts the rows.

    python benchmarks/morph_table.py [--jobs 2] [--only resnet] [--json benchmarks/results/morph_table.json]
    python benchmarks/morph_table.py --write      # write docs/morph_table.md from the JSON without measuring
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import morph_markdown
import morph_nets
import morph_trials
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.spaces import find_spaces

ROOT = Path(__file__).parents[1]
JSON = ROOT / "benchmarks" / "results" / "morph_table.json"
# Maximum relative error in float64; maximum error in float32 over the noise; minimum noise, four unit roundoffs.
LIMITS = {"float64": 1e-12, "ratio": 8.0, "floor": 4 * 2.0**-24}
MEMORY = 12 << 30  # bytes of address space for one network
TIMEOUT = 1500  # seconds for one network
CAUGHT = ("differs from its parent", "violate S E = I", "report this")  # messages of the engine's last check
WIDENING = morph_markdown.GROUPS["Wider, and back"]

Outputs = dict[str, list[Tensor]]  # mode -> outputs in float64


def run(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Outputs:
    """Return outputs in eval mode, in train mode, and in eval mode after train mode; the network is not changed."""
    work = copy.deepcopy(model).to(dtype)
    for module in work.modules():  # `to` does not cast plain attributes
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(module, key, value.to(dtype))
    found: Outputs = {}
    for name, training in (("eval", False), ("train", True), ("after", False)):
        work.train(training)
        for module in work.modules():
            if "drop" in type(module).__name__.lower() or "stochastic" in type(module).__name__.lower():
                module.eval()
        with torch.no_grad(), mock.patch("torch.nn.functional.dropout", lambda x, *_args, **_options: x):
            leaves = tree_leaves(work(images.to(dtype)))
        found[name] = [leaf.double() for leaf in leaves if isinstance(leaf, Tensor)]
    found["train"] += found.pop("after")
    return found


def distance(want: list[Tensor], have: list[Tensor]) -> float:
    """Return the largest relative difference over all outputs in the maximum norm; inf for nan or other shapes."""
    worst = 0.0
    for a, b in zip(want, have, strict=True):
        if a.shape != b.shape:
            return math.inf
        error = float((a - b).abs().max() / a.abs().max())
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def measure(model: nn.Module, trial: morph_trials.Trial, batch: int, known: dict[Any, Any]) -> dict[str, Any]:
    """Measure a trial against its parent; `known` caches the parent's outputs for transforms of the same images."""
    images = torch.randn((batch, *trial.shape[1:]), generator=torch.Generator().manual_seed(7))
    key = (images.shape, type(trial.before))
    if key not in known:
        parent = nn.Sequential(trial.before, model) if trial.before else model
        known[key] = {dtype: run(parent, images, dtype) for dtype in (torch.float64, torch.float32)}
    want = known[key]
    child64 = run(trial.exact or trial.child, images, torch.float64)
    child32 = run(trial.child, images, torch.float32)
    row: dict[str, Any] = {"promises_train": trial.train}
    for mode in ("eval", "train"):
        noise = max(distance(want[torch.float64][mode], want[torch.float32][mode]), LIMITS["floor"])
        row[f"float64_{mode}"] = distance(want[torch.float64][mode], child64[mode])
        row[f"noise_{mode}"] = noise
        row[f"ratio_{mode}"] = distance(want[torch.float32][mode], child32[mode]) / noise
    certificate = trial.report.certificate
    row["certificate"] = None if certificate is None else [certificate.entries, certificate.violations]
    row["parameters"] = [sum(p.numel() for p in net.parameters()) for net in (model, trial.child)]
    row["changes"] = len(trial.report.changes)
    modes = ("eval", "train") if trial.train else ("eval",)
    good = all(
        row[f"float64_{mode}"] <= LIMITS["float64"] and row[f"ratio_{mode}"] <= LIMITS["ratio"] for mode in modes
    )
    good &= bool(trial.report.changes) and (certificate is None or certificate.violations == 0)
    return row | {"verdict": "exact" if good else "wrong"}


def attempt(
    model: nn.Module,
    x: Tensor,
    name: str,
    transform: Callable[[nn.Module, Tensor], morph_trials.Trial],
    known: dict[Any, Any],
) -> dict[str, Any]:
    """Run the transform `name`, and return its row."""
    began = time.perf_counter()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        small = x if len(x) > 2 else x[:1]  # the engine enlarges the batch to four images in train mode
        row = measure(model, transform(model, small), len(x), known)
    except morph_trials.Absent as nothing:
        row = {"verdict": "none", "reason": str(nothing)}
    except MorphError as error:
        # The engine decides in advance what can be widened, so a child that cannot run is an error.
        found = [*CAUGHT, *(["the child cannot be run"] if name in WIDENING else [])]
        caught = any(text in str(error) for text in found)
        row = {"verdict": "wrong" if caught else "refused", "reason": str(error)}
    except Exception as error:  # any other exception is an error of the morph
        row = {"verdict": "wrong", "reason": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    after = model.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(value, after[name]) for name, value in before.items()):
        row = {"verdict": "wrong", "reason": "the parent has been changed"}
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def check(name: str, only: list[str]) -> dict[str, Any]:
    """Return all rows of one network."""
    model = morph_nets.build(name)
    x = morph_nets.example(model)
    report: dict[str, Any] = {"network": name, "input": list(x.shape)}
    try:
        spaces = list(find_spaces(model, x))
        frozen = [s for s in spaces if s.frozen]
        report["spaces"] = {"total": len(spaces), "channels": sum(s.width for s in spaces)}
        report["spaces"]["frozen"] = [{"key": s.key, "width": s.width, "reason": s.frozen} for s in frozen]
    except MorphError as error:
        report["spaces"] = {"reason": str(error)}
    known: dict[Any, Any] = {}
    report["transforms"] = {
        transform: attempt(model, x, transform, function, known)
        for transform, function in morph_trials.transforms().items()
        if not only or transform in only
    }
    return report


def child_process(name: str, only: list[str]) -> dict[str, Any]:
    """Run `check` in a separate process; a process that dies gives a wrong row."""
    command = [sys.executable, __file__, "--child", name, *(["--transforms", *only] if only else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False)
        lines, why = done.stdout.splitlines(), f"code {done.returncode}: {done.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired:
        lines, why = [], f"no answer in {TIMEOUT} s"
    if lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    return {"network": name, "transforms": {"all": {"verdict": "wrong", "reason": f"the process died, {why}"}}}


def check_all(
    names: list[str], only: list[str], jobs: int, commit: str, save: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Return the reports of all networks in order; print a line for each, and pass all reports so far to `save`."""
    reports: dict[str, dict[str, Any]] = {}

    def one(name: str) -> dict[str, Any]:
        report = reports[name] = child_process(name, only)
        rows = report["transforms"]
        for row in rows.values():
            row["commit"] = commit
        save([reports[n] for n in names if n in reports])
        verdicts = [row["verdict"] for row in rows.values()]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        print(f"{name:32} {counts}, {sum(r.get('seconds', 0) for r in rows.values()):.0f} s", flush=True)
        for transform, row in rows.items():
            if row["verdict"] == "wrong":
                print(f"    WRONG {transform}: {json.dumps(row)}", flush=True)
        return report

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, names))


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]], whole: bool) -> list[dict[str, Any]]:
    """Replace networks of the old reports by new ones; without `whole`, replace only the transforms of the new ones."""
    made = {report["network"]: report for report in old}
    for report in new:
        rows = report["transforms"]
        if not whole:
            rows = made.get(report["network"], {}).get("transforms", {}) | rows
            rows = {name: rows[name] for name in [*morph_markdown.WHAT, *rows] if name in rows}
        made[report["network"]] = report | {"transforms": rows}
    return [made[name] for name in morph_nets.NETWORKS if name in made]


def count(reports: list[dict[str, Any]]) -> dict[str, int]:
    """Count the rows by verdict."""
    verdicts = [row["verdict"] for report in reports for row in report["transforms"].values()]
    return {verdict: verdicts.count(verdict) for verdict in ("exact", "refused", "none", "wrong")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="networks checked in parallel")
    parser.add_argument("--only", nargs="+", default=[], help="names or parts of names; * is a wildcard")
    parser.add_argument("--transforms", nargs="+", default=[], help="some transforms only")
    parser.add_argument("--json", type=Path, help="write all rows to this file; with --only or --transforms, update it")
    parser.add_argument("--write", action="store_true", help=f"write {morph_markdown.PAGE.name} from {JSON.name}")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        torch.set_num_threads(1)
        print(json.dumps(check(options.child, options.transforms)))
        return 0
    if options.write:
        morph_markdown.PAGE.write_text(morph_markdown.page(json.loads(JSON.read_text())))
        return 0
    names = [
        name
        for name in morph_nets.NETWORKS
        if not options.only or any(part == name or fnmatch.fnmatch(name, f"*{part}*") for part in options.only)
    ]
    os.nice(5)  # other users may share the cores
    source = provenance()
    old = (
        json.loads(options.json.read_text())["networks"]
        if (options.only or options.transforms) and options.json and options.json.exists()
        else []
    )

    def save(reports: list[dict[str, Any]]) -> None:
        if options.json:
            merged = merge(old, reports, whole=not options.transforms)
            result: dict[str, Any] = {
                "limits": LIMITS,
                "counts": count(merged),
                "networks": merged,
                "provenance": source,
            }
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    reports = check_all(names, options.transforms, options.jobs, source["commit"], save)
    counts = count(reports)
    print(
        f"{len(names)} networks, {sum(counts.values())} rows: {counts['exact']} exact, {counts['refused']} refused, "
        f"{counts['wrong']} wrong ({counts['none']} with nothing to do)"
    )
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
