"""The results of kernels in plain PyTorch, which their tests compare them with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gigamorph.kernels.activations import activate_reference, slope_reference
from gigamorph.kernels.batch_norm import group_sums
from gigamorph.kernels.pool import max_pool2d_reference
from gigamorph.kernels.windows import ConvGeometry, placed


def normalize_act_reference(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, act: str
) -> tuple[Tensor, Tensor]:
    """y and z in plain PyTorch."""
    z = (x - mean.reshape(-1, 1, 1)) * rstd.reshape(-1, 1, 1)
    if weight is not None:
        z = z * weight.reshape(-1, 1, 1)
    if bias is not None:
        z = z + bias.reshape(-1, 1, 1)
    if residual is not None:
        z = z + residual
    return activate_reference(z, act), z


def normalize_act_gradients_reference(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    together: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dz and the window's sums of dz and of dz * xhat, in plain PyTorch."""
    z = normalize_act_reference(x, mean, rstd, weight, bias, None, "none")[0] if gate is None else gate
    dz = dy * slope_reference(z, act)
    xhat = normalize_act_reference(x, mean, rstd, None, None, None, "none")[0]
    dx = dz * rstd.reshape(-1, 1, 1)
    if weight is not None:
        dx = dx * weight.reshape(-1, 1, 1)
    sums = dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))
    if together:
        a, b = group_sums(sums, weight, together).unflatten(1, (-1, 1, 1))
        dx = dx - rstd.reshape(-1, 1, 1) * (a + xhat * b) / (x.numel() // x.shape[1] * together)
    return dx, dz, *sums


def conv2d_dgrad_reference(
    dy: Tensor,
    weight: Tensor,
    size: Sequence[int],
    geometry: ConvGeometry,
    *,
    gate: Tensor | None = None,
    gate_act: str = "none",
    addend: Tensor | None = None,
    addend_at: Sequence[int] = (0, 0),
    mask: Tensor | None = None,
    mask_act: str = "none",
) -> Tensor:
    """dx in plain PyTorch: the gradient of a padded convolution."""
    if gate is not None:
        dy = dy * slope_reference(gate, gate_act)
    with torch.enable_grad():
        x = dy.new_zeros(dy.shape[0], weight.shape[1] * geometry.groups, *size).requires_grad_()
        settings = geometry.stride, 0, geometry.dilation, geometry.groups
        (dx,) = torch.autograd.grad(F.conv2d(geometry.padded(x), weight, None, *settings), x, dy)
    if addend is not None:
        dx = dx + placed(addend, addend_at, size)
    return dx if mask is None else dx * slope_reference(mask, mask_act)


def conv2d_forward_reference(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    geometry: ConvGeometry,
    act: str,
    mask: Tensor | None = None,
    mask_act: str = "none",
) -> tuple[Tensor, Tensor]:
    """y and z in plain PyTorch."""
    z = F.conv2d(geometry.padded(x), weight, None, geometry.stride, 0, geometry.dilation, geometry.groups)
    if shift is not None:
        z = z + shift.reshape(-1, 1, 1)
    if residual is not None:
        z = z + residual
    if mask is not None and mask_act == "gradient":
        return mask * slope_reference(z, act), z
    y = activate_reference(z, act)
    return (y if mask is None else y * slope_reference(mask, mask_act)), z


def conv2d_wgrad_reference(
    weight_size: Sequence[int], x: Tensor, dy: Tensor, gate: Tensor | None, gate_act: str, geometry: ConvGeometry
) -> tuple[Tensor, Tensor]:
    """The gradients that are added to dw and dshift, in plain PyTorch."""
    dz = dy if gate is None else dy * slope_reference(gate, gate_act)
    settings = geometry.stride, 0, geometry.dilation, geometry.groups
    dw = torch.nn.grad.conv2d_weight(geometry.padded(x), tuple(weight_size), dz, *settings)  # pyright: ignore
    return dw, dz.sum((0, 2, 3))


def max_pool2d_backward_reference(
    dy: Tensor, x: Tensor, kernel: Sequence[int], geometry: ConvGeometry, mask_act: str = "none"
) -> Tensor:
    """dx in plain PyTorch."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(max_pool2d_reference(x, kernel, geometry), x, dy)
    return dx if mask_act == "none" else dx * slope_reference(x, mask_act)
