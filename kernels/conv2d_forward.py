"""Fused convolution in one pass over memory:

    y = slope(mask) * act(conv(x, w) + shift + residual)

    conv(x, w)[n, k, i, j] = sum over r, s, c of  x[n, c, i*stride - top + r*dilation, j*stride - left + s*dilation]
                                                  * w[k, c, r, s]

As a matrix product: rows are output pixels, columns the output channels of a group, depth is taps x input channels.
The forward of a network uses act, shift and residual. The data gradient is the same product with flipped filters
(`conv2d_dgrad.py`); it uses `mask` to apply the slope of the activation that made x before dx is written.

If z is computed again instead of stored, the kernel writes its gradient and not z:

    y = mask * slope(z),    z = conv(x, w) + shift + residual,    mask a gradient of act(z)

For a following BatchNorm in training, the epilogue also returns mean and squared deviations of each tile's rounded
output: the statistics then need no separate pass over memory.

`conv2d_kernels.py` has the kernels: one by descriptors, one by pointers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from .conv2d_kernels import FilterFlip, Steps, conv2d_descriptor_kernel, conv2d_pointer_kernel, product_options
from .dtypes import sum_dtype
from .moments import merge_parts
from .stream import as_map, dense
from .tuning import Config, matmul_config, register_limit, roomy_registers
from .windows import ConvGeometry, Phases, as_one_row, can_describe_product, describe, is_dense, placed, without_steps

# Activations whose value and slope need neither exp nor erf.
CHEAP = frozenset({"none", "relu", "relu6", "hardswish", "gradient"})

Taps = tuple[Sequence[int], Sequence[int]]  # taps along a filter's rows and columns


def flipped_filters(weight: Tensor, groups: int, taps: Taps) -> Tensor:
    """Filters with inputs and outputs exchanged and the given taps, which descend in equal steps.

    Args:
        weight: (K, C / groups, R, S).

    Returns:
        (C, K / groups, taps, taps) in channels-last memory.
    """
    k, depth, _, _ = weight.shape
    rows, cols = taps
    # Slices and one flip: index lists would cost several kernels.
    w = weight[:, :, _ascending(rows), _ascending(cols)].flip(2, 3)
    if groups > 1:
        w = w.reshape(groups, k // groups, depth, len(rows), len(cols)).transpose(1, 2)
        w = w.reshape(groups * depth, k // groups, len(rows), len(cols))
    else:
        w = w.transpose(0, 1)
    return w.contiguous(memory_format=torch.channels_last)


def _ascending(taps: Sequence[int]) -> slice:
    return slice(taps[-1], taps[0] + 1, taps[0] - taps[1] if len(taps) > 1 else 1)


def filter_matrix(weight: Tensor) -> Tensor:
    """Filters (K, C, R, S) as rows, (K, R x S x C)."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    geometry: ConvGeometry,
    act: str,
    *,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_at: Sequence[int] = (0, 0),
    z: Tensor | None = None,
    mask: Tensor | None = None,
    mask_act: str = "none",
    moments: bool = False,
    taps: Taps | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Write y, and z if given (the input of the activation); see the formula above.

    With `moments`, it returns mean and sum of squared deviations of each channel of y, like `moments.moments(y)`: (K,)
    in float32 (float64 for float64).

    Args:
        x: (N, C, H, W) window.
        weight: (K, C / groups, R, S) in channels-last memory.
        y: (N, K, OH, OW) window to be written.
        shift: (K,).
        z, mask: windows of y's size. `mask_act` is the activation whose slope follows from `mask`; with "gradient",
            `mask` is the gradient of act(z).
        residual: a window of y's size, or of a part of y that begins at row and column `residual_at`.
        taps: the taps of `weight`, the filters of another convolution, to flip into w: see `flipped_filters`.
    """
    if taps is not None and (
        x.dtype.itemsize != 2 or geometry.groups > 1
    ):  # tensor cores cannot transpose other dtypes
        weight, taps = flipped_filters(weight, geometry.groups, taps), None
    filters, depth, r, s = weight.shape if taps is None else (*weight.shape[1::-1], *map(len, taps))
    images, _, lines, run = y.shape
    pixels = images * lines * run
    if not y.numel():
        none = y.new_zeros(filters, dtype=sum_dtype(y.dtype))
        return (none, none.clone()) if moments else None
    x, geometry = without_steps(x, geometry, (r, s))
    maps = (x, y, residual, z, mask)
    matrix = filter_matrix(weight)
    described = can_describe_product(x, geometry, y, residual, z, mask, matrix)
    whole = residual is None or residual.shape == y.shape
    if described and whole and geometry.is_pixelwise((r, s)) and all(map(is_dense, maps)):
        x, y, residual, z, mask = (None if t is None else as_one_row(t) for t in maps)  # pyright: ignore
        lines, run = 1, pixels
    config = matmul_config(
        x.device,
        x.dtype,
        *((y.shape[0], lines, run) if described else (1, 1, pixels)),
        filters // geometry.groups,
        depth,
        described,
        1 + sum(t is not None for t in (residual, z, mask)),
        r * s,
        not {act, mask_act} <= CHEAP,
        moments,
    )
    flip = None
    if taps is not None and config.form == "descriptor":
        flip = FilterFlip.of(*taps, weight)
    elif taps is not None:
        matrix = filter_matrix(flipped_filters(weight, geometry.groups, taps))
    options = {"ACT": act, "MASK": mask_act, **product_options((r, s), config, x.dtype)}
    if config.form == "descriptor" and config.num_warps == 8 and config.block_n <= 128 and mask is not None:
        # With one more register, the assembler's choice with a residual, a multiprocessor runs one block, not two.
        options |= register_limit(x.device, 128 if residual is not None else None)
    elif config.form == "descriptor" and config.block_n <= 64 and mask is not None and residual is not None:
        options |= roomy_registers(x.device, 128)
    if residual is not None and config.form != "descriptor":
        residual = placed(residual, residual_at, y.shape[2:])
    run_form = _by_descriptors if config.form == "descriptor" else _by_pointers
    maps = residual, tuple(residual_at), mask, y, z
    work = _Work(x, matrix, *maps, dense(shift), depth, flip, geometry, config, moments, options)
    return run_form(work)


class _Work(NamedTuple):
    """The arguments of both forms of the kernel; see `launch`."""

    x: Tensor
    matrix: Tensor  # filters [K, taps x channels], or the filters to flip
    residual: Tensor | None
    residual_at: tuple[int, ...]
    mask: Tensor | None
    y: Tensor
    z: Tensor | None
    shift: Tensor | None
    depth: int  # input channels of a group
    flip: FilterFlip | None
    geometry: ConvGeometry
    config: Config
    moments: bool
    options: dict[str, Any]

    def sums(self, tiles: int) -> Tensor | None:
        """An empty tensor for mean and squared deviations of each tile and filter, if wanted."""
        if not self.moments:
            return None
        return torch.empty(2, tiles, self.y.shape[1], dtype=sum_dtype(self.y.dtype), device=self.y.device)


def _by_descriptors(work: _Work) -> tuple[Tensor, Tensor] | None:
    config, geometry, x = work.config, work.geometry, work.x
    images, filters, lines, run = work.y.shape
    rows, cols = config.rows, config.block_m // config.rows
    box_x, box_y = [1, rows, cols, config.block_k], [1, rows, cols, config.block_n // config.parts]
    box_w = [config.block_n, config.block_k] if work.flip is None else [config.block_k, config.block_n]
    phases = Phases.of(x, geometry)
    down, across = triton.cdiv(lines, rows), triton.cdiv(run, cols)
    sums = work.sums(images * down * across)
    conv2d_descriptor_kernel[(images * down * across * triton.cdiv(filters, config.block_n),)](
        *phases.describe(box_x),
        describe(work.matrix, box_w, operand=True),
        *(None if t is None else describe(t, box_y) for t in (work.residual, work.mask, work.y, work.z)),
        work.shift,
        *((None, None) if sums is None else sums),
        lines,
        run,
        filters,
        down,
        across,
        geometry.dilation_h,
        *phases.shifts,
        *work.residual_at,
        CIN=work.depth,
        STEPS=Steps.of(work.options["P"][:2], geometry, work.flip),
        **work.options,
    )
    return None if sums is None else merge_parts(sums, (rows, cols), (lines, run))


def _by_pointers(work: _Work) -> tuple[Tensor, Tensor] | None:
    config, geometry, x = work.config, work.geometry, work.x
    images, filters, lines, run = work.y.shape
    pixels, groups = images * lines * run, geometry.groups
    if pixels + config.block_m >= 2**31:
        raise ValueError(
            f"conv2d: an output of {images} x {lines} x {run} pixels is too large for the pointer form; "
            "use smaller tiles"
        )
    tiles = triton.cdiv(pixels, config.block_m)
    sums = work.sums(tiles)
    few, matrix = None, work.matrix
    if config.form == "columns":  # padded with zeros to whole steps: filters are read in long words
        few, matrix = work.depth, F.pad(matrix, [0, -matrix.shape[1] % config.block_k])
    conv2d_pointer_kernel[(tiles * triton.cdiv(filters // groups, config.block_n), groups)](
        as_map(x),
        matrix,
        *map(as_map, (work.residual, work.mask, work.y, work.z)),
        work.shift,
        *((None, None) if sums is None else sums),
        x.shape[0],
        *x.shape[2:],
        *work.y.shape[2:],
        work.depth,
        filters // groups,
        geometry.top,
        geometry.left,
        *geometry.stride,
        *geometry.dilation,
        FEW=few,
        **work.options,
    )
    return None if sums is None else merge_parts(sums, (1, config.block_m), (1, pixels))
