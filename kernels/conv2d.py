"""The fused convolution as registered ops with a choice of implementations and autograd.

    y = act(conv(x, w) + shift + residual)

`conv2d` is the differentiable op. It consists of `conv2d_forward` and `conv2d_backward`, which the engine calls
directly because it sums gradients itself. Their three ops run, for every shape, the faster of our kernel and cuDNN's,
as measured (`choice.py`); both save the same tensors, so they may be mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import conv2d_dgrad as dense_dgrad
from . import conv2d_forward as dense_forward
from . import conv2d_wgrad as dense_wgrad
from . import depthwise
from .activations import MASKS, activate_reference, check_activation, slope_reference
from .choice import run_fastest
from .dtypes import sum_dtype
from .moments import moments_of_each
from .pointwise import act_grad
from .windows import ConvGeometry, empty_map, map_like, nhwc, placed, without_margin


def conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "none",
) -> Tensor:
    """act(conv(x, weight * scale) + shift + residual), differentiable, one pass over memory.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16.
        weight: (K, C / groups, R, S), of x's dtype.
        scale, shift: (K,), or None.
        residual: (N, K, OH, OW), or None.
        padding: one number, (rows, columns), or (top, bottom, left, right).
        act: "none", "relu", "relu6", "silu", "gelu" or "hardswish".

    Returns:
        (N, K, OH, OW) in channels-last memory.

    Raises:
        ValueError: for an unknown activation or incompatible shapes.
    """
    geometry = ConvGeometry.of(_pair(stride), _four(padding), _pair(dilation), groups)
    check_activation("conv2d", act)
    if weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"conv2d: weight {tuple(weight.shape)} and groups={groups} do not fit {x.shape[1]} input channels"
        )
    output = x.shape[0], weight.shape[0], *geometry.output(x, weight.shape[2:])
    if residual is not None and tuple(residual.shape) != output:
        raise ValueError(f"conv2d: residual {tuple(residual.shape)} does not fit the output {output}")
    if scale is not None:
        weight = (weight * scale.reshape(-1, 1, 1, 1)).to(weight.dtype)
    keep_z = act not in MASKS and act != "none" and torch.is_grad_enabled()
    return _Conv2d.apply(geometry, act, keep_z, x, weight, shift, residual)  # pyright: ignore


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _four(padding: int | Sequence[int]) -> list[int]:
    pad = _pair(padding)
    return [pad[0], pad[0], pad[1], pad[1]] if len(pad) == 2 else pad


# -- PyTorch's own ops --------------------------------------------------------------------------------------------


def split_padding(geometry: ConvGeometry) -> tuple[list[int], list[int]]:
    """Splits the padding into the even part that PyTorch's convolutions add and the rest in the order of `F.pad`."""
    top, bottom, left, right = geometry.padding
    rows, cols = min(top, bottom), min(left, right)
    return [rows, cols], [left - cols, right - cols, top - rows, bottom - rows]


