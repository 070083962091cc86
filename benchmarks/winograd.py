"""Winograd's convolutions on the CPU beside oneDNN's, and networks with them and without, in turns.

    python benchmarks/winograd.py --json benchmarks/results/winograd_cpu.json

Layers: milliseconds with bias and ReLU, the least of `ROUNDS`, and the distance of both from float64. Networks: seconds
by the clock and of the processors, the least of `--rounds`, of stock PyTorch, of steps without these convolutions and
with them, one process, one turn each.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.bench.meter import time_call
from gigamorph.engine.models import create_model
from gigamorph.kernels import winograd

ROUNDS = 12
LAYERS = [(64, 64, 256), (128, 128, 128), (256, 256, 64), (512, 512, 32), (32, 32, 256), (64, 32, 256), (96, 96, 128)]
NETWORKS = [("resnet18", "inference", 1024), ("resnet18", "frozen", 512), ("resnet18", "live", 512)]


def least(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Least seconds by the clock and of the processors of each, which take turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(time_call(call))
    return {name: (min(c for c, _ in times), min(c for _, c in times)) for name, times in found.items()}


def layer(channels: int, filters: int, side: int) -> dict[str, Any]:
    """One convolution of 3 x 3 with bias and ReLU, as inference has it."""
    torch.manual_seed(0)
    x = torch.randn(1, channels, side, side).relu().contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(filters, channels, 3, 3) * (2 / channels / 9) ** 0.5, torch.randn(filters)
    place = [1, 1], [1, 1], [1, 1], 1
    by_onednn = torch.ops.mkldnn._reorder_convolution_weight(weight, *place)
    by_winograd = winograd.pack(weight)

    def onednn() -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, by_onednn, bias, *place, "relu", [], "")

    def ours() -> Tensor:
        y = winograd.conv3x3(x, by_winograd, filters, bias, relu=True)
        assert y is not None
        return y

    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
    times = least({"onednn": onednn, "winograd": ours}, ROUNDS)
    row: dict[str, Any] = {"channels": channels, "filters": filters, "side": side}
    for name, call in (("onednn", onednn), ("winograd", ours)):
        row[name] = {"ms": 1e3 * times[name][0], "error": float((call() - exact).norm() / exact.norm())}
    return row | {"ratio": times["winograd"][0] / times["onednn"][0]}


def network(name: str, mode: str, tile: int, side: int, rounds: int) -> dict[str, Any]:
    """Steps of a network on one image: of stock, and ours without and with these convolutions."""
    torch.manual_seed(0)
    stock = create_model(name, num_classes=1000, in_channels=3).train(mode == "live")
    image = torch.randn(1, 3, side, side)

    def step(net: nn.Module) -> None:
        with torch.set_grad_enabled(mode != "inference"):
            y = net(image)
        if mode != "inference":
            net.zero_grad(set_to_none=True)
            y.square().mean().backward()

    nets = {"stock": stock, "without": accelerate(copy.deepcopy(stock), tile=tile)}
    own = winograd.pays
    winograd.pays = lambda *_: False  # when the program is made, which is in the first step
    try:
        step(nets["without"])
    finally:
        winograd.pays = own
    nets["with"] = accelerate(copy.deepcopy(stock), tile=tile)
    step(nets["with"])
    times = least({which: lambda net=net: step(net) for which, net in nets.items()}, rounds)
    row: dict[str, Any] = {"network": name, "mode": mode, "side": side, "tile": tile}
    return row | {which: {"seconds": clock, "cpu_seconds": cpu} for which, (clock, cpu) in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    if not winograd.available():
        raise SystemExit(f"nothing to compare: {winograd.missing()}")
    rows: dict[str, list[dict[str, Any]]] = {"layers": [], "networks": []}
    for shape in LAYERS:
        rows["layers"].append(layer(*shape))
        print(rows["layers"][-1], flush=True)
    for name, mode, tile in NETWORKS:
        rows["networks"].append(network(name, mode, tile, args.side, args.rounds))
        print(rows["networks"][-1], flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"provenance": provenance(), **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
