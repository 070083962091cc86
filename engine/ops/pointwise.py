"""Rules of ops that act on each pixel by itself: arithmetic, activations, frozen norms, channel reductions, dropout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..trace import Op
from .base import (
    Block,
    Env,
    Local,
    Maps,
    Node,
    Refusal,
    Whole,
    arguments,
    replay,
    rule,
)
from .promote import promoted

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
    "long",
    "int",
    "bool",
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
    """The image axes of a broadcast result of `rank` dimensions; all map operands must agree on them."""
    found = set()
    sizes = set()
    for value in maps.inputs(op):
        h, w = maps.axes[value]
        shift = rank - len(maps.shape(value))
        found.add((h + shift, w + shift))
        sizes.add(maps.extent(value))
    if len(found) != 1:
        raise Refusal(f"'{op.name}' combines maps whose image axes lie at different places")
    if len(sizes) != 1:
        both = " and ".join(sorted(str(size) for size in sizes))
        raise Refusal(f"'{op.name}' combines maps of different sizes, {both}")
    return found.pop()


@rule(*ELEMENTWISE)
def elementwise(op: Op, maps: Maps) -> Local | list[Node]:
    rank = len(maps.shape(op.outputs[0]))
    axes = aligned_axes(op, maps, rank)
    op, made = promoted(op, maps, axes, rank)
    local = Local(op, {v: maps.pointwise(v) for v in maps.inputs(op)}, (axes,), replay(op))
    return [*made, local] if made else local


def _random(made: Local | list[Node], random: bool) -> Local | list[Node]:
    local = made[-1] if isinstance(made, list) else made
    assert isinstance(local, Local)
    local.random = random
    return made


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
def linear(op: Op, maps: Maps) -> Local | Whole:
    given = arguments(op, "input weight bias")
    value = given["input"].value
    if value in maps.flat and len(maps.shape(value)) - 1 in maps.axes[value]:
        return Whole(op)  # a classifier behind a flatten: a weight for each position
    if len(maps.shape(value)) - 1 in maps.axes[value]:
        raise Refusal("'linear' contracts an image axis")
    only_maps(op, maps, value)
    return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), replay(op))


@rule("dropout", "alpha_dropout")
def dropout(op: Op, maps: Maps) -> Local | list[Node]:
    given = arguments(op, "input p training inplace", p=0.5, training=True)
    return _random(elementwise(op, maps), bool(given["training"]) and given["p"] > 0)


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
def noise(op: Op, maps: Maps) -> Local | list[Node]:
    random = op.name != "rrelu" or bool(arguments(op, "input lower upper training")["training"])
    return _random(elementwise(op, maps), random)
