"""Transforms of the table: each runs a morph, and defines which networks must be equal on which input.

If a morph changes the input, the parent follows a layer with that change: shrinking by the mean, or ImageNet's
normalisation. Rules that know no architecture choose the modules to deepen from the forward.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from morph_nets import look_at
from torch import Tensor, nn

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph import decompose as dec
from gigamorph.engine.morph import deepen, front, inputs, kernel_size
from gigamorph.engine.morph import merge as mer
from gigamorph.engine.morph import widen as wid
from gigamorph.engine.morph.spaces import Spaces, find_spaces
from gigamorph.engine.morph.step import Report


@dataclass
class Trial:
    """Result of a morph.

    Attributes:
        report: report of the engine.
        child: the child in float32.
        exact: the child of the same morph on float64 weights, if new weights are computed and rounded when they are
            stored; None if the stored weights of the child give the parent's function.
        before: a layer before the parent, or None.
        shape: shape of the child's images.
        train: whether the morph is exact in train mode too.
    """

    report: Report
    child: nn.Module
    exact: nn.Module | None
    before: nn.Module | None
    shape: tuple[int, ...]
    train: bool = True


class Absent(Exception):
    """Error: the transform does not apply to the network; the message states what is missing."""


class Normalise(nn.Module):
    """Independent conversion of grey (N, 1, H, W) in [0, 1] to three channels with ImageNet's normalisation."""

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", inputs.IMAGENET_MEAN), ("std", inputs.IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return ((x.double() - mean) / std).to(x.dtype)


def transforms() -> dict[str, Callable[[nn.Module, Tensor], Trial]]:
    """Return all transforms by their name in the table."""
    return {
        "widen x2": lambda m, x: _widened(m, x, *wid.widen(m, x, factor=2)),
        "widen x1.5": lambda m, x: _widened(m, x, *wid.widen(m, x, factor=1.5)),
        "random counts": _random_counts,
        "new channels": _new_channels,
        "merge back": _merge_back,
        "identity": lambda m, x: _edited(m, x, *deepen.insert_identity(m, x, middle(m, x), act="SiLU")),
        "identity, BatchNorm": _identity_norm,
        "pair": lambda m, x: _edited(m, x, *deepen.insert_pair(m, x, middle(m, x), "GELU")),
        "residual": _residual,
        "in sequence": lambda m, x: _edited(m, x, *dec.decompose(m, x, kernel3(m, x), act="ReLU"), rounded=True),
        "in parallel": lambda m, x: _edited(m, x, *dec.split_parallel(m, x, middle(m, x))),
        "kernel": _kernel,
        "grey": _grey,
        "front x2": lambda m, x: _front(m, x, 2, "fold"),
        "front x4": lambda m, x: _front(m, x, 4, "stages"),
    }


# -- widening ----------------------------------------------------------------------------------------------------


def _widened(model: nn.Module, x: Tensor, child: nn.Module, report: Report) -> Trial:
    del model
    if not report.changes:
        raise MorphError("no channel space of this network can grow")
    return Trial(report, child, None, None, tuple(x.shape))


def _growable(model: nn.Module, x: Tensor) -> Spaces:
    spaces = find_spaces(model, x)
    if not spaces.growable():
        raise MorphError("no channel space of this network can grow")
    return spaces


def _random_counts(model: nn.Module, x: Tensor) -> Trial:
    rng = np.random.default_rng(1)
    spaces = _growable(model, x).growable()
    counts: Any = {s.key: rng.choice([1, 1, 1, 2, 3], len(s.order)).tolist() for s in spaces}
    return _widened(model, x, *wid.widen(model, x, counts, split="kraft"))


def _new_channels(model: nn.Module, x: Tensor) -> Trial:
    """Add channels to the first space with single channels as classes; a norm over channels allows none."""
    single = [s for s in _growable(model, x).growable() if len(s.order) == s.width]
    if not single:
        raise MorphError("every space that can grow is under a norm over channels or in groups")
    return _widened(model, x, *wid.widen(model, x, free={single[0].key: 3}))


