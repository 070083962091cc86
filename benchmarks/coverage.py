"""Checks which real networks the engine computes exactly: those of the census, with frozen and with live norms.

Each network runs at a small, odd size in tiles, with random weights and statistics, and is compared with stock PyTorch:
outputs, the gradient of every parameter and of the image, and every buffer after the step. There are two modes: "eval"
(batch 1), and "live" (batch 4, every module in training mode). In float64 each tensor must agree to 1e-12, or to four
times the change of stock PyTorch's result under different rounding (`coverage_judge.py`). In float32 the error against
float64 is divided by stock PyTorch's own. The verdict is

    exact        computed tile by tile
    taken whole  exact, but only with fallback="untiled": some op needs a whole map in the middle
    refused      with the message
    unclear      differs by no more than stock under different rounding, but by more than 1e-9
    wrong        anything else

Networks run in child processes, so that a crash does not stop the others. Results are appended as they come, and
existing ones are not computed again. The last line has the counts.

    python benchmarks/coverage.py [--jobs 1] [--only resnet] [--json FILE] [--markdown]
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import itertools
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)]
from coverage_list import CLASSES  # noqa: E402
from coverage_markdown import MODES, PAGE, VERDICTS, page  # noqa: E402

from gigamorph.engine.bench.machine import provenance  # noqa: E402
from gigamorph.engine.bench.process import Process  # noqa: E402
from gigamorph.engine.bench.results import OK  # noqa: E402
from gigamorph.engine.files import write_json  # noqa: E402

# A BatchNorm after a global pooling has one value per image; with two images its output is always plus and minus one.
BATCH = {"eval": 1, "live": 4}
# The first size that the network accepts is used.
# halonet's blocks need multiples of 256, more than one of them; flexivit has its own fixed size.
SIZES = [(97, 113), (96, 128), (128, 160), (192, 224), (224, 224), (256, 256), (299, 307)]
OWN_SIZES = {"halonet26t": (512, 256), "flexivit_small": (240, 240)}
TILES = {0: 48, 192: 96}  # keys: minimal length of the image's smaller side
LIMIT = 1e-12
TIMEOUT = 3600  # seconds for one network in one mode
NETWORKS_EACH = 20  # networks per process
RESULTS = ROOT / "benchmarks" / "results" / "coverage_census.json"


def build(name: str) -> Any:
    """Build the network of a census name with random weights."""
    import coverage_nets

    from gigamorph.engine.models.compat import make_torchvision_importable

    make_torchvision_importable()
    source, _, rest = name.rpartition(":")
    if source == "own":
        return coverage_nets.NETWORKS[rest]()
    if source in ("tv", "tvs"):
        import torchvision

        if source == "tvs":
            return torchvision.models.get_model(rest, weights=None, weights_backbone=None)
        quiet = {"init_weights": False} if rest in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(rest, weights=None, **quiet)
    if source == "tvd":
        from torchvision.models.detection import backbone_utils

        makes = backbone_utils.mobilenet_backbone if "mobilenet" in rest else backbone_utils.resnet_fpn_backbone
        fpn = {"fpn": True} if "mobilenet" in rest else {}
        return makes(backbone_name=rest, weights=None, trainable_layers=5, **fpn)
    import timm

    made = timm.create_model(rest, pretrained=False)
    return coverage_nets.TimmFeatures(made, source) if source else made


def check(name: str, mode: str, verdict_only: bool) -> dict[str, Any]:
    """Return the verdict on one network in one mode, with the errors in float32 and the times of steps if wanted."""
    import torch
    from coverage_judge import ROUNDING, judge
    from exactness import randomize

    from gigamorph import GigamorphError, accelerate
    from gigamorph.engine.capture.recording import capture
    from gigamorph.engine.lowering.stages import lower

    torch.manual_seed(0)
    began = time.perf_counter()
    model = randomize(build(name)).double().eval()
    model.train(mode == "live")
    size = OWN_SIZES.get(name) or _legal_size(copy.deepcopy(model), BATCH[mode])
    tile = TILES[max(side for side in TILES if side <= min(size))]
    report: dict[str, Any] = {"network": name, "mode": mode, "class": CLASSES[name], "size": size, "tile": tile}
    image = torch.randn(BATCH[mode], 3, *size, dtype=torch.float64)
    fallback = None
    try:
        network = lower(capture(model, tuple(image.shape), image.dtype, "cpu"))
    except GigamorphError as refusal:
        report["message"] = str(refusal)
        try:
            network = lower(capture(model, tuple(image.shape), image.dtype, "cpu"), "untiled")
        except GigamorphError as second:
            return report | {"message": str(second), "verdict": "refused", "seconds": time.perf_counter() - began}
        fallback = "untiled"
    disabled = _disable_dropout(model, network, everywhere=fallback is not None)
    if disabled:
        report["dropout off"] = disabled
    fast = lambda twin: accelerate(twin, tile=tile, fallback=fallback)  # noqa: E731
    casts = any(op.name == "float" for op in network.program.ops)
    found = judge(model, image, fast, casts, LIMIT, single=not verdict_only)
    if not found["good"] and max(found["noise"], found["largest"]) > ROUNDING and mode == "eval":
        _calibrate(model, size)
        report["statistics"] = f"of a batch: with random ones stock's own noise is {found['noise']:.0e}"
        found = judge(model, image, fast, casts, LIMIT, single=not verdict_only)
    report |= found if verdict_only else found | {"steps": _times(model, image, fast)}
    del report["noise"], report["largest"]
    good, unclear = report.pop("good"), report.pop("unclear")
    exact = "taken whole" if fallback else "exact"
    report["verdict"] = exact if good else "unclear" if unclear else "wrong"
    return report | {"seconds": time.perf_counter() - began}


def _times(model: Any, image: Any, fast: Callable[[Any], Any]) -> dict[str, float]:
    """Return CPU seconds of training steps: stock's, the accelerated network's first (recorded), and a later one."""
    from exactness import step

    def seconds(network: Any) -> float:
        began = time.process_time()  # one thread computes; other processes do not count
        step(network, image)
        return time.process_time() - began

    stock, tiled = copy.deepcopy(model), fast(copy.deepcopy(model))
    try:
        step(stock, image)
        step(stock, image)
    except RuntimeError:  # only one step works (EfficientFormerV2 stores a bias with its graph)
        return {}
    first = seconds(tiled)
    pairs = [(seconds(stock), seconds(tiled)) for _ in range(2)]
    own, other = (min(times) for times in zip(*pairs, strict=True))
    return {"stock": round(own, 4), "first": round(first, 4), "tiled": round(other, 4)}


def _disable_dropout(model: Any, network: Any, everywhere: bool) -> list[str]:
    """Disable dropout that draws other numbers than stock does, and return the modules' names.

    This is dropout of whole maps, which is drawn tile by tile, and any dropout where ops wait for whole maps, because
    the numbers of each sample are then drawn in another order.
    """
    found = {local.op.module for stage in network.stages for local in stage.locals if local.random}
    disabled = []
    for name, module in model.named_modules():
        for attribute in ("p", "drop_prob", "drop_rate", "dropout", "attn_drop"):
            rate = getattr(module, attribute, 0.0)
            if (everywhere or name in found) and isinstance(rate, float) and rate > 0:
                setattr(module, attribute, 0.0)
                disabled.append(name)
    return disabled


def _calibrate(model: Any, size: tuple[int, int]) -> None:
    """Set BatchNorm statistics to those of a random batch; with others, maps may grow from layer to layer."""
    import torch

    torch.optim.swa_utils.update_bn([torch.randn(BATCH["live"], 3, *size, dtype=torch.float64)], model)


def _legal_size(model: Any, batch: int) -> tuple[int, int]:
    """Return the first size that the network accepts in its mode; its running statistics may change."""
    import torch

    for height, width in SIZES:
        try:
            with torch.no_grad():
                model(torch.zeros(batch, 3, height, width, dtype=torch.float64))
        except (RuntimeError, AssertionError):
            continue
        return height, width
    raise RuntimeError(f"the network itself accepts none of the sizes {SIZES}")


class Server:
    """The work of a child process: one network in one mode."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)

    def check(self, name: str, mode: str, verdict_only: bool) -> dict[str, Any]:
        try:
            return check(name, mode, verdict_only)
        except Exception as error:  # any error of a network is its verdict
            return _wrong(name, mode, " ".join(f"{type(error).__name__}: {error}".split())[:300])


