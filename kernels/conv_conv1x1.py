"""The end of a residual bottleneck for inference, 3x3 convolution and 1x1 convolution in one pass over memory:

    y = act(conv(h, w2) + shift2 + residual),   h = mid_act(conv(x, w1) + shift1)

w1 is (M, C, R, S) with stride 1 or 2, w2 is (K, M, 1, 1); frozen normalisation is folded into weights and shifts. The
map h is never in memory: a program holds all M channels of a box of its pixels, rounds them to the maps' dtype, like a
stored map, and multiplies them by w2, one block of output channels after another. Compared with two kernels this saves
one write and one read of h.

The 1x1 convolution before is not fused. Values in registers cannot be shifted between rows, so its output would be
computed again for every tap: in ResNet-50's first stage 9 x 256 x 64 multiply-adds per pixel instead of 256 x 64, while
the whole block takes 69632.

The kernel requires descriptors (sm_90), and M must be a power of two of at most 256, so that h fits in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import activate, activate_reference
from .conv2d_forward import filter_matrix
from .conv2d_kernels import Steps, gemm, product_options
from .stream import dense
from .triton_private import jit_kernel
from .tuning import conv_conv1x1_config, most_mid_channels
from .windows import ConvGeometry, Phases, can_describe, can_describe_product, describe, empty_map


@jit_kernel(["lines", "segments", "row_even", "row_odd", "col_even", "col_odd"])
def _conv_conv1x1_kernel(
    x_desc,  # [N, H, W, CIN] window
    x01_desc,
    x10_desc,
    x11_desc,  # with a stride of two, x_desc has the even rows and columns, these the odd columns, odd rows and both
    w1_desc,  # [M, R*S*CIN]
    w2_desc,  # [COUT, M]
    residual_desc,  # [N, OH, OW, COUT] window or None
    y_desc,  # [N, OH, OW, COUT] window
    shift1_ptr,  # [M]
    shift2_ptr,  # [COUT]
    COUT,
    lines,  # boxes in vertical direction
    segments,  # boxes in horizontal direction
    row_even,
    row_odd,
    col_even,
    col_odd,  # offsets of the phases' first taps from an output
    M: tl.constexpr,
    MID_ACT: tl.constexpr,
    ACT: tl.constexpr,
    CIN: tl.constexpr,
    STEPS: tl.constexpr,
    P: tl.constexpr,
):
    """All filters of y at a box of ROWS x BM / ROWS pixels, computed from all M channels of h."""
    COLS: tl.constexpr = P.BM // P.ROWS
    pid = tl.program_id(0)
    j0 = (pid % segments) * COLS
    line = pid // segments
    n = line // lines
    i = (line % lines) * P.ROWS

    x = (x_desc, x01_desc, x10_desc, x11_desc)
    acc = gemm(x, w1_desc, n, i, j0, (row_even, row_odd, col_even, col_odd), 0, 1, M, CIN, STEPS, P)
    acc += tl.load(shift1_ptr + tl.arange(0, M)).to(P.ACC)[None, :]
    h = activate(acc, MID_ACT).to(x_desc.dtype)  # [BM, M]

    for k0 in range(0, COUT, P.BN):
        z = tl.dot(h, w2_desc.load([k0, 0]).T, input_precision=P.PRECISION, out_dtype=P.ACC)
        k = k0 + tl.arange(0, P.BN)
        z += tl.load(shift2_ptr + k, mask=k < COUT, other=0.0).to(P.ACC)[None, :]
        if residual_desc is not None:
            z += residual_desc.load([n, i, j0, k0]).reshape(P.BM, P.BN).to(P.ACC)
        y_desc.store([n, i, j0, k0], activate(z, ACT).to(y_desc.dtype).reshape(1, P.ROWS, COLS, P.BN))


def conv_conv1x1_fits(
    x: Tensor, weight1: Tensor, weight2: Tensor, residual: Tensor | None, geometry: ConvGeometry
) -> bool:
    """Whether the kernel supports a pair.

    It needs a chip with descriptors, maps that they can address, no dilation, and M a power of two up to 256 (128 in
    float32).
    """
    filters = weight1.shape[0]
    return (
        geometry.stride_h == geometry.stride_w
        and geometry.dilation == (1, 1)
        and filters & (filters - 1) == 0
        and 16 <= filters <= most_mid_channels(x.dtype)
        and weight2.shape[0] * x.dtype.itemsize % 16 == 0
        and can_describe_product(x, geometry, residual, filter_matrix(weight1))
    )


def conv_conv1x1_launch(
    x: Tensor,
    weight1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    shift2: Tensor,
    residual: Tensor | None,
    y: Tensor,
    geometry: ConvGeometry,
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
        geometry: the geometry of the first convolution.
    """
    mid, depth, r, s = weight1.shape
    n, filters, oh, ow = y.shape
    if not y.numel():
        return
    if not (conv_conv1x1_fits(x, weight1, weight2, residual, geometry) and can_describe(y)):
        raise ValueError(
            f"conv_conv1x1: cannot run {depth} -> {mid} -> {filters}, stride {geometry.stride}, {x.dtype} on "
            f"{x.device} in this memory layout; run the two convolutions separately"
        )
    config = conv_conv1x1_config(x, oh, ow, mid, filters, residual is not None)
    phases = Phases.of(x, geometry)
    rows, cols = config.rows, config.block_m // config.rows
    box_x, box_y = [1, rows, cols, config.block_k], [1, rows, cols, config.block_n]
    down, across = triton.cdiv(oh, rows), triton.cdiv(ow, cols)
    shift1, shift2 = dense(shift1, shift2)
    _conv_conv1x1_kernel[(n * down * across,)](
        *phases.describe(box_x),
        describe(filter_matrix(weight1), [mid, config.block_k], operand=True),
        describe(weight2.reshape(filters, mid), [config.block_n, mid], operand=True),
        None if residual is None else describe(residual, box_y),
        describe(y, box_y),
        shift1,
        shift2,
        filters,
        down,
        across,
        *phases.shifts,
        M=mid,
        MID_ACT=mid_act,
        ACT=act,
        CIN=depth,
        STEPS=Steps(*geometry.stride, 1),
        **product_options((r, s), config, x.dtype),
    )


def conv_conv1x1_reference(
    x: Tensor,
    weight1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    shift2: Tensor,
    residual: Tensor | None,
    geometry: ConvGeometry,
    mid_act: str,
    act: str,
) -> Tensor:
    """y in plain PyTorch."""
    h = activate_reference(F.conv2d(geometry.padded(x), weight1, shift1, geometry.stride), mid_act)
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
    geometry: Sequence[int],
    mid_act: str,
    act: str,
) -> Tensor:
    """The fused pair, for inference: it has no gradient. See `conv_conv1x1_launch`."""
    given = ConvGeometry(*geometry)
    y = _output(x, weight1, weight2, given)
    conv_conv1x1_launch(x, weight1, shift1, weight2, shift2, residual, y, given, mid_act, act)
    return y


def _output(x: Tensor, weight1: Tensor, weight2: Tensor, geometry: ConvGeometry) -> Tensor:
    return empty_map(x.shape[0], weight2.shape[0], *geometry.output(x, weight1.shape[2:]), like=x)


@conv_conv1x1.register_fake
def _(x, weight1, shift1, weight2, shift2, residual, geometry, mid_act, act) -> Tensor:
    return _output(x, weight1, weight2, ConvGeometry(*geometry))
