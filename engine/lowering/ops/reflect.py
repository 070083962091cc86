"""Padding that repeats pixels of the image: a mirrored border, or the last pixel repeated.

Joining a map to its own mirror image is such a padding, as in `torch.cat([x, x.flip(2)], 2)[:, :, :height]`.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...capture.program import Op
from ..geometry import Mirror
from .base import Block, Env, Local, Maps
from .constants import Constants
from .resample import select


def mirrored_pad(op: Op, maps: Maps, value: int, pad: tuple[int, int, int, int], mode: str) -> Local:
    """`F.pad` with a mode of `Mirror`; `pad` is (top, bottom, left, right)."""
    h, w = maps.axes[value]
    height, width = maps.size(value)
    rows = Mirror(height, height + pad[0] + pad[1], pad[0], mode)
    cols = Mirror(width, width + pad[2] + pad[3], pad[2], mode)

    constants = Constants()

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        return (_take(_take(env[value], h, rows, block.rows, constants), w, cols, block.cols, constants),)

    return Local(op, {value: (rows, cols)}, (maps.axes[value],), run)


def joined_mirror(op: Op, maps: Maps, value: int, dim: int, length: int) -> Local:
    """The first `length` rows or columns of a map that is joined to its mirror image."""
    axes = maps.axes[value]
    more = [length - maps.shape(value)[axis] if axis == dim else 0 for axis in axes]
    return mirrored_pad(replace(op, inputs=(value,)), maps, value, (0, more[0], 0, more[1]), "symmetric")


def _take(x: Tensor, dim: int, access: Mirror, span: tuple[int, int], constants: Constants) -> Tensor:
    """The outputs of `span`, selected from the window with their inputs."""
    start = access.span(*span)[0]
    sources = [access.source(o) - start for o in range(*span)]
    if sources == list(range(sources[0], sources[0] + len(sources))):
        return x.narrow(dim, sources[0], len(sources))
    return select(x, dim, constants.numbers(sources, x))
