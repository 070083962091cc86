"""Windows: rectangles of NHWC buffers that kernels read and write in place.

Every map is a tensor of shape (N, C, H, W) with adjacent channels in memory (stride 1). Rows and pixels may be strided,
so a part of a larger buffer (an interior with a margin, one phase of a strided grid) is also a window and is never
copied. Padding is the rows and columns of zeros around the window where the image ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import dot_precision
from .torch_private import FakeTensor
from .triton_private import ROUNDS_TO_TF32, TensorDescriptor, interpreting
from .tuning import has_descriptors


class ConvGeometry(NamedTuple):
    """Geometry of a convolution or pooling: nine integers, which registered ops take as one list.

    Tap (r, s) of output (i, j) is at row i*stride_h - top + r*dilation_h and column j*stride_w - left + s*dilation_w.

    Attributes:
        top, bottom, left, right: rows and columns of zeros (-inf for a pooling) around the map.
    """

    stride_h: int = 1
    stride_w: int = 1
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1

    @classmethod
    def of(
        cls,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0, 0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> ConvGeometry:
        """The geometry from pairs (height, width) and padding (top, bottom, left, right)."""
        return cls(*stride, *padding, *dilation, groups)

    @property
    def stride(self) -> tuple[int, int]:
        return self.stride_h, self.stride_w

    @property
    def padding(self) -> tuple[int, int, int, int]:
        return self.top, self.bottom, self.left, self.right

    @property
    def dilation(self) -> tuple[int, int]:
        return self.dilation_h, self.dilation_w

    @property
    def form(self) -> tuple[int | bool, ...]:
        """The part that affects the time: uneven padding costs stock a copy, whatever its amount."""
        uneven = self.top != self.bottom or self.left != self.right
        return *self.stride, *self.dilation, self.groups, uneven

    def output(self, x: Tensor, kernel: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the output for a map and a filter of (height, width)."""
        return (
            output_size(x.shape[2], kernel[0], self.stride_h, self.dilation_h, self.top, self.bottom),
            output_size(x.shape[3], kernel[1], self.stride_w, self.dilation_w, self.left, self.right),
        )

    def padded(self, x: Tensor, value: float = 0.0) -> Tensor:
        """A copy of the map with its padding."""
        return F.pad(x, [self.left, self.right, self.top, self.bottom], value=value) if any(self.padding) else x

    def is_pixelwise(self, kernel: Sequence[int]) -> bool:
        """Whether each output of a filter of (height, width) reads the one pixel at its position."""
        return tuple(kernel) == (1, 1) == self.stride and not any(self.padding)

    def is_depthwise(self, weight: Tensor) -> bool:
        """Whether each channel has a separate filter."""
        return self.groups > 1 and weight.shape[0] == self.groups and weight.shape[1] == 1


def nhwc(x: Tensor) -> Tensor:
    """`x` if its channels are adjacent in memory, else a channels-last copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last)


def empty_map(n: int, c: int, h: int, w: int, like: Tensor) -> Tensor:
    """An uninitialised channels-last map."""
    return torch.empty(n, h, w, c, dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)


def map_like(x: Tensor, dtype: torch.dtype | None = None, margin: Sequence[int] | None = None) -> Tensor:
    """An uninitialised channels-last map of x's size, with a margin of rows above and columns to the left."""
    (n, c, h, w), (above, left) = x.shape, margin or (0, 0)
    return torch.empty(n, h + above, w + left, c, dtype=dtype or x.dtype, device=x.device).permute(0, 3, 1, 2)


def without_margin(whole: Tensor, margin: Sequence[int] | None) -> Tensor:
    """The part of a map below and to the right of its margin."""
    return whole if margin is None else whole[:, :, margin[0] :, margin[1] :]


def placed(part: Tensor, at: Sequence[int], size: Sequence[int]) -> Tensor:
    """A map of `size` with `part` from row and column `at` on and zeros around it; `part` if it has that size."""
    if tuple(part.shape[2:]) == tuple(size):
        return part
    whole = empty_map(part.shape[0], part.shape[1], size[0], size[1], like=part).zero_()
    whole[:, :, at[0] : at[0] + part.shape[2], at[1] : at[1] + part.shape[3]] = part
    return whole


