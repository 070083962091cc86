"""CPU convolutions fused with bias, residual sum and activation, with weights packed once per pass.

3 x 3 convolutions with stride 1 use Winograd's filtering (kernels/winograd.py) where that is faster, others oneDNN.

PyTorch's CPU build has `torch.ops.mkldnn._convolution_pointwise`, which `torch.compile` uses. It reads weights in the
blocked order of oneDNN's kernels; an ordinary convolution reorders them in every call, that is for every tile.
`Scan.prepare` packs the weights for each pass from the tensors of that pass, so they cannot be those of an earlier
step. Packing multiplies in norms and layer scales, so only the network's own weights and the packed ones are in memory.

This is for inference only: in training on small tiles the gradients of ResNet-18 were 1.6 to 1.9 times as far from
float64 as PyTorch's. If oneDNN does not fuse, or is switched off, PyTorch's own ops compute the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import winograd
from ...kernels.choice import current_mode
from ..torch_private import convolution_pointwise, reorder_convolution_weight
from .conv_chains import ACTIVATIONS, ConvChain, find_chains, fused_op, leave_unscaled, scaled
from .ops import Block, Env, Local
from .ops.base import BlockMemory
from .ops.window import split_padding
from .stages import Packing, ProgramStage

# Activations that oneDNN computes as PyTorch does. Its ReLUs turn NaN into 0, and its GELU turns infinity into NaN:
# these run after it, in place, while the block is in the cache.
_FUSED = frozenset({"none", "hardswish"})
_LEAST_FILTERS = 16  # of a convolution of one channel: kernels of packed weights process this many at a time


@functools.cache
def runs() -> bool:
    """Whether this build of PyTorch has the ops and they compute correct results on this processor."""
    if not torch.backends.mkldnn.is_available() or convolution_pointwise is None:
        return False
    settings = [1, 1], [1, 1], [1, 1], 1
    x, weight, bias = (torch.linspace(-1, 1, n).sin() for n in (16 * 36, 16 * 16 * 9, 16))
    x, weight = x.reshape(1, 16, 6, 6).contiguous(memory_format=torch.channels_last), weight.reshape(16, 16, 3, 3)
    try:
        packed = reorder_convolution_weight(weight, *settings)
        y = convolution_pointwise.binary(x, x, packed, bias, *settings, "add", None, None, [], None)
    except (RuntimeError, TypeError):  # an operator that is registered but not built, or has another signature
        return False
    return torch.allclose(y, F.conv2d(x, weight, bias, padding=1) + x, atol=1e-4)


def allowed() -> bool:
    """Whether the process's settings allow oneDNN for float32 convolutions without reduced precision."""
    enabled = bool(torch.backends.mkldnn.enabled)
    precision: str = torch.backends.mkldnn.conv.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    return enabled and precision in ("none", "ieee") and current_mode() != "stock"


def gains_by_winograd(stage: ProgramStage, chain: ConvChain) -> bool:
    """Whether Winograd's filtering is available and faster for a convolution."""
    plain = chain.stride == chain.dilation == (1, 1) and chain.groups == 1 and not chain.channels_last
    weight, output = stage.program.values[chain.weight], chain.members[0].op.outputs[0]
    pixels = math.prod(stage.maps.size(output))
    return plain and winograd.pays(tuple(weight.shape), pixels) and winograd.missing() is None


def fuse_on_cpu(stage: ProgramStage) -> None:
    """Replace float32 convolutions and the sums and activations after them by oneDNN ops, if available."""
    if not runs():
        return
    for chain in find_chains(stage, frozenset({torch.float32}), frozenset(ACTIVATIONS.values())):
        _replace(stage, chain)


@dataclass(frozen=True)
class Weight:
    """A convolution's weight.

    Attributes:
        own: the network's weight, (K, C, R, S).
        factors: factors to multiply it by, one after the other.
        packed: the weight that the op computes with, factors included.
    """

    own: Tensor
    factors: Sequence[Tensor]
    packed: Tensor

    def plain(self) -> Tensor:
        """The weight in the format of PyTorch's convolution."""
        if not (self.packed.is_mkldnn or for_winograd(self.packed)):
            return self.packed
        return functools.reduce(scaled, self.factors, self.own)