def _merge_back(model: nn.Module, x: Tensor) -> Trial:
    """Widen by 1.5 and merge back to the parent's size and function."""
    _growable(model, x)
    wide, _ = wid.widen(model, x, factor=1.5)
    narrow, report = mer.merge(wide, x)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (model, narrow)]
    if sizes[0] != sizes[1]:
        raise MorphError(f"merged to {sizes[1]} parameters, not back to {sizes[0]}")
    return _widened(wide, x, narrow, report)


# -- deepening ---------------------------------------------------------------------------------------------------


def _edited(model: nn.Module, x: Tensor, child: nn.Module, report: Report, rounded: bool = False) -> Trial:
    exact = None
    if rounded:
        exact = copy.deepcopy(model).double()
        report.step.repeat(exact)
    return Trial(report, child, exact, None, tuple(x.shape))


def _identity_norm(model: nn.Module, x: Tensor) -> Trial:
    trial = _edited(model, x, *deepen.insert_identity(model, x, middle(model, x), norm=True), rounded=True)
    trial.train = False
    return trial


def _residual(model: nn.Module, x: Tensor) -> Trial:
    path = middle(model, x)
    norm = isinstance(model.get_submodule(path), nn.Conv2d)  # BatchNorm cannot follow channels on the last axis
    return _edited(model, x, *deepen.insert_residual(model, x, path, norm=norm))


def _kernel(model: nn.Module, x: Tensor) -> Trial:
    """Enlarge all convolutions of the most common kernel above 1 by a ring of taps."""
    convs = {p: m for p, m, _ in _layers(model, x) if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1}
    sizes = Counter(m.kernel_size for m in convs.values())
    if not sizes:
        raise Absent("no convolution with a kernel above 1")
    old: Any = sizes.most_common(1)[0][0]
    paths = [path for path, conv in convs.items() if conv.kernel_size == old]
    return _edited(model, x, *kernel_size.grow_kernel(model, x, paths, [k + 2 for k in old]))


def middle(model: nn.Module, x: Tensor) -> str:
    """Return the middle convolution in forward order, or the middle linear layer if only the stem is a convolution.

    Only maps of at least 3 x 3 pixels, or as many tokens, count, so the squeezed values of a gate do not.
    """
    found = _layers(model, x)
    convs = [path for path, module, _ in found if isinstance(module, nn.Conv2d)]
    paths = convs if len(convs) > 1 else [path for path, _, _ in found]
    return paths[len(paths) // 2]


def kernel3(model: nn.Module, x: Tensor) -> str:
    """Return the middle 3x3 convolution, preferably ungrouped, or the middle linear layer if there is none."""
    found = _layers(model, x)
    convs = [(p, m.groups) for p, m, _ in found if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    paths = [path for path, groups in convs if groups == 1] or [path for path, _ in convs]
    paths = paths or [path for path, module, _ in found if isinstance(module, nn.Linear)]
    if not paths:
        raise Absent("neither a 3x3 convolution nor a linear layer on tokens")
    return paths[len(paths) // 2]


def _layers(model: nn.Module, x: Tensor) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """Return path, module and output shape of all layers on maps or tokens, in forward order."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, tuple[str, nn.Module, tuple[int, ...]]] = {}

    def look(module: nn.Module, _args: Any, result: Tensor) -> None:
        conv = isinstance(module, nn.Conv2d)
        positions = result.shape[2:].numel() if conv else result.shape[1:-1].numel()
        if positions >= 9:
            found.setdefault(names[id(module)], (names[id(module)], module, tuple(result.shape)))

    look_at(model, x, (nn.Conv2d, nn.Linear), look)
    return list(found.values())


# -- inputs ------------------------------------------------------------------------------------------------------


def _grey(model: nn.Module, x: Tensor) -> Trial:
    child, report = inputs.to_grey(model, x[:, :1])
    trial = _edited(model, x[:, :1], child, report, rounded=True)
    trial.before = Normalise()
    return trial


def _front(model: nn.Module, x: Tensor, r: int, mode: str) -> Trial:
    child, report = front.front(model, x, r, mode)
    shape = (*x.shape[:2], r * x.shape[2], r * x.shape[3])
    return Trial(report, child, None, nn.AvgPool2d(r), shape)
