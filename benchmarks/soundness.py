"""The soundness trial: random modules must be exact as in stock PyTorch, or refused.

A module does anything that a forward may do: gradient modes, state, hooks, containers, call styles, and changes by its
user between steps. It runs with stock PyTorch and accelerated, in float64, and everything visible is compared after
every step (`tests/helpers/judge.py`). With --opinfo, PyTorch's own samples of its operations are judged instead, each
between two convolutions. With --foreign, small pieces of Python code as in published networks are judged and counted
separately (`tests/helpers/random_modules/foreign`). Verdicts:

    exact        all results agree
    refused      by a gigamorph error that names the location and the remedy; stock still runs afterwards
    unclear      refused, but the message lacks the location or the remedy
    wrong        a result differs
    traceback    any other exception
    lenient      it runs where stock raises
    stock fails  both raise, or stock's results are not meaningful; not counted

    python benchmarks/soundness.py --modules 20000 [--seed 0] [--workers 2] [--log FILE] [--json FILE] [--shrink]
    python benchmarks/soundness.py --foreign --modules 500 [--only Config] [--log FILE] [--json FILE] [--shrink]
    python benchmarks/soundness.py --opinfo [--only conv] [--log FILE] [--json FILE]
    python benchmarks/soundness.py --modules 10000 --fallback untiled
    python benchmarks/soundness.py --seed-of 17 [--shrink]
    python benchmarks/soundness.py --seed-of ConfigRead.vars_of#3 [--shrink]

A run with --log can be stopped at any time; the same command continues it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

KINDS = ("exact", "refused", "unclear", "wrong", "traceback", "lenient", "stock fails")
BAD = ("wrong", "traceback", "unclear")
CHUNK = 5
_FALLBACK = "GIGAMORPH_SOUNDNESS_FALLBACK"  # passes --fallback to the worker processes
SECONDS = 120  # for one module


@dataclass(frozen=True)
class Found:
    """A judged module or sample that can be sent between processes."""

    name: str
    kind: str
    reason: str
    group: str
    text: str = ""


def _ready() -> None:
    import judge
    import torch

    torch.set_num_threads(1)
    judge.FALLBACK = os.environ.get(_FALLBACK)


# The machine may be busy, so CPU time counts; the other timer ends a call that waits forever.
_TIMERS = (signal.SIGPROF, signal.ITIMER_PROF, 1), (signal.SIGALRM, signal.ITIMER_REAL, 20)


def _alarm(_signal: int, _frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s of CPU time, or twenty times as long")


def _judged(name: str, call: Any) -> Found:
    """Return the verdict of a call, even if the call fails."""
    for number, timer, factor in _TIMERS:
        signal.signal(number, _alarm)
        signal.setitimer(timer, factor * SECONDS)
    try:
        verdict, text = call()
        return Found(name, verdict.kind, verdict.reason, verdict.group, text)
    except Exception as error:  # an error of the trial itself must not count as a verdict on the engine
        reason = f"trial: {type(error).__name__}: {error}"[:300]
        return Found(name, "traceback", reason, f"traceback: {reason[:100]}")
    finally:
        for _, timer, _ in _TIMERS:
            signal.setitimer(timer, 0)


def _spec(name: str) -> Any:
    """Return the module of a seed ("17"), or a scenario of a foreign piece ("ConfigRead.vars_of#3")."""
    from random_modules import draw, draw_foreign

    piece, _, number = name.rpartition("#")
    return draw_foreign(piece, int(number)) if piece else draw(int(number))


def _modules(names: list[str], shrinks: bool) -> list[Found]:
    from judge import judge, shrink

    def one(name: str) -> tuple[Any, str]:
        spec = _spec(name)
        verdict = judge(spec)
        if shrinks and verdict.kind in BAD:
            spec, verdict = shrink(spec, verdict)
        return verdict, str(spec) if verdict.kind in BAD else ""

    return [_judged(name, lambda name=name: one(name)) for name in names]


def _stock(names: list[str], _shrinks: bool) -> None:
    """Run modules only with stock PyTorch: a few of its kernels crash, for example of norms in channels_last."""
    from judge import play_stock

    for name in names:
        play_stock(_spec(name))


def _kills(work: Any, chunk: list[Any]) -> bool:
    """Whether a piece of work crashes its process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _ready) as pool:
        return isinstance(pool.submit(work, chunk, False).exception(), BrokenProcessPool)


def _samples(names: list[str], _shrinks: bool) -> list[Found]:
    from judge import judge
    from opinfo_modules import samples

    found = []
    for name in names:
        for number, sample in enumerate(samples(name)):
            label = f"{name}#{number}"
            found.append(_judged(label, lambda sample=sample: (judge(sample), str(sample))))
    return found


