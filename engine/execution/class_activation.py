"""Class activation maps: the contribution of each cell of the last map to a score, and the cells' image regions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import GigamorphError
from ..lowering.geometry import Cells
from ..lowering.ops import Axes, Reduction
from ..lowering.receptive_field import ReceptiveField, receptive_fields
from ..lowering.stages import ProgramStage
from ..tiling.forward import ForwardPass
from ..tiling.scan import Observer
from ..torch_private import tree_leaves
from .forward import Forward
from .run import run

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evidence:
    """The contribution of each cell of the last map before the global pooling to a score.

    Attributes:
        values: (N, h, w), for volumes (N, d, h, w), float32 (float64 for a float64 network).
        outputs: (N, outputs), the outputs of the network.
        rows: the image rows of the map's rows.
        columns: the image columns of the map's columns.
        adds_up: whether the values sum to the map's contribution to the score; true for means and sums, not for maxima.
    """

    values: Tensor
    outputs: Tensor
    rows: ReceptiveField
    columns: ReceptiveField
    adds_up: bool


class _Found(Exception):
    """Carries a result out of a call, which it ends early."""

    def __init__(self, result: Evidence):
        super().__init__("found")
        self.result = result


def evidence_of_call(call: Any, score: Score, compute: Callable[[], Any]) -> Evidence:
    """The evidence for a score of a network's first output, in inference.

    Args:
        call: a new call of an accelerated network with an image batch.
        score: differentiable function (N, outputs) -> (N,).
        compute: computes the call.
    """

    def finish(forward: Forward) -> list[Any]:
        with torch.no_grad():
            raise _Found(find_evidence(forward, score))

    call.batch, call.finish = replace(call.batch, training=False, image_grad=False), finish
    try:
        compute()
    except _Found as found:
        return found.result
    raise AssertionError


def column_of(outputs: Tensor, output: int) -> Tensor:
    """A column of (N, outputs); raises an error if it does not exist."""
    if not -outputs.shape[1] <= output < outputs.shape[1]:
        raise GigamorphError(f"output {output} does not exist; the network has {outputs.shape[1]} outputs")
    return outputs[:, output]


def find_evidence(forward: Forward, score: Score) -> Evidence:
    """Run a forward, then the stage with its last pooling again, and return the evidence for a score.

    Args:
        forward: a new forward.
        score: maps the network's first output, (N, outputs), to (N,).

    Raises:
        GigamorphError: if the network has no global pooling.
    """
    staged = forward.prepared.staged
    pooling = [n for n, step in enumerate(staged.steps) if isinstance(step, ProgramStage) and step.reductions]
    if not pooling:
        raise GigamorphError(
            "the network pools nothing over the image, so it has no class activation map; use gradients: "
            "gigamorph explain --method gradient"
        )
    run([forward], 0, pooling[-1])
    scan, _, vectors = forward.scan(pooling[-1])
    replay = forward.prepared.replay(pooling[-1], scan.device)
    stage, results = scan.tiled.stage, ForwardPass(scan, vectors, replay=replay).run()
    pooled = {r.outputs[0]: r for r in stage.reductions if r.kind != "moments"}
    with torch.enable_grad():
        leaves = [r.detach().requires_grad_() for r in results]
        forward.env.update(zip(stage.results, leaves, strict=True))
        run([forward], pooling[-1] + 1)
        outputs = next(t for t in tree_leaves(forward.output()) if isinstance(t, Tensor))
        outputs = outputs.reshape(outputs.shape[0], -1)
        grads = torch.autograd.grad(score(outputs).sum(), leaves, allow_unused=True)
    there = [
        (pooled[value], grad)
        for value, grad in zip(stage.results, grads, strict=True)
        if value in pooled and grad is not None
    ]
    if not there:
        raise GigamorphError("no evidence: the score does not depend on the network's last pooling; use another score")
    last = there[-1][0].value
    shape = staged.program.values[last].shape
    if shape[0] != len(outputs):
        raise GigamorphError(
            f"no evidence: {shape[0]} maps are pooled for {len(outputs)} rows of outputs, as for bags of images; give "
            "single images to a network of images"
        )
    slices = [shape[2]] if len(shape) == 5 and stage.maps.axes[last] == (3, 4) else []

    def cells(value: int) -> tuple[int, ...]:
        return tuple(staged.program.values[value].shape[2:] if slices else stage.maps.size(value))

    there = [(reduction, grad) for reduction, grad in there if cells(reduction.value) == cells(last)]
    wide = torch.promote_types(leaves[0].dtype, torch.float32)
    total = torch.zeros(len(outputs), *slices, *stage.maps.size(last), dtype=wide, device=scan.device)
    observers: dict[int, list[Observer]] = {}
    for reduction, grad in there:
        observer = _observer(total, reduction, grad, stage.maps.axes[reduction.value])
        observers.setdefault(reduction.value, []).append(observer)
    ForwardPass(replace(scan, observers=observers), vectors).run()
    rows, columns = receptive_fields(staged)[last]
    adds_up = any(reduction.kind == "sum" for reduction, _ in there)
    return Evidence(total, outputs.detach(), rows, columns, adds_up)


def _observer(total: Tensor, reduction: Reduction, grad: Tensor, axes: Axes) -> Observer:
    """An observer that adds the evidence of each block to `total`."""
    grad = reduction.keep_dims(grad)

    def add(block: Tensor, rect: tuple[int, int, int, int]) -> None:
        weight = grad.to(total.dtype) / reduction.count
        if reduction.grid is not None:
            for axis, cells, span in zip(axes, reduction.grid, (rect[:2], rect[2:]), strict=True):
                weight = _spread(weight, axis, cells, *span)
        share = (block.to(total.dtype) * weight).movedim(axes, (-2, -1))
        share = share.reshape(share.shape[0], -1, *total.shape[1:-2], *share.shape[-2:]).sum(1)
        total[..., rect[0] : rect[1], rect[2] : rect[3]] += share

    return add


def _spread(weight: Tensor, axis: int, cells: Cells, lo: int, hi: int) -> Tensor:
    """For each index in [lo, hi) of an axis, the sum of the weights of the cells that contain it."""
    spans = [cells.span(cell) for cell in range(cells.count)]
    holds = [[float(start <= index < end) for start, end in spans] for index in range(lo, hi)]
    return torch.movedim(torch.movedim(weight, axis, -1) @ weight.new_tensor(holds).T, -1, axis)
