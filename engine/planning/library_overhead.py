"""Memory of libraries in addition to tensors: compiled kernels, copies of weights, workspaces."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from ..capture.program import Value
from ..lowering.geometry import Window
from ..lowering.ops import Local
from ..lowering.stages import Packing
from ..tiling.stage import TiledStage
from . import constants
from .interstage import value_bytes
from .simulate import halo_shape

# The capacity of oneDNN's kernel cache, read before its first kernel. Its default of 1024 takes 90 MB after a hundred
# image sizes; with 256, recompilation takes 3 to 5 % of the time.
_MOST_KERNELS = int(os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256"))
_LARGE_BATCH = 16  # from this size on PyTorch passes all convolutions to oneDNN


def cpu_libraries(stages: Sequence[TiledStage], stage_bytes: int, training: bool) -> int:
    """Bytes of libraries on the CPU: loaded code, oneDNN's compiled kernels, its weight copies, and its scratch memory.

    Args:
        stages: the tiled stages.
        stage_bytes: bytes of the weights of convolutions, in the stage with the most; other ops copy no weights.
        training: whether there is a backward.
    """
    compiled = sum(_convolutions_that_differ(stages, training).values())
    compiled += len(_packings_that_differ(stages)) * (not training)
    scratch = max(map(_grouped_scratch, stages)) if training else 0
    image = stages[0].stage.program.values[stages[0].stage.image]
    return constants.CODE_BYTES[training] + _kernel_bytes(compiled, image.dtype) + _weight_copies(stage_bytes) + scratch


def least_cpu_libraries(nodes: Iterable[Any], values: Sequence[Value], stage_bytes: int, training: bool) -> int:
    """A lower bound of `cpu_libraries` for all tile sizes."""
    weights = {_weight_shape(local, values) for local in convolutions(nodes) if compiles(local, values, training)}
    compiled = sum(_kernels(shape[2:] == (3, 3), training) for shape in weights)
    return constants.CODE_BYTES[training] + _kernel_bytes(compiled) + _weight_copies(stage_bytes)


def _kernels(winograd: bool, training: bool) -> int:
    """The number of kernels (of forward, dgrad and wgrad) that oneDNN compiles for a convolution.

    Args:
        winograd: whether Winograd's algorithm computes forward and dgrad.
        training: whether there is a backward.
    """
    return (1 if training else 0) if winograd else (3 if training else 1)


def compiles(local: Local, values: Sequence[Value], training: bool) -> bool:
    """Whether oneDNN computes a convolution on the CPU.

    In training with a single thread, PyTorch computes 1 x 1 convolutions by a matrix product.
    """
    if not training or torch.get_num_threads() > 1:
        return True
    source = next(iter(local.reads))
    windows = [access for access in local.reads[source] if isinstance(access, Window)]
    pixel = all(w.kernel == w.stride == 1 for w in windows)
    return not pixel or values[source].shape[0] >= _LARGE_BATCH


def _packings_that_differ(stages: Sequence[TiledStage]) -> set[Any]:
    """The distinct shapes of weights that oneDNN reorders, each of which needs a kernel."""
    values = (tiled.stage.program.values for tiled in stages)
    found = ((v[one.weight], one) for v, tiled in zip(values, stages, strict=True) for one in tiled.stage.packings)
    return {tuple(weight.shape) for weight, one in found if not _is_transformed(one, weight)}


def _is_transformed(packing: Packing, weight: Value) -> bool:
    """Whether the packed weight is transformed for Winograd's algorithm."""
    return packing.nbytes(weight.shape, weight.dtype) != value_bytes(weight)


