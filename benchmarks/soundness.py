"""The soundness trial: random modules, each exact as stock PyTorch has it, or refused.

A module does whatever a forward may do: gradient modes, state, hooks, containers, call styles, and things that its user
changes between steps. It is run with stock PyTorch and accelerated, in float64, and everything that can be seen is
compared after every step (`tests/helpers/judge.py`). With --opinfo, instead: PyTorch's own samples of its operations,
each between two convolutions. Verdicts:

    exact        everything agrees
    refused      by an error of gigamorph that names the place and the remedy; stock runs afterwards as before
    unclear      refused, but the message names no place or no remedy
    wrong        something differs
    traceback    any other exception
    lenient      it runs where stock raises
    stock fails  stock raises, and so do we; or stock's numbers say nothing. Not counted.

    python benchmarks/soundness.py --modules 20000 [--seed 0] [--workers 2] [--json FILE] [--shrink]
    python benchmarks/soundness.py --seed-of 17 [--shrink]
    python benchmarks/soundness.py --opinfo [--only conv] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
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
CHUNK = 20
SECONDS = 120  # for one module


@dataclass(frozen=True)
class Found:
    """A judged module or sample, ready to be sent between processes."""

    name: str
    kind: str
    reason: str
    group: str
    text: str = ""


def _ready() -> None:
    import torch

    torch.set_num_threads(1)


def _alarm(_signal: int, _frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def _judged(name: str, call: Any) -> Found:
    """The verdict of a call, whatever happens in it."""
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    try:
        verdict, text = call()
        return Found(name, verdict.kind, verdict.reason, verdict.group, text)
    except Exception as error:  # a fault of the trial itself must not pass for a verdict of the engine
        reason = f"trial: {type(error).__name__}: {error}"[:300]
        return Found(name, "traceback", reason, f"traceback: {reason[:100]}")
    finally:
        signal.alarm(0)


def _modules(seeds: list[int], shrinks: bool) -> list[Found]:
    from judge import judge, shrink
    from random_modules import draw

    def one(seed: int) -> tuple[Any, str]:
        spec = draw(seed)
        verdict = judge(spec)
        if shrinks and verdict.kind in BAD:
            spec, verdict = shrink(spec, verdict)
        return verdict, str(spec) if verdict.kind in BAD else ""

    return [_judged(str(seed), lambda seed=seed: one(seed)) for seed in seeds]


def _stock(seeds: list[int], _shrinks: bool) -> None:
    """Modules with stock PyTorch alone: a few of its kernels crash (of norms in channels_last, for one)."""
    from judge import play_stock
    from random_modules import draw

    for seed in seeds:
        play_stock(draw(seed))


def _kills(work: Any, chunk: list[Any]) -> bool:
    """Whether a process dies of a piece of work."""
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


def _run(work: Any, chunks: list[list[Any]], workers: int, shrinks: bool) -> Iterator[tuple[int, list[Found]]]:
    """Chunks in processes; when one dies, what was in hand is tried one by one, and the element that kills is named."""
    waiting, suspects = chunks[::-1], []
    context = multiprocessing.get_context("spawn")
    while waiting or suspects:
        queue, count = (suspects, 1) if suspects else (waiting, workers)
        # PyTorch's cache of fake ops grows without end, and with it what each garbage collection goes through.
        pool = ProcessPoolExecutor(count, context, _ready, max_tasks_per_child=50)
        running: dict[Any, list[Any]] = {}
        try:
            while running or queue:
                while queue and len(running) < count:
                    running[pool.submit(work, queue[-1], shrinks)] = queue[-1]
                    queue.pop()
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    result = done.result()
                    yield len(running.pop(done)), result
        except BrokenProcessPool:
            if queue is waiting:
                suspects.extend([one] for chunk in running.values() for one in chunk)
            else:
                (chunk,) = running.values()
                kind = "stock fails" if work is _modules and _kills(_stock, chunk) else "traceback"
                yield 1, [Found(str(chunk[0]), kind, "the process died", f"{kind}: the process died")]
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Log:
    """Verdicts as they come, in a file beside the report: a long run that is ended goes on where it was."""

    path: Path

    def read(self) -> list[Found]:
        return [Found(**json.loads(line)) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def add(self, found: list[Found]) -> None:
        with self.path.open("a") as file:
            file.write("".join(json.dumps(vars(one)) + "\n" for one in found))


def _print_one(seed: int, shrinks: bool) -> int:
    """One module, its source and its verdict."""
    import inspect

    from judge import judge, shrink
    from random_modules import draw
    from random_modules.piece import PIECES

    _ready()
    spec = draw(seed)
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
    parser.add_argument("--modules", type=int, default=2000, help="how many are drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed-of", type=int, help="print and run this module alone")
    parser.add_argument(
        "--shrink", action="store_true", help="and print the first of each reason without what is not needed"
    )
    parser.add_argument("--opinfo", action="store_true", help="PyTorch's samples of its operations")
    parser.add_argument("--only", default="", help="operations whose name has this in it")
    parser.add_argument("--first", type=int, default=40, help="how many reasons are printed")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _chunks(given: argparse.Namespace) -> tuple[Any, list[list[Any]]]:
    """What judges, and what is to be judged, in pieces for one process each."""
    if given.opinfo:
        from opinfo_modules import operations

        return _samples, [[name] for name in operations() if given.only in name]
    seeds = list(range(given.seed, given.seed + given.modules))
    return _modules, [seeds[n : n + CHUNK] for n in range(0, len(seeds), CHUNK)]


def _carry_out(
    work: Any,
    chunks: list[list[Any]],
    workers: int,
    console: Any,
    *,
    known: list[Found] | None = None,
    log: Log | None = None,
    shrinks: bool = False,
) -> list[Found]:
    """The verdicts of all chunks, with those that are known, shown as they come."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    texts = TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[counts]}")
    columns = BarColumn(), MofNCompleteColumn(), texts[0], TimeRemainingColumn(), texts[1]
    found, before = list(known or ()), len(known or ())
    names = {one.name for one in found}
    chunks = [left for chunk in chunks if (left := [one for one in chunk if str(one) not in names])]
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(map(len, chunks)), rate="", counts="")
        for count, result in _run(work, chunks, workers, shrinks):
            found += result
            if log is not None:
                log.add(result)
            rate = f"{(len(found) - before) / (time.perf_counter() - start):.1f}/s"
            counts = Counter(one.kind for one in found)
            told = " ".join(f"{kind} {counts[kind]}" for kind in KINDS if counts[kind])
            progress.update(task, advance=count, rate=rate, counts=told)
    return found


