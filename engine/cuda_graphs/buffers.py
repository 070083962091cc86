"""Static tensors at fixed addresses for CUDA graphs, and the executors that capture work on them."""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels.choice import reason
from ..tiling.halos import copy_all, memory_order
from ..tiling.memory import note_capture

log = logging.getLogger("gigamorph")

Name = tuple[Any, ...]  # name of a tensor in graph buffers


class Executor(Protocol):
    """Captures functions that read and write only graph buffers and their own tensors."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Returns a function that replays the device work of `run`; the call of `run` itself may have no effect."""
        ...

    def apart(self) -> Executor:
        """An executor with its own memory, in which a capture may leave tensors for the next one."""
        ...


class CudaGraphs:
    """Captures CUDA graphs that share a memory pool; no function leaves tensors in it, so their order is free.

    They also share a stream, because a pool reuses blocks only on the stream that allocated them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None

    def apart(self) -> CudaGraphs:
        other = CudaGraphs(self.device)
        other.stream = self.stream = self.stream or torch.cuda.Stream(self.device)
        return other

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            if not self.graphs:  # a pool is freed with its last graph
                self.pool = torch.cuda.graph_pool_handle()
                torch.cuda.empty_cache()  # the pool cannot reuse cached blocks of earlier tiles and graphs
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
            gc.disable()  # collecting a graph or event invalidates the capture
            try:
                with torch.cuda.stream(self.stream):
                    # Thread-local, because the prefetching thread pins memory meanwhile.
                    graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                    try:
                        run()
                    finally:
                        graph.capture_end()
            finally:
                if collecting:
                    gc.enable()
            torch.cuda.current_stream().wait_stream(self.stream)
        self.graphs.add(graph)
        note_capture(self.device)
        return graph.replay


@functools.cache
def _graphs(device: torch.device) -> CudaGraphs:
    return CudaGraphs(device)


def executor(device: torch.device) -> Executor | None:
    """The executor of a device; None on devices without CUDA graphs. Tests replace it."""
    return _graphs(device) if device.type == "cuda" else None


def captured(executor: Executor, run: Callable[[], None]) -> Callable[[], None] | None:
    """The work as a graph; None if it cannot be captured, which logs a warning once per cause."""
    try:
        return executor.capture(run)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        warn_once(reason(error))
        return None


def captured_if_it_fits(executor: Executor, run: Callable[[], None]) -> Callable[[], None] | None:
    """Like `captured`, but also None if memory is too small, for work that can run in smaller parts."""
    try:
        return captured(executor, run)
    except torch.OutOfMemoryError:
        return None


@functools.cache
def warn_once(cause: str) -> None:
    log.warning("a tile cannot be captured as a CUDA graph and runs op by op: %s", cause)


CHUNK_BYTES = 32 * 2**20
_ALIGNMENT = 512  # that of PyTorch's own allocations


class SharedBuffers:
    """Memory that several `GraphBuffers` share, each from the beginning; only one of them is in use at a time."""

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []

    def take(self, start: tuple[int, int], size: int, device: torch.device) -> tuple[Tensor, tuple[int, int]]:
        """`size` bytes from a position (chunk, offset) on, and the position after them."""
        chunk, offset = start
        while chunk < len(self.chunks) and offset + size > self.chunks[chunk].numel():
            chunk, offset = chunk + 1, 0
        if chunk == len(self.chunks):
            with torch.inference_mode(False):  # written both in and outside inference mode
                self.chunks.append(torch.empty(max(size, CHUNK_BYTES), dtype=torch.uint8, device=device))
        end = offset + -(-size // _ALIGNMENT) * _ALIGNMENT
        return self.chunks[chunk][offset : offset + size], (chunk, end)


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor in the memory order of another."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor.stride()  # retains the strides of axes of size one
    return torch.empty_permuted(tensor.shape, memory_order(tensor), device="meta").stride()


class GraphBuffers:
    """Static tensors by name: `inputs` are loaded before captured work reads them, and the work writes `outputs`.

    Args:
        arena: the memory of the tensors if they are needed only during the work.
    """

    def __init__(self, arena: SharedBuffers | None = None) -> None:
        self.inputs: dict[Name, Tensor] = {}
        self.outputs: dict[Name, Tensor] = {}
        self._arena, self._end = arena, (0, 0)

    def _buffer_like(self, tensor: Tensor) -> Tensor:
        strides = _dense_strides(tensor)
        if self._arena is None or not tensor.numel():
            with torch.inference_mode(False):  # written both in and outside inference mode
                return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
        flat, self._end = self._arena.take(self._end, tensor.numel() * tensor.element_size(), tensor.device)
        flat = flat.view(tensor.dtype)
        # .data: other tensors share the storage, and autograd must not track their writes together.
        return flat.as_strided(tensor.shape, strides, flat.storage_offset()).data

    def load(self, tensors: Mapping[Name, Tensor]) -> None:
        """Copy tensors to the inputs; names and shapes must be the same each time."""
        for name, tensor in tensors.items():
            if name not in self.inputs:
                self.inputs[name] = self._buffer_like(tensor)
        copy_all((self.inputs[name], tensor) for name, tensor in tensors.items())

    def give(self, name: Name, tensor: Tensor) -> None:
        """Copy a result to the outputs; called by captured work."""
        if name not in self.outputs:
            self.outputs[name] = self._buffer_like(tensor)
        self.outputs[name].copy_(tensor)
