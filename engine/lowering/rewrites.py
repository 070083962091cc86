"""Rewrites of a graph that do not change its function and make it faster or smaller.

`fold_batch_norm` (folding.py): a frozen BatchNorm becomes part of the convolution before it.

`fold_gates` (conv_chains.py): factors for the channels of a map become part of the convolution that reads the product.

`fuse` (fused/, where kernels run) and `fuse_on_cpu` (onednn.py): convolutions take the sums and activations after them.

`winograd_in_training` (winograd.py): 3 x 3 convolutions with fewer multiplications on the CPU.

`in_place_runs`: an activation or a residual sum overwrites its input if nothing else reads that.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ... import kernels
from ..capture.program import Op, Ref
from .conv_chains import fold_gates
from .folding import fold_batch_norm
from .onednn import fuse_on_cpu
from .ops import Block, Env
from .ops.base import Run
from .stages import ProgramStage, StagedProgram, only_readers, vector_inputs
from .winograd import winograd_in_training

_MAKES_A_NEW_TENSOR = frozenset(
    {"conv2d", "packed_conv2d", "batch_norm", "add", "linear", "live_batch_norm", "scale_shift"}
)


def _plain(name: str) -> str:
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def prepare(staged: StagedProgram, training: bool, image_grad: bool = False) -> None:
    """Apply all rewrites that do not depend on the tile, for the device that the network was recorded for.

    Args:
        training: whether there will be a backward.
        image_grad: whether the image needs a gradient.
    """
    for stage in staged.stages:
        # Copies: other stages, and other choices of stored maps, have the same ops.
        stage.locals = [replace(local) for local in stage.locals]
        fold_batch_norm(stage)
        fold_gates(stage)
        if kernels.enabled(stage.program.values[stage.image].device):
            from .fused import fuse  # needs Triton

            fuse(stage, training, image_grad)
        elif stage.program.values[stage.image].device.type == "cpu":
            (winograd_in_training if training else fuse_on_cpu)(stage)
        stage.vectors = vector_inputs(stage)


def unvalued_runs(stage: ProgramStage, with_halo: set[int]) -> dict[int, Run]:
    """Functions without values for the second pass over ops whose stored output no op of the stage reads.

    Args:
        with_halo: values that have halos, rows or columns that later tiles read.

    Returns:
        For the output of each such op, the function that replaces the op's own.
    """
    stored = set(stage.stored)
    runs = {local.op.outputs[0]: local.memory.unvalued for local in stage.locals if local.op.outputs[0] in stored}
    if not any(runs.values()):
        return {}
    read = {r.value for r in stage.reductions if r.kind != "moments"} | with_halo
    read.update(v for local in stage.locals for v in local.reads)
    return {value: run for value, run in runs.items() if run is not None and value not in read}


def in_place_runs(stage: ProgramStage, with_halo: set[int]) -> dict[int, Run]:
    """In-place functions for ReLU and residual sums with an input that nothing else and no later tile reads.

    Args:
        with_halo: values that have halos, rows or columns that later tiles read; this depends on the tile.

    Returns:
        For the output of each such op, the function that replaces the op's own.
    """
    alone = only_readers(stage)
    fresh = {v for local in stage.locals if _plain(local.op.name) in _MAKES_A_NEW_TENSOR for v in local.op.outputs}

    def free(value: int, op: Op) -> bool:
        same = stage.program.values[value], stage.program.values[op.outputs[0]]
        return (
            value in fresh
            and value in alone
            and value not in with_halo
            and same[0].shape == same[1].shape
            and same[0].dtype == same[1].dtype
        )

    runs: dict[int, Run] = {}
    for local in stage.locals:
        op, name = local.op, _plain(local.op.name)
        operands = [arg.value for arg in op.args if isinstance(arg, Ref)]
        if name == "relu" and operands and free(operands[0], op):
            runs[op.outputs[0]] = partial(_relu_in_place, operands[0])
        elif name == "add" and len(operands) == 2 and operands[0] != operands[1] and "alpha" not in op.kwargs:
            for target, other in (operands, operands[::-1]):
                if free(target, op) and other in stage.maps:
                    runs[op.outputs[0]] = partial(_add_in_place, target, other)
                    break
    return runs


def _relu_in_place(value: int, env: Env, _block: Block) -> tuple[Tensor, ...]:
    x = env[value]
    return (torch.relu(x) if x._is_view() else torch.relu_(x),)


def _add_in_place(target: int, other: int, env: Env, _block: Block) -> tuple[Tensor, ...]:
    x, y = env[target], env[other]
    return (x + y if x._is_view() else x.add_(y),)
