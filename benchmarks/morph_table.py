"""Every morph on real networks: architecture x transform x error, with the refusals and their reasons.

Networks have random weights and random statistics. Each transform is carried out by the engine, and then measured here
without its help: parent and child on the same random images, in eval mode, in train mode (dropout off), and in eval
mode again with the statistics that train mode left; in float64, and in float32 as a multiple of the parent's own noise,
which is its float32 output against its float64 output, at least four roundoffs. A row is

    exact     float64 at most 1e-12, float32 at most 8 times the noise, no violation of the certificate
    refused   a MorphError that gives a reason, and the network was left as it was
    none      the network has nothing that the transform is about
    wrong     anything else, also where the engine's own last check had to stop a morph

Each network runs in a process of its own with bounded memory. The last line counts.

    python benchmarks/morph_table.py [--jobs 2] [--only resnet] [--json benchmarks/results/morph_table.json]
    python benchmarks/morph_table.py --write      # docs/morph_table.md from the JSON, measuring nothing
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
# Of the relative error in float64; of that in float32 over the noise; of the noise from below, four unit roundoffs.
LIMITS = {"float64": 1e-12, "ratio": 8.0, "floor": 4 * 2.0**-24}
MEMORY = 12 << 30  # bytes of address space for one network
TIMEOUT = 1500  # seconds for one network
CAUGHT = ("differs from its parent", "violate S E = I", "report this")  # the engine's last check, not a precondition
WIDENING = morph_markdown.GROUPS["Wider, and back"]

Outputs = dict[str, list[Tensor]]  # mode -> outputs in float64


def run(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Outputs:
    """Outputs in eval mode, in train mode, and in eval mode with the statistics left; the network stays as it is."""
    work = copy.deepcopy(model).to(dtype)
    for module in work.modules():  # as plain attributes, `to` does not reach them
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
    """Largest relative difference in the maximum norm over all outputs; infinite if shapes differ or one is nan."""
    worst = 0.0
    for a, b in zip(want, have, strict=True):
        if a.shape != b.shape:
            return math.inf
        error = float((a - b).abs().max() / a.abs().max())
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def measure(model: nn.Module, trial: morph_trials.Trial, batch: int, known: dict[Any, Any]) -> dict[str, Any]:
    """Errors of a trial against its parent; `known` keeps the parent's outputs for transforms of the same images."""
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
    """The row of the transform `name`."""
    began = time.perf_counter()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        small = x if len(x) > 2 else x[:1]  # the engine takes four images in train mode by itself
        row = measure(model, transform(model, small), len(x), known)
    except morph_trials.Absent as nothing:
        row = {"verdict": "none", "reason": str(nothing)}
    except MorphError as error:
        # What can be widened is decided beforehand: a child that cannot be run has been promised by mistake.
        found = [*CAUGHT, *(["the child cannot be run"] if name in WIDENING else [])]
        caught = any(text in str(error) for text in found)
        row = {"verdict": "wrong" if caught else "refused", "reason": str(error)}
    except Exception as error:  # whatever a morph raises besides is its fault
        row = {"verdict": "wrong", "reason": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    after = model.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(value, after[name]) for name, value in before.items()):
        row = {"verdict": "wrong", "reason": "the parent has been changed"}
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def check(name: str, only: list[str]) -> dict[str, Any]:
    """All rows of one network."""
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
    """`check` in a process of its own; one that dies is a wrong row."""
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
    names: list[str], only: list[str], jobs: int, commit: str, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """The reports of all networks, in order, with a line each as they come; `keep` gets all that there are so far."""
    reports: dict[str, dict[str, Any]] = {}

    def one(name: str) -> dict[str, Any]:
        report = reports[name] = child_process(name, only)
        rows = report["transforms"]
        for row in rows.values():
            row["commit"] = commit
        keep([reports[n] for n in names if n in reports])
        verdicts = [row["verdict"] for row in rows.values()]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        print(f"{name:32} {counts}, {sum(r.get('seconds', 0) for r in rows.values()):.0f} s", flush=True)
        for transform, row in rows.items():
            if row["verdict"] == "wrong":
                print(f"    WRONG {transform}: {json.dumps(row)}", flush=True)
        return report

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, names))


def merge(kept: list[dict[str, Any]], new: list[dict[str, Any]], whole: bool) -> list[dict[str, Any]]:
    """`kept` with its networks replaced by the new ones, or only those transforms that they have if not `whole`."""
    made = {report["network"]: report for report in kept}
    for report in new:
        rows = report["transforms"]
        if not whole:
            rows = made.get(report["network"], {}).get("transforms", {}) | rows
            rows = {name: rows[name] for name in [*morph_markdown.WHAT, *rows] if name in rows}
        made[report["network"]] = report | {"transforms": rows}
    return [made[name] for name in morph_nets.NETWORKS if name in made]


def count(reports: list[dict[str, Any]]) -> dict[str, int]:
    """Rows by verdict."""
    verdicts = [row["verdict"] for report in reports for row in report["transforms"].values()]
    return {verdict: verdicts.count(verdict) for verdict in ("exact", "refused", "none", "wrong")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="networks checked at once")
    parser.add_argument("--only", nargs="+", default=[], help="names or parts of names; * is a wildcard")
    parser.add_argument("--transforms", nargs="+", default=[], help="some transforms only")
    parser.add_argument("--json", type=Path, help="write all rows to this file; with --only or --transforms, theirs")
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
    os.nice(5)  # others may be at work on the same cores
    source = provenance()
    kept = (
        json.loads(options.json.read_text())["networks"]
        if (options.only or options.transforms) and options.json and options.json.exists()
        else []
    )

    def keep(reports: list[dict[str, Any]]) -> None:
        if options.json:
            merged = merge(kept, reports, whole=not options.transforms)
            result: dict[str, Any] = {
                "limits": LIMITS,
                "counts": count(merged),
                "networks": merged,
                "provenance": source,
            }
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    reports = check_all(names, options.transforms, options.jobs, source["commit"], keep)
    counts = count(reports)
    print(
        f"{len(names)} networks, {sum(counts.values())} rows: {counts['exact']} exact, {counts['refused']} refused, "
        f"{counts['wrong']} wrong ({counts['none']} with nothing to do)"
    )
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
