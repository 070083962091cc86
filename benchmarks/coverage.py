"""Which real networks the engine computes exactly: every network of class a (one sweep, a final pooling) of the census.

Each network runs at a small, odd size in float64 with random weights and random BatchNorm statistics, in tiles, and is
compared with stock PyTorch: outputs and the gradient of every parameter and of the image. The verdict is "exact",
"refused" (with the message) or "wrong". Networks run in child processes, so that one that crashes does not stop the
others. The last line counts.

    python benchmarks/coverage.py [--jobs 2] [--only resnet] [--json FILE]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)]

TIMM = """
    resnet18 resnet50 resnext50_32x4d resnetblur18 resnetaa50 resnet50d resnetv2_50 resnet51q regnetx_002 densenet121
    densenetblur121d vgg11_bn vgg11 convnext_atto convnext_atto_ols convnext_atto_rms convnext_tiny_hnf
    efficientnet_lite0 efficientnet_es fbnetc_100 mobilenetv1_100 mobilenetv2_100 mobilenet_edgetpu_v2_s
    mobilenetv4_conv_small mobilenetv4_conv_aa_medium mobilenetv4_conv_blur_medium mnasnet_100 spnasnet_100 dla34
    dla60x dla60_res2net hrnet_w18_small hrnet_w18_ssld res2net50_26w_4s res2net50d nf_resnet26 repvgg_a0 mobileone_s0
    gernet_s inception_v3 inception_v4 inception_resnet_v2 inception_next_atto xception41 xception41p legacy_xception
    dpn48b dpn68b darknet53 darknetaa53 cspresnet50 cspdarknet53 cs3darknet_focus_s cs3darknet_s selecsls42b vovnet39a
    nasnetalarge pnasnet5large starnet_s1 fasternet_t0 hgnetv2_b0 convmixer_768_32 mambaout_femto convformer_s18
    halonet26t
""".split()
TORCHVISION = """
    googlenet shufflenet_v2_x0_5 squeezenet1_1 mnasnet0_5 alexnet convnext_tiny resnet18 densenet121 inception_v3
""".split()
NETWORKS = [
    *TIMM,
    *(f"tv:{name}" for name in TORCHVISION),
    "tvs:fcn_resnet50",
    "own:unet_t",
    "own:unet_i",
    "own:fpn",
]
SIZES = [(193, 225), (192, 224), (256, 256)]  # the first that the network itself can take
TILE = 64
LIMIT = 1e-12
TIMEOUT = 900  # seconds for one network


def build(name: str) -> Any:
    """The network of a census name, with random weights."""
    from gigamorph.engine.models.compat import make_torchvision_importable

    make_torchvision_importable()
    source, _, rest = name.rpartition(":")
    if source == "own":
        import coverage_nets

        return coverage_nets.NETWORKS[rest]()
    if source == "tv":
        import torchvision

        quiet = {"init_weights": False} if rest in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(rest, weights=None, **quiet)
    if source == "tvs":
        import torchvision

        return torchvision.models.get_model(rest, weights=None, weights_backbone=None)
    import timm

    return timm.create_model(rest, pretrained=False)


def check(name: str) -> dict[str, Any]:
    """The verdict on one network."""
    import torch
    from exactness import compare, randomize

    from gigamorph.engine import GigamorphError
    from gigamorph.engine.graph import build_network
    from gigamorph.engine.trace import capture

    torch.manual_seed(0)
    began = time.perf_counter()
    model = randomize(build(name)).double().eval()
    size = _legal_size(model)
    report: dict[str, Any] = {"network": name, "size": size, "tile": TILE}
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    try:
        build_network(capture(model, tuple(image.shape), image.dtype, "cpu"))
    except GigamorphError as refusal:
        return report | {"verdict": "refused", "message": str(refusal), "seconds": time.perf_counter() - began}
    found = compare(model, image, tile=TILE)
    worst = max(found, key=lambda key: found[key])
    report |= {"error": found[worst], "worst": worst, "verdict": "exact" if found[worst] <= LIMIT else "wrong"}
    if report["verdict"] == "wrong":
        report["sensitivity"] = _sensitivity(model, image)
        if found[worst] <= report["sensitivity"]:
            report["verdict"] = "exact"
            report["message"] = (
                f"error {found[worst]:.1e} is above {LIMIT:.0e}, but stock PyTorch changes by "
                f"{report['sensitivity']:.1e} itself if its input and weights change in the last bit"
            )
    return report | {"seconds": time.perf_counter() - began}


def _legal_size(model: Any) -> tuple[int, int]:
    import torch

    for height, width in SIZES:
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, height, width, dtype=torch.float64))
        except (RuntimeError, AssertionError):
            continue
        return height, width
    raise RuntimeError(f"the network itself takes none of the sizes {SIZES}")


def _sensitivity(model: Any, image: Any) -> float:
    """How much stock PyTorch's result changes if the image and every parameter change in their last bit."""
    import copy

    import torch
    from exactness import step, step_errors

    def nudge(tensor: Any) -> Any:
        return tensor * (1 + torch.finfo(tensor.dtype).eps * torch.randint(-1, 2, tensor.shape))

    before = step(model, image)
    nudged = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in nudged.parameters():
            parameter.copy_(nudge(parameter))
    return max(step_errors(before, step(nudged, nudge(image))).values())


