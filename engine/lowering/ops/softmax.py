"""Softmax and division by the norm over the image: reductions, and a local op that reads their results."""

from __future__ import annotations

import torch
from torch import Tensor

from ...capture.program import Op
from .base import Maps, Node
from .reductions import ReductionCall, mapped, root, shifted_exp, squared, vector, wide


def softmax_over_image(op: Op, maps: Maps, value: int, dim: int, logarithm: bool) -> list[Node]:
    """Softmax along an image axis, or along the positions of a flattened map."""
    call = ReductionCall(op, maps, value, (dim,), {"keepdim": True})
    nodes, made, top, total = shifted_exp(call, torch.Tensor.detach)
    dtype = call.dtype
    found, sums = call.keepdim_result(total)
    if logarithm:
        more, most = call.keepdim_result(top)

        def finish(x: Tensor, most: Tensor, sums: Tensor) -> Tensor:
            return (x.to(sums.dtype) - most.detach() - sums.log()).to(dtype)

        last, _ = mapped(op, maps, "log_softmax", (value,), finish, dtype, (most, sums), call.output)
        return [*nodes, *found, *more, last]
    last, _ = mapped(op, maps, "softmax", (made,), lambda e, sums: (e / sums).to(dtype), dtype, (sums,), call.output)
    return [*nodes, *found, last]


def normalize_over_image(op: Op, maps: Maps, value: int, dims: tuple[int, ...], eps: float) -> list[Node]:
    """x / max(|x|, eps) with the Euclidean norm over the image, or over one of its axes."""
    call = ReductionCall(op, maps, value, dims, {"keepdim": True})
    own, dtype = wide(maps.program.values[value].dtype), call.dtype
    local, made = call.mapped("square", lambda x: squared(x.to(own)), own)
    sizes = [1 if d in call.dims else n for d, n in enumerate(call.shape)]
    total, length = (maps.new_value(sizes, own, like=value) for _ in range(2))
    scale = vector((total,), length, lambda t: root(t).clamp_min(eps))
    found, norms = call.keepdim_result(length)
    last, _ = mapped(op, maps, "normalized", (value,), lambda x, n: (x / n).to(dtype), dtype, (norms,), call.output)
    return [local, call.reduce(made, "sum", total, keepdim=True), scale, *found, last]
