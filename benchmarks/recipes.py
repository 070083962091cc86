"""The claims of all recipes on their synthetic tasks over ten seeds, each seed in a separate process.

python benchmarks/recipes.py [--only morphhr]    # missing seeds, cheapest recipe first
python benchmarks/recipes.py --write             # verdicts and page from the rows in the JSON, without measuring

Held-out seeds of a task are run after task and rule were committed: seven of ten, or all. An interrupted run continues.
Only committed states are measured, and every seed's rows have their commit. Seeds are measured again if the recipe's
`synthetic.py` has changed, or if their commit is not the whole measured state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.mammography.recipes import RECIPES, get_recipe
from gigamorph.engine.mammography.recipes.claims import LEAST, judge

ROOT = Path(__file__).parents[1]
JSON = ROOT / "benchmarks" / "results" / "recipes.json"
PAGE = ROOT / "docs" / "recipes" / "README.md"
SIZES = "Memory and hours at the published sizes, predicted: [sizes.md](sizes.md)."
WEIGHTS = """## Weights

Every configuration names its file of weights and the origin of the file. The file is looked up by its name, and in the
cache of torch.hub. The first digits of its SHA-256 are checked if its publisher states them. A recipe that should start
from trained weights refuses to start without them, unless `weights = "random"` is set; log and model card then state
that no weights were trained before. Files of torchvision, timm, VISSL (SimCLR), SwAV and DINO are read unchanged, and
Keras' ResNet-50 and VGG in h5 (extra `[keras]`; [details](end2end.md#weights-of-keras)). For a published file, and for
every h5 file, inputs of another scale are refused."""
ORDER = ("cae", "end2end", "dvme", "morphhr", "siamese")
TIMEOUT = 3600  # seconds for one seed


def task_of(name: str) -> str:
    """Return a hash of a recipe's synthetic task with its settings and rule: the code after the imports."""
    code = (ROOT / "engine" / "mammography" / "recipes" / name / "synthetic.py").read_text()
    return hashlib.sha256(re.split(r"^from \S+ import ", code, flags=re.M)[-1].encode()).hexdigest()[:12]


def changed() -> str:
    """Return the uncommitted changes of the checkout, except results and their page."""
    own = [f":!{path.relative_to(ROOT)}" for path in (JSON, PAGE)]
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", *own]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def is_recorded(seed: dict[str, Any] | None) -> bool:
    """Whether a seed was measured at a committed state."""
    return seed is not None and not seed["provenance"]["uncommitted_changes"]


def measure(name: str, seed: int) -> dict[str, Any]:
    """Measure the rows of one seed with the recipe's own command; add wall time, CPU time and provenance."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "gigamorph.cli.main", "recipe", name, "--synthetic", "--seeds", str(seed)]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run([*command, "--out", str(out)], timeout=TIMEOUT, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode > 1 or not (out / "claim.json").exists():  # 1: one seed gives no verdict
            raise SystemExit(f"{name}, seed {seed}: exit code {done.returncode}")
        rows = json.loads((out / "claim.json").read_text())["rows"]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    threads = os.environ.get("OMP_NUM_THREADS", "")
    measured = {"seconds": time.monotonic() - began, "cpu_seconds": cpu, "threads": threads}
    # The JSON and its page, which a run changes itself, do not count as changes of what is measured.
    return {"rows": rows, **measured, "provenance": {**provenance(), "uncommitted_changes": bool(changed())}}


def judged(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return the measurements so far with the verdict of the rule."""
    synthetic = get_recipe(name).synthetic
    seeds = {str(seed): found["seeds"][str(seed)] for seed in synthetic.seeds if str(seed) in found["seeds"]}
    rows = [row for own in seeds.values() for row in own["rows"]]
    holds, lines = judge(synthetic.rule, rows)
    return {
        "claim": synthetic.claim,
        "rule": str(synthetic.rule),
        "task": found["task"],
        "holds": holds,
        "judged": lines,
        "seeds": seeds,
    }