def serve() -> None:
    """Child process: a network's name per line in, its verdict as JSON per line out."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what networks print must not get among the answers
    for line in sys.stdin:
        name = line.strip()
        try:
            report = check(name)
        except Exception as error:  # whatever a network raises is its verdict
            text = " ".join(f"{type(error).__name__}: {error}".split())
            report = {"network": name, "verdict": "wrong", "message": text[:300]}
        answers.write(json.dumps(report) + "\n")
        answers.flush()


class Child:
    """A process that checks networks; started again after a crash."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def check(self, name: str) -> dict[str, Any]:
        if self.process is None:
            command = [sys.executable, __file__, "--serve"]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(TIMEOUT, process.kill)
        timer.start()
        try:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if answer:
            return json.loads(answer)
        self.process = None
        return {"network": name, "verdict": "wrong", "message": f"the process died with code {process.wait()}"}

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def check_all(names: list[str], jobs: int) -> list[dict[str, Any]]:
    """The verdicts on all networks, in order, with one line each as they come."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    reports: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def work() -> None:
        child = Child()
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return child.close()
            report = child.check(name)
            with lock:
                reports[name] = report
                print(_line(len(reports), len(names), report), flush=True)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [reports[name] for name in names]


def _line(number: int, total: int, report: dict[str, Any]) -> str:
    verdict = report["verdict"]
    detail = f"{report['error']:.1e} ({report['worst']})" if "error" in report else ""
    size = "x".join(map(str, report.get("size", ())))
    parts = [
        f"[{number:2}/{total}]",
        f"{report['network']:30}",
        f"{verdict.upper() if verdict == 'wrong' else verdict:8}",
    ]
    return " ".join(
        [*parts, f"{size:8}", f"{report.get('seconds', 0):5.0f} s ", detail, report.get("message", "")]
    ).rstrip()


def provenance() -> dict[str, Any]:
    """What the numbers were made with."""
    import timm
    import torch
    import torchvision

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "limit": LIMIT,
        "dtype": "float64",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="networks checked at once")
    parser.add_argument("--only", nargs="+", default=[], help="names or parts of names; * is a wildcard")
    parser.add_argument("--json", type=Path, help="write all verdicts to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    names = [
        name
        for name in NETWORKS
        if not options.only or any(part == name or fnmatch.fnmatch(name, f"*{part}*") for part in options.only)
    ]
    reports = check_all(names, options.jobs)
    counts = {v: sum(r["verdict"] == v for r in reports) for v in ("exact", "refused", "wrong")}
    if options.json:
        from gigamorph.engine.models.compat import make_torchvision_importable

        make_torchvision_importable()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**provenance(), "counts": counts, "networks": reports}, indent=1) + "\n")
    print(f"{len(names)} networks: {counts['exact']} exact, {counts['refused']} refused, {counts['wrong']} wrong")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
