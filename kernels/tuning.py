"""Launch configurations of kernels (tiles, warps, stages, splits), computed from shape, dtype and chip."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from .activations import MASKS
from .precision import dot_precision
from .triton_private import HAS_DESCRIPTORS, compile_target, interpreting

# Most dynamic shared memory a block may have, bytes, by capability.
SHARED_LIMIT = dict.fromkeys((0, 75), 65_536) | dict.fromkeys((80, 87), 166_912)
SHARED_LIMIT |= dict.fromkeys((86, 89, 120, 121), 101_376) | dict.fromkeys((90, 100, 103), 232_448)
# Number of multiprocessors assumed for every chip, so that results do not depend on the chip.
PROCESSORS = 132


@functools.cache
def _device_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """10 * major + minor of the NVIDIA GPU that kernels on `device` are compiled for; 0 for other vendors.

    It is 90 in the interpreter, and 0 without a GPU, so that plans work there too.
    """
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return 0 if torch.version.hip else _device_capability(index)  # AMD has other numbers, such as (9, 4)
    if interpreting():
        return 90
    target = compile_target()
    return target.arch if target is not None and target.backend == "cuda" else 0


def has_descriptors(device: torch.device) -> bool:
    """Whether the chip has a tensor memory accelerator."""
    return HAS_DESCRIPTORS and capability(device) >= 90


def has_tensor_memory(device: torch.device) -> bool:
    """Whether sums of products are in a separate memory, as on data-centre Blackwell; GeForce and GB10 have none."""
    return 100 <= capability(device) < 120


def shared_limit(device: torch.device) -> int:
    """Shared memory that one block may use, bytes; the smallest known limit on unknown chips."""
    return SHARED_LIMIT.get(capability(device), min(SHARED_LIMIT.values()))


def register_limit(device: torch.device, registers: int | None) -> dict[str, int | None]:
    """The launch option for the assembler's limit of registers per thread; AMD's compiler has none."""
    return {"maxnreg": registers} if capability(device) else {}


def roomy_registers(device: torch.device, registers: int) -> dict[str, int | None]:
    """The register limit on Blackwell, where the assembler by default spills addresses to fit one more program."""
    return register_limit(device, registers) if capability(device) >= 100 else {}


@dataclass(frozen=True)
class Config:
    """One launch configuration of a matrix kernel.

    Attributes:
        form: "descriptor" (row segments through tensor descriptors), "pointer", or "columns" (pointers, and depth runs
            over the columns of the flattened filter).
        block_m, block_n, block_k: pixels, output channels and input channels (columns) of a tile.
        num_warps, num_stages: Triton's launch options.
        rows: rows of the map that a tile covers (descriptors).
        parts: number of parts of the filters, one or two, in which the epilogue processes a tile.
    """

    form: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    rows: int = 1
    parts: int = 1


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two that is at least n, within bounds."""
    return min(most, max(least, triton.next_power_of_2(n)))


def box_rows(pixels: int, lines: int, filters: int) -> int:
    """Rows of a tile of `pixels` and `filters`, a power of two, in a map of `lines` lines.

    A tile is as square as possible: for a map of 133 x 133 pixels, tiles of 8 x 16 waste 14 %, tiles of 1 x 128 half.
    Tiles are square for maps of all sizes, so that a new size needs no compilation. A filter of several pixels also
    reads fewer pixels from a square tile. Filters are the rows of such a product, and Hopper's tensor cores process 64
    rows at a time, so tiles with fewer filters have one row.
    """
    if filters < 64 and not interpreting():
        return 1
    square = 1 << (pixels.bit_length() - 1) // 2
    return min(square, triton.next_power_of_2(lines))