def _run(work: Any, chunks: list[list[Any]], workers: int, shrinks: bool) -> Iterator[tuple[list[Any], list[Found]]]:
    """Run chunks in processes; when one dies, run its elements one by one to identify the one that crashes."""
    waiting, suspects = chunks[::-1], []
    context = multiprocessing.get_context("spawn")
    while waiting or suspects:
        queue, count = (suspects, 1) if suspects else (waiting, workers)
        # PyTorch's cache of fake ops grows without limit, and slows down garbage collection.
        pool = ProcessPoolExecutor(count, context, _ready, max_tasks_per_child=50)
        running: dict[Any, list[Any]] = {}
        try:
            while running or queue:
                while queue and len(running) < count:
                    running[pool.submit(work, queue[-1], shrinks)] = queue[-1]
                    queue.pop()
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    result = done.result()
                    yield running.pop(done), result
        except BrokenProcessPool:
            if queue is waiting:
                suspects.extend([one] for chunk in running.values() for one in chunk)
            else:
                (chunk,) = running.values()
                kind = "stock fails" if work is _modules and _kills(_stock, chunk) else "traceback"
                yield chunk, [Found(str(chunk[0]), kind, "the process died", f"{kind}: the process died")]
        finally:
            pool.shutdown(cancel_futures=True)


def _settings(given: argparse.Namespace, source: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in which two runs must agree to be continued as one."""
    diff = subprocess.run(["git", "diff", "HEAD"], cwd=ROOT, capture_output=True, check=False).stdout
    names = "modules", "seed", "opinfo", "foreign", "only", "fallback"
    of_source = {"commit": source["commit"], "diff": hashlib.sha256(diff).hexdigest()[:12], "torch": source["torch"]}
    return of_source | {name: getattr(given, name) for name in names}


def _resume(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what an earlier run has judged, one line per chunk; create the file if it does not exist."""
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # an incomplete line is judged again
    if lines and json.loads(lines[0]) != settings:
        raise SystemExit(f"{path} belongs to another commit or other settings; delete it, or choose another file")
    path.write_text("".join(line + "\n" for line in lines or [json.dumps(settings)]))
    return [json.loads(line) for line in lines[1:]]


def _print_one(name: str, shrinks: bool) -> int:
    """Print one module, its source and its verdict."""
    import inspect

    from judge import judge, shrink
    from random_modules.piece import PIECES

    _ready()
    spec = _spec(name)
    verdict = judge(spec)
    if shrinks and verdict.kind in BAD:
        spec, verdict = shrink(spec, verdict)
    print(spec)
    for name in sorted({part.name for part in spec.pieces}):
        print(f"\n{inspect.getsource(PIECES[name])}")
    network = spec.build()
    for number, piece in enumerate(network.pieces):
        options = {k: v for k, v in vars(piece).items() if not k.startswith("_") and k != "training"}
        print(f"pieces.{number}: {options} {piece}")
    print(f"\n{verdict.kind} (visit {verdict.visit}): {verdict.reason}\n{verdict.details}")
    return int(verdict.kind in BAD)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=2000, help="number of random modules")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first module")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed-of", help="print and run only this module")
    parser.add_argument(
        "--shrink", action="store_true", help="also print the first of each reason, reduced to the necessary parts"
    )
    parser.add_argument("--opinfo", action="store_true", help="PyTorch's samples of its operations")
    parser.add_argument("--foreign", action="store_true", help="Python code as in published networks")
    parser.add_argument("--fallback", choices=["untiled"], help="as in accelerate: allow graph breaks")
    parser.add_argument("--only", default="", help="only operations, or foreign pieces, whose name contains this")
    parser.add_argument("--first", type=int, default=40, help="number of printed reasons")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--log", type=Path, help="file of verdicts; the same command continues a run")
    return parser.parse_args()


def _chunks(given: argparse.Namespace) -> tuple[Any, list[list[Any]]]:
    """Return the function that judges, and the work in chunks for one process each."""
    if given.opinfo:
        from opinfo_modules import operations

        return _samples, [[name] for name in operations() if given.only in name]
    names = [str(seed) for seed in range(given.seed, given.seed + given.modules)]
    if given.foreign:
        from random_modules import foreign_names

        kinds = [name for name in foreign_names() if given.only in name]
        random.Random(0).shuffle(kinds)
        names = [f"{kinds[int(n) % len(kinds)]}#{int(n) // len(kinds)}" for n in names]
    return _modules, [names[n : n + CHUNK] for n in range(0, len(names), CHUNK)]