@dataclass(frozen=True)
class _Call:
    """A chain on one block.

    Attributes:
        pad, margin: as in `Block`.
    """

    chain: ConvChain
    pad: tuple[int, int, int, int]
    margin: tuple[int, int]

    @property
    def settings(self) -> tuple[Any, ...]:
        return split_padding(self.pad)[0], self.chain.stride, self.chain.dilation, self.chain.groups

    def run(self, x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """The output, in new memory."""
        if for_winograd(weight.packed) and x.numel():
            filters, act = weight.own.shape[0], self.chain.act
            y = winograd.conv3x3(x, weight.packed, filters, bias, residual, act == "relu", self.pad, self.margin)
            if y is not None:
                return y if act == "relu" else self._with_room(y, _activate(y, act))
        uneven = split_padding(self.pad)[1]
        y = self._by_onednn(F.pad(x, uneven) if any(uneven) else x, weight, bias, residual)
        if self.margin == (0, 0):
            return y
        n, channels, height, width = y.shape
        return self._with_room(winograd.empty_with_room(y, (n, channels, height, width), self.margin), y)

    def _with_room(self, target: Tensor, y: Tensor) -> Tensor:
        """The output in memory with a margin for halos."""
        return y if y is target or self.margin == (0, 0) else target.copy_(y)

    def _by_onednn(self, x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        act, packed = self.chain.act, weight.packed
        if not packed.is_mkldnn or x.numel() == 0:
            padding, stride, dilation, groups = self.settings
            y = F.conv2d(x, weight.plain(), bias, stride, padding, dilation, groups)
            return _activate(y if residual is None else y.add_(residual), act)
        x = _channels_last(x)
        if residual is not None and residual.shape[2:].numel() == 1:  # PyTorch 2.11 raises for a sum of one pixel
            y = convolution_pointwise(x, packed, bias, *self.settings, "none", [], "")
            return _activate(y.add_(residual), act)
        if residual is not None:
            residual = _channels_last(residual)
            y = convolution_pointwise.binary(x, residual, packed, bias, *self.settings, "add", None, None, [], None)
            assert y.shape == residual.shape  # oneDNN would broadcast
            return _activate(y, act)
        fused = act if act in _FUSED else "none"
        y = convolution_pointwise(x, packed, bias, *self.settings, fused, [], "")
        return y if fused == act else _activate(y, act)


def _activate(y: Tensor, act: str) -> Tensor:
    """An activation, in place if PyTorch supports that."""
    if act == "none":
        return y
    return F.gelu(y) if act == "gelu" else getattr(F, act)(y, inplace=True)


def _channels_last(x: Tensor) -> Tensor:
    """The map in channels-last memory, with channels-last strides also for one channel."""
    x = x.contiguous(memory_format=torch.channels_last)
    _, c, h, w = x.shape
    return x.as_strided(x.shape, (h * w * c, 1, w * c, c)) if c == 1 else x


def _replace(stage: ProgramStage, chain: ConvChain) -> None:
    first, weight = chain.members[0], stage.program.values[chain.weight]
    gains = gains_by_winograd(stage, chain)
    packing = None
    if weight.shape[1] > 1 or chain.groups > 1 or weight.shape[0] >= _LEAST_FILTERS:
        leave_unscaled(stage, chain)
        packed = stage.maps.new_value(like=chain.weight)
        packing = Packing(chain.weight, packed, functools.partial(_pack, chain, gains), chain.factors)
        stage.packings.append(packing)

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x, own = env[chain.x], env[chain.weight]
        bias = None if chain.bias is None else env[chain.bias]
        residual = None if chain.residual is None else env[chain.residual]
        if chain.channels_last:
            x, own = x.permute(0, 3, 1, 2), own[:, :, None, None]
            residual = None if residual is None else residual.permute(0, 3, 1, 2)
        weight = Weight(own, [env[v] for v in chain.factors], own if packing is None else env[packing.packed])
        y = _Call(chain, block.pad, block.margin).run(x, weight, bias, residual)
        return (y.permute(0, 2, 3, 1) if chain.channels_last else y,)

    local = Local(
        fused_op(chain, "packed_conv2d"),
        chain.reads(stage),
        chain.members[-1].axes,
        run,
        fill=None if gains else first.fill,  # it adds its own padding
        memory=BlockMemory(leaves_room=gains, spares=first.memory.spares),
    )
    stage.replace(chain.members, local)


def for_winograd(packed: Tensor) -> bool:
    """Whether packed weights are those of `winograd.pack`."""
    return packed.dim() == 1


def _pack(chain: ConvChain, gains: bool, weight: Tensor, *factors: Tensor) -> Tensor:
    """The scaled weight in packed form; unpacked if no kernel can use it.

    Args:
        gains: whether Winograd's filtering will use it.
    """
    weight = functools.reduce(scaled, factors, weight[:, :, None, None] if chain.channels_last else weight)
    if type(weight) is not Tensor or weight.numel() == 0 or not allowed():
        return weight
    if gains:
        return winograd.pack(weight)
    if weight.is_meta:
        return weight
    return reorder_convolution_weight(weight, [0, 0], chain.stride, chain.dilation, chain.groups)
