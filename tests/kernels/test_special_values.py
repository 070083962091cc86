"""Every kernel keeps NaN, infinities and subnormal numbers where PyTorch keeps them.

What is not finite in PyTorch is not finite in a kernel; an infinity may become NaN, where a mean subtracts it from
itself. Infinite factors of norms are left out: PyTorch's formulas for them differ by device. The interpreter compares
as a GPU does (`helpers/interpreter.py`): `tl.maximum` of NaN and a number is the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE
from torch import Tensor

from gigamorph.kernels import batch_norm, conv2d, layer_norm, moments, pointwise, pool, stem
from gigamorph.kernels.choice import override
from gigamorph.kernels.windows import ConvGeometry

C, K = 6, 5
CONV = ConvGeometry.of((1, 1), (1, 1, 1, 1))
DEPTHWISE = ConvGeometry(**{**CONV._asdict(), "groups": C})
POOL = ConvGeometry.of((2, 2), (1, 1, 1, 1))
SIZES = {
    "x": (2, C, 7, 9),
    "like": (2, C, 7, 9),  # a second map of x's size
    "y": (2, K, 7, 9),
    "small": (2, C, 4, 5),
    "weight": (K, C, 3, 3),
    "filters": (C, 1, 3, 3),
    "image": (2, 1, 16, 20),
    "first": (K, 1, 3, 3),
    "pooled": (2, K, 4, 5),
    "shift": (K,),
    "scale": (C,),
    "mean": (C,),
    "rstd": (C,),
}
ACTS = ("none", "relu", "relu6", "silu", "gelu", "hardswish")


def wgrad(x: Tensor, y: Tensor, gate: Tensor | None, act: str, weight: Tensor, geometry: ConvGeometry) -> Any:
    sums = torch.zeros_like(weight), torch.zeros_like(weight[:, 0, 0, 0])
    conv2d.conv2d_wgrad_(*sums, x, y, gate, act, geometry)
    return sums


def stem_both(image: Tensor, first: Tensor, shift: Tensor, pooled: Tensor, act: str) -> Any:
    window = POOL, (1, 1, 1, 1)
    y, spots = stem.stem(image, first, shift, *window, act, True)
    return y, spots, *stem.stem_gradients(pooled, spots, image, first, shift, *window, act)


CALLS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    **{
        f"conv2d {act}": (
            ("x", "weight", "shift", "y"),
            lambda x, w, s, y, act=act: conv2d.conv2d_forward(x, w, s, y, CONV, act, act != "none", (0, 0)),
        )
        for act in ACTS
    },
    "depthwise relu": (
        ("x", "filters", "scale"),
        lambda x, w, s: conv2d.conv2d_forward(x, w, s, None, DEPTHWISE, "relu", True, (0, 0)),
    ),
    "conv2d_moments": (
        ("x", "weight", "shift"),
        lambda x, w, s: conv2d.conv2d_moments(x[:1], w, s, CONV, (0, 0)),
    ),
    "conv2d_act_grad": (
        ("y", "x", "weight", "shift"),
        lambda y, x, w, s: conv2d.conv2d_act_grad(y, x, w, s, "silu", CONV),
    ),
    "conv2d_dgrad": (
        ("y", "weight", "x", "like"),
        lambda y, w, x, m: conv2d.conv2d_dgrad(y, w, None, "none", x, (0, 0), m, "relu", (7, 9), CONV),
    ),
    "depthwise dgrad": (
        ("x", "filters", "like"),
        lambda x, w, m: conv2d.conv2d_dgrad(x, w, m, "relu", None, (0, 0), None, "none", (7, 9), DEPTHWISE),
    ),
    "conv2d_wgrad": (("x", "y", "weight"), lambda x, y, w: wgrad(x, y, None, "none", w, CONV)),
    "depthwise wgrad": (
        ("x", "like", "filters"),
        lambda x, y, w: wgrad(x, y, None, "none", w, DEPTHWISE),
    ),
    **{f"act_grad {act}": (("x", "like"), lambda x, z, act=act: pointwise.act_grad(x, z, act)) for act in ACTS},
    "layer_norm": (("x", "scale", "mean"), lambda x, w, b: layer_norm.layer_norm(x, w, b, 1e-5)),
    "layer_norm_backward": (("x", "like", "scale"), lambda dy, x, w: layer_norm.layer_norm_backward(dy, x, w, 1e-5)),
    "moments": (("x",), moments.moments),
    "moments_backward": (
        ("x", "mean", "rstd", "scale", "like"),
        lambda x, mean, dmean, dvar, addend: moments.moments_backward(x, mean, dmean, dvar, 126, addend),
    ),
    **{
        f"normalize_act {act}": (
            ("x", "mean", "rstd", "scale", "like"),
            lambda x, mean, rstd, w, r, act=act: batch_norm.normalize_act(x, mean, rstd, w, mean, r, act),
        )
        for act in ("none", "relu", "relu6")
    },
    "normalize_act_gradients": (
        ("x", "like", "mean", "rstd", "scale"),
        lambda dy, x, mean, rstd, w: batch_norm.normalize_act_gradients(dy, x, mean, rstd, w, mean, None, "relu", True),
    ),
    "normalize_act_gradients live": (
        ("x", "like", "mean", "rstd", "scale"),
        lambda dy, x, mean, rstd, w: batch_norm.normalize_act_gradients(
            dy, x, mean, rstd, w, mean, None, "relu", True, 1
        ),
    ),
    "max_pool2d": (("x",), lambda x: pool.max_pool2d(x, (3, 3), POOL)),
    "max_pool2d_backward": (
        ("small", "x"),
        lambda dy, x: pool.max_pool2d_backward(dy, x, (3, 3), POOL, "relu"),
    ),
    **{
        f"stem {act}": (
            ("image", "first", "shift", "pooled"),
            lambda x, w, s, dy, act=act: stem_both(x, w, s, dy, act),
        )
        for act in ("none", "relu", "relu6")
    },
}


def tensors(names: tuple[str, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    made = []
    for name in names:
        tensor = torch.randn(SIZES[name], generator=g, dtype=torch.float64)
        tensor = tensor.abs() + 0.5 if name == "rstd" else tensor
        form = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        made.append(tensor.to(DEVICE).contiguous(memory_format=form))
    return made


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 5e-324], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_as_in_pytorch(name: str, value: float) -> None:
    arguments, call = CALLS[name]
    for place, argument in enumerate(arguments):
        if argument in ("scale", "rstd") and math.isinf(value):
            continue
        given = tensors(arguments)
        given[place][tuple(size // 2 for size in given[place].shape)] = value
        results = []
        for mode in ("triton", "stock"):
            with override(mode):
                found = call(*(t.clone(memory_format=torch.preserve_format) for t in given))
            results.append(found if isinstance(found, tuple) else (found,))
        for number, (ours, stock) in enumerate(zip(*results, strict=True)):
            if number and argument == "shift" and name.startswith("stem"):
                continue  # all pixels of the channel are equal, and the kernel adds the shift after the pooling
            where = f"result {number} with {value} in {argument}"
            assert torch.equal(ours.isfinite(), stock.isfinite()), f"{where}: finite in other places"
            known = ~ours.isnan() if math.isinf(value) else torch.ones_like(ours, dtype=torch.bool)
            assert torch.allclose(ours[known], stock[known], rtol=1e-9, atol=1e-9, equal_nan=True), where
