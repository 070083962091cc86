"""Functions that print how much memory something takes; each runs in a process of its own."""

import resource
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gigamorph import open_pixels
from gigamorph.engine.models.folder import Preprocessing
from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.kernel_size import grow_kernel
from gigamorph.engine.morph.recipe import Fingerprint, Morph, Recipe, _shapes, grow_file
from gigamorph.engine.morph.step import Step
from gigamorph.engine.morph.store import Computed, TensorSpec, layout, read_state, write_state
from gigamorph.engine.morph.widen import WidenStep, widen
from gigamorph.engine.published.images import PreparedSource
from gigamorph.engine.tiling.memory import large_blocks_on_own_pages, peak_bytes, reset_peak, used_bytes


def double(source: str, target: str, tensors: int, mib: int) -> None:
    """Double a file of `tensors` times `mib` MiB; print the extra peak."""
    parts = {f"t{i}": TensorSpec((mib << 18,), torch.float32) for i in range(tensors)}
    write_state(source, Computed(parts, lambda name: torch.full(parts[name].shape, float(name[1:]))))
    state = read_state(source)
    grown = {name: TensorSpec((2, *part.shape), part.dtype) for name, part in layout(state).items()}
    start = used_bytes()
    reset_peak()
    with large_blocks_on_own_pages():
        write_state(target, Computed(grown, lambda name: torch.stack([state[name], state[name] / 2])))
    print(peak_bytes() - start)


def grow(source: str, target: str, layers: int, width: int) -> None:
    """Grow a file of a chain of convolutions by each morph in turn; print the file's bytes and the extra peaks."""
    more = width // 4
    morphs = {
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
        child, report = morphs[op](network(4))
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
    for op in morphs:
        step, child = wide(op)
        parent, grown = (Fingerprint(_shapes(p), "") for p in (parts, child))
        start = used_bytes()
        reset_peak()
        grow_file(Recipe([Morph(step, parent, grown)]), model, source, target)
        extra.append(peak_bytes() - start)
    print(Path(source).stat().st_size, *extra)


def widen_narrow_image() -> None:
    """Widen an image of 12500 x 2 pixels; print by how many KiB the largest resident set grows."""
    source = open_pixels(np.ones((1, 12500, 2), np.uint16))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    PreparedSource(source, Preprocessing(1, size=(64, 64), fit="widen")).read(0, 64, 0, 64)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
