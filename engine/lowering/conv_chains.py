"""Finds convolutions and the ops after them that a single op can compute:

    y = act(conv(x, w) * scale + b + residual)

GPU kernels (fused/) and oneDNN (onednn.py) compute a chain in one call. A linear layer on the channels of a
channels-last map is a convolution with a 1x1 filter; the scale of a layer is folded into weight and bias. Ops with
packed weights need no scaled weights: see `leave_unscaled`.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..capture.program import Op, Ref, Value
from .folding import Fold
from .geometry import Access, Window
from .ops import Env, Local, VectorOp
from .ops.base import arguments
from .stages import ProgramStage, only_readers

ACTIVATIONS = {"relu": "relu", "relu6": "relu6", "silu": "silu", "hardswish": "hardswish", "gelu": "gelu"}


@dataclass(slots=True)
class ConvChain:
    """A convolution and the ops fused with it: value numbers and settings, without padding (it depends on the tile).

    Attributes:
        act: the activation.
        factors: factors to multiply the weight by, one after the other, per filter or per element.
        channels_last: whether x, y and residual have shape (N, H, W, C) and the weight (K, C): a linear layer.
        y: the output.
        members: the ops, the convolution first.
    """

    x: int
    weight: int
    bias: int | None
    residual: int | None
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    channels_last: bool = False
    act: str = "none"
    factors: tuple[int, ...] = ()
    y: int = -1
    members: list[Local] = field(default_factory=list)

    @classmethod
    def of(cls, conv: Local) -> ConvChain:
        """The chain of a single convolution."""
        own = arguments(conv.op, "input weight bias stride padding dilation groups", dilation=1, groups=1)
        x, weight, bias = own["input"].value, own["weight"].value, own["bias"]
        height, width = conv.reads[x]
        assert isinstance(height, Window) and isinstance(width, Window)
        steps = (height.stride, width.stride), (height.dilation, width.dilation), own["groups"]
        bias = None if bias is None else bias.value
        return cls(x, weight, bias, None, *steps, channels_last=conv.op.name == "linear", members=[conv])

    def reads(self, stage: ProgramStage) -> dict[int, tuple[Access, Access]]:
        """The accesses of an op that computes the chain."""
        found = dict(self.members[0].reads)
        if self.residual is not None:
            found[self.residual] = stage.maps.pointwise(self.residual)
        return found


def _depths(stage: ProgramStage) -> dict[int, int]:
    """Number of ops on the longest path from the image to each map."""
    depths = dict.fromkeys(stage.sources, 0)
    for local in stage.locals:
        depth = 1 + max(depths.get(v, 0) for v in local.reads)
        depths.update(dict.fromkeys(local.op.outputs, depth))
    return depths


def find_chains(stage: ProgramStage, dtypes: Container[torch.dtype], acts: Container[str]) -> list[ConvChain]:
    """The convolutions of a stage with the sums and activations after them; layer scales are folded immediately.

    Args:
        dtypes: supported dtypes of outputs.
        acts: supported activations.
    """
    readers, depths = only_readers(stage), _depths(stage)
    values = stage.program.values
    found_chains: list[ConvChain] = []
    taken: set[int] = set()  # outputs of ops that are part of a fused one, or read by its sum

    def follower(chain: list[Local]) -> Local | None:
        """The only reader of the chain's output, skipping inactive dropout; None if there are several."""
        while True:
            found = readers.get(chain[-1].op.outputs[0])
            if found is None or found.op.outputs[0] in taken:
                return None
            if found.op.name != "dropout" or found.random:
                return found
            chain.append(found)

    # The deepest convolution of a sum absorbs it: its other inputs exist by then.
    convs = [local for local in stage.locals if local.op.name == "conv2d" or _is_pixel_linear(stage, local)]
    for conv in sorted(convs, key=lambda c: -depths[c.op.outputs[0]]):
        if values[conv.op.outputs[0]].dtype not in dtypes:
            continue
        spec = ConvChain.of(conv)
        chain = spec.members
        if (next_op := follower(chain)) is not None:
            made = chain[-1].op.outputs[0]
            scale = channel_scale(stage, next_op, made, spec.channels_last)
            if scale is not None and values[scale].dtype == values[made].dtype == values[next_op.op.outputs[0]].dtype:
                _fold_scale(stage, spec, scale)
                chain.append(next_op)
                next_op = follower(chain)
        if next_op is not None:
            spec.residual = other_summand(stage, next_op, chain[-1].op.outputs[0])
            if spec.residual == spec.x and conv.reads[spec.x] != stage.maps.pointwise(spec.x):
                spec.residual = None  # an op reads each map through a single window
            if spec.residual is not None:
                chain.append(next_op)
                next_op = follower(chain)
        if next_op is not None and (act := activation_of(next_op.op)) is not None and act in acts:
            spec.act = act
            chain.append(next_op)
        taken.update(local.op.outputs[0] for local in chain)
        spec.y = chain[-1].op.outputs[0]
        found_chains.append(spec)
    return found_chains


