"""Rules of ops that act on each pixel by itself: arithmetic, activations, frozen norms, channel reductions, dropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..trace import Op
from .base import (
    Block,
    Env,
    Local,
    Maps,
    Reduction,
    Refusal,
    Whole,
    arguments,
    dimensions,
    replay,
    rule,
)

ELEMENTWISE = [
    "relu",
    "relu6",
    "silu",
    "gelu",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "leaky_relu",
    "sigmoid",
    "tanh",
    "elu",
    "selu",
    "celu",
    "softplus",
    "softsign",
    "mish",
    "logsigmoid",
    "threshold",
    "hardshrink",
    "softshrink",
    "tanhshrink",
    "add",
    "sub",
    "subtract",
    "mul",
    "multiply",
    "div",
    "divide",
    "true_divide",
    "floor_divide",
    "pow",
    "float_power",
    "square",
    "sqrt",
    "rsqrt",
    "exp",
    "exp2",
    "expm1",
    "log",
    "log1p",
    "log2",
    "log10",
    "abs",
    "absolute",
    "neg",
    "negative",
    "positive",
    "sign",
    "clamp",
    "clip",
    "clamp_min",
    "clamp_max",
    "minimum",
    "maximum",
    "fmin",
    "fmax",
    "reciprocal",
    "erf",
    "sin",
    "cos",
    "tan",
    "atan",
    "floor",
    "ceil",
    "round",
    "trunc",
    "frac",
    "addcmul",
    "addcdiv",
    "where",
    "lerp",
    "masked_fill",
    "nan_to_num",
    "remainder",
    "fmod",
    "logaddexp",
    "hypot",
    "atan2",
    "xlogy",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "logical_and",
    "logical_or",
    "logical_not",
    "logical_xor",
    "bitwise_not",
    "bitwise_and",
    "bitwise_or",
    "isnan",
    "isinf",
    "isfinite",
    "__add__",
    "__radd__",
    "__sub__",
    "__rsub__",
    "rsub",
    "__mul__",
    "__rmul__",
    "__truediv__",
    "__rtruediv__",
    "__rdiv__",
    "__pow__",
    "__rpow__",
    "__neg__",
    "__invert__",
    "__and__",
    "__or__",
    "__gt__",
    "__lt__",
    "__ge__",
    "__le__",
    "__eq__",
    "__ne__",
    "float",
    "double",
    "half",
    "bfloat16",
    "to",
    "type",
    "type_as",
    "contiguous",
    "clone",
    "detach",
    "zeros_like",
    "ones_like",
]


def aligned_axes(op: Op, maps: Maps, rank: int) -> tuple[int, int]:
    """The image axes of a broadcast result of `rank` dimensions; all operands must agree on them."""
    found = set()
    sizes = set()
    for value in maps.inputs(op):
        h, w = maps.axes[value]
        shift = rank - len(maps.shape(value))
        found.add((h + shift, w + shift))
        sizes.add(maps.size(value))
    if len(found) != 1:
        raise Refusal(f"'{op.name}' combines maps whose image axes lie at different places")
    if len(sizes) != 1:
        raise Refusal(f"'{op.name}' broadcasts a map of size {min(sizes)} against one of size {max(sizes)}")
    axes = found.pop()
    for value in op.inputs:
        if value in maps:
            continue
        shape = maps.shape(value)
        for axis in axes:
            position = axis - (rank - len(shape))
            if position >= 0 and shape[position] != 1:
                raise Refusal(
                    f"'{op.name}' combines the map with a tensor of shape {tuple(shape)} that depends on the position "
                    "in the image"
                )
    return axes


@rule(*ELEMENTWISE)
def elementwise(op: Op, maps: Maps) -> Local:
    rank = len(maps.shape(op.outputs[0]))
    axes = aligned_axes(op, maps, rank)
    return Local(op, {v: maps.pointwise(v) for v in maps.inputs(op)}, (axes,), replay(op))


def on_channels(op: Op, maps: Maps, value: int) -> Local:
    """A per-pixel op whose parameters belong to dimension 1."""
    if 1 in maps.axes[value]:
        raise Refusal(f"'{op.name}' takes an image axis for the channels")
    only_maps(op, maps, value)
    return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), replay(op))


def only_maps(op: Op, maps: Maps, *values: int) -> None:
    if set(maps.inputs(op)) - set(values):
        raise Refusal(f"'{op.name}' takes its parameters from the image")


@rule("prelu")
def prelu(op: Op, maps: Maps) -> Local:
    return on_channels(op, maps, op.inputs[0])


@rule("local_response_norm")
def local_response_norm(op: Op, maps: Maps) -> Local:
    return on_channels(op, maps, op.inputs[0])


@rule("linear")
def linear(op: Op, maps: Maps) -> Local:
    given = arguments(op, "input weight bias")
    value = given["input"].value
    if len(maps.shape(value)) - 1 in maps.axes[value]:
        raise Refusal("'linear' contracts an image axis")
    only_maps(op, maps, value)
    return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), replay(op))


@rule("matmul", "__matmul__")
def matmul(op: Op, maps: Maps) -> Local:
    left, right = (arg.value for arg in op.args[:2])
    rank = len(maps.shape(left))
    if left not in maps or right in maps or len(maps.shape(right)) > 2 or rank - 1 in maps.axes[left]:
        raise Refusal("'matmul' contracts positions of the image")
    if len(maps.shape(right)) == 1 and rank - 1 < max(maps.axes[left]):
        raise Refusal("'matmul' contracts positions of the image")
    return Local(op, {left: maps.pointwise(left)}, (maps.axes[left],), replay(op))


@rule("softmax", "log_softmax", "softmin", "normalize", "glu", "cumsum", "flip", "roll", "logcumsumexp")
def along_dims(op: Op, maps: Maps) -> Local | Whole:
    """Ops along given dimensions that keep the rank: per pixel iff no image axis is among them."""
    value = op.inputs[0]
    position = "dims shifts" if op.name == "roll" else "dim"
    if op.name == "roll":
        given = arguments(op, "input shifts dims")
        dims = given["dims"]
    elif op.name == "flip":
        dims = op.kwargs.get("dims", op.args[1:])
        dims = dims[0] if len(dims) == 1 else dims
    elif op.name == "normalize":
        dims = arguments(op, "input p dim", dim=1)["dim"]
    else:
        dims = arguments(op, f"input {position}", dim=-1 if op.name == "glu" else None)["dim"]
    if dims is None:
        raise Refusal(f"'{op.name}' without a dimension")
    if set(dimensions(dims, len(maps.shape(value)))) & set(maps.axes[value]):
        return Whole(op)
    only_maps(op, maps, value)
    return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), replay(op))


def axes_after(axes: tuple[int, int], dims: tuple[int, ...], keepdim: bool) -> tuple[int, int]:
    """Image axes after the dimensions `dims` were reduced."""
    if keepdim:
        return axes
    return axes[0] - sum(d < axes[0] for d in dims), axes[1] - sum(d < axes[1] for d in dims)


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "norm", "logsumexp", "prod", "var_mean", "std_mean",
      "argmax", "argmin", "any", "all")  # fmt: skip
def reduction(op: Op, maps: Maps) -> Local | Reduction | Whole:
    """Over channels: per pixel. Over both image axes: a sum or a maximum over tiles. Else on the whole map."""
    if op.name in ("max", "min") and len(op.inputs) == 2:
        return elementwise(op, maps)
    value = op.inputs[0]
    shape = maps.shape(value)
    names = "input p dim keepdim" if op.name == "norm" else "input dim keepdim"
    given = arguments(op, names, keepdim=False)
    dim = given.get("axis", given["dim"])
    keepdim = bool(given["keepdim"])
    if dim is not None and isinstance(dim, bool):  # var(x, unbiased)
        return Whole(op)
    dims = dimensions(dim, len(shape))
    axes = maps.axes[value]
    hit = set(dims) & set(axes)
    if not hit:
        out = axes_after(axes, dims, keepdim)
        return Local(op, {value: maps.pointwise(value)}, (out,) * len(op.outputs), replay(op))
    if len(hit) == 2 and op.name in ("mean", "sum", "amax") and maps.program.values[value].dtype.is_floating_point:
        if given.get("dtype") is not None:
            return Whole(op)
        count = math.prod(shape[d] for d in dims) if op.name == "mean" else 1
        return Reduction(op, value, "max" if op.name == "amax" else "sum", count, dims, keepdim)
    return Whole(op)


@rule("dropout", "alpha_dropout")
def dropout(op: Op, maps: Maps) -> Local:
    given = arguments(op, "input p training inplace", p=0.5, training=True)
    local = elementwise(op, maps)
    local.random = bool(given["training"]) and given["p"] > 0
    return local


@rule("feature_dropout", "dropout1d", "dropout2d", "dropout3d")
def channel_dropout(op: Op, maps: Maps) -> Local:
    """One draw per sample and channel, the same for all positions: a small, drawn once per step as stock draws it."""
    value = op.inputs[0]
    given = arguments(op, "input p training inplace", p=0.5, training=True)
    shape, axes = maps.shape(value), maps.axes[value]
    if set(axes) & {0, 1}:
        raise Refusal(f"'{op.name}' takes an image axis for the channels")
    if op.name == "dropout1d" or len(shape) != 4:
        raise Refusal(f"'{op.name}' on a map of {len(shape)} dimensions")
    mask_shape = [1 if d > 1 else size for d, size in enumerate(shape)]

    def once(dtype: torch.dtype, device: torch.device) -> Tensor:
        return F.dropout2d(torch.ones(mask_shape, dtype=dtype, device=device), given["p"], given["training"])

    local = Local(op, {value: maps.pointwise(value)}, (axes,), replay(op))
    if given["training"] and given["p"] > 0:

        def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
            assert local.drawn is not None
            return (env[value] * env[local.drawn],)

        local.run, local.once = run, once
    return local


@rule("rand_like", "randn_like", "bernoulli", "rrelu")
def noise(op: Op, maps: Maps) -> Local:
    local = elementwise(op, maps)
    local.random = op.name != "rrelu" or bool(arguments(op, "input lower upper training")["training"])
    return local