def _wrong(name: str, mode: str, message: str) -> dict[str, Any]:
    return {"network": name, "mode": mode, "class": CLASSES[name], "verdict": "wrong", "message": message}


class CoverageProcess:
    """A process that checks networks. It is restarted after a crash, and after some networks, because PyTorch's cache
    of fake ops grows by gigabytes and networks are refused if too little memory is free."""

    def __init__(self) -> None:
        self.process: Process | None = None
        self.checked = 0

    def check(self, name: str, mode: str, verdict_only: bool) -> dict[str, Any]:
        if self.checked and self.checked % NETWORKS_EACH == 0:
            self.close()
        self.checked += 1
        process = self.process = self.process or Process("coverage", TIMEOUT, folder=Path(__file__).parent)
        report = process.ask("check", name=name, mode=mode, verdict_only=verdict_only)
        if report.pop("status") == OK:
            return report
        self.close()
        return _wrong(name, mode, report["reason"])

    def close(self) -> None:
        if self.process is not None:
            self.process.__exit__()
            self.process = None


def check_all(tasks: list[tuple[str, str]], verdict_only: bool, jobs: int, results: VerdictFile) -> None:
    """Append the verdicts on all networks and modes, and print one line for each."""
    idle = [CoverageProcess() for _ in range(jobs)]

    def work(task: tuple[str, str]) -> dict[str, Any]:
        child = idle.pop()
        report = child.check(*task, verdict_only)
        idle.append(child)
        return report

    with ThreadPoolExecutor(jobs) as pool:
        for number, done in enumerate(as_completed([pool.submit(work, task) for task in tasks]), 1):
            results.add(done.result())
            print(_line(number, len(tasks), done.result()), flush=True)
    for child in idle:
        child.close()