def _by_reason(found: list[Found]) -> list[list[Found]]:
    """What is wrong or lenient by reasons, the most frequent first."""
    groups: dict[str, list[Found]] = {}
    for one in sorted(found, key=lambda one: int(one.name) if one.name.isdigit() else 0):
        if one.kind in (*BAD, "lenient"):
            groups.setdefault(one.group, []).append(one)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0].name))


def _report(
    given: argparse.Namespace, source: dict[str, Any], found: list[Found], groups: list[list[Found]], seconds: float
) -> dict[str, Any]:
    """What --json writes."""
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
    return report | ({"operations": _by_operation(found)} if given.opinfo else {})


def main() -> int:
    given = _arguments()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if given.seed_of is not None:
        return _print_one(given.seed_of, given.shrink)

    from rich.console import Console

    from gigamorph.engine.bench.machine import provenance

    console, began = Console(soft_wrap=True), time.perf_counter()
    source, log = provenance(), None
    if given.json and not given.opinfo and not source["uncommitted_changes"]:
        name = f".{source['commit'][:12]}.{given.seed}.{given.modules}.jsonl"
        log = Log(given.json.with_suffix(name))
    known = log.read() if log is not None else []
    work, chunks = _chunks(given)
    found = _carry_out(work, chunks, given.workers, console, known=known, log=log)
    seconds = time.perf_counter() - began
    groups = _by_reason(found)
    for group in groups[: given.first]:
        names = " ".join(one.name for one in group[:4])
        console.print(f"{len(group):>5}  {group[0].kind}: {group[0].reason[:150]}  [{names}]", markup=False)
    if given.shrink and not given.opinfo:
        first = [[int(group[0].name)] for group in groups[: given.first]]
        for small in _carry_out(work, first, given.workers, console, shrinks=True):
            console.print(f"{small.text}\n  {small.kind}: {small.reason}\n", markup=False)
    counts = Counter(one.kind for one in found)
    rate = (len(found) - len(known)) / seconds
    console.print(", ".join(f"{kind} {counts[kind]}" for kind in KINDS) + f"; {seconds:.0f} s, {rate:.1f} per s")
    if given.json:
        given.json.write_text(json.dumps(_report(given, source, found, groups, seconds), indent=1) + "\n")
    if log is not None:
        log.path.unlink(missing_ok=True)
    return int(any(counts[kind] for kind in BAD))


def _by_operation(found: list[Found]) -> dict[str, dict[str, int]]:
    table: dict[str, Counter[str]] = {}
    for one in found:
        table.setdefault(one.name.split("#")[0], Counter())[one.kind] += 1
    return {name: dict(counts) for name, counts in sorted(table.items())}


if __name__ == "__main__":
    raise SystemExit(main())