def _is_pixel_linear(stage: ProgramStage, local: Local) -> bool:
    return local.op.name == "linear" and all(
        len(stage.maps.shape(v)) == 4 and stage.maps.axes[v] == (1, 2) for v in (*local.reads, *local.op.outputs)
    )


def channel_scale(stage: ProgramStage, local: Local, value: int, channels_last: bool) -> int | None:
    """The vector that multiplies the channels of `value` (a layer scale); None for other ops."""
    operands = [arg.value for arg in local.op.args if isinstance(arg, Ref)]
    if local.op.name.strip("_") not in ("mul", "imul", "rmul") or len(operands) != 2 or value not in operands:
        return None
    scale = operands[1] if operands[0] == value else operands[0]
    if scale == value or scale in stage.maps:
        return None
    shape = list(stage.program.values[scale].shape)
    channels = stage.maps.shape(value)[3 if channels_last else 1]
    wanted = [channels] if channels_last else [channels, 1, 1]
    fits = len(shape) <= 4 and [1] * (4 - len(shape)) + shape == [1] * (4 - len(wanted)) + wanted
    return scale if fits else None


@dataclass(frozen=True)
class LayerScale:
    """A convolution followed by a scale, by value number; a call returns the scaled weight, and bias if any."""

    weight: int
    bias: int | None
    scale: int

    def factors(self, env: Env) -> tuple[Tensor, ...]:
        """A factor for each filter, and the scaled bias if there is one."""
        scale = env[self.scale].reshape(-1)
        return (scale,) if self.bias is None else (scale, env[self.bias] * scale)

    def __call__(self, env: Env) -> tuple[Tensor, ...]:
        scale, *bias = self.factors(env)
        return scaled(env[self.weight], scale), *bias


