"""Layer normalisation over channels and the linear layer after it in one kernel, as in a ConvNeXt block:

    y = act(n w^T + b),   n = layer_norm(x)

and its gradients, with dz = dy * act'(z), z = n w^T + b:

    dw += sum over pixels of dz^T n,   db += sum of dz,   dx = layer_norm_backward(dz w)

As a matrix product: rows are pixels, columns filters, depth channels. x is normalised when it is loaded, so n is never
written; x is read a second time for mean and rstd, and the product reads it through the cache. Only x is saved for the
backward, which computes n again, and dz in the epilogue of the product for z.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import activate, activate_reference, check_activation
from .choice import run_fastest
from .conv2d import conv2d_act_grad, conv2d_backward
from .layer_norm import layer_norm, layer_norm_backward, layer_norm_reference
from .stream import as_map, count_pixels, dense, pixel_offsets, pixel_product_options
from .triton_private import jit_kernel
from .tuning import linear_columns, linear_config
from .windows import ConvGeometry, empty_map, nhwc


@jit_kernel(["pixels", "H", "W"])
def _layer_norm_linear_kernel(
    x,  # map [N, C, H, W]
    y,  # map [N, K, H, W]
    ln_weight_ptr,  # [C] or None
    ln_bias_ptr,  # [C] or None
    w_ptr,  # [K, C]
    bias_ptr,  # [K] or None
    pixels,
    H,
    W,
    C,
    K,
    columns,  # output channels of a program, a multiple of BN
    EPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FLAT: tl.constexpr,
    VEC: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """y of BM pixels and `columns` filters, BN at a time."""
    p = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM] pixels
    inside = (p < pixels)[:, None]
    x_rows = x.ptr + pixel_offsets(x, p, H, W, FLAT, VEC)[:, None]
    y_rows = y.ptr + pixel_offsets(y, p, H, W, FLAT, VEC)[:, None]
    mean = tl.zeros((BM,), ACC)
    m2 = tl.zeros((BM,), ACC)
    for c0 in range(0, C, BK):  # blocks of channels merge by Chan's formula
        c = (c0 + tl.arange(0, BK))[None, :]
        n = tl.minimum(C - c0, BK)
        values = tl.load(x_rows + c, mask=inside & (c < C), other=0.0).to(ACC)  # [BM, BK]
        part = tl.sum(values, 1) / n
        centred = tl.where(c < C, values - part[:, None], 0.0)
        delta = part - mean
        mean += delta * n / (c0 + n)
        m2 += tl.sum(centred * centred, 1) + delta * delta * (c0 * n) / (c0 + n)
    mean = mean[:, None]
    rstd = tl.rsqrt(m2 / C + EPS)[:, None]

    first = tl.program_id(1) * columns
    for k0 in range(first, tl.minimum(first + columns, K), BN):
        k = k0 + tl.arange(0, BN)
        acc = tl.zeros((BN, BM), ACC)
        for c0 in range(0, C, BK):
            c = c0 + tl.arange(0, BK)
            wanted = c < C
            a = tl.load(x_rows + c[None, :], mask=inside & wanted[None, :], other=0.0).to(ACC)
            a = (a - mean) * rstd
            if ln_weight_ptr is not None:
                a *= tl.load(ln_weight_ptr + c, mask=wanted, other=0.0).to(ACC)[None, :]
            if ln_bias_ptr is not None:
                a += tl.load(ln_bias_ptr + c, mask=wanted, other=0.0).to(ACC)[None, :]
            w = tl.load(w_ptr + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & wanted[None, :], other=0.0)
            # Computed values are the right operand: Hopper reads left ones from registers while it multiplies, and
            # Triton (3.6, 3.7) may overwrite those too early (triton-lang/triton#9433).
            acc = tl.dot(w, a.to(w_ptr.dtype.element_ty).T, acc, input_precision=PRECISION, out_dtype=ACC)
        z = acc.T  # [BM, BN]
        k = k[None, :]
        if bias_ptr is not None:
            z += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(ACC)
        tl.store(y_rows + k, activate(z, ACT).to(y.ptr.dtype.element_ty), mask=inside & (k < K))


def launch_linear_act(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    y: Tensor,
) -> None:
    """Write y = act(layer_norm(x) weight^T + bias) at each pixel.

    Args:
        x, y: (N, C, H, W) and (N, K, H, W) windows.
        ln_weight, ln_bias: (C,), of any floating dtype.
        weight: (K, C), dense, of y's dtype, which may be narrower than x's.
        bias: (K,), of any floating dtype.
    """
    if not y.numel():
        return
    pixels, channels, filters = count_pixels(x, "layer_norm_linear_act"), x.shape[1], y.shape[1]
    config = linear_config(x.device, weight.dtype, pixels, filters, channels)
    rows = triton.cdiv(pixels, config.block_m)
    columns = linear_columns(filters, rows, config.block_n)
    ln_weight, ln_bias, bias = dense(ln_weight, ln_bias, bias)
    _layer_norm_linear_kernel[(rows, triton.cdiv(filters, columns))](
        as_map(x),
        as_map(y),
        ln_weight,
        ln_bias,
        weight,
        bias,
        pixels,
        *x.shape[2:],
        channels,
        filters,
        columns,
        EPS=eps,
        **pixel_product_options(x, y, config, act, weight.dtype, linear=True),
    )


@torch.library.custom_op("gigamorph::layer_norm_linear_act", mutates_args=())
def layer_norm_linear_act(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
) -> Tensor:
    """act(layer_norm(x) weight^T + bias) at each pixel, one pass over memory.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16.
        ln_weight, ln_bias: (C,), or None.
        weight: (K, C) or (K, C, 1, 1), of x's dtype or a narrower one, in which the product is then computed.
        bias: (K,), or None.
        act: "none", "relu", "relu6", "silu", "gelu" or "hardswish".

    Returns:
        (N, K, H, W) in channels-last memory, of weight's dtype.

    Raises:
        ValueError: for an unknown activation or shapes that do not fit.
    """
    check_activation("layer_norm_linear_act", act)
    if weight[0].numel() != x.shape[1]:
        raise ValueError(f"layer_norm_linear_act: weight {tuple(weight.shape)} does not fit {x.shape[1]} channels")
    x, weight = nhwc(x), weight.flatten(1)

    def ours() -> Tensor:
        y = empty_map(x.shape[0], weight.shape[0], x.shape[2], x.shape[3], weight)
        launch_linear_act(x, ln_weight, ln_bias, eps, weight.contiguous(), bias, act, y)
        return y

    def stock() -> Tensor:
        n = layer_norm(x, ln_weight, ln_bias, eps, weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            z = F.linear(n.permute(0, 2, 3, 1), weight, None if bias is None else bias.to(weight.dtype))
        return activate_reference(z, act).permute(0, 3, 1, 2)

    given = [name for name, t in (("scale", ln_weight), ("shift", ln_bias), ("bias", bias)) if t is not None]
    settings = (*weight.shape, str(weight.dtype), act, *given)
    return run_fastest("layer_norm_linear_act", x, settings, ours, stock)


@layer_norm_linear_act.register_fake
def _(x, ln_weight, ln_bias, eps, weight, bias, act):
    return empty_map(x.shape[0], weight.shape[0], x.shape[2], x.shape[3], weight)


def layer_norm_linear_act_backward(
    dy: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dln_weight and dln_bias; the gradients of weight and bias are added to the given buffers.

    Args:
        dy: (N, K, H, W), of weight's dtype.
        weight: (K, C).
        dweight, dbias: buffers (K, C) and (K,) in float32 (float64 for float64), or None; dbias requires dweight.
        others: as for `layer_norm_linear_act`.
    """
    n, filters, pixel = layer_norm(x, ln_weight, ln_bias, eps, weight.dtype), weight[:, :, None, None], ConvGeometry()
    if act != "none":
        dy = conv2d_act_grad(dy, n, filters, bias, act, pixel)
    dw = None if dweight is None else dweight[:, :, None, None]
    dn, _ = conv2d_backward(dy, n, filters, None, "none", pixel, wants_x=True, dw=dw, dshift=dbias)
    assert dn is not None
    return layer_norm_backward(dn, x, ln_weight, eps)


def layer_norm_linear_act_reference(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
) -> Tensor:
    """y in plain PyTorch."""
    n = layer_norm_reference(x, ln_weight, ln_bias, eps)
    return activate_reference(F.conv2d(n, weight.reshape(weight.shape[0], -1, 1, 1), bias), act)