def forward_stock(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    geometry: ConvGeometry,
    act: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    """y and z by PyTorch's own ops, in place where possible."""
    even, uneven = split_padding(geometry)
    if any(uneven):
        x = F.pad(x, uneven)
    bias = None if shift is None else shift.to(x.dtype)
    z = F.conv2d(x, weight, bias, geometry.stride, even, geometry.dilation, geometry.groups)  # pyright: ignore
    if residual is not None:
        z.add_(residual)
    z = nhwc(z)
    if keep_z:
        return activate_reference(z, act), z
    y = {"relu": F.relu_, "none": lambda t: t}.get(act, lambda t: activate_reference(t, act))(z)
    return y, x.new_empty(0)


def backward_stock(dz: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry, wanted: list[bool]) -> Any:
    """PyTorch's gradients of a convolution of x, which already includes the uneven part of the padding."""
    even, _ = split_padding(geometry)
    settings = list(geometry.stride), even, list(geometry.dilation), False, [0, 0], geometry.groups
    return torch.ops.aten.convolution_backward(dz, x, weight, None, *settings, wanted)


# -- forward ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gigamorph::conv2d_forward", mutates_args=())
def conv2d_forward(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    geometry: Sequence[int],
    act: str,
    keep_z: bool,
    margin: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """y, and z = the input of the activation (empty unless `keep_z`).

    With a margin, y has that many more rows above and columns to the left of the result, which are left unwritten: a
    halo can then be copied there, without another copy of the map.
    """
    x, residual, given = nhwc(x), None if residual is None else nhwc(residual), ConvGeometry(*geometry)

    def ours() -> tuple[Tensor, Tensor]:
        whole, z = _outputs(x, weight, given, keep_z, margin)
        epilogue = {"shift": shift, "residual": residual, "z": z if keep_z else None}
        run = depthwise.forward if given.is_depthwise(weight) else dense_forward.launch
        run(x, weight, without_margin(whole, margin), given, act, **epilogue)
        return whole, z

    def stock() -> tuple[Tensor, Tensor]:
        made, z = forward_stock(x, weight, shift, residual, given, act, keep_z)
        if not any(margin):
            return made, z
        whole, _ = _outputs(x, weight, given, False, margin)
        without_margin(whole, margin).copy_(made)
        return whole, z

    named = [name for name, t in (("shift", shift), ("residual", residual)) if t is not None]
    return run_fastest("conv2d_forward", x, (*weight.shape, *given.form, act, *named, keep_z, any(margin)), ours, stock)


def _outputs(
    x: Tensor, weight: Tensor, geometry: ConvGeometry, keep_z: bool, margin: Sequence[int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    (n, k), (h, w) = (x.shape[0], weight.shape[0]), geometry.output(x, weight.shape[2:])
    z = empty_map(n, k, h, w, x) if keep_z else x.new_empty(0)
    return empty_map(n, k, h + margin[0], w + margin[1], x), z


@conv2d_forward.register_fake
def _(x, weight, shift, residual, geometry, act, keep_z, margin):
    return _outputs(x, weight, ConvGeometry(*geometry), keep_z, margin)


@torch.library.custom_op("gigamorph::conv2d_moments", mutates_args=())
def conv2d_moments(
    x: Tensor, weight: Tensor, shift: Tensor | None, geometry: Sequence[int], margin: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """y = conv(x, weight) + shift as in `conv2d_forward`, and mean and m2 of each of its channels in each image.

    The last two are (N, K) in float32 (float64 for float64), as from `moments`. For a single image the convolution's
    epilogue computes them, if that is faster as measured.
    """
    x, given = nhwc(x), ConvGeometry(*geometry)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        whole, _ = _outputs(x, weight, given, False, margin)
        found = dense_forward.launch(x, weight, without_margin(whole, margin), given, "none", shift=shift, moments=True)
        assert found is not None
        return whole, found[0][None], found[1][None]

    def stock() -> tuple[Tensor, Tensor, Tensor]:
        whole, _ = conv2d_forward(x, weight, shift, None, given, "none", False, margin)
        return whole, *moments_of_each(without_margin(whole, margin))

    if x.shape[0] > 1 or given.is_depthwise(weight):
        return stock()
    settings = (*weight.shape, *given.form, shift is None, any(margin))
    return run_fastest("conv2d_moments", x, settings, ours, stock)


@conv2d_moments.register_fake
def _(x, weight, shift, geometry, margin):
    whole, _ = _outputs(x, weight, ConvGeometry(*geometry), False, margin)
    mean, m2 = (x.new_empty(x.shape[0], weight.shape[0], dtype=sum_dtype(x.dtype)) for _ in range(2))
    return whole, mean, m2


@torch.library.custom_op("gigamorph::conv2d_act_grad", mutates_args=())
def conv2d_act_grad(
    dy: Tensor, x: Tensor, weight: Tensor, shift: Tensor | None, act: str, geometry: Sequence[int]
) -> Tensor:
    """dz = dy * act'(z), z = conv(x, weight) + shift, without storing z."""
    dy, x, given = nhwc(dy), nhwc(x), ConvGeometry(*geometry)

    def ours() -> Tensor:
        dz = map_like(dy)
        dense_forward.launch(x, weight, dz, given, act, shift=shift, mask=dy, mask_act="gradient")
        return dz

    def stock() -> Tensor:
        z, _ = conv2d_forward(x, weight, shift, None, given, "none", False, (0, 0))
        return act_grad(dy, z, act)

    settings = (*weight.shape, *given.form, act, shift is None)
    return run_fastest("conv2d_act_grad", x, settings, ours, stock)


@conv2d_act_grad.register_fake
def _(dy, x, weight, shift, act, geometry):
    return map_like(dy)


# -- data gradient ------------------------------------------------------------------------------------------------


@torch.library.custom_op("gigamorph::conv2d_dgrad", mutates_args=())
def conv2d_dgrad(
    dy: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    gate_act: str,
    addend: Tensor | None,
    addend_at: Sequence[int],
    mask: Tensor | None,
    mask_act: str,
    size: Sequence[int],
    geometry: Sequence[int],
) -> Tensor:
    """dx = (conv^T(dy * slope(gate), weight) + addend) * slope(mask), of height and width `size`.

    The addend begins at row and column `addend_at` of dx; it is zero elsewhere.
    """
    dy, gate, addend, mask = (None if t is None else nhwc(t) for t in (dy, gate, addend, mask))
    assert dy is not None
    given = ConvGeometry(*geometry)
    channels = weight.shape[1] * given.groups

    def ours() -> Tensor:
        dx = empty_map(dy.shape[0], channels, size[0], size[1], dy)
        rest = {"gate": gate, "gate_act": gate_act, "mask": mask, "mask_act": mask_act}
        if given.is_depthwise(weight):
            whole = None if addend is None else placed(addend, addend_at, size)
            depthwise.dgrad(dy, weight, dx, given, addend=whole, **rest)
        else:
            dense_dgrad.dgrad(dy, weight, dx, given, addend=addend, addend_at=addend_at, **rest)
        return dx

    def stock() -> Tensor:
        dz = dy if gate is None else act_grad(dy, gate, gate_act)
        _, uneven = split_padding(given)
        height, width = size[0] + uneven[2] + uneven[3], size[1] + uneven[0] + uneven[1]
        x = empty_map(dy.shape[0], channels, height, width, dy)  # only its shape is read
        dx = backward_stock(dz, x, weight, given, [True, False, False])[0]
        dx = nhwc(dx[:, :, uneven[2] : uneven[2] + size[0], uneven[0] : uneven[0] + size[1]])
        if addend is not None:
            (top, left), (height, width) = addend_at, addend.shape[2:]
            dx[:, :, top : top + height, left : left + width] += addend
        return dx if mask is None else dx * slope_reference(mask, mask_act)

    settings = (*weight.shape, *given.form, gate_act, mask_act, addend is None)
    return run_fastest("conv2d_dgrad", dy, settings, ours, stock)


@conv2d_dgrad.register_fake
def _(dy, weight, gate, gate_act, addend, addend_at, mask, mask_act, size, geometry):
    return empty_map(dy.shape[0], weight.shape[1] * ConvGeometry(*geometry).groups, size[0], size[1], dy)


# -- weight gradient ----------------------------------------------------------------------------------------------


@torch.library.custom_op("gigamorph::conv2d_wgrad_", mutates_args={"dw", "dshift"})
def conv2d_wgrad_(
    dw: Tensor,
    dshift: Tensor | None,
    x: Tensor,
    dy: Tensor,
    gate: Tensor | None,
    gate_act: str,
    geometry: Sequence[int],
) -> None:
    """Add the gradients of a convolution's weight and shift to float32 (float64) buffers.

    dw += sum over pixels of dz * x at each tap, dshift += sum of dz, with dz = dy * slope(gate).
    """
    x, dy, gate, given = nhwc(x), nhwc(dy), None if gate is None else nhwc(gate), ConvGeometry(*geometry)

    def ours(dw: Tensor = dw, dshift: Tensor | None = dshift) -> None:
        if given.is_depthwise(dw):
            unused = dw.new_zeros(dw.shape[0]) if dshift is None else dshift
            depthwise.wgrad(x, dy, dw, unused, given, gate=gate, gate_act=gate_act)
        else:
            dense_wgrad.launch(dw, dshift, x, dy, gate, gate_act, given)

    def stock(dw: Tensor = dw, dshift: Tensor | None = dshift) -> None:
        dz = dy if gate is None else act_grad(dy, gate, gate_act)
        _, uneven = split_padding(given)
        padded = F.pad(x, uneven) if any(uneven) else x
        w = torch.empty_like(dw, dtype=x.dtype)  # only its shape is read
        dw.add_(backward_stock(dz, padded, w, given, [False, True, False])[1])
        if dshift is not None:
            dshift.add_(dz.sum((0, 2, 3), dtype=dshift.dtype))

    settings = (*dw.shape, *given.form, gate_act, dshift is None)
    # A measurement runs the candidates many times, so it uses scratch buffers instead of the sums.
    trial = {
        "triton": lambda: ours(torch.zeros_like(dw), None if dshift is None else torch.zeros_like(dshift)),
        "stock": lambda: stock(torch.zeros_like(dw), None if dshift is None else torch.zeros_like(dshift)),
    }
    run_fastest("conv2d_wgrad", x, settings, ours, stock, trial)


@conv2d_wgrad_.register_fake
def _(dw, dshift, x, dy, gate, gate_act, geometry):
    return None


# -- the whole backward, and the differentiable op ----------------------------------------------------------------


def conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    act: str,
    geometry: ConvGeometry,
    *,
    wants_x: bool,
    wants_residual: bool = False,
    dw: Tensor | None = None,
    dshift: Tensor | None = None,
    addend: Tensor | None = None,
    addend_at: Sequence[int] = (0, 0),
    input_act: str = "none",
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the residual, if wanted; adds to dw and dshift, if given.

    Args:
        gate: a map that determines the slope of `act`: its output or its input. None: dy includes that slope already.
        dw: buffer for the gradient of weight.
        dshift: buffer for the gradient of shift; requires dw.
        addend: added to the gradient of x, from row and column `addend_at` of x on.
        input_act: activation that made x, whose slope the gradient of x is multiplied by.
    """
    if gate is not None and (wants_residual or wants_x):  # dz is the residual's gradient, and read for dx and dw
        dy, gate = act_grad(dy, gate, act), None
    if gate is None:
        act = "none"
    dx = None
    if wants_x:
        mask = None if input_act == "none" else x
        dx = conv2d_dgrad(dy, weight, gate, act, addend, addend_at, mask, input_act, x.shape[2:], geometry)
    if dw is not None:
        conv2d_wgrad_(dw, dshift, x, dy, gate, act, geometry)
    return dx, dy if wants_residual else None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, geometry: ConvGeometry, act: str, keep_z: bool, *tensors: Tensor | None) -> Tensor:
        x, weight, shift, residual = tensors
        assert x is not None and weight is not None
        y, z = conv2d_forward(x, weight, shift, residual, geometry, act, keep_z, (0, 0))
        ctx.save_for_backward(x, weight, None if act == "none" else (z if keep_z else y))
        ctx.act, ctx.geometry, ctx.shift_dtype = act, geometry, None if shift is None else shift.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        wants_x, wants_weight, wants_shift, wants_residual = ctx.needs_input_grad[3:]
        dw = dshift = None
        if wants_weight or wants_shift:
            dw = torch.zeros_like(weight, dtype=sum_dtype(x.dtype), memory_format=torch.channels_last)
            dshift = dw.new_zeros(weight.shape[0]) if wants_shift else None
        wanted = {"wants_x": wants_x, "wants_residual": wants_residual, "dw": dw, "dshift": dshift}
        dx, dresidual = conv2d_backward(grads[0], x, weight, gate, ctx.act, ctx.geometry, **wanted)
        dw = dw.to(weight.dtype) if dw is not None and wants_weight else None
        return None, None, None, dx, dw, None if dshift is None else dshift.to(ctx.shift_dtype), dresidual
