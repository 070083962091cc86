"""The per-channel transform of norm kernels: (x - mean) * scale + bias, scale = rstd * weight."""

from __future__ import annotations

import triton
import triton.language as tl

from .stream import channel


@triton.jit
def affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, C, BC: tl.constexpr, ACC: tl.constexpr):
    """mean, rstd, rstd * weight and bias of the channels c, each [1, BC]."""
    mean, rstd = channel(mean_ptr, c, C, ACC), channel(rstd_ptr, c, C, ACC)
    scale = rstd if weight_ptr is None else rstd * channel(weight_ptr, c, C, ACC)
    bias = tl.zeros((1, BC), ACC) if bias_ptr is None else channel(bias_ptr, c, C, ACC)
    return mean, rstd, scale, bias
