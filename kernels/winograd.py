"""3 x 3 convolutions with stride 1 on the CPU by Winograd's F(2 x 2, 3 x 3) (`winograd.cpp`), in float32.

    y = act(conv(x, w) + bias + residual)

A block of 2 x 2 outputs takes 16 products instead of 36, on channels-last maps, with weights that are transformed once
(`pack`). The time is 0.58 to 0.88 of that of oneDNN's convolution. Its sums are shorter, so its error is smaller: 0.71
to 0.79 of oneDNN's distance to float64. Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.

An infinity or NaN in a block of 4 x 4 inputs reaches all outputs of the block, but in a convolution only those that
read it. If an output is not finite, `conv3x3` returns None, and the caller uses a convolution.

The library is built once if there is a C++ compiler; otherwise `missing` returns the reason.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpp import built

log = logging.getLogger(__name__)

_OPTIONS = {"AVX2": ("-mavx2", "-mfma"), "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mfma")}
_CHANNELS = 16  # channels and filters must be multiples of this
_LEAST_CHANNELS = 32  # below, the transforms cost more than the products save
_LEAST_PIXELS = 2048  # of an output, all tiles together: below, packing costs more

Padding = tuple[int, int, int, int]  # top, bottom, left, right


class _Map(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "images height width channels image row pixel".split()]

    @classmethod
    def of(cls, x: Tensor) -> _Map:
        n, c, h, w = x.shape
        image, _, row, pixel = x.stride()
        return cls(n, h, w, c, image, row, pixel)


class _Library:
    def __init__(self, path: Path):
        lib = ctypes.CDLL(str(path))
        whole, address, threads = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        self.packed_floats = lib.winograd_packed_floats
        self.scratch_floats = lib.winograd_scratch_floats
        for sizes in (self.packed_floats, self.scratch_floats):
            sizes.argtypes, sizes.restype = [whole, whole], whole
        self.pack, self.conv3x3 = lib.winograd_pack, lib.winograd_conv3x3
        self.pack.argtypes, self.pack.restype = [address, *[whole] * 6, address, threads], None
        types = [address, _Map, whole, whole, *[address] * 3, _Map, threads, address, _Map, *[address] * 2, threads]
        self.conv3x3.argtypes, self.conv3x3.restype = types, ctypes.c_bool


@functools.cache
def _found() -> _Library | str:
    """The library, or why there is none."""
    options = _OPTIONS.get(torch.backends.cpu.get_cpu_capability())
    if options is None or not sys.platform.startswith("linux"):
        return "it needs Linux and a processor with AVX2"
    threads = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))  # a second thread pool would compete
    linking = [str(threads[0])] if threads else ["-fopenmp"]
    try:
        return _Library(built(Path(__file__).with_suffix(".cpp"), ["-O3", "-fopenmp", *options], linking))
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("convolutions use only oneDNN: %s", error)
        return str(error)


@functools.cache
def _is_correct() -> bool:
    """Whether the library computes correct results on this processor."""
    x, weight = (torch.linspace(-1, 1, n).mul(50).sin() for n in (32 * 35, 48 * 32 * 9))
    x, weight = x.reshape(1, 5, 7, 32).permute(0, 3, 1, 2), weight.reshape(48, 32, 3, 3)
    y = conv3x3(x, pack(weight), 48)
    return y is not None and torch.allclose(y, F.conv2d(x, weight, padding=1), atol=1e-4)


def missing() -> str | None:
    """The reason why the library is not available; None if it is. The first call builds it in a second or two."""
    found = _found()
    if isinstance(found, str):
        return found
    return None if _is_correct() else "it computes wrong results on this processor"


def pays(weight: tuple[int, ...], pixels: int) -> bool:
    """Whether a convolution with stride 1 is faster with it.

    Args:
        weight: the shape (filters, channels, rows, columns).
        pixels: pixels of the output in one pass.
    """
    filters, channels, *sides = weight
    whole = channels % _CHANNELS == filters % _CHANNELS == 0
    return sides == [3, 3] and whole and min(channels, filters) >= _LEAST_CHANNELS and pixels >= _LEAST_PIXELS


def conv3x3(
    x: Tensor,
    packed: Tensor,
    filters: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    pad: Padding = (1, 1, 1, 1),
    margin: tuple[int, int] = (0, 0),
) -> Tensor | None:
    """`act(F.conv2d(F.pad(x, pad), w, bias) + residual)`, (N, filters, H', W') in channels-last memory.

    Args:
        x: (N, channels, H, W), float32, channels-last or a window of a channels-last map.
        packed: the result of `pack`.
        bias: (filters,).
        residual: like the output, in any memory order.
        relu: whether the activation is ReLU; otherwise there is none.
        pad: rows and columns of zeros at the top, bottom, left and right.
        margin: rows above and columns to the left of the output to leave free in its memory.

    Returns:
        The output; None if it is not finite before the activation.
    """
    library, x = _library(), _in_rows(x)
    residual = None if residual is None else _in_rows(residual)
    bias = None if bias is None else bias.contiguous()
    n, channels, height, width = x.shape
    top, bottom, left, right = pad
    shape = n, filters, height + top + bottom - 2, width + left + right - 2
    y = empty_with_room(x, shape, margin)
    if residual is not None and residual.shape != y.shape:
        raise ValueError(f"the residual {tuple(residual.shape)} must have the shape of the output, {tuple(y.shape)}")
    threads = torch.get_num_threads()
    scratch = x.new_empty(threads * library.scratch_floats(channels, filters))
    if x.is_meta:
        return y
    zeros = x.new_zeros(channels)
    bias_at, residual_at = (0 if t is None else t.data_ptr() for t in (bias, residual))
    output_map, like = (_Map.of(y), _Map.of(y if residual is None else residual))
    read = x.data_ptr(), _Map.of(x), top, left, packed.data_ptr(), bias_at, residual_at, like
    written = int(relu), y.data_ptr(), output_map, zeros.data_ptr(), scratch.data_ptr(), threads
    return y if library.conv3x3(*read, *written) else None


def _library() -> _Library:
    library = _found()
    if isinstance(library, str):
        raise RuntimeError(f"Winograd convolutions are not available: {library}")
    return library


def pack(weight: Tensor, for_input: bool = False) -> Tensor:
    """The transformed weights for `conv3x3`.

    Args:
        weight: (filters, channels, 3, 3), float32, in any memory order.
        for_input: whether they are for the gradient of the input: filters and channels are exchanged, and taps rotated
            by 180 degrees.
    """
    library = _library()
    filters, channels = weight.shape[:2]
    by_filter, by_channel, by_row, by_column = weight.stride()
    start = 0 if weight.is_meta else weight.data_ptr()
    if for_input:
        start += 2 * (by_row + by_column) * weight.itemsize
        filters, channels, by_filter, by_channel = channels, filters, by_channel, by_filter
        by_row, by_column = -by_row, -by_column
    packed = weight.new_empty(library.packed_floats(channels, filters))
    if weight.is_meta:
        return packed
    strides = by_filter, by_channel, by_row, by_column
    library.pack(start, filters, channels, *strides, packed.data_ptr(), torch.get_num_threads())
    return packed


def empty_with_room(like: Tensor, shape: tuple[int, int, int, int], margin: tuple[int, int]) -> Tensor:
    """An uninitialised channels-last map with a margin of rows above it and columns to the left in memory."""
    n, channels, height, width = shape
    above, before = margin
    whole = n, channels, height + above, width + before
    buffer = torch.empty(whole, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return buffer[:, :, above:, before:]


def _in_rows(x: Tensor) -> Tensor:
    """The map itself if its channels are adjacent in memory, else a channels-last copy."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)
