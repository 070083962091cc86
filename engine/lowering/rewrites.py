"""Which implementation runs an op: rewrites of a graph that leave its function as it is and make it faster or smaller.

`fold_batch_norm`: a frozen BatchNorm after a convolution is a factor and an offset per output channel,

    bn(conv(x, w, b)) = conv(x, w*s, (b - mean)*s + beta),   s = gamma / sqrt(var + eps)

so the stage runs one convolution with the folded weights, which are computed once per step by ordinary autograd; the
gradients of w, gamma and beta come out of the gradients of the folded weights. Neither the convolution's raw output
nor a normalised copy of it exists any more.

`fuse` (fused/, where kernels run) and `fuse_on_cpu` (onednn.py): convolutions take the sums and activations after them.

`in_place_runs`: an activation or a residual sum overwrites its input where nothing else will read that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import kernels
from ..capture.trace import Op, Ref, Value
from .onednn import fuse_on_cpu
from .ops import Block, Env, Local, VectorOp
from .ops.base import Run, arguments
from .stages import Stage, StagedProgram, private_maps, readers_of, vector_inputs

_MAKES_A_NEW_TENSOR = frozenset(
    {"conv2d", "packed_conv2d", "batch_norm", "add", "linear", "live_batch_norm", "scale_shift"}
)


def _plain(name: str) -> str:
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def prepare(staged: StagedProgram, training: bool, image_grad: bool = False) -> None:
    """All rewrites that do not depend on the tile, for the device that the network was recorded for.

    Args:
        training: whether there will be a backward.
        image_grad: whether the image will want a gradient.
    """
    for stage in staged.stages:
        fold_batch_norm(stage)
        if kernels.enabled(stage.program.values[stage.image].device):
            from .fused import fuse  # needs Triton

            fuse(stage, training, image_grad)
        elif stage.program.values[stage.image].device.type == "cpu" and not training:
            fuse_on_cpu(stage)


def fold_batch_norm(stage: Stage) -> None:
    """Fold every frozen BatchNorm that is the only reader of a convolution into that convolution."""
    readers, private = readers_of(stage), private_maps(stage)
    makers = {local.op.outputs[0]: local for local in stage.locals if local.op.name == "conv2d"}
    dropped: set[int] = set()
    for norm in list(stage.locals):
        if norm.op.name != "batch_norm":
            continue
        given = arguments(norm.op, "input running_mean running_var weight bias training momentum eps", eps=1e-5)
        raw = given["input"].value
        conv = makers.get(raw)
        if conv is None or raw not in private or len(readers[raw]) != 1:
            continue
        dropped.add(id(norm))
        _fold(stage, conv, norm, given)
    stage.locals = [local for local in stage.locals if id(local) not in dropped]
    stage.vectors = vector_inputs(stage)


def _fold(stage: Stage, conv: Local, norm: Local, given: dict[str, Any]) -> None:
    values = stage.program.values
    own = arguments(conv.op, "input weight bias stride padding dilation groups")
    weight, bias = own["weight"].value, None if own["bias"] is None else own["bias"].value
    mean, var = given["running_mean"].value, given["running_var"].value
    gamma = None if given["weight"] is None else given["weight"].value
    beta = None if given["bias"] is None else given["bias"].value
    folded_weight, folded_bias = len(values), len(values) + 1
    values.append(values[weight])
    values.append(Value(values[mean].shape, values[weight].dtype, values[weight].device))
    eps = given["eps"]

    def fold(env: Env) -> tuple[Tensor, Tensor]:
        w = env[weight]
        wide = torch.promote_types(w.dtype, torch.float32)
        scale = torch.rsqrt(env[var].to(wide) + eps)
        if gamma is not None:
            scale = scale * env[gamma].to(wide)
        offset = -env[mean].to(wide)
        if bias is not None:
            offset = offset + env[bias].to(wide)
        offset = offset * scale
        if beta is not None:
            offset = offset + env[beta].to(wide)
        return (w.to(wide) * scale.reshape(-1, 1, 1, 1)).to(w.dtype), offset.to(w.dtype)

    inputs = tuple(v for v in (weight, bias, mean, var, gamma, beta) if v is not None)
    stage.prelude.append(VectorOp(fold, inputs, (folded_weight, folded_bias)))
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    kwargs = {
        **{n: own[n] for n in names if own[n] is not None},
        "weight": Ref(folded_weight),
        "bias": Ref(folded_bias),
    }
    op = replace(
        conv.op,
        args=(),
        kwargs=kwargs,
        inputs=(own["input"].value, folded_weight, folded_bias),
        outputs=norm.op.outputs,
    )
    again = stage.apply_rule(op)
    conv.op, conv.run, conv.unvalued, conv.axes, conv.reads = op, again.run, again.unvalued, again.axes, again.reads


def unvalued_runs(stage: Stage, with_halo: set[int]) -> dict[int, Run]:
    """How the second pass computes ops whose output is stored and that nothing in the stage reads: without values.

    Args:
        carried: values of which rows or columns are handed to later tiles.
    """
    readers = readers_of(stage)
    read = {r.value for r in stage.reductions if r.kind != "moments"} | set(readers) | with_halo
    return {
        local.op.outputs[0]: local.unvalued
        for local in stage.locals
        if local.unvalued is not None and local.op.outputs[0] in stage.stored and local.op.outputs[0] not in read
    }


def in_place_runs(stage: Stage, with_halo: set[int]) -> dict[int, Run]:
    """How ReLU and residual sums overwrite an input that nothing else reads and that no later tile needs.

    Args:
        carried: values of which rows or columns are handed to later tiles; this depends on the tile.

    Returns:
        For the output of each such op, the function that computes it in place of the op's own.
    """
    readers, private = readers_of(stage), private_maps(stage)
    fresh = {v for local in stage.locals if _plain(local.op.name) in _MAKES_A_NEW_TENSOR for v in local.op.outputs}

    def free(value: int, op: Op) -> bool:
        same = stage.program.values[value], stage.program.values[op.outputs[0]]
        return (
            value in fresh
            and value in private
            and value not in with_halo
            and len(readers[value]) == 1
            and same[0].shape == same[1].shape
            and same[0].dtype == same[1].dtype
        )

    runs: dict[int, Run] = {}
    for local in stage.locals:
        op, name = local.op, _plain(local.op.name)
        operands = [arg.value for arg in op.args if isinstance(arg, Ref)]
        if name == "relu" and operands and free(operands[0], op):
            runs[op.outputs[0]] = _relu_in_place(operands[0])
        elif name == "add" and len(operands) == 2 and operands[0] != operands[1] and "alpha" not in op.kwargs:
            for target, other in (operands, operands[::-1]):
                if free(target, op) and other in stage.maps:
                    runs[op.outputs[0]] = _add_in_place(target, other)
                    break
    return runs


def _relu_in_place(value: int):
    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        x = env[value]
        return (torch.relu(x) if x._is_view() else torch.relu_(x),)

    return run


def _add_in_place(target: int, other: int):
    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        x, y = env[target], env[other]
        return (x + y if x._is_view() else x.add_(y),)

    return run
