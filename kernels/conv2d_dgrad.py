"""Data gradient of the fused convolution by the forward kernel with flipped filters:

    dx = (conv^T(dz, w) + addend) * slope(mask),    dz = dy * slope(gate)

    conv^T(dz, w)[n, c, h, v] = sum over k, i, j, r, s with i*stride - top + r*dilation = h and
                                j*stride - left + s*dilation = v   of   dz[n, k, i, j] * w[k, c, r, s]

With a stride of one this is a convolution of dz with the filters rotated by 180 degrees and inputs and outputs
exchanged. With a larger stride, each phase of the input grid (every stride-th row and column) is a convolution with the
taps that reach it; the phases are written in place, as windows of dx.

`gate` is the output (or input) of the convolution's own activation, and `addend` the gradient of another branch, of all
of x or of a part of it. `mask` is the input x if it determines the slope of the activation that made it: dx is then the
gradient before that activation, and the op that made x need not apply the slope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .conv2d_forward import launch
from .pointwise import launch_act_grad
from .windows import ConvGeometry, map_like, placed


class Phase(NamedTuple):
    """Along one axis, the inputs start, start + stride, ... and the convolution of dz for their gradient."""

    start: int
    taps: tuple[int, ...]  # filter taps in the order of the flipped filter
    padding: int
    dilation: int


def phases(kernel: int, stride: int, before: int, dilation: int) -> list[Phase]:
    """All phases of one axis.

    Input h = start + stride*u contributes to output i = u + (start + before - r*dilation)/stride for every tap r where
    that is an integer: every (stride/g)-th tap, g = gcd(dilation, stride).
    """
    step = stride // math.gcd(dilation, stride)
    found = []
    for start in range(stride):
        taps = [r for r in range(kernel) if (start + before - r * dilation) % stride == 0]
        taps.reverse()
        # The first applied tap is the last of the filter, at the smallest output index.
        padding = -(start + before - taps[0] * dilation) // stride if taps else 0
        found.append(Phase(start, tuple(taps), padding, step * dilation // stride))
    return found


def dgrad(
    dy: Tensor,
    weight: Tensor,
    dx: Tensor,
    geometry: ConvGeometry,
    *,
    gate: Tensor | None = None,
    gate_act: str = "none",
    addend: Tensor | None = None,
    addend_at: Sequence[int] = (0, 0),
    mask: Tensor | None = None,
    mask_act: str = "none",
) -> None:
    """Write dx, a window of the input's shape; see the formula above.

    Args:
        dy: (N, K, OH, OW) window.
        weight: (K, C / groups, R, S).
        geometry: the geometry of the forward.
        gate: window of dy's size that determines the slope of `gate_act`.
        addend: a window of dx's size, or of a part of dx that begins at row and column `addend_at`.
        mask: a window of dx's size that determines the slope of `mask_act`.
    """
    _, _, r, s = weight.shape
    if gate is not None:  # one separate pass; in the product, dy and gate would be loaded once per tap
        dz = map_like(dy)
        launch_act_grad(dy, gate, gate_act, dz)
        dy = dz
    rows = phases(r, geometry.stride_h, geometry.top, geometry.dilation_h)
    cols = phases(s, geometry.stride_w, geometry.left, geometry.dilation_w)
    if addend is not None and geometry.stride != (1, 1):
        addend, addend_at = placed(addend, addend_at, dx.shape[2:]), (0, 0)
    if not all(p.taps for p in (*rows, *cols)):  # inputs that no tap reaches
        if addend is None:
            dx.zero_()
        elif mask is None:
            dx.copy_(addend)
        else:
            launch_act_grad(addend, mask, mask_act, dx)
    for row in rows:
        for col in cols:
            if not row.taps or not col.taps:
                continue

            def window(x: Tensor | None, row: Phase = row, col: Phase = col) -> Tensor | None:
                return None if x is None else x[:, :, row.start :: geometry.stride_h, col.start :: geometry.stride_w]

            target = window(dx)
            assert target is not None
            padding, dilation = (row.padding, 0, col.padding, 0), (row.dilation, col.dilation)
            phase = ConvGeometry.of((1, 1), padding, dilation, geometry.groups)
            options = {"residual_at": addend_at, "mask_act": mask_act, "taps": (row.taps, col.taps)}
            launch(dy, weight, target, phase, "none", residual=window(addend), mask=window(mask), **options)