def _carry_out(
    work: Any,
    chunks: list[list[Any]],
    workers: int,
    console: Any,
    *,
    known: list[dict[str, Any]] | None = None,
    log: Path | None = None,
    shrinks: bool = False,
) -> list[Found]:
    """Return the verdicts of all chunks, including known ones; show and log them as they come."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    texts = TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[counts]}")
    columns = BarColumn(), MofNCompleteColumn(), texts[0], TimeRemainingColumn(), texts[1]
    found = [Found(**one) for line in known or () for one in line["found"]]
    done, before = {name for line in known or () for name in line["chunk"]}, len(found)
    chunks = [left for chunk in chunks if (left := [one for one in chunk if one not in done])]
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(map(len, chunks)), rate="", counts="")
        for chunk, result in _run(work, chunks, workers, shrinks):
            found += result
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps({"chunk": chunk, "found": [vars(one) for one in result]}) + "\n")
            rate = f"{(len(found) - before) / (time.perf_counter() - start):.1f}/s"
            counts = Counter(one.kind for one in found)
            shown = " ".join(f"{kind} {counts[kind]}" for kind in KINDS if counts[kind])
            progress.update(task, advance=len(chunk), rate=rate, counts=shown)
    return found


def _by_reason(found: list[Found]) -> list[list[Found]]:
    """Group wrong and lenient results by reason, the most frequent first."""
    groups: dict[str, list[Found]] = {}
    for one in sorted(found, key=lambda one: int(one.name) if one.name.isdigit() else 0):
        if one.kind in (*BAD, "lenient"):
            groups.setdefault(one.group, []).append(one)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0].name))


def _report(
    given: argparse.Namespace, source: dict[str, Any], found: list[Found], groups: list[list[Found]], seconds: float
) -> dict[str, Any]:
    """Return the content for --json."""
    counts = Counter(one.kind for one in found)
    report: dict[str, Any] = {
        "machine": source,
        "modules": None if given.opinfo else {"first": given.seed, "count": given.modules},
        "counts": {kind: counts[kind] for kind in KINDS},
        "seconds": round(seconds, 1),
        "refusals": dict(Counter(one.group for one in found if one.kind == "refused").most_common(100)),
        "bad": [
            {"name": g[0].name, "times": len(g), "kind": g[0].kind, "reason": g[0].reason, "spec": g[0].text}
            for g in groups
        ],
    }
    if given.opinfo:
        return report | {"operations": _by_name(found, "#")}
    return report | ({"pieces": _by_name(found, ".")} if given.foreign else {})


def main() -> int:
    given = _arguments()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if given.fallback:
        os.environ[_FALLBACK] = given.fallback
    if given.seed_of is not None:
        return _print_one(given.seed_of, given.shrink)

    from rich.console import Console

    from gigamorph.engine.bench.machine import provenance

    console, began = Console(soft_wrap=True), time.perf_counter()
    source = provenance()
    known = _resume(given.log, _settings(given, source)) if given.log else []
    work, chunks = _chunks(given)
    found = _carry_out(work, chunks, given.workers, console, known=known, log=given.log)
    seconds = time.perf_counter() - began
    groups = _by_reason(found)
    for group in groups[: given.first]:
        names = " ".join(one.name for one in group[:4])
        console.print(f"{len(group):>5}  {group[0].kind}: {group[0].reason[:150]}  [{names}]", markup=False)
    if given.shrink and not given.opinfo:
        first = [[group[0].name] for group in groups[: given.first]]
        for small in _carry_out(work, first, given.workers, console, shrinks=True):
            console.print(f"{small.text}\n  {small.kind}: {small.reason}\n", markup=False)
    counts = Counter(one.kind for one in found)
    for name, kinds in (_by_name(found, ".") if given.foreign else {}).items():
        console.print(f"{name:<24}", ", ".join(f"{kind} {kinds[kind]}" for kind in KINDS if kind in kinds))
    console.print(", ".join(f"{kind} {counts[kind]}" for kind in KINDS) + f"; {seconds:.0f} s")
    if given.json:
        given.json.write_text(json.dumps(_report(given, source, found, groups, seconds), indent=1) + "\n")
    return int(any(counts[kind] for kind in BAD))


def _by_name(found: list[Found], separator: str) -> dict[str, dict[str, int]]:
    """Count verdicts by the part of the name before the separator."""
    table: dict[str, Counter[str]] = {}
    for one in found:
        table.setdefault(one.name.split(separator)[0], Counter())[one.kind] += 1
    return {name: dict(counts) for name, counts in sorted(table.items())}


if __name__ == "__main__":
    raise SystemExit(main())
