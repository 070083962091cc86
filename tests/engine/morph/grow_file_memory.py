"""Run by test_recipe: grow a file of weights by each morph in turn; prints the file's bytes and the extra peaks."""

import sys
from pathlib import Path

import torch
from torch import nn

from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.kernel_size import grow_kernel
from gigamorph.engine.morph.recipe import Fingerprint, Morph, Recipe, _shapes, grow_file
from gigamorph.engine.morph.step import Step
from gigamorph.engine.morph.store import Computed, TensorSpec, layout, write_state
from gigamorph.engine.morph.widen import WidenStep, widen
from gigamorph.engine.tiling.memory import peak_bytes, reset_peak, used_bytes

source, target, layers, width = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
more = width // 4
GROW = {
    "kernel": lambda m: grow_kernel(m, torch.zeros(1, 1, 8, 8), "1", 5),
    "front": lambda m: front(m, torch.zeros(1, 1, 8, 8), 2, "stages"),
    "widen": lambda m: widen(m, torch.zeros(1, 1, 2, 2), {"1.weight:0": 5}),
}


def network(width: int) -> nn.Module:
    """A chain of 3x3 convolutions."""
    body = [part for _ in range(layers) for part in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), *body)


def wide(op: str) -> tuple[Step, dict[str, TensorSpec]]:
    """The step of the wide network, made on a narrow one, and names and shapes of its child."""
    child, report = GROW[op](network(4))
    step, parts = report.step, {}
    for name, part in layout(child.state_dict()).items():
        shape = [width if n == 4 else width + more if n == 5 and op == "widen" else n for n in part.shape]
        parts[name] = TensorSpec(tuple(shape), part.dtype)
    if isinstance(step, WidenStep):
        (key,) = step.copies
        step.copies[key] = (1,) * (width - more) + (2,) * more
    return step, parts


with torch.device("meta"):
    model = network(width)
parts = layout(model.state_dict())
write_state(source, Computed(parts, lambda name: torch.full(parts[name].shape, 0.01)))
extra = []
for op in GROW:
    step, child = wide(op)
    parent, grown = (Fingerprint(_shapes(p), "") for p in (parts, child))
    start = used_bytes()
    reset_peak()
    grow_file(Recipe([Morph(step, parent, grown)]), model, source, target)
    extra.append(peak_bytes() - start)
print(Path(source).stat().st_size, *extra)