class VerdictFile:
    """The verdicts in a file, which is rewritten after each of them."""

    def __init__(self, path: Path):
        self.path = path
        self.source = provenance()
        self.commit = f"{(self.source['commit'] or '')[:12]}{'-dirty' * self.source['uncommitted_changes']}"
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        if path.exists():
            self.rows = {(r["network"], r["mode"]): r for r in json.loads(path.read_text())["networks"]}

    def add(self, report: dict[str, Any]) -> None:
        self.rows[report["network"], report["mode"]] = report | {"commit": self.commit}
        order = {(name, mode): i for i, (name, mode) in enumerate(itertools.product(CLASSES, MODES))}
        rows = [self.rows[key] for key in sorted(self.rows, key=lambda key: order.get(key, len(order)))]
        found = {**self.source, "limit": LIMIT, "dtype": "float64", "counts": counts(rows), "networks": rows}
        write_json(self.path, found, "results")


def counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the number of networks with each verdict, by mode."""
    return {mode: {v: sum(r["verdict"] == v and r["mode"] == mode for r in rows) for v in VERDICTS} for mode in MODES}


def _line(number: int, total: int, report: dict[str, Any]) -> str:
    verdict = report["verdict"]
    detail = f"{report['error']:.1e} ({report['worst']})" if "error" in report else ""
    ratios = " ".join(f"{ratio:.2f}" for ratio in report.get("float32", {}).values())
    size = "x".join(map(str, report.get("size", ())))
    shown = verdict.upper() if verdict == "wrong" else verdict
    where = f"[{number:3}/{total}] {report['network']:30} {report['mode']:4} {shown:11} {size:8}"
    parts = [where, f"{report.get('seconds', 0):5.0f} s ", detail, ratios]
    return " ".join([*parts, report.get("message", ""), report.get("notes", "")]).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="networks checked in parallel")
    parser.add_argument("--only", nargs="+", default=[], help="names or parts of names; * is a wildcard")
    parser.add_argument("--mode", choices=MODES, help="only one mode")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file to which verdicts are appended")
    parser.add_argument("--again", action="store_true", help="also check networks that have a verdict")
    parser.add_argument("--retry", action="store_true", help="also check networks that are wrong or refused")
    parser.add_argument("--verdict-only", action="store_true", help="neither float32 errors nor times of steps")
    parser.add_argument("--markdown", action="store_true", help="only write docs/coverage.md from the file")
    options = parser.parse_args()
    results = VerdictFile(options.json)

    def wanted(name: str, mode: str) -> bool:
        found = results.rows.get((name, mode))
        new = found is None or options.again or (options.retry and found["verdict"] in ("wrong", "refused"))
        named = not options.only or any(part == name or fnmatch.fnmatch(name, f"*{part}*") for part in options.only)
        return new and named and options.mode in (None, mode)

    if options.markdown:
        PAGE.write_text(page(json.loads(options.json.read_text())))
        return 0
    tasks = [(name, mode) for name, mode in itertools.product(CLASSES, MODES) if wanted(name, mode)]
    if tasks:
        from gigamorph.engine.models.compat import make_torchvision_importable

        make_torchvision_importable()
        check_all(tasks, options.verdict_only, options.jobs, results)
    found = json.loads(options.json.read_text())
    for mode, own in found["counts"].items():
        print(f"{mode}: {sum(own.values())} networks: " + ", ".join(f"{own[v]} {v}" for v in VERDICTS))
    return 1 if any(own["wrong"] for own in found["counts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