@dataclass(frozen=True)
class OutputSize:
    """Output size of a product: images of `lines` lines of `run` pixels, and filters."""

    images: int
    lines: int
    run: int
    filters: int

    def tiles(self, block_m: int, block_n: int) -> int:
        """Number of tiles of block_m pixels and block_n filters; boxes of pixels do not wrap at the end of a line."""
        rows = box_rows(block_m, self.lines, block_n)
        boxes = triton.cdiv(self.lines, rows) * triton.cdiv(self.run, block_m // rows)
        return self.images * boxes * triton.cdiv(self.filters, block_n)


def fill_chip(made: OutputSize, block_m: int, block_n: int) -> tuple[int, int]:
    """The tile of a product, halved while all tiles still run at once, as for the last maps of a small image.

    The time of a tile is that of loading its (m + n) operands per channel from L2, or of its m x n products. Both are
    shorter for half a tile, and twice as many tiles are free on a half-empty chip. 34 x 34 pixels and 512 filters are
    30 tiles of 128 x 256 on 132 multiprocessors, and 100 tiles of 64 x 128, each with half the operands.
    """
    while 2 * made.tiles(block_m, block_n) <= PROCESSORS:
        if block_n > max(64, block_m):
            block_n //= 2
        elif block_m > 64:
            block_m //= 2
        else:
            break
    return block_m, block_n


def ragged(tiles: int) -> bool:
    """Whether tiles at one per multiprocessor leave most of the chip idle in the last of few waves.

    A multiprocessor runs two tiles of half the size, and the last ones have it for themselves. On an H100, a 3x3
    convolution of 133 x 133 pixels and 256 filters, 139 tiles on 132 multiprocessors, took 0.81 of the time with them.
    """
    full, rest = divmod(tiles, PROCESSORS)
    return 1 <= full < 4 and 0 < rest <= PROCESSORS // 2


def matmul_config(
    device: torch.device,
    dtype: torch.dtype,
    images: int,
    lines: int,
    run: int,
    channels_out: int,
    depth: int,
    described: bool,
    epilogue_maps: int = 1,
    taps: int = 1,
    costly: bool = False,
    moments: bool = False,
) -> Config:
    """The tile of an implicit matrix product.

    A tile of m x n moves (m + n) / (2 m n) bytes of operands per multiply-add through L2, so long products take the
    largest tile whose accumulators fit in registers, 128 x 256 with eight warps. Short ones are bound by memory: two
    blocks of 128 x 128 per multiprocessor, or three of 128 x 64, so that one computes while another reads and writes
    its maps. On an H200 four warps did that as fast as eight, or up to a fifth faster.
    No configuration may spill registers: `benchmarks/compile_gate.py` compiles those of real networks.

    Args:
        images: number of images.
        lines, run: output pixels of an image: `lines` lines of `run` pixels.
        channels_out: output channels (of a group).
        depth: input channels (of a group).
        described: whether descriptors can address every operand.
        epilogue_maps: maps of the tile's size that the epilogue reads or writes through shared memory.
        taps: number of filter taps.
        costly: whether exp or erf is computed for every element, which takes registers.
        moments: whether the epilogue computes the moments of the tile.
    """
    form = "descriptor" if described else "columns" if flattens(depth, taps) else "pointer"
    if interpreting():  # few large programs: a call costs more than its elements
        block_m = power_of_two(lines * run, 16, 256 if described else 1024)
        columns = taps * depth if form == "columns" else depth
        blocks = block_m, power_of_two(channels_out, 16, 128), power_of_two(columns, 16, 64)
        rows = box_rows(block_m, lines, blocks[1]) if described else 1
        return Config(form, *blocks, rows=rows, parts=2 if rows > 1 else 1)
    itemsize, half = dtype.itemsize, dtype.itemsize <= 2
    if form == "columns":
        return _columns_config(itemsize, channels_out, taps * depth)
    if form == "pointer":
        maps = epilogue_maps + moments
        return _pointer_config(device, itemsize, lines * run, channels_out, depth, maps, taps, costly)
    # A thread reads whole rows of tensor memory: statistics take registers.
    summed = moments and has_tensor_memory(device)
    plain = not (costly or summed)
    block_k = power_of_two(depth, 16, 128 // itemsize)
    wide = half and taps * depth >= (512 if epilogue_maps == 1 else 2048) and plain and epilogue_maps <= 2
    block_n = power_of_two(channels_out, 16, 256 if wide else 128)
    if half and 64 < channels_out < 256 and -channels_out % 128 >= 64:  # three blocks of 64 instead of four
        block_n = 64
    block_m = power_of_two(lines * run if block_n >= 64 else run, 64, 128)
    made = OutputSize(images, lines, run, channels_out)
    if block_n == 256 and ragged(made.tiles(block_m, block_n)):
        block_n = 128
    block_m, block_n = fill_chip(made, block_m, block_n)
    slim = half and plain and block_n <= 128 and epilogue_maps <= 2  # with three maps a few registers would spill
    num_warps = 4 if slim or block_m * block_n <= 128 * 64 else 8
    blocks = 1 if block_n > 128 else 2 if block_n > 64 else 3
    room = shared_limit(device) // blocks - 3072  # a block uses 1 KiB more than it requests, and barriers
    num_stages = max(2, min(4, room // ((block_m + block_n) * block_k * itemsize)))
    rows = box_rows(block_m, lines, block_n)
    # With several rows or three maps, all sums and the loaded values would not fit in registers together.
    parts = 2 if block_n > 64 and (rows > 1 or epilogue_maps > 2 or summed) else 1
    return Config("descriptor", block_m, block_n, block_k, num_warps, num_stages, rows, parts)


def _pointer_config(
    device: torch.device,
    itemsize: int,
    pixels: int,
    channels_out: int,
    depth: int,
    epilogue_maps: int,
    taps: int,
    costly: bool,
) -> Config:
    """The tile of the pointer form, limited by the registers of addresses.

    Each thread has a pointer per 16 bytes of each operand, or per element without alignment. Triton knows alignment
    only if 16 divides the number of channels.
    """
    scattered = depth % 16 > 0 or channels_out % 16 > 0
    block_n = power_of_two(channels_out, 16, 64 if scattered or itemsize > 2 else 128)
    # A multiprocessor of a GeForce has 48 warps, of which two smaller programs keep more busy.
    blocks = 2 if 80 < capability(device) < 90 or capability(device) >= 120 else 1
    low = scattered or block_n <= 32 or (costly and epilogue_maps > 1) or blocks == 2
    block_m = power_of_two(pixels, 64, 64 if low else 128)
    short = scattered or (itemsize > 2 and taps > 1)
    block_k = power_of_two(depth, 16, max(16, (64 if short else 128) // itemsize))
    full = block_m * block_n * itemsize >= 128 * 64 * 2
    wide = block_m * block_n * itemsize > 128 * 64 * 2 or (full and epilogue_maps > 1)
    num_warps = 8 if scattered or wide else 4
    stages = (shared_limit(device) // blocks - 3072) // ((block_m + block_n) * block_k * itemsize)
    return Config("pointer", block_m, block_n, block_k, num_warps, max(1, min(4, stages)))


def flattens(depth: int, taps: int) -> bool:
    """Whether a product by pointers runs over the columns of the flattened filter instead of channels tap by tap.

    It does if that takes fewer steps of 16, the minimum of tensor cores: for fewer than 16 channels.
    """
    return triton.cdiv(taps * depth, 16) < taps


def _columns_config(itemsize: int, channels_out: int, columns: int) -> Config:
    """The tile of the columns form: 256 threads gather at most 16 elements each per step, whose addresses fit.

    A first layer with about 49 columns is one step. There is one stage, because no asynchronous copy moves two bytes.
    """
    if itemsize == 8:  # products without tensor cores
        return Config("columns", 64, power_of_two(channels_out, 16, 32), 16, 8, 1)
    block_n = power_of_two(channels_out, 16, 128 if itemsize <= 2 else 64)
    block_k = power_of_two(columns, 16, 64) if columns <= 64 else 32
    return Config("columns", 64, block_n, block_k, 8, 1)


# -- weight gradient ----------------------------------------------------------------------------------------------

# Output pixels that one split sums at most.
SPLIT_PIXELS = 65_536


def wgrad_config(
    device: torch.device,
    dtype: torch.dtype,
    run: int,
    filters: int,
    depth: int,
    taps: int,
    described: bool,
    gate_act: str = "none",
) -> Config:
    """The tile: block_m output channels x block_n input channels (columns of the filter for pointers), block_k pixels.

    Args:
        run: adjacent output pixels: a row for descriptors, all pixels for pointers.
        filters: output channels (of a group).
        depth: input channels for descriptors, columns of the flattened filter for pointers.
        taps: tiles that a program holds at once: the taps of a filter row for descriptors, 1 for pointers.
        gate_act: the activation whose slope is applied to dy.
    """
    form = "descriptor" if described else "pointer"
    if interpreting():  # few large programs: a call costs more than its elements
        return Config(form, power_of_two(filters, 16, 128), power_of_two(depth, 16, 128), power_of_two(run, 16, 256))
    itemsize = dtype.itemsize
    if itemsize == 8 or (itemsize == 4 and dot_precision(dtype) == "ieee"):  # products without tensor cores
        return Config(form, power_of_two(filters, 16, 32), power_of_two(depth, 16, 32 if taps == 1 else 16), 16, 4, 3)
    block_k = power_of_two(run, 16, 128 // itemsize)
    if described and block_k > 16:  # half if that saves a sixth of a row's rounded length
        short, long = (triton.cdiv(run, k) * k for k in (block_k // 2, block_k))
        block_k = block_k // 2 if 6 * short <= 5 * long else block_k
    if described:  # rows are input channels, at least 64; accumulators take at most 96 registers of a thread
        block_n = power_of_two(depth, 64, 128 if taps == 1 else 64)
        block_m = power_of_two(filters, 16, min(128, 1 << (384 // taps).bit_length() - 1))
    else:  # every element has its own address and mask
        block_m = power_of_two(filters, 16, 128)
        block_n, block_k = power_of_two(depth, 16, 128 // itemsize), min(block_k, 32)
    if gate_act not in ("none", *MASKS):  # the slope takes registers
        block_k = max(16, block_k // 2)
    num_warps = 8 if block_m == 128 or block_m * block_n * taps > 96 * 128 else 4
    line = (block_m * (1 if gate_act == "none" else 2) + block_n * taps) * itemsize
    block_k = max(16, min(block_k, 1 << ((shared_limit(device) - 8192) // line).bit_length() - 1))
    # Two programs of four warps share a multiprocessor. In addition to the stages, dz passes through shared memory.
    room = shared_limit(device) * num_warps // 8 - block_m * block_k * itemsize - 4096
    if described and itemsize == 4 and has_tensor_memory(device):  # operands are transposed through two further stages
        room -= 2 * line * block_k
    return Config(form, block_m, block_n, block_k, num_warps, max(1, min(4, room // (line * block_k))))


def programs_at_once(num_warps: int) -> int:
    """Programs of a weight gradient that run at a time; one in the interpreter, where calls dominate."""
    return 1 if interpreting() else PROCESSORS * (8 // num_warps)


@functools.lru_cache(maxsize=4096)
def split_count(tiles: int, segments: int, segment: int, tile_bytes: int, split_bytes: int, slots: int) -> int:
    """Number of splits of the pixels.

    The cost counts bytes: those that the waves of programs load, and each split's sums, written and read once.

    Args:
        tiles: programs of one split.
        segments: blocks of pixels, of `segment` pixels each.
        tile_bytes: bytes that a program loads per block of pixels.
        split_bytes: bytes that a split writes.
        slots: programs that run at once.
    """

    def cost(splits: int) -> int:
        waves = triton.cdiv(tiles * splits, slots)
        return waves * slots * triton.cdiv(segments, splits) * tile_bytes + 2 * splits * split_bytes

    least = triton.cdiv(segments * segment, SPLIT_PIXELS)
    most = max(least, min(segments, least + triton.cdiv(4 * slots, tiles)))
    splits = min(range(least, most + 1), key=cost)
    return triton.cdiv(segments, triton.cdiv(segments, splits))


def splits_blocks(splits: int) -> tuple[int, int]:
    """Elements of a program that adds up splits, and the splits that it adds at a time."""
    rows = power_of_two(splits, 2, 32)
    return 4096 // rows, rows
