"""The 1x1 convolution after a BatchNorm in training, which normalises its input when it loads it:

    y = act(n) w^T + shift,   n = (x - mean) * rstd * weight + bias

with mean and squared deviations of each channel of y, which the next BatchNorm needs, from the same tiles. Two layers
read one map and write one; the normalised map is never stored.

As a matrix product: rows are pixels, columns filters, depth channels. This only pays for 1x1 filters: a larger filter
would normalise each pixel once per tap. The backward uses other kernels: `normalize_act` computes the input of the
weight gradient again, and `normalize_act_gradients` passes the data gradient through the norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import activate, check_activation
from .batch_norm import normalize_act, normalize_act_reference
from .choice import run_fastest
from .conv2d import conv2d_forward, conv2d_moments
from .dtypes import sum_dtype
from .moments import merge_parts, moments_of_each, tile_moments
from .stream import as_map, count_pixels, dense, pixel_offsets, pixel_product_options
from .tuning import linear_config, roomy_registers
from .windows import ConvGeometry, empty_map, nhwc


@triton.jit(do_not_specialize=["pixels", "H", "W"])
def _normalized_conv1x1_kernel(
    x,  # map [N, C, H, W]
    y,  # map [N, K, H, W]
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    w_ptr,  # [K, C]
    shift_ptr,  # [K] or None
    part_mean_ptr,  # [tiles, K] or None: moments of each tile's output
    part_m2_ptr,  # [tiles, K] or None
    pixels,
    H,
    W,
    C,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FLAT: tl.constexpr,
    VEC: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """y of BM pixels and BN filters."""
    blocks = tl.cdiv(K, BN)
    tile = tl.program_id(0) // blocks
    p = tile * BM + tl.arange(0, BM)  # [BM] pixels
    k = tl.program_id(0) % blocks * BN + tl.arange(0, BN)  # [BN] filters
    inside = p < pixels
    x_rows = x.ptr + pixel_offsets(x, p, H, W, FLAT, VEC)[:, None]
    acc = tl.zeros((BN, BM), ACC)
    for c0 in range(0, C, BK):
        c = c0 + tl.arange(0, BK)
        wanted = c < C
        scale = tl.load(rstd_ptr + c, mask=wanted, other=0.0).to(ACC)
        scale *= tl.load(weight_ptr + c, mask=wanted, other=0.0).to(ACC)
        mean = tl.load(mean_ptr + c, mask=wanted, other=0.0).to(ACC)
        bias = tl.load(bias_ptr + c, mask=wanted, other=0.0).to(ACC)
        a = tl.load(x_rows + c[None, :], mask=inside[:, None] & wanted[None, :], other=0.0).to(ACC)
        a = activate((a - mean[None, :]) * scale[None, :] + bias[None, :], ACT)  # [BM, BK]
        w = tl.load(w_ptr + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & wanted[None, :], other=0.0)
        # Computed values are the right operand: Hopper reads left ones from registers while it multiplies, and
        # Triton (3.6, 3.7) may overwrite those too early (triton-lang/triton#9433).
        acc = tl.dot(w, a.to(w_ptr.dtype.element_ty).T, acc, input_precision=PRECISION, out_dtype=ACC)
    made = acc.T  # [BM, BN]
    if shift_ptr is not None:
        made += tl.load(shift_ptr + k, mask=k < K, other=0.0).to(ACC)[None, :]
    made = made.to(y.ptr.dtype.element_ty)
    y_rows = y.ptr + pixel_offsets(y, p, H, W, FLAT, VEC)[:, None]
    tl.store(y_rows + k[None, :], made, mask=inside[:, None] & (k < K)[None, :])
    if part_mean_ptr is not None:
        part_mean, part_m2 = tile_moments(made.to(ACC), inside, tl.minimum(BM, pixels - tile * BM), ACC)
        at = tile.to(tl.int64) * K + k
        tl.store(part_mean_ptr + at, part_mean, mask=k < K)
        tl.store(part_m2_ptr + at, part_m2, mask=k < K)


def launch(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: str,
    w: Tensor,
    shift: Tensor | None,
    y: Tensor,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    """Write y; return mean and m2 of each of its channels over all images, empty unless `moments`.

    Args:
        x, y: (N, C, H, W) and (N, K, H, W) windows.
        mean, rstd, weight, bias, shift: (C,) and (K,), of any floating dtype.
        w: (K, C), dense, of x's dtype.
    """
    pixels, channels, filters = count_pixels(x, "normalized_conv1x1"), x.shape[1], y.shape[1]
    if not y.numel():
        none = y.new_zeros(filters if moments else 0, dtype=sum_dtype(y.dtype))
        return none, none.clone()
    config = linear_config(x.device, x.dtype, pixels, filters, channels)
    tiles = triton.cdiv(pixels, config.block_m)
    parts = torch.empty(2, tiles, filters, dtype=sum_dtype(y.dtype), device=y.device) if moments else None
    mean, rstd, weight, bias, shift = dense(mean, rstd, weight, bias, shift)
    _normalized_conv1x1_kernel[(tiles * triton.cdiv(filters, config.block_n),)](
        as_map(x),
        as_map(y),
        mean,
        rstd,
        weight,
        bias,
        w,
        shift,
        *((None, None) if parts is None else parts),
        pixels,
        *x.shape[2:],
        channels,
        filters,
        **pixel_product_options(x, y, config, act, x.dtype, linear=False),
        **roomy_registers(x.device, 255),
    )
    if parts is None:
        return y.new_empty(0, dtype=sum_dtype(y.dtype)), y.new_empty(0, dtype=sum_dtype(y.dtype))
    return merge_parts(parts, (1, config.block_m), (1, pixels))


@torch.library.custom_op("gigamorph::normalized_conv1x1", mutates_args=())
def normalized_conv1x1(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: str,
    w: Tensor,
    shift: Tensor | None,
    moments: bool,
    margin: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """y with a margin as in `conv2d_forward`, and mean and m2 of each channel of each image if `moments`.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16.
        mean, rstd, weight, bias: (C,), of any floating dtype.
        act: "none", "relu", "relu6", "silu", "gelu" or "hardswish".
        w: (K, C, 1, 1), of x's dtype; shift: (K,).
        moments: whether to return moments, (N, K) in float32 (float64 for float64); else they are empty.
        margin: rows above and columns to the left of the result to leave unwritten.
    """
    check_activation("normalized_conv1x1", act)
    x = nhwc(x)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        whole, *_ = _outputs(x, w, moments, margin)
        y = whole[:, :, margin[0] :, margin[1] :]
        in_epilogue = moments and x.shape[0] == 1
        found = launch(x, mean, rstd, weight, bias, act, w.flatten(1).contiguous(), shift, y, in_epilogue)
        if moments:
            found = (found[0][None], found[1][None]) if in_epilogue else moments_of_each(y)
        return whole, *found

    def stock() -> tuple[Tensor, Tensor, Tensor]:
        n = normalize_act(x, mean, rstd, weight, bias, None, act)
        if moments:
            return conv2d_moments(n, w, shift, ConvGeometry(), margin)
        whole, _ = conv2d_forward(n, w, shift, None, ConvGeometry(), "none", False, margin)
        return whole, *(x.new_empty(0, dtype=sum_dtype(x.dtype)) for _ in range(2))

    settings = (*w.shape, act, shift is None, moments, any(margin))
    return run_fastest("normalized_conv1x1", x, settings, ours, stock)


def _outputs(x: Tensor, w: Tensor, moments: bool, margin: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    whole = empty_map(x.shape[0], w.shape[0], x.shape[2] + margin[0], x.shape[3] + margin[1], x)
    shape = (x.shape[0], w.shape[0]) if moments else (0,)
    mean, m2 = (x.new_empty(shape, dtype=sum_dtype(x.dtype)) for _ in range(2))
    return whole, mean, m2


@normalized_conv1x1.register_fake
def _(x, mean, rstd, weight, bias, act, w, shift, moments, margin):
    return _outputs(x, w, moments, margin)


def normalized_conv1x1_reference(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, act: str, w: Tensor, shift: Tensor | None
) -> Tensor:
    """y in plain PyTorch."""
    n, _ = normalize_act_reference(x, mean, rstd, weight, bias, None, act)
    return F.conv2d(n, w, shift)
