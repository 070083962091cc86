"""Fused weight gradient of a convolution, added to the caller's buffers:

    dw[k, c, r, s] += sum over n, i, j of  dz[n, k, i, j] * x[n, c, i*stride - top + r*dilation,
                                                                    j*stride - left + s*dilation]
    dshift[k]      += sum over n, i, j of  dz[n, k, i, j],          dz = dy * slope(gate)

As a matrix product: output channels by taps x input channels, summed over output pixels. In products dz is rounded to
the dtype of dy, as if it had been stored; its sum uses unrounded values.

Buffers are float32 (float64 for float64 maps). The pixels are split over programs. A split sums at most 64k pixels (the
rounding of a longer float32 sum would be visible) and is written separately; a second kernel adds all splits to the
buffers in order. There are no atomics: two runs agree bit by bit.

`conv2d_wgrad_kernels.py` has the kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .conv2d_kernels import Steps, product_options
from .conv2d_wgrad_kernels import add_splits_kernel, wgrad_descriptor_kernel, wgrad_pointer_kernel
from .dtypes import sum_dtype
from .stream import as_map
from .tuning import Config, capability, programs_at_once, register_limit, split_count, splits_blocks, wgrad_config
from .windows import ConvGeometry, as_one_row, can_describe_product, describe, is_dense, phases_along, without_steps


def launch(
    dw: Tensor,
    dshift: Tensor | None,
    x: Tensor,
    dy: Tensor,
    gate: Tensor | None,
    gate_act: str,
    geometry: ConvGeometry,
) -> None:
    """Add the gradients to dw, and to dshift if given; see the formula above.

    Args:
        dw: (K, C / groups, R, S) in channels-last memory, float32 (float64 for float64 maps).
        dshift: (K,) of the same dtype.
        x: (N, C, H, W) window.
        dy: (N, K, OH, OW) window.
        gate: window of dy's size that determines the slope of `gate_act`, which is "none" without a gate.
    """
    filters, depth, r, s = dw.shape
    groups, pixels = geometry.groups, dy.shape[0] * dy.shape[2] * dy.shape[3]
    _check_buffers(dw, dshift, x)
    if not dy.numel() or not (x.numel() or dshift is not None):
        return
    x, geometry = without_steps(x, geometry, (r, s))
    # A program of the descriptor form holds the accumulators of all taps of a row.
    described = s <= 12 and can_describe_product(x, geometry, dy, gate)
    maps = (x, dy, gate)
    if described and geometry.is_pixelwise((r, s)) and all(map(is_dense, maps)):
        x, dy, gate = (None if t is None else as_one_row(t) for t in maps)  # pyright: ignore
    config = wgrad_config(
        x.device,
        x.dtype,
        dy.shape[3] if described else pixels,
        filters // groups,
        depth if described else r * s * depth,
        s if described else 1,
        described,
        "none" if gate is None else gate_act,
    )
    if config.form != "descriptor" and pixels + config.block_k >= 2**31:
        raise ValueError(f"conv2d_wgrad: {pixels} pixels are too many for the pointer form; use smaller tiles")
    cut = _Cut.of(dw, dshift, x, dy, gate, geometry, config)
    part = None if cut.splits == 1 else torch.empty(cut.splits, cut.length, dtype=dw.dtype, device=dw.device)
    shifts = dshift if part is None or dshift is None else part[:, dw.numel() :]
    options = {
        "GATE": "none" if gate is None else gate_act,
        "ADD": part is None,
        **product_options((r, s), config, x.dtype),
        # By default, ptxas spills a few addresses, of wide elements or on sm_100, to fit one more program.
        **register_limit(x.device, 255 if x.element_size() > 2 or capability(x.device) >= 100 else None),
    }
    run = _by_descriptors if config.form == "descriptor" else _by_pointers
    run(_Work(dw if part is None else part, shifts, x, dy, gate, geometry, config, cut, depth, options))
    if part is not None:
        _add_splits(part, dw, dshift)


def _check_buffers(dw: Tensor, dshift: Tensor | None, x: Tensor) -> None:
    held = sum_dtype(x.dtype)
    if dw.dtype != held or (dshift is not None and dshift.dtype != held):
        raise ValueError(f"conv2d_wgrad: buffers of gradients of {x.dtype} maps must be {held}")
    if not dw.permute(0, 2, 3, 1).is_contiguous() or (dshift is not None and not dshift.is_contiguous()):
        raise ValueError("conv2d_wgrad: the buffers must be dense, and dw in channels-last memory")


def _add_splits(part: Tensor, dw: Tensor, dshift: Tensor | None) -> None:
    """Add the gradients of all splits [splits, elements] to the buffers, in order."""
    splits, length = part.shape
    block, rows = splits_blocks(splits)
    add_splits_kernel[(triton.cdiv(length, block),)](
        part, dw, dshift, dw.numel(), length, splits, BLOCK=block, ROWS=rows
    )


class _Cut(NamedTuple):
    """Partition of the work into programs.

    Attributes:
        length: elements of the gradients.
        tiles: programs per split.
        segments, total: blocks of pixels per run of pixels, and in total.
        splits, share: parts of the pixels, and blocks per part.
    """

    length: int
    tiles: int
    segments: int
    total: int
    splits: int
    share: int

    @classmethod
    def of(
        cls,
        dw: Tensor,
        dshift: Tensor | None,
        x: Tensor,
        dy: Tensor,
        gate: Tensor | None,
        geometry: ConvGeometry,
        config: Config,
    ) -> _Cut:
        (filters, depth, r, s), groups = dw.shape, geometry.groups
        pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
        by_descriptors = config.form == "descriptor"
        columns, run = (depth, dy.shape[3]) if by_descriptors else (r * s * depth, pixels)
        length = dw.numel() + (0 if dshift is None else filters)
        tiles = triton.cdiv(filters // groups, config.block_m) * triton.cdiv(columns, config.block_n)
        tiles *= r if by_descriptors else groups
        segments = triton.cdiv(run, config.block_k)
        total = segments * (pixels // run)
        taps = s if by_descriptors else 1
        tile_bytes = (config.block_m * (1 if gate is None else 2) + taps * config.block_n) * config.block_k
        sizes = tile_bytes * x.element_size(), length * dw.element_size()
        splits = split_count(tiles, total, config.block_k, *sizes, programs_at_once(config.num_warps))
        return cls(length, tiles, segments, total, splits, triton.cdiv(total, splits))


class _Work(NamedTuple):
    """The arguments of both forms of the kernel; see `launch`.

    `dw` and `dshift` are the buffers, or the parts of all splits; `depth` is the number of input channels of a group.
    """

    dw: Tensor
    dshift: Tensor | None
    x: Tensor
    dy: Tensor
    gate: Tensor | None
    geometry: ConvGeometry
    config: Config
    cut: _Cut
    depth: int
    options: dict[str, Any]


def _by_descriptors(work: _Work) -> None:
    dw, dshift, x, dy, gate, geometry, config, cut, depth, options = work
    box_x, box_dy = [1, 1, config.block_k, config.block_n], [1, 1, config.block_k, config.block_m]
    even, odd, shift_even, shift_odd = phases_along(x, 3, geometry.stride_w, geometry.left)
    wgrad_descriptor_kernel[(cut.tiles * cut.splits,)](
        describe(even, box_x, operand=True),
        describe(odd, box_x, operand=True),
        describe(dy, box_dy, operand=gate is None),
        None if gate is None else describe(gate, box_dy),
        dw,
        dshift,
        cut.length,
        dy.shape[2],
        dy.shape[1],
        depth,
        cut.segments,
        cut.total,
        cut.share,
        geometry.top,
        geometry.dilation_h,
        shift_even,
        shift_odd,
        STEPS=Steps(*geometry.stride, geometry.dilation_w),
        **options,
    )


def _by_pointers(work: _Work) -> None:
    dw, dshift, x, dy, gate, geometry, _, cut, depth, options = work
    wgrad_pointer_kernel[(cut.tiles * cut.splits,)](
        *map(as_map, (x, dy, gate)),
        dw,
        dshift,
        cut.length,
        *x.shape[2:],
        *dy.shape[2:],
        dy.shape[0] * dy.shape[2] * dy.shape[3],
        dy.shape[1] // geometry.groups,
        geometry.groups,
        cut.share,
        geometry.top,
        geometry.left,
        *geometry.stride,
        *geometry.dilation,
        CIN=depth,
        **options,
    )
