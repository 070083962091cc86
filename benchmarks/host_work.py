"""What the host launches in a step on a GPU, inside of captured work and outside of it; counted without a GPU.

    python benchmarks/host_work.py [--network resnet50] [--autocast] [--json FILE]

Which ops a step dispatches depends on how many tiles there are, not on how large they are: so an image of 256 x 256 in
tiles of 128 stands for 4096 x 4096 in tiles of 2048, and one of 208 x 160 in one tile for a mammogram of 3328 x 2560.
The step runs on the CPU. Every op that is no view counts as a launch; of our own ops each as one. A copy of several
tensors is one launch per tensor, or per 300 tensors where all lie dense in memory (what PyTorch's foreach kernels ask
for). Capturing is stood in for by remembering the function.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gigamorph import accelerate, kernels
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.cuda_graphs import buffers
from gigamorph.engine.models.compat import make_torchvision_importable
from gigamorph.engine.planning.plan import Plan
from gigamorph.kernels import choice

STEPS = 4  # the first makes the graph buffers, the second captures, the third and all later ones are alike
FOREACH = 300  # tensors that a foreach kernel takes in one launch, about


class Launches(TorchDispatchMode):
    """Counts launches; those made while `inside` apart."""

    sees_tiles = True

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.found = False, (Counter[str](), Counter[str]())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func._schema.name and func._schema.name != "aten::detach":
            self.found[self.inside][func._schema.name] += _launches(func, args)
        return func(*args, **(kwargs or {}))


def _launches(func: Any, args: Any) -> int:
    if not func._schema.name.startswith("aten::_foreach_"):
        return 1
    tensors = [tensor for given in args if isinstance(given, (list, tuple)) for tensor in given]
    count = len(args[0])
    return -(-count // FOREACH) if all(map(_dense, tensors)) else count


def _dense(tensor: torch.Tensor) -> bool:
    reach = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return reach == tensor.numel()


class Remembered:
    """Captures by remembering the function; a replay is one launch outside."""

    def __init__(self, launches: Launches):
        self.launches = launches

    def apart(self) -> Remembered:
        return self

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        def again() -> None:
            self.launches.found[False]["replay"] += 1
            self.launches.inside = True
            try:
                run()
            finally:
                self.launches.inside = False

        return again


def count(network: str, size: tuple[int, int], tile: int, replayed: bool, autocast: bool) -> list[dict[str, Any]]:
    """Launches of each of the first steps."""
    make_torchvision_importable()
    import torchvision

    torch.manual_seed(0)
    net = accelerate(getattr(torchvision.models, network)(num_classes=2), tile=tile, batch_norm="frozen")
    image = torch.randn(1, 3, *size)
    launches = Launches()
    rows = []
    executor = mock.patch.object(buffers, "executor", lambda device: Remembered(launches) if replayed else None)
    room = mock.patch.object(Plan, "replayed", property(lambda plan: replayed))
    with executor, room, mock.patch.object(kernels, "enabled", lambda device: True), choice.override("stock"):
        for number in range(STEPS):
            net.zero_grad()
            launches.found = (Counter(), Counter())
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), launches:
                loss = net(image).sum()
            with launches:
                loss.backward()
            outside, inside = launches.found
            copies = sum(n for name, n in outside.items() if "copy" in name)
            rows.append(
                {"step": number + 1, "inside": inside.total(), "outside": outside.total(), "outside_copies": copies}
            )
            rows[-1]["outside_most"] = dict(outside.most_common(8))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--autocast", action="store_true", help="in bfloat16")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = {}
    for name, size, tile in (("4096 x 4096, four tiles", (256, 256), 128), ("3328 x 2560, one tile", (208, 160), 208)):
        for replayed in (False, True):
            key = f"{name}, {'replayed' if replayed else 'op by op'}"
            found[key] = count(given.network, size, tile, replayed, given.autocast)
            last = found[key][-1]
            told = {k: v for k, v in last.items() if k in ("inside", "outside", "outside_copies")}
            print(f"{key:34}", *(f"{k} {v:6}" for k, v in told.items()))
            print("   ", last["outside_most"])
    if given.json:
        report = {**provenance(), "network": given.network, "autocast": given.autocast, "launches": found}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
