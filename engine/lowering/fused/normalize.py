"""A norm or channel gate with the sum and activation, or the 1x1 convolution, after it as one op of the stage.

    y = act(xhat * factor + offset + residual),   xhat = (x - mean) * rstd
    y = conv1x1(act(xhat * factor + offset))

PyTorch saves x, the normalised map and the activation's output; this op saves only x, and y if the activation's slope
after a sum depends on it. With a 1x1 convolution, the backward computes that convolution's input again. The backward of
a norm is one pass: dx with constant statistics, and the sums of dz and of dz * xhat over the tile, which are the
gradients of offset and factor. Once per step ordinary autograd derives all other gradients from these (affine.py), and
the stage that made x adds the gradients of the statistics in another pass. If one tile contains all data of a norm's
statistics, the backward is two passes and complete.

Under autocast, GroupNorm turns a 16-bit map into float32, which the convolutions after it round again. If only
convolutions read the result, it is written in their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ....kernels.activations import MASKS
from ....kernels.batch_norm import normalize_act, normalize_act_gradients
from ....kernels.conv2d import conv2d_backward, conv2d_forward, conv2d_moments
from ....kernels.windows import ConvGeometry
from ..conv_chains import activation_of, other_summand
from ..ops import Block, Env, Local, VectorOp
from ..ops.base import BlockMemory
from ..stages import ProgramStage, only_readers, private_maps, readers_of
from .affine import affine_of
from .conv import DTYPES, ConvSpec, add_to_sums, as_autocast_wants, is_pixelwise, weight_sums


@dataclass(slots=True)
class NormalizeSpec:
    """Value numbers and settings of a norm. `mean` and `rstd` are constants for autograd.

    Attributes:
        dtype: the dtype of y.
        together: channels that share statistics, if these are statistics of x; else 0.
        masked: whether the readers of y apply the activation's slope to its gradient.
    """

    x: int
    mean: int
    rstd: int
    factor: int
    offset: int
    residual: int | None = None
    act: str = "none"
    dtype: torch.dtype | None = None
    together: int = 0
    masked: bool = False

    @property
    def vectors(self) -> tuple[int, int, int, int]:
        """Mean, rstd, factor and offset."""
        return self.mean, self.rstd, self.factor, self.offset


class FusedNormalize(torch.autograd.Function):
    """The norm of one block."""

    @staticmethod
    def forward(ctx: Any, spec: NormalizeSpec, block: Block, x: Tensor, residual: Tensor | None, *vectors: Tensor):
        margin = None if block.margin == (0, 0) else block.margin
        y = normalize_act(x, *vectors, residual, spec.act, spec.dtype, margin)
        y = y[:, :, block.margin[0] :, block.margin[1] :]
        gate = y if residual is not None and spec.act != "none" and not spec.masked else None
        ctx.save_for_backward(x, gate, *vectors)
        ctx.spec, ctx.sum_of, ctx.whole, ctx.grad_terms = spec, block.sum_of, block.whole, block.grad_terms
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        (dy,) = grads
        x, gate, *vectors = ctx.saved_tensors
        wants_x, wants_residual = ctx.needs_input_grad[2:4]
        keep_dz, act = wants_residual and gate is not None, "none" if ctx.spec.masked else ctx.spec.act
        plus = None
        if ctx.grad_terms:
            plus = reduce(torch.add, ctx.grad_terms)
            ctx.grad_terms.clear()
        dx, dz = _gradients(ctx, dy, x, *vectors, gate, act, keep_dz, plus=plus)
        dresidual = None if not wants_residual else dz if keep_dz else dy
        return None, None, dx if wants_x else None, dresidual, *[None] * len(vectors)


class FusedNormConv(torch.autograd.Function):
    """The norm of one block, its activation, and the 1x1 convolution after them."""

    @staticmethod
    def forward(
        ctx: Any, specs: tuple[NormalizeSpec, ConvSpec], block: Block, valued: bool, x: Tensor, *rest: Tensor | None
    ):
        (spec, conv), (weight, bias, *vectors) = specs, rest
        assert weight is not None
        ctx.save_for_backward(x, weight, *vectors)
        ctx.spec, ctx.conv, ctx.sum_of, ctx.whole = spec, conv, block.sum_of, block.whole
        if not valued:
            return x.new_empty(()).expand(x.shape[0], weight.shape[0], *x.shape[2:])
        n = normalize_act(x, *vectors, None, spec.act)
        if block.shares is None:
            y, _ = conv2d_forward(n, weight, bias, None, ConvGeometry(), "none", False, block.margin)
        else:
            y, *moments = conv2d_moments(n, weight, bias, ConvGeometry(), block.margin)
            block.shares[conv.y] = tuple(part[:, :, None, None] for part in moments)
        return y[:, :, block.margin[0] :, block.margin[1] :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        (dy,) = grads
        x, weight, *vectors = ctx.saved_tensors
        spec, pixel = ctx.spec, ConvGeometry()
        dw, dbias = weight_sums(ctx, ctx.conv, weight, *ctx.needs_input_grad[4:6])
        if dw is not None:
            n = normalize_act(x, *vectors, None, spec.act)
            conv2d_backward(dy, n, weight, None, "none", pixel, wants_x=False, dw=dw, dshift=dbias)
            del n
        dn, _ = conv2d_backward(dy, x, weight, None, "none", pixel, wants_x=True)
        assert dn is not None
        dx, _ = _gradients(ctx, dn, x, *vectors, None, spec.act, False)
        return None, None, None, dx if ctx.needs_input_grad[3] else None, *[None] * 6


def _gradients(ctx: Any, *given: Any, plus: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """dx and dz; the sums of dz and of dz * xhat are added to the gradients of offset and factor.

    If the block is the whole map, dx includes the gradient through the statistics.
    """
    dx, dz, *sums = normalize_act_gradients(*given, ctx.spec.together if ctx.whole else 0, plus)
    wants_factor, wants_offset = ctx.needs_input_grad[-2:]
    values, wanted = (ctx.spec.offset, ctx.spec.factor), (wants_offset, wants_factor)
    add_to_sums(ctx, zip(values, wanted, sums, strict=True))
    return dx, dz


def fuse_norms(stage: ProgramStage, convs: dict[int, ConvSpec]) -> dict[int, NormalizeSpec]:
    """Replace norms and gates that no convolution has absorbed by kernels, each with its only reader.

    Args:
        convs: the fused convolutions by output; those that become part of another op are removed.

    Returns:
        The norms that become separate ops, by output.
    """
    alone, readers, private = only_readers(stage), readers_of(stage), private_maps(stage)
    taken: set[int] = set()  # ops that have become part of another
    fused: dict[int, NormalizeSpec] = {}
    for norm in list(stage.locals):
        affine = affine_of(stage, norm)
        if affine is None or not _has_kernels(stage, norm):
            continue
        chain = [norm]

        def follower(chain: list[Local] = chain) -> Local | None:
            """The only reader of the chain's output; None if there are several."""
            found = alone.get(chain[-1].op.outputs[0])
            return None if id(found) in taken else found

        residual, act = None, "none"
        next_op = follower()
        if next_op is not None:
            residual = other_summand(stage, next_op, chain[-1].op.outputs[0])
            if residual is not None:
                chain.append(next_op)
                next_op = follower()
        found = None if next_op is None else activation_of(next_op.op)
        # After a sum, the slope must follow from the output.
        if next_op is not None and found is not None and (residual is None or found in MASKS):
            act = found
            chain.append(next_op)
            next_op = follower()
        (x,) = norm.reads
        y = chain[-1].op.outputs[0]
        conv = None if next_op is None or residual is not None else convs.get(next_op.op.outputs[0])
        if conv is not None and next_op is not None and _fits(stage, conv, x, y):
            del convs[conv.y]
            chain.append(next_op)
        else:
            conv = None
        taken.update(map(id, chain))
        dtype = _dtype(stage, x, y, readers.get(y, []), convs) if conv is None and y in private else None
        maps, like = stage.maps, affine.inputs[0]
        wide = torch.promote_types(stage.program.values[like].dtype, torch.float32)
        mean, rstd, factor, offset = (maps.new_value((maps.shape(x)[1],), wide, like=like) for _ in range(4))
        made = dtype or stage.program.values[y].dtype
        spec = NormalizeSpec(x, mean, rstd, factor, offset, residual, act, made, affine.together)
        stage.prelude.append(VectorOp(affine.make, affine.inputs, spec.vectors, whole=affine.whole))
        _replace(stage, chain, spec, conv)
        if conv is None:
            fused[y] = spec
    return fused


