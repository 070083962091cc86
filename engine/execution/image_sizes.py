"""Calls with images of several sizes, whose outputs are concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.call_trees import Ref
from ..capture.graph import Graph
from ..capture.program import Program
from ..errors import GigamorphError
from ..images.batches import PixelBatch
from ..lowering.ops import VectorOp
from ..torch_private import tree_map
from .programs import GraphInputs
from .run import run


def outputs_of_sizes(net: Any, batches: Sequence[Tensor | PixelBatch]) -> Any:
    """The outputs for image batches of several sizes, concatenated.

    They are computed one after the other, or together if they share the statistics of a BatchNorm in training mode.

    Args:
        net: the accelerated network.
        batches: image batches, each of one size.
    """
    first = net._open(batches[0], _concatenable)
    if any(isinstance(step, VectorOp) and step.share is not None for step in first.prepared.staged.steps):
        return _outputs_together(net, batches)
    outputs, together = [], None
    for x in batches:
        call = net._call(x)
        call.together, call.like = together, first.program
        outputs.append(net._compute(_concatenable, call))
        together = call.together
    return tree_map(lambda *parts: torch.cat(parts), *outputs)


def _outputs_together(net: Any, batches: Sequence[Tensor | PixelBatch]) -> Any:
    if net.split is not None:
        raise GigamorphError(
            "BatchNorm in training mode cannot share statistics between images of several sizes with split; "
            'pass images of one size, or accelerate(..., batch_norm="frozen")'
        )
    others, runner = [net._open(x, _concatenable) for x in batches[1:]], net._runner

    def compute(graphs: Sequence[Graph], inputs: Sequence[GraphInputs]) -> list[Any]:
        graphs, inputs = [*graphs, *(o.graph for o in others)], [*inputs, *(o.inputs for o in others)]
        prepared = runner.programs.prepare(graphs, inputs, runner.settings)
        for one in prepared:
            check_rows(one.staged.program, prepared[0].staged.program)
        forwards = runner.begin(call, inputs, prepared)
        run(forwards)
        outputs = [forwards[0].finish(), *(forward.output() for forward in forwards[1:])]
        return [torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*outputs, strict=True)]

    call = net._call(batches[0])
    call.complete = compute
    return net._compute(_concatenable, call)


def _concatenable(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The network's result, if its outputs can be concatenated; others raise an error during the recording."""
    result = network(*args, **kwargs)
    _require_tensors(result)
    return result


def _require_tensors(result: Any) -> None:
    if isinstance(result, Tensor):
        return
    if not isinstance(result, (dict, list, tuple)):
        raise TypeError(
            f"outputs of images of several sizes are concatenated, but this network returns {type(result).__name__}; "
            "call it for each image"
        )
    for part in result.values() if isinstance(result, dict) else result:
        _require_tensors(part)


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
