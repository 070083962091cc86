"""Vectors that are columns of something else, as autograd makes them: kernels read numbers that lie side by side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_checks import DEVICE, random_map
from torch import Tensor

from gigamorph.kernels import batch_norm, choice
from gigamorph.kernels.conv2d import conv2d_forward, conv2d_moments
from gigamorph.kernels.layer_norm import layer_norm, layer_norm_backward
from gigamorph.kernels.moments import moments_backward
from gigamorph.kernels.stem import stem
from gigamorph.kernels.windows import ConvGeometry

C = 16
Vector = Callable[[int], Tensor]


def maps(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [random_map(1, C, 5, 9, torch.float32, g) for _ in range(count)]


def weight(*shape: int) -> Tensor:
    return random_map(*shape, torch.float32, torch.Generator().manual_seed(1))


OPS: dict[str, Callable[[Vector], object]] = {
    "moments_backward": lambda v: moments_backward(maps(1)[0], v(0), v(1), v(2), 45, None),
    "normalize_act": lambda v: batch_norm.normalize_act(maps(1)[0], v(0), v(1), v(2), v(3), None, "relu"),
    "normalize_act_gradients": lambda v: batch_norm.normalize_act_gradients(
        *maps(2), v(0), v(1), v(2), v(3), None, "relu", False
    ),
    "conv2d": lambda v: conv2d_forward(
        maps(1)[0], weight(C, C, 1, 1), v(0), None, ConvGeometry(), "relu", False, (0, 0)
    ),
    "depthwise": lambda v: conv2d_forward(
        maps(1)[0], weight(C, 1, 3, 3), v(0), None, ConvGeometry.of(groups=C), "relu", False, (0, 0)
    ),
    "conv2d_moments": lambda v: conv2d_moments(maps(1)[0], weight(C, C, 1, 1), v(0), ConvGeometry(), (0, 0)),
    "layer_norm": lambda v: layer_norm(maps(1)[0], v(0), v(1), 1e-5),
    "layer_norm_backward": lambda v: layer_norm_backward(*maps(2), v(0), 1e-5),
    "stem": lambda v: stem(maps(1)[0], weight(C, C, 3, 3), v(0), ConvGeometry(), [1, 1, 1, 1], "relu", False)[0],
}


@pytest.mark.parametrize("op", OPS)
def test_columns_are_read_as_what_they_hold(op: str) -> None:
    columns = torch.rand(C, 4, generator=torch.Generator().manual_seed(2)).add(0.5).to(DEVICE)
    with choice.override("triton"):
        found, wanted = (OPS[op](lambda n, t=t: t[n]) for t in (columns.t(), columns.t().contiguous()))
    as_list = lambda made: [made] if isinstance(made, Tensor) else list(made)  # noqa: E731
    for one, other in zip(as_list(found), as_list(wanted), strict=True):
        assert torch.equal(one, other)
