"""Run by test_recipe: grow a weights file in its own process; prints the file's bytes and the extra peak memory."""

import sys
from pathlib import Path

import torch
from torch import nn

from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.kernel_size import grow_kernel
from gigamorph.engine.morph.recipe import Fingerprint, Morph, Recipe, _shapes, grow_file
from gigamorph.engine.morph.step import Step
from gigamorph.engine.morph.store import Computed, Layout, layout, write_state
from gigamorph.engine.morph.widen import WidenStep, widen
from gigamorph.engine.tiling.memory import peak_bytes, reset_peak, used_bytes

op, source, target, layers, width = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])


def network(width: int) -> nn.Module:
    """A chain of 3x3 convolutions."""
    body = [part for _ in range(layers) for part in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), *body)


def shapes(width: int, more: int) -> dict[str, Layout]:
    """Names and shapes of the child of a network of this width."""
    small = network(4)
    grow = {
        "kernel": lambda m: grow_kernel(m, torch.zeros(1, 1, 8, 8), "1", 5),
        "front": lambda m: front(m, torch.zeros(1, 1, 8, 8), 2, "stages"),
        "widen": lambda m: widen(m, torch.zeros(1, 1, 2, 2), {"1.weight:0": 5}),
    }
    child, report = grow[op](small)
    steps.append(report.step)
    parts = {}
    for name, part in layout(child.state_dict()).items():
        shape = [width if n == 4 else width + more if n == 5 and op == "widen" else n for n in part.shape]
        parts[name] = Layout(tuple(shape), part.dtype)
    return parts


steps: list[Step] = []
more = width // 4
child = shapes(width, more)  # the recipe of the wide network, made on a narrow one
step = steps[0]
if isinstance(step, WidenStep):
    (key,) = step.copies
    step.copies[key] = (1,) * (width - more) + (2,) * more
with torch.device("meta"):
    model = network(width)
parts = layout(model.state_dict())
parent, grown = (Fingerprint(_shapes(p), "") for p in (parts, child))
write_state(source, Computed(parts, lambda name: torch.full(parts[name].shape, 0.01)))
start = used_bytes()
reset_peak()
grow_file(Recipe([Morph(step, parent, grown)]), model, source, target)
print(Path(source).stat().st_size, peak_bytes() - start)
