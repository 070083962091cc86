"""Networks with attention in float64: outputs and all gradients by tiles against stock PyTorch, and the memory of both.

    python benchmarks/attention.py --json benchmarks/results/attention_cpu.json
    python benchmarks/attention.py --only "ViT-S/16" --size 256x192 --tile 128
    python benchmarks/attention.py --json benchmarks/results/attention_cpu.json --markdown

A row is one network at one size: an inference and a training step of stock, and of tiles, in processes of their own,
each the first of its kind, with its recording. Memory is what is resident at most above what was there when the network
was: with the parameters' gradients, without the parameters. What they gave is compared in the parent: relative errors
of outputs, of the image's gradient, and the worst parameter's. It goes on where its file ends. Each network has a
second size that is odd, or the next one that the network itself can take.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers")]
from exactness import errors, named, randomize, step  # noqa: E402

from gigamorph import accelerate  # noqa: E402
from gigamorph.engine.bench.machine import provenance  # noqa: E402
from gigamorph.engine.bench.process import Process  # noqa: E402
from gigamorph.engine.bench.results import OK  # noqa: E402
from gigamorph.engine.models.compat import make_torchvision_importable  # noqa: E402
from gigamorph.engine.tiling.memory import peak_bytes, reset_peak, return_free_pages, used_bytes  # noqa: E402

Size = tuple[int, int]
WAYS = ("stock", "tiles")


def _swin(size: Size) -> nn.Module:
    import torchvision

    return torchvision.models.swin_t(weights=None)


def _timm(name: str, **options: Any) -> Callable[[Size], nn.Module]:
    def build(size: Size) -> nn.Module:
        import timm

        return timm.create_model(name, **{"img_size": size, **options})

    return build


# What builds a network for a size, and its second size.
NETWORKS: dict[str, tuple[Callable[[Size], nn.Module], Callable[[Size], Size]]] = {
    "Swin-T": (_swin, lambda size: (size[0] - 3, size[1] - 5)),
    "MaxViT-T": (_timm("maxvit_tiny_tf_224"), lambda size: (size[0] - 32, size[1] + 32)),
    "CoAtNet-0": (_timm("coatnet_0_rw_224"), lambda size: (size[0] - 32, size[1] + 32)),
    "ViT-S/16": (
        _timm("vit_small_patch16_224", dynamic_img_size=True, dynamic_img_pad=True),
        lambda size: (size[0] - 3, size[1] - 5),
    ),
}


class Server:
    """What a child process does: one network at one size, in one way."""

    def steps(self, network: str, size: list[int], way: str, tile: int, folder: str) -> dict[str, Any]:
        """Memory and CPU seconds of an inference and a training step; what they gave is written to a file."""
        torch.set_num_threads(1)
        make_torchvision_importable()
        torch.manual_seed(0)
        model = randomize(NETWORKS[network][0]((size[0], size[1]))).double().eval()
        image = torch.randn(1, 3, *size, dtype=torch.float64)
        net = model if way == "stock" else accelerate(model, tile=tile)
        found: dict[str, Any] = {}
        there = used_bytes()
        with torch.no_grad():
            output, found["inference"] = measured(lambda: net(image), there)
        result, found["training"] = measured(lambda: step(net, image), there)
        torch.save({"inference": output, "result": result}, Path(folder) / way)
        return found


def measured(work: Any, there: int) -> tuple[Any, dict[str, float]]:
    """What a call gives, the bytes that it takes at most above what was there before all, and its seconds."""
    gc.collect()
    return_free_pages()
    reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, {
        "bytes": peak_bytes() - there,
        "seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }


def row(network: str, size: Size, tile: int) -> dict[str, Any]:
    """A network at a size, both ways, compared."""
    what: dict[str, Any] = {"network": network, "size": list(size), "tile": tile, "status": OK}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            with Process("attention", 3600, lean=True, folder=Path(__file__).parent) as process:
                asked = {"network": network, "size": size, "way": way, "tile": tile, "folder": folder}
                answer = process.ask("steps", **asked)
            if answer.pop("status") != OK:
                return what | {"status": f"{way}: {answer['reason']}"}
            what[way] = answer
        stock, tiles = (torch.load(Path(folder) / way, weights_only=False) for way in WAYS)
    wanted, given = stock["result"], tiles["result"]
    by_name = errors(wanted.gradients, given.gradients)
    worst = max(by_name, key=lambda name: by_name[name])
    what["errors"] = {
        "output": max(errors(named(wanted.outputs), named(given.outputs)).values()),
        "inference": max(errors(named([stock["inference"]]), named([tiles["inference"]])).values()),
        "image": errors({"image": wanted.image}, {"image": given.image})["image"],
        "parameters": by_name[worst],
        "worst": worst,
    }
    return what


def rows(networks: list[str], size: Size, tile: int) -> Iterator[tuple[str, Size, int]]:
    """What is measured."""
    for name in networks:
        for own in (size, NETWORKS[name][1](size)):
            yield name, own, tile


def line(found: dict[str, Any]) -> str:
    """A row as people read it."""
    start = f"{found['network']:10} {found['size'][0]} x {found['size'][1]}"
    if found["status"] != OK:
        return f"{start}: {found['status']}"
    parts = []
    for mode in ("inference", "training"):
        stock, tiles = found["stock"][mode], found["tiles"][mode]
        parts.append(
            f"{mode} {tiles['bytes'] / 2**20:.0f} of {stock['bytes'] / 2**20:.0f} MiB, "
            f"CPU {tiles['cpu_seconds']:.1f} of {stock['cpu_seconds']:.1f} s"
        )
    far = ", ".join(f"{name} {value:.0e}" for name, value in found["errors"].items() if name != "worst")
    return f"{start}: {'; '.join(parts)}; {far}"


def markdown(found: list[dict[str, Any]]) -> str:
    """The table of docs/attention.md."""
    lines = [
        "| network | image | tile | inference: stock, tiles | training: stock, tiles "
        "| CPU seconds of a step: stock, tiles | outputs | worst gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        if one["status"] != OK:
            lines.append(f"| {one['network']} | {_sides(one)} | {one['tile']} | {one['status']} | | | | |")
            continue
        memory = [
            ", ".join(f"{one[way][mode]['bytes'] / 2**20:,.0f} MiB" for way in WAYS)
            for mode in ("inference", "training")
        ]
        seconds = ", ".join(f"{one[way]['training']['cpu_seconds']:.1f}" for way in WAYS)
        far = one["errors"]
        cells = [one["network"], _sides(one), str(one["tile"]), *memory, seconds]
        cells += [f"{max(far['output'], far['inference']):.0e}", f"{max(far['image'], far['parameters']):.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _sides(one: dict[str, Any]) -> str:
    return f"{one['size'][0]} x {one['size'][1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--size", default="1024x768", help="height x width of the first image, multiples of 32")
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--json", type=Path, help="the file that rows are appended to")
    parser.add_argument("--markdown", action="store_true", help="print the table of a file, and measure nothing")
    options = parser.parse_args()
    height, width = (int(side) for side in options.size.split("x"))
    there = json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() else []
    if options.markdown:
        print(markdown(there), end="")
        return 0
    done = {(one["network"], *one["size"], one["tile"]) for one in there if one["status"] == OK}
    for network, size, tile in rows(options.only, (height, width), options.tile):
        if (network, *size, tile) in done:
            continue
        there = [one for one in there if (one["network"], *one["size"], one["tile"]) != (network, *size, tile)]
        there.append(row(network, size, tile) | {"provenance": provenance()})
        print(line(there[-1]), flush=True)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({"what": "benchmarks/attention.py", "rows": there}, indent=1) + "\n")
    return 0 if all(one["status"] == OK for one in there) else 1


if __name__ == "__main__":
    sys.exit(main())
