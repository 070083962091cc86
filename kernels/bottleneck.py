"""The tail of a residual bottleneck for inference, 3x3 convolution and 1x1 convolution in one pass over memory:

    y = act(conv(h, w2) + shift2 + residual),   h = mid_act(conv(x, w1) + shift1)

w1 is (M, C, R, S) with stride 1 or 2, w2 is (K, M, 1, 1); frozen normalisation is folded into weights and shifts. The
map h is never in memory: a program holds all M channels of a row segment of it, rounds them to the maps' dtype, as a
stored map would be, and multiplies them by w2, one block of output channels after another. Next to two kernels this
saves one write and one read of h.

The leading 1x1 convolution is not fused as well. Values in registers cannot be shifted between rows, so its output
would be computed anew for every tap: in ResNet-50's first stage 9 x 256 x 64 multiply-adds per pixel in place of
256 x 64, when the whole block takes 69632.

Descriptors only (sm_90); M is a power of two of at most 256, so that h fits in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import activate, activate_reference
from .conv2d_forward import gemm_columns
from .dtypes import accumulator, dot_precision
from .tuning import Config, forced_config, has_descriptors, interpreting, power_of_two, shared_limit
from .windows import can_describe, can_describe_phases, column_phases, describe, empty_map, output_size


@triton.jit
def _conv_conv1x1_kernel(
    x_desc,
    x_odd_desc,
    w1_desc,
    w2_desc,  # windows and matrices; the odd columns are used for a stride of two
    shift1_ptr,
    shift2_ptr,  # [M], [COUT]
    residual_desc,
    y_desc,
    OH,
    COUT,
    segments,  # output rows, output channels, segments per row
    top,
    shift_even,
    shift_odd,  # row of tap 0 is i*stride - top; column shifts of the two column phases
    CIN: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    MID_ACT: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    j0 = (pid % segments) * BM
    line = pid // segments
    n = line // OH
    i = line % OH

    acc = tl.zeros((BM, M), ACC)
    acc = gemm_columns(
        acc,
        x_desc,
        w1_desc,
        n,
        i * STRIDE - top,
        j0,
        shift_even,
        0,
        1,
        CIN,
        R,
        S,
        0,
        STRIDE,
        1,
        BM,
        BK,
        PRECISION,
        ACC,
    )
    if STRIDE == 2 and S > 1:
        acc = gemm_columns(
            acc,
            x_odd_desc,
            w1_desc,
            n,
            i * STRIDE - top,
            j0,
            shift_odd,
            0,
            1,
            CIN,
            R,
            S,
            1,
            STRIDE,
            1,
            BM,
            BK,
            PRECISION,
            ACC,
        )
    acc += tl.load(shift1_ptr + tl.arange(0, M)).to(ACC)[None, :]
    h = activate(acc, MID_ACT).to(x_desc.dtype)  # [BM, M]

    for k0 in range(0, COUT, BN):
        z = tl.dot(h, w2_desc.load([k0, 0]).T, input_precision=PRECISION, out_dtype=ACC)
        k = k0 + tl.arange(0, BN)
        z += tl.load(shift2_ptr + k, mask=k < COUT, other=0.0).to(ACC)[None, :]
        if HAS_RESIDUAL:
            z += residual_desc.load([n, i, j0, k0]).reshape(BM, BN).to(ACC)
        y_desc.store([n, i, j0, k0], activate(z, ACT).to(y_desc.dtype).reshape(1, 1, BM, BN))


def conv_conv1x1_fits(x: Tensor, weight1: Tensor, weight2: Tensor, residual: Tensor | None, stride: int) -> bool:
    """Whether the kernel can do it: a chip with descriptors, maps that they can address, M a power of two up to 256
    (128 in float32)."""
    filters = weight1.shape[0]
    return (
        has_descriptors(x.device)
        and stride in (1, 2)
        and filters & (filters - 1) == 0
        and 16 <= filters <= (256 if x.dtype.itemsize <= 2 or interpreting() else 128)
        and weight2.shape[0] * x.dtype.itemsize % 16 == 0
        and can_describe(x, residual, _matrix(weight1))
        and (stride == 1 or can_describe_phases(x))
    )


def _matrix(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _config(x: Tensor, run: int, channels_mid: int, channels_out: int, residual: bool) -> Config:
    """h takes block_m x M accumulators and half as many registers again; what is left decides block_n."""
    config = forced_config()
    if config is not None:
        return config
    depth, itemsize = x.shape[1], x.dtype.itemsize
    if interpreting():  # few large programs: a call costs more than its elements
        blocks = power_of_two(run, 16, 256), power_of_two(channels_out, 16, 128), power_of_two(depth, 16, 64)
        return Config("descriptor", *blocks)
    block_m = 64 if itemsize > 2 or channels_mid > 128 else 128
    block_n = power_of_two(channels_out, 16, 64 if itemsize <= 2 else 32)
    block_k = power_of_two(depth, 16, 128 // itemsize)
    stage = (block_m + channels_mid) * block_k * itemsize
    tail = (channels_mid * block_n + block_m * (channels_mid + block_n * (3 if residual else 1))) * itemsize
    num_stages = max(2, min(4, (shared_limit(x.device) - tail - 2048) // stage))
    return Config("descriptor", block_m, block_n, block_k, 8 if block_m * channels_mid > 64 * 64 else 4, num_stages)


def conv_conv1x1_launch(
    x: Tensor,
    weight1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    shift2: Tensor,
    residual: Tensor | None,
    y: Tensor,
    stride: int,
    padding: Sequence[int],
    mid_act: str,
    act: str,
) -> None:
    """Write y; see the formula above.

    Args:
        x: (N, C, H, W) window.
        weight1, shift1: (M, C, R, S) and (M,).
        weight2, shift2: (K, M, 1, 1) and (K,).
        residual: window of y's size, or None.
        y: (N, K, OH, OW) window to be written.
        padding: (top, bottom, left, right) rows and columns of zeros around x.
    """
    mid, depth, r, s = weight1.shape
    n, filters, oh, ow = y.shape
    if not y.numel():
        return
    if not (conv_conv1x1_fits(x, weight1, weight2, residual, stride) and can_describe(y)):
        raise ValueError(
            f"conv_conv1x1: cannot take {depth} -> {mid} -> {filters}, stride {stride}, {x.dtype} on {x.device}"
            " as laid out; run the two convolutions apart"
        )
    config = _config(x, ow, mid, filters, residual is not None)
    even, odd, shift_even, shift_odd = column_phases(x, stride, padding[2])
    box_x, box_y = [1, 1, config.block_m, config.block_k], [1, 1, config.block_m, config.block_n]
    y_desc = describe(y, box_y)
    segments = triton.cdiv(ow, config.block_m)
    _conv_conv1x1_kernel[(n * oh * segments,)](
        describe(even, box_x),
        describe(odd, box_x),
        describe(_matrix(weight1), [mid, config.block_k]),
        describe(weight2.reshape(filters, mid), [config.block_n, mid]),
        shift1,
        shift2,
        y_desc if residual is None else describe(residual, box_y),
        y_desc,
        oh,
        filters,
        segments,
        padding[0],
        shift_even,
        shift_odd,
        CIN=depth,
        M=mid,
        R=r,
        S=s,
        STRIDE=stride,
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        HAS_RESIDUAL=residual is not None,
        MID_ACT=mid_act,
        ACT=act,
        PRECISION=dot_precision(x.dtype),
        ACC=accumulator(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def conv_conv1x1_reference(
    x: Tensor,
    weight1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    shift2: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: Sequence[int],
    mid_act: str,
    act: str,
) -> Tensor:
    """y in plain PyTorch."""
    top, bottom, left, right = padding
    h = activate_reference(F.conv2d(F.pad(x, [left, right, top, bottom]), weight1, shift1, stride), mid_act)
    z = F.conv2d(h, weight2, shift2)
    return activate_reference(z if residual is None else z + residual, act)


@torch.library.custom_op("gigamorph::conv_conv1x1", mutates_args=())
def conv_conv1x1(
    x: Tensor,
    weight1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    shift2: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: Sequence[int],
    mid_act: str,
    act: str,
) -> Tensor:
    """The fused pair, for inference: it has no gradient. See `conv_conv1x1_launch`."""
    y = _conv_conv1x1_fake(x, weight1, shift1, weight2, shift2, residual, stride, padding, mid_act, act)
    conv_conv1x1_launch(x, weight1, shift1, weight2, shift2, residual, y, stride, padding, mid_act, act)
    return y


@conv_conv1x1.register_fake
def _conv_conv1x1_fake(x, weight1, shift1, weight2, shift2, residual, stride, padding, mid_act, act) -> Tensor:
    top, bottom, left, right = padding
    oh = output_size(x.shape[2], weight1.shape[2], stride, 1, top, bottom)
    ow = output_size(x.shape[3], weight1.shape[3], stride, 1, left, right)
    return empty_map(x.shape[0], weight2.shape[0], oh, ow, like=x)