@dataclass(frozen=True)
class Gated:
    """A convolution with factors for its input channels (`fold_gates`), by value number; a call returns the product."""

    weight: int
    scale: int
    filters: int
    groups: int

    def factors(self, env: Env) -> tuple[Tensor]:
        """Factors for the elements of the filters, of size one in dimensions along which they are equal."""
        scale = env[self.scale]
        if self.groups == 1:
            return (scale.reshape(1, -1, 1, 1),)
        rows = scale.reshape(self.groups, 1, -1).expand(-1, self.filters // self.groups, -1)
        return (rows.reshape(self.filters, -1, 1, 1),)

    def __call__(self, env: Env) -> tuple[Tensor]:
        return (scaled(env[self.weight], *self.factors(env)),)


def scaled(weight: Tensor, factors: Tensor) -> Tensor:
    """A weight with a factor for each filter, or for each element."""
    return weight * (factors.reshape(-1, *[1] * (weight.dim() - 1)) if factors.dim() == 1 else factors)


def _fold_scale(stage: ProgramStage, spec: ConvChain, scale: int) -> None:
    """Multiply weight and bias by a layer scale, once per step and by ordinary autograd."""
    values, run = stage.program.values, LayerScale(spec.weight, spec.bias, scale)
    given = [v for v in (spec.weight, spec.bias) if v is not None]
    made = tuple(range(len(values), len(values) + len(given)))
    values.extend(values[v] for v in given)
    stage.prelude.append(VectorOp(run, (*given, scale), made))
    spec.weight, spec.bias = made[0], None if spec.bias is None else made[1]


def leave_unscaled(stage: ProgramStage, chain: ConvChain) -> None:
    """Set the chain's weight to the network's own, with the factors of norms, layer scales and gates separate.

    Packing multiplies the weights one by one, so the scaled weights are never all in memory.
    """
    values = stage.program.values
    while (op := next((op for op in stage.prelude if chain.weight in op.outputs), None)) is not None:
        run = op.run
        if not isinstance(run, Fold | LayerScale | Gated):
            return
        weight = values[run.weight]
        factors = len(values)
        filters, channels = weight.shape[:2]
        shape = (filters,)
        if isinstance(run, Gated):
            shape = (1 if run.groups == 1 else filters, channels, 1, 1)
        wide = torch.promote_types(weight.dtype, torch.float32)
        values.append(Value(torch.Size(shape), wide, weight.device))
        inputs = tuple(v for v in op.inputs if v != run.weight)
        stage.prelude[stage.prelude.index(op)] = VectorOp(run.factors, inputs, (factors, *op.outputs[1:]))
        chain.weight, chain.factors = run.weight, (factors, *chain.factors)


def other_summand(stage: ProgramStage, local: Local, value: int) -> int | None:
    """The map of the same shape and dtype that an op adds to `value`; None for other ops."""
    op, values = local.op, stage.program.values
    operands = [arg.value for arg in op.args if isinstance(arg, Ref)]
    if op.name.strip("_") not in ("add", "iadd") or len(operands) != 2 or op.kwargs or value not in operands:
        return None
    other = operands[1] if operands[0] == value else operands[0]
    alike = all(values[other].shape == values[v].shape for v in (value, op.outputs[0]))
    same_dtype = values[other].dtype == values[value].dtype == values[op.outputs[0]].dtype
    return other if other != value and other in stage.maps and alike and same_dtype else None


def activation_of(op: Op) -> str | None:
    name = op.name.removesuffix("_")
    if name == "gelu" and op.kwargs.get("approximate", "none") != "none":
        return None
    return ACTIVATIONS.get(name) if name == "gelu" or not set(op.kwargs) - {"inplace"} else None


def fused_op(chain: ConvChain, name: str) -> Op:
    """The call that represents a chain."""
    vectors = chain.weight, *chain.factors, chain.bias
    inputs = [v for v in (chain.x, *vectors, chain.residual) if v is not None]
    first, last = chain.members[0], chain.members[-1]
    return replace(first.op, name=name, args=(), kwargs={}, inputs=tuple(inputs), outputs=last.op.outputs)


def fold_gates(stage: ProgramStage) -> None:
    """Multiply factors for the channels of a map, as in squeeze-and-excite, into the convolution that reads them:

        conv(x * s, w) = conv(x, w * s),   s a factor for each input channel

    The product and its gradient are then never stored; the gradient of s follows from that of w * s, once per step.
    This applies if a single convolution reads the product and all images share the factors, which excludes gates of a
    batch.
    """
    readers = only_readers(stage)
    dropped: set[int] = set()
    for gate in stage.locals:
        conv = readers.get(gate.op.outputs[0])
        if conv is None or conv.op.name != "conv2d" or len(gate.reads) != 1:
            continue
        (value,) = gate.reads
        scale = channel_scale(stage, gate, value, channels_last=False)
        if scale is not None and _fold_gate(stage, conv, value, scale):
            dropped.add(id(gate))
    stage.locals = [local for local in stage.locals if id(local) not in dropped]


def _fold_gate(stage: ProgramStage, conv: Local, value: int, scale: int) -> bool:
    values = stage.program.values
    own = arguments(conv.op, "input weight bias stride padding dilation groups", dilation=1, groups=1)
    weight = own["weight"].value
    wide = torch.promote_types(values[weight].dtype, values[scale].dtype)
    # Under autocast the product may have another dtype; the convolution must return the same dtype for the map.
    if wide != values[weight].dtype or values[value].dtype != values[conv.op.outputs[0]].dtype:
        return False
    made = len(values)
    values.append(values[weight])
    gated = Gated(weight, scale, values[weight].shape[0], own["groups"])
    stage.prelude.append(VectorOp(gated, (weight, scale), (made,)))
    stage.change_arguments(conv, input=Ref(value), weight=Ref(made))
    return True