def page(found: dict[str, dict[str, Any]]) -> str:
    """Return the claims as Markdown."""
    lines = [
        "# Recipes",
        "",
        "Published methods, ready to run at native resolution. `gigamorph recipe list` lists them, `gigamorph recipe",
        "NAME` prints a configuration with the source of every value, `gigamorph train TABLE --recipe NAME --config",
        "FILE --out RUN` trains, and `gigamorph recipe NAME --synthetic` tests the method's claim on a synthetic task.",
        "",
        "Generated by `python benchmarks/recipes.py`, which measures missing seeds on CPUs, and stores them",
        "in `benchmarks/results/recipes.json`. Seeds marked * were not used to design the task: task and rule were",
        "committed before these seeds were run. One part of the rule is newer: a seed counts as a win only if the",
        f"difference exceeds {LEAST:g}. It was added after end2end was run again with other rounding of sums, which",
        "reversed the verdict for one seed. It makes no verdict more favourable.",
        "",
        "| recipe | method | claim on the synthetic task | verdict | seeds | CPU time of a seed |",
        "|---|---|---|---|---:|---:|",
    ]
    for name, text in RECIPES.items():
        own = found.get(name)
        if own is None:
            lines.append(f"| [{name}]({name}.md) | {text} | not measured | | | |")
            continue
        seconds = [seed["cpu_seconds"] for seed in own["seeds"].values()]
        cells = (f"[{name}]({name}.md)", text, own["claim"], _verdict(own))
        lines.append(f"| {' | '.join(cells)} | {len(seconds)} | {sum(seconds) / len(seconds):.0f} s |")
    lines += ["", *SIZES.splitlines(), "", *WEIGHTS.splitlines()]
    for name in RECIPES:
        own = found.get(name)
        if own is not None:
            lines += [
                "",
                f"## {name}",
                "",
                own["rule"],
                "",
                f"**{_verdict(own).capitalize()}.**{_missing(name, own)}",
                "",
            ]
            lines += [*_rows([_format_line(line) for line in own["judged"]]), "", *_rows(_marked(name, own))]
            commits = dict.fromkeys(seed["provenance"]["commit"][:12] for seed in own["seeds"].values())
            lines += ["", f"Measured at {', '.join(commits)}."]
    return "\n".join(lines) + "\n"


def _verdict(own: dict[str, Any]) -> str:
    return "holds" if own["holds"] else "does not hold"


def _missing(name: str, own: dict[str, Any]) -> str:
    absent = [str(seed) for seed in get_recipe(name).synthetic.seeds if str(seed) not in own["seeds"]]
    return f" Seeds {', '.join(absent)} were not run." if absent else ""


def _format_line(line: dict[str, Any]) -> dict[str, Any]:
    """Format a line of the rule for the page."""
    low, high = line.get("low"), line.get("high")
    wins = line.get("wins")
    return {
        "part of the rule": line["what"],
        "mean": f"{line['mean']:.4f}",
        "95 % interval": "" if low is None else f"{low:.4f} to {high:.4f}",
        "wins": "" if wins is None else f"{wins} of {line['seeds']}",
        "holds": "not claimed" if line["holds"] is None else line["holds"],
    }


def _marked(name: str, own: dict[str, Any]) -> list[dict[str, Any]]:
    held_out = get_recipe(name).synthetic.held_out
    return [
        {**row, "seed": f"{row['seed']}{' *' * (row['seed'] in held_out)}"}
        for seed in own["seeds"].values()
        for row in seed["rows"]
    ]


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(key for row in rows for key in row))
    head = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return head + [f"| {' | '.join(_cell(row.get(name)) for name in names)} |" for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(RECIPES), action="append")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    found = json.loads(JSON.read_text()) if JSON.exists() else {}
    if not given.write and changed():
        raise SystemExit(f"figures must be of a committed state; commit these changes first:\n{changed()}")
    for name in () if given.write else given.only or ORDER:
        if found.get(name, {}).get("task") != task_of(name):
            found[name] = {"task": task_of(name), "seeds": {}}
        for seed in get_recipe(name).synthetic.seeds:
            if not is_recorded(found[name]["seeds"].get(str(seed))):
                found[name]["seeds"][str(seed)] = measure(name, seed)
                found[name] = judged(name, found[name])
                JSON.write_text(json.dumps(found, indent=1) + "\n")
                PAGE.write_text(page(found))
    found = {name: judged(name, own) for name, own in found.items()}  # by the current rule
    JSON.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
