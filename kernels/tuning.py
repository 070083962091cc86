"""Configurations of kernels, computed from shape, dtype and chip, and what overrides them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from triton import knobs

# Most dynamic shared memory a block may have, bytes.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return knobs.runtime.interpret


@functools.cache
def _device_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """10 * major + minor of the GPU that kernels on `device` are compiled for; 90 in the interpreter."""
    if device.type == "cuda":
        return _device_capability(device.index if device.index is not None else torch.cuda.current_device())
    if interpreting():
        return 90
    return triton.runtime.driver.active.get_current_target().arch  # pyright: ignore


def has_descriptors(device: torch.device) -> bool:
    """Whether the chip has a tensor memory accelerator."""
    return capability(device) >= 90


def shared_limit(device: torch.device) -> int:
    """Shared memory that one block may use, bytes; the smallest known limit on unknown chips."""
    return SHARED_LIMIT.get(capability(device), min(SHARED_LIMIT.values()))


@dataclass(frozen=True)
class Config:
    """One launch configuration of a matrix kernel.

    Attributes:
        form: "descriptor" (row segments through tensor descriptors) or "pointer".
        block_m, block_n, block_k: pixels, output channels and input channels of a tile.
        num_warps, num_stages: as Triton takes them.
    """

    form: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3


_forced: list[Config] = []


@contextlib.contextmanager
def forced(config: Config) -> Iterator[None]:
    """Use one configuration for every matrix kernel inside: for tests and benchmarks."""
    _forced.append(config)
    try:
        yield
    finally:
        _forced.pop()


def forced_config() -> Config | None:
    return _forced[-1] if _forced else None


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two that holds n, within bounds."""
    return min(most, max(least, triton.next_power_of_2(n)))


def matmul_config(
    device: torch.device,
    dtype: torch.dtype,
    pixels: int,
    channels_out: int,
    depth: int,
    described: bool,
    epilogue_maps: int = 1,
    taps: int = 1,
    costly: bool = False,
) -> Config:
    """The tile of an implicit matrix product.

    A tile of m x n moves (m + n) / (2 m n) bytes of operands per multiply-add through L2, so long products take the
    largest tile whose accumulators fit in registers, 128 x 256 with eight warps. Short ones are bound by memory: two
    blocks of 128 x 128 per multiprocessor, so that one computes while the other reads and writes its maps.
    Nothing here may spill: `benchmarks/compile_gate.py` compiles what real networks get.

    Args:
        pixels: longest run of output pixels that a tile may take (the row for descriptors, all of them for pointers).
        channels_out: output channels (of a group).
        depth: input channels (of a group).
        described: whether descriptors can address every operand.
        epilogue_maps: maps of the tile's size that the epilogue reads or writes through shared memory.
        taps: of the filter.
        costly: whether exp or erf is computed for every element, which takes registers.
    """
    config = forced_config()
    if config is not None:
        return config if described or config.form == "pointer" else _as_pointer(config)
    if interpreting():  # few large programs: a call costs more than its elements
        return Config(
            "descriptor" if described else "pointer",
            power_of_two(pixels, 16, 256 if described else 1024),
            power_of_two(channels_out, 16, 128),
            power_of_two(depth, 16, 64),
        )
    itemsize, half = dtype.itemsize, dtype.itemsize <= 2
    if not described:
        return _pointer_config(device, itemsize, pixels, channels_out, depth, epilogue_maps)
    block_k = power_of_two(depth, 16, 128 // itemsize)
    wide = half and taps * depth >= 512 and not costly and epilogue_maps <= 2
    block_m, block_n = power_of_two(pixels, 64, 128), power_of_two(channels_out, 16, 256 if wide else 128)
    if block_n <= 64 and pixels > 128 and half and not costly:
        block_m = 256
    num_warps = 8 if block_m * block_n > 128 * 64 else 4
    blocks = 1 if block_n > 128 else 2
    room = shared_limit(device) // blocks - 3072  # a block takes 1 KiB more than it asks for, and barriers
    num_stages = max(2, min(4, room // ((block_m + block_n) * block_k * itemsize)))
    return Config("descriptor", block_m, block_n, block_k, num_warps, num_stages)


def _pointer_config(
    device: torch.device, itemsize: int, pixels: int, channels_out: int, depth: int, epilogue_maps: int
) -> Config:
    """Addresses take registers: a pointer per 16 bytes and thread for each operand, per element where not aligned."""
    scattered = depth * itemsize % 16 > 0 or channels_out * itemsize % 16 > 0
    block_n = power_of_two(channels_out, 16, 64 if scattered or itemsize > 2 else 128)
    block_m = power_of_two(pixels, 64, 64 if scattered else 128)
    block_k = power_of_two(depth, 16, (64 if scattered else 128) // itemsize)
    full = block_m * block_n * itemsize >= 128 * 64 * 2
    wide = block_m * block_n * itemsize > 128 * 64 * 2 or (full and epilogue_maps > 1)
    num_warps = 8 if scattered or wide else 4
    stage = (block_m + block_n) * block_k * itemsize
    return Config("pointer", block_m, block_n, block_k, num_warps, min(4, (shared_limit(device) - 3072) // stage))


def _as_pointer(config: Config) -> Config:
    return Config("pointer", config.block_m, config.block_n, config.block_k, config.num_warps, config.num_stages)