def output_size(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> int:
    """Length of a window op's output along one axis."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def can_describe(*tensors: Tensor | None) -> bool:
    """Whether tensor descriptors can address these maps or matrices.

    They must be aligned to 16 bytes, with a dense last dimension and without overlapping elements.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        shape, strides, itemsize = tensor.shape, tensor.stride(), tensor.element_size()
        last = 1 if len(shape) == 4 else len(shape) - 1
        if (
            0 in shape
            or strides[last] != 1
            or shape[last] * itemsize < 16
            or any(
                strides[d] * itemsize % 16 or not strides[d] for d in range(len(shape)) if d != last and shape[d] > 1
            )
            or (tensor.device.type != "meta" and not isinstance(tensor, FakeTensor) and tensor.data_ptr() % 16)
        ):
            return False
    return True


def describe(x: Tensor, box: Sequence[int], operand: bool = False) -> TensorDescriptor:
    """A descriptor of a map's NHWC view; reads outside return zero, writes outside are dropped.

    Args:
        x: (N, C, H, W) map, or an (R, C) matrix.
        box: the block that one load or store moves, (1, rows, columns, channels) or (rows, columns).
        operand: whether it is an operand of products: float32 is then rounded if products are in TF32.
    """
    view = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    shape = view.shape
    # A dimension of size one may have any stride; descriptors want a multiple of 16 bytes.
    unit = 16 // view.element_size()
    strides = [unit if n == 1 and s % unit else s for s, n in zip(view.stride(), shape, strict=True)]
    strides[-1] = 1
    rounded = operand and ROUNDS_TO_TF32 and dot_precision(x.dtype) == "tf32" and not interpreting()
    return TensorDescriptor(view, list(shape), strides, list(box), **({"round_f32_to_tf32": True} if rounded else {}))


def is_dense(x: Tensor | None) -> bool:
    """Whether a map is dense: pixels, rows and images without gaps."""
    return x is None or x.is_contiguous(memory_format=torch.channels_last)


def as_one_row(x: Tensor) -> Tensor:
    """A dense map with all pixels in one row."""
    return x.permute(0, 2, 3, 1).reshape(1, 1, -1, x.shape[1]).permute(0, 3, 1, 2)


def phases_along(x: Tensor, dim: int, stride: int, before: int) -> tuple[Tensor, Tensor, int, int]:
    """The rows or columns that even and odd taps read, and the coordinate shift of each.

    With a stride of two, column 2j - before + s has the parity of `before` for even s. The phase that begins at column
    e holds it at (2j - before + s - e) / 2 = j + s/2 - (before + e)/2.
    """
    if stride == 1:
        return x, x, -before, 0
    even = before % 2
    odd = 1 - even
    every = [slice(None)] * dim
    # Kernels add (s - 1)/2 for odd taps: (2j - before + s - odd)/2 = j + (s - 1)/2 + (1 - before - odd)/2.
    windows = x[(*every, slice(even, None, 2))], x[(*every, slice(odd, None, 2))]
    return *windows, -(before + even) // 2, (1 - before - odd) // 2


class Phases(NamedTuple):
    """The windows of a map that the taps of a convolution with strides of one or two read.

    Attributes:
        windows: of even rows and columns, odd columns, odd rows, and odd rows and columns; for a stride of one the map
            itself, and no others are read.
        shifts: offsets of the first taps of even rows, odd rows, even and odd columns from an output.
    """

    windows: tuple[Tensor, Tensor, Tensor, Tensor]
    shifts: tuple[int, int, int, int]

    @classmethod
    def of(cls, x: Tensor, geometry: ConvGeometry) -> Phases:
        *rows, row_even, row_odd = phases_along(x, 2, geometry.stride_h, geometry.top)
        found, shifts = [], (0, 0)
        for window in rows:
            *cols, col_even, col_odd = phases_along(window, 3, geometry.stride_w, geometry.left)
            found += cols
            shifts = col_even, col_odd
        return cls(tuple(found), (row_even, row_odd, *shifts))

    def distinct(self) -> dict[int, Tensor]:
        """The different windows, by their identity."""
        return {id(window): window for window in self.windows}

    def describe(self, box: Sequence[int]) -> list[TensorDescriptor]:
        """Descriptors of operands, one for each different window."""
        made = {key: describe(window, box, operand=True) for key, window in self.distinct().items()}
        return [made[id(window)] for window in self.windows]


def without_steps(x: Tensor, geometry: ConvGeometry, kernel: Sequence[int]) -> tuple[Tensor, ConvGeometry]:
    """The map without the rows or columns that a strided filter of one row or column skips, and its geometry."""
    if kernel[0] == 1 < geometry.stride_h and geometry.top == 0:
        x, geometry = x[:, :, :: geometry.stride_h], geometry._replace(stride_h=1)
    if kernel[1] == 1 < geometry.stride_w and geometry.left == 0:
        x, geometry = x[..., :: geometry.stride_w], geometry._replace(stride_w=1)
    return x, geometry


def can_describe_product(x: Tensor, geometry: ConvGeometry, *others: Tensor | None) -> bool:
    """Whether descriptors can address the operands of a convolution as a matrix product, x by its phases."""
    along = zip(geometry.stride, geometry.dilation, x.shape[2:], strict=True)
    return (
        has_descriptors(x.device)
        and geometry.groups == 1
        and all(stride == 1 or (stride == 2 and dilation % 2 == 1 and size > 1) for stride, dilation, size in along)
        and can_describe(*({id(x): x} | Phases.of(x, geometry).distinct()).values(), *others)
    )
