"""Counts without a GPU the bytes that a whole training step moves on one, including copies of the engine.

    env -u TRITON_INTERPRET python benchmarks/step_bytes.py [--network resnet50] [--frozen] [--json FILE]

A whole step of `accelerate` runs on the CPU, in one tile, in bfloat16, with the graph of a GPU (PyTorch computes its
ops). Its graphs are stored, as on a GPU without a budget. For each op that is not a view, every tensor that it reads or
writes counts once; what the gradients of a norm in training mode read twice counts twice. The step runs in two sizes:
traffic proportional to the pixels is printed per pixel, the rest (weights and their gradients) separately.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gigamorph import accelerate, kernels
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.cuda_graphs import buffers
from gigamorph.engine.execution.forward import Forward
from gigamorph.engine.models.compat import make_torchvision_importable
from gigamorph.engine.tiling import backward, stored_maps
from gigamorph.kernels import choice

SIZES = 512, 1024
CONSTANT_OPS = {"aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::new_full"}


class Moved(TorchDispatchMode):
    """Counts launches and bytes by op."""

    sees_tiles = True

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if func.is_view or "empty" in name or name == "aten::detach":
            return result
        given = [] if name in CONSTANT_OPS else [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        tensors = {(t.data_ptr(), t.numel(), t.dtype): t for t in (*given, *made)}
        self.launches[name] += 1
        self.bytes[name] += sum(map(_bytes, tensors.values()))
        # For a complete gradient, the second pass reads x, and dz if that was written, otherwise dy.
        if name == "gigamorph::normalize_act_gradients" and len(args) > 9 and args[9]:
            self.bytes[name] += 2 * _bytes(given[0])
        return result


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def step(network: str, size: int, live: bool) -> Moved:
    """Return the traffic of the second of two steps."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(network, num_classes=2).train()
    net = accelerate(model, tile=size, batch_norm=None if live else "frozen")
    image = torch.randn(1, 3, size, size)
    whole = mock.patch.object(Forward, "_retained", lambda self, index: self.prepared.stages[index].tiles)
    pages = [mock.patch.object(module, "on_pages", lambda device: False) for module in (stored_maps, backward)]
    gpu = mock.patch.object(kernels, "enabled", lambda device: True)
    with (
        gpu,
        whole,
        pages[0],
        pages[1],
        choice.override("stock"),
        mock.patch.object(buffers, "executor", lambda _: None),
    ):
        for _ in range(2):
            net.zero_grad()
            moved = Moved()
            with torch.autocast("cpu", torch.bfloat16), moved:
                loss = net(image).sum()
            with moved:
                loss.backward()
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="name in timm")
    parser.add_argument("--frozen", action="store_true", help="use frozen norms")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    make_torchvision_importable()
    small, large = (step(given.network, size, not given.frozen) for size in SIZES)
    pixels = [size * size for size in SIZES]
    ops = {}
    for name, count in large.bytes.most_common():
        each = (count - small.bytes[name]) / (pixels[1] - pixels[0])
        ops[name] = {"launches": large.launches[name], "bytes_per_pixel": round(each, 1)}
        ops[name]["megabytes_besides"] = round((count - each * pixels[1]) / 1e6, 1)
    ops = dict(sorted(ops.items(), key=lambda op: -op[1]["bytes_per_pixel"]))
    total = {key: round(sum(op[key] for op in ops.values()), 1) for key in next(iter(ops.values()))}
    print(given.network, "frozen" if given.frozen else "live", total)
    for name, op in list(ops.items())[:16]:
        print("   ", name, op)
    if given.json:
        report = {"machine": provenance(), "network": given.network, "frozen": given.frozen, "total": total, "ops": ops}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