def _convolutions_that_differ(stages: Sequence[TiledStage], training: bool) -> dict[Any, int]:
    """The distinct convolutions of all stages and their number of kernels; equal shapes share kernels."""
    found: dict[Any, int] = {}
    for tiled in stages:
        maps, values = tiled.stage.maps, tiled.stage.program.values
        transformed = {one.weight for one in tiled.stage.packings if _is_transformed(one, values[one.weight])}
        for local in convolutions(tiled.stage.locals):
            if not compiles(local, values, training):
                continue
            source, output = next(iter(local.reads)), local.op.outputs[0]
            steps = [-(-a // max(1, b)) for a, b in zip(maps.size(source), maps.size(output), strict=True)]
            form = _weight_shape(local, values), maps.shape(source)[1], len(local.op.inputs), *steps
            rows, cols = (
                {hi - lo for lo, hi in (axis.block(output, step) for step in range(axis.steps))}
                for axis in (tiled.rows, tiled.cols)
            )
            kernels = _kernels(not transformed.isdisjoint(local.op.inputs), training)
            found.update(((form, height, width), kernels) for height in rows for width in cols)
    return found


def convolutions(nodes: Iterable[Any]) -> list[Local]:
    """The convolutions for which oneDNN compiles at least one kernel."""
    return [node for node in nodes if isinstance(node, Local) and node.op.name in ("conv2d", "packed_conv2d")]


def gpu_libraries(stages: Sequence[TiledStage], training: bool) -> int:
    """Bytes of workspaces on a GPU, and of trials of kernels."""
    return constants.GPU_LIBRARIES + max(_scratch_bytes(tiled, training) for tiled in stages)


def _weight_shape(local: Local, values: Sequence[Value]) -> tuple[int, ...]:
    return next(tuple(values[v].shape) for v in local.op.inputs if v not in local.reads)


def _kernel_bytes(compiled: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of compiled kernels, of which the cache holds the latest.

    Args:
        compiled: number of kernels.
        dtype: dtype of the maps, which autocast may change.
    """
    sixteen = dtype.itemsize == 2 or torch.is_autocast_enabled("cpu")
    return min(_MOST_KERNELS, compiled) * (constants.KERNEL_BYTES_16 if sixteen else constants.KERNEL_BYTES)


def _weight_copies(stage_bytes: int) -> int:
    """Bytes of weights in the memory order of the kernels."""
    return min(stage_bytes, constants.MOST_WEIGHT_COPIES)


def _grouped_scratch(tiled: TiledStage) -> int:
    """Scratch bytes of oneDNN for the weight gradient of a grouped convolution: one per group, padded to blocks."""
    values, most, block = tiled.stage.program.values, 0, constants.CHANNEL_BLOCK
    for local in tiled.stage.locals:
        kernels = [values[v] for v in local.op.inputs if v in tiled.stage.vectors and len(values[v].shape) == 4]
        if "conv" in local.op.name and kernels:
            out_channels, per_group, *sides = kernels[0].shape
            groups = max(values[v].shape[1] for v in local.reads) // max(1, per_group)
            if groups > 1:
                padded = (-(-channels // block) * block for channels in (per_group, out_channels // groups))
                most = max(most, groups * math.prod(padded) * math.prod(sides) * kernels[0].dtype.itemsize)
    return most


def _scratch_bytes(tiled: TiledStage, training: bool) -> int:
    """Upper bound of the scratch bytes of a convolution, or a linear layer after a norm, on a GPU.

    A library's workspace is as large as the maps in another memory order. Choosing between kernels (`choice.py`)
    computes the result again, with PyTorch also the input of its activation. Weight gradients are summed in splits.
    """
    stage = tiled.stage

    def block(value: int) -> int:
        spans = [map(partial(axis.block, value), range(axis.steps)) for axis in (tiled.rows, tiled.cols)]
        rows, cols = (max(hi - lo for lo, hi in axis) for axis in spans)
        info = stage.program.values[value]
        return math.prod(halo_shape(stage, value, rows, cols)) * info.dtype.itemsize

    most = 0
    for local in stage.locals:
        if "conv" in local.op.name or local.op.name in ("fused_stem", "fused_norm_linear"):
            maps = sum(map(block, local.reads)) + 2 * sum(map(block, local.op.outputs))
            weights = (v for v in local.op.inputs if v in stage.vectors and len(stage.program.values[v].shape) == 4)
            sums = sum(4 * math.prod(stage.program.values[v].shape) for v in weights)
            most = max(most, maps + constants.WGRAD_SPLITS * sums * training)
    return most
