"""Memory (by `plan`) and hours (by the roofline) of the recipes at their published sizes, without running them.

python benchmarks/recipes_size.py [--only end2end-whole] [--measure]   # writes JSON and docs/recipes/sizes.md
python benchmarks/recipes_size.py --write                              # the page from the JSON
python benchmarks/recipes_size.py --measure --shrink 16                # sides divided by 16: every row in seconds

Memory is that of a step with all that the GPU offers (80 GB), and what stock PyTorch would take. Hours are for 1,000
training images (or patches) through the configuration's epochs, at best: the floor of stock PyTorch's step on an A100
by its data sheet (2,039 GB/s, 19.5 TFLOP/s in float32), times the plan's work; reading and validation are not in it.
With --measure a step in float32 is run on this CPU, in half of the memory that is free. Patches are trained on by plain
PyTorch: what end2end-patch and siamese take is the column of stock PyTorch. The auto-encoder of cae is not planned.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gigamorph.engine.accelerate import accelerate, freeze_batch_norm
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.bench.results import Task
from gigamorph.engine.bench.roofline import count
from gigamorph.engine.mammography.recipes.cae import CaeConfig
from gigamorph.engine.mammography.recipes.dvme import DvmeConfig
from gigamorph.engine.mammography.recipes.end2end.config import Config as End2End
from gigamorph.engine.mammography.recipes.end2end.network import PatchNet, convert, features, width_of
from gigamorph.engine.mammography.recipes.features import UpTo
from gigamorph.engine.mammography.recipes.morphhr.config import Config as MorphHR
from gigamorph.engine.mammography.recipes.morphhr.grow import grow
from gigamorph.engine.mammography.recipes.siamese import SiameseConfig
from gigamorph.engine.mammography.recipes.siamese.network import Embedding
from gigamorph.engine.models import create_model
from gigamorph.engine.morph.files import Grown
from gigamorph.engine.planning import constants
from gigamorph.engine.planning.preview import plan
from gigamorph.engine.tiling.memory import available_bytes

ROOT = Path(__file__).parents[1]
JSON = ROOT / "benchmarks" / "results" / "recipes_size.json"
PAGE = ROOT / "docs" / "recipes" / "sizes.md"
GPU = "A100"


@dataclass(frozen=True)
class Row:
    """A training of a recipe: its network, the batch of a step, and the number of epochs."""

    name: str
    what: str
    make: Callable[[], nn.Module]
    image: tuple[int, int, int, int]
    epochs: int
    frozen: bool = True
    """Whether norms use stored statistics."""
    training: bool = True


def rows() -> list[Row]:
    """Return the rows of the published configurations; full images have 4096 x 3072 pixels."""
    high, end = MorphHR(), End2End()
    whole, pair, cae, dvme = end.models[0], SiameseConfig(), CaeConfig(), DvmeConfig()
    full = (1, high.channels, 4096, 3072)
    return [
        Row(
            "morphhr-low",
            "ResNet-50 at a quarter of the resolution",
            lambda: create_model(high.model, 2, high.channels),
            (high.low[0].batch_size, high.channels, 1024, 768),
            high.low[0].epochs,
            False,
        ),
        Row("morphhr-high", "the morphed child, full images", _child, full, high.high[0].epochs),
        Row(
            "morphhr-direct",
            "ResNet-50 itself, full images",
            lambda: create_model(high.model, 2, high.channels),
            full,
            high.high[0].epochs,
        ),
        Row("end2end-patch", "patches, all layers", _patch, (32, 3, 224, 224), end.patch[2].epochs, False),
        Row(
            "end2end-whole",
            "whole images, all layers",
            lambda: convert(_patch(), whole),
            (end.whole[1].batch_size, 3, *end.resize),
            end.whole[1].epochs,
        ),
        Row(
            "siamese",
            "pairs of patches, one of two networks",
            lambda: Embedding(create_model(pair.model, 2, 1), pair.layer, pair.dim, 1, pair.patch),
            (2 * pair.batch_size, 1, pair.patch, pair.patch),
            pair.epochs,
            False,
        ),
        Row(
            "cae-maps",
            "AlexNet's maps",
            lambda: UpTo(create_model(cae.model, 2, cae.channels), cae.layer),
            (cae.batch_size, cae.channels, *cae.resize),
            1,
            training=False,
        ),
        Row(
            "dvme",
            "embeddings of ResNet-50",
            lambda: create_model("resnet50", 2, dvme.channels),
            (dvme.batch_size, dvme.channels, dvme.crop, dvme.crop),
            1,
            training=False,
        ),
    ]


def _patch() -> PatchNet:
    maps = features("resnet50", 3)
    return PatchNet(maps, width_of(maps, 3))


def _child() -> nn.Module:
    config = MorphHR()
    parent = Grown(create_model(config.model, 2, config.channels).eval(), channels=config.channels)
    return grow(parent, config, 0)[0].network


def size(row: Row, shrink: int, measure: bool) -> dict[str, Any]:
    """Return memory and hours of a row, with the sides of its images divided by `shrink`."""
    torch.manual_seed(0)
    network = row.make().train(row.training)
    if row.frozen and row.training:
        freeze_batch_norm(network)
    n, channels, *sides = row.image
    image = (n, channels, *(max(side // shrink, min(side, 64)) for side in sides))
    gigabytes, *rates = constants.GPUS[GPU]
    given = {"device": "cuda", "training": row.training}
    made = plan(network, image, int(constants.FREE_SHARE * gigabytes * 1e9), **given)
    names = ("gb_per_s", "tflop_per_s fp32", "tflop_per_s bf16")
    floor = count(network, Task(row.name, image, row.training)).seconds(dict(zip(names, rates, strict=True)), "fp32")
    assert floor is not None
    seconds = floor * made.work
    found: dict[str, Any] = {
        "what": row.what,
        "image": image,
        "epochs": row.epochs,
        "peak_bytes": made.peak_bytes,
        "stock_bytes": made.stock_bytes,
        "seconds_of_a_step": seconds,
        "hours_of_1000_images": seconds / n * 1000 * row.epochs / 3600,
    }
    if measure:
        found["cpu_seconds_of_a_step"] = _measured(network, image, row.training)
    return found


def _measured(network: nn.Module, image: tuple[int, ...], training: bool) -> float:
    net = accelerate(network, memory_budget=available_bytes() // 2, fallback="untiled")
    x = torch.rand(image)
    began = time.process_time()
    with torch.set_grad_enabled(training):
        out = net(x)
        if training:
            out.float().square().mean().backward()
    return time.process_time() - began


def page(found: dict[str, dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    assert __doc__ is not None
    lines = ["# Recipes at their published sizes", "", *__doc__.split("\n\n")[-1].strip().splitlines(), ""]
    lines += [
        "| training | | batch | epochs | memory of a step | of stock PyTorch | a step at best | 1,000 images at best | CPU time of a step |",  # noqa: E501
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in found.items():
        measured = own.get("cpu_seconds_of_a_step")
        cells = (
            name,
            own["what"],
            " x ".join(map(str, own["image"])),
            str(own["epochs"]),
            f"{own['peak_bytes'] / 2**30:.2f} GiB",
            f"{own['stock_bytes'] / 2**30:.2f} GiB" if own["stock_bytes"] else "",
            f"{1000 * own['seconds_of_a_step']:.3g} ms",
            f"{own['hours_of_1000_images']:.2g} h",
            "" if measured is None else f"{measured:.3g} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = rows()
    parser.add_argument("--only", choices=[row.name for row in every], action="append")
    parser.add_argument("--measure", action="store_true", help="run a step of each row on this CPU")
    parser.add_argument("--shrink", type=int, default=1, help="divide the sides; only printed")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    stored = json.loads(JSON.read_text()) if JSON.exists() and given.shrink == 1 else {}
    if given.write:
        PAGE.write_text(page(stored))
        return
    machine = provenance()  # before the first row is written as an uncommitted change
    for row in every:
        if not given.only or row.name in given.only:
            stored[row.name] = {**size(row, given.shrink, given.measure), "provenance": machine}
            print(page({row.name: stored[row.name]}).splitlines()[-1], flush=True)
            if given.shrink == 1:
                order = [each.name for each in every if each.name in stored]
                JSON.write_text(json.dumps({name: stored[name] for name in order}, indent=1) + "\n")
                PAGE.write_text(page({name: stored[name] for name in order}))


if __name__ == "__main__":
    main()
