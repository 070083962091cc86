"""Adds the partial sums of a streaming kernel's programs, two numbers per channel, in a fixed order:

first[c], second[c] = sum over programs and folds of parts[program, 0 or 1, fold * C + c]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import merge_blocks


@triton.jit(do_not_specialize=["parts"])
def _add_kernel(
    x_ptr,  # [parts, 2, C]
    first_ptr,  # [C]
    second_ptr,  # [C]
    parts,
    sp,
    ss,  # from part to part, from sum to sum
    C,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """One of the two sums of BC channels over all parts, BM at a time."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    x_ptr += tl.program_id(1).to(tl.int64) * ss
    total = tl.zeros((BM, BC), x_ptr.dtype.element_ty)
    for begin in range(0, parts, BM):
        part = begin + tl.arange(0, BM)
        at = part.to(tl.int64)[:, None] * sp + c[None, :]
        total += tl.load(x_ptr + at, mask=(part < parts)[:, None] & (c < C)[None, :], other=0.0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + c, tl.sum(total, 0), mask=c < C)
    else:
        tl.store(second_ptr + c, tl.sum(total, 0), mask=c < C)


def _add(x: Tensor, first: Tensor, second: Tensor) -> None:
    parts, _, channels = x.shape
    rows, block = merge_blocks(parts, channels)
    grid = triton.cdiv(channels, block), 2
    _add_kernel[grid](x, first, second, parts, x.stride(0), x.stride(1), channels, BM=rows, BC=block)


def add_parts(parts: Tensor, folds: int) -> tuple[Tensor, Tensor]:
    """The two sums of each channel.

    Args:
        parts: (programs, 2, folds * C), C channels next to each other.
    """
    width, like = parts.shape[2], {"dtype": parts.dtype, "device": parts.device}
    if folds > 1:
        # Over programs first: each of the many folded channels is summed separately, so many programs have work.
        sums = torch.empty(2, folds, width // folds, **like)
        _add(parts, *sums)
        parts = sums.transpose(0, 1)
    first, second = (torch.empty(width // folds, **like) for _ in range(2))
    _add(parts, first, second)
    return first, second