def _has_kernels(stage: ProgramStage, norm: Local) -> bool:
    """Whether kernels support the op's dtypes: a single one, or as under autocast 16 bits for x and 32 for y."""
    (x,), values = norm.reads, stage.program.values
    given, made = values[x].dtype, values[norm.op.outputs[0]].dtype
    return given in DTYPES and (made == given or (given.itemsize == 2 and made == torch.float32))


def _fits(stage: ProgramStage, conv: ConvSpec, x: int, y: int) -> bool:
    """Whether a convolution of the norm's output can absorb the norm."""
    same = stage.program.values[x].dtype == stage.program.values[conv.y].dtype
    return is_pixelwise(stage, conv, y) and not conv.channels_last and conv.act == "none" and same


def _dtype(stage: ProgramStage, x: int, y: int, readers: list[Local], convs: dict[int, ConvSpec]) -> torch.dtype | None:
    """The dtype of x if all readers of y round it to that dtype; None otherwise."""
    specs, values = [convs.get(local.op.outputs[0]) for local in readers], stage.program.values
    dtype = values[x].dtype
    alone = all(spec is not None and spec.residual != y and values[spec.y].dtype == dtype for spec in specs)
    return dtype if alone else None


def _replace(stage: ProgramStage, chain: list[Local], spec: NormalizeSpec, conv: ConvSpec | None) -> None:
    """Replace the last op of a chain by the fused op, and remove the others."""
    norm, last, maps = chain[0], chain[-1], stage.maps
    x, residual = spec.x, spec.residual

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        added = None if residual is None else env[residual]
        return (FusedNormalize.apply(spec, block, env[x], added, *(env[v] for v in spec.vectors)),)  # pyright: ignore

    def run_both(env: Env, block: Block, valued: bool = True) -> tuple[Tensor, ...]:
        assert conv is not None
        bias = None if conv.bias is None else env[conv.bias]
        given = (env[x], as_autocast_wants(env[conv.weight]), bias, *(env[v] for v in spec.vectors))
        return (FusedNormConv.apply((spec, conv), block, valued, *given),)  # pyright: ignore

    reads = dict(norm.reads)
    if residual is not None:
        reads[residual] = maps.pointwise(residual)
    if conv is None:
        name, inputs = "fused_normalize", (*reads, *spec.vectors)
    else:
        of_conv = (v for v in (conv.weight, conv.bias) if v is not None)
        name, inputs = "fused_norm_conv", (*reads, *spec.vectors, *of_conv)
    op = replace(norm.op, name=name, args=(), kwargs={}, inputs=inputs, outputs=last.op.outputs)
    # With a residual, `adds` is off: its gradient is dy itself and would lack the added terms.
    made = Local(op, reads, last.axes, run, adds=residual is None, memory=BlockMemory(leaves_room=True))
    if conv is not None:
        memory = BlockMemory(leaves_room=True, unvalued=partial(run_both, valued=False))
        made = Local(op, reads, last.axes, run_both, memory=memory)
    stage.replace(chain, made)
