"""Checks that the outputs for images of several sizes can be concatenated."""

from __future__ import annotations

from ..capture.call_trees import Ref
from ..capture.program import Program
from ..errors import GigamorphError


def check_rows(program: Program, like: Program) -> None:
    """Raise an error if the outputs for two image batches are not rows of the same shapes."""
    rows, others = _rows(program), _rows(like)
    if rows != others:
        image, other = (tuple(each.values[each.image].shape[2:]) for each in (program, like))
        raise GigamorphError(
            f"outputs of images of several sizes are concatenated, but this network's rows have the shapes {others} "
            f"for an image of {other} and {rows} for one of {image}; call it for each image"
        )


def _rows(program: Program) -> list[tuple[int, ...]]:
    """The shape of one row of each output."""
    rows = []
    for leaf in program.output:
        if not isinstance(leaf, Ref):
            continue
        shape = tuple(program.values[leaf.value].shape)
        if not shape:
            raise GigamorphError(
                "outputs of images of several sizes are concatenated, but this network returns a number; call it for "
                "each image"
            )
        rows.append(shape[1:])
    return rows
