"""Tensors at fixed addresses, and what captures work on them."""

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

Name = tuple[Any, ...]  # what a graph buffers holds


class Executor(Protocol):
    """Captures functions that read and write graph buffers, and besides them only what they make."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does again all that `run` does on the device. `run` is called for that, but need have no effect."""
        ...

    def apart(self) -> Executor:
        """One whose captured work may leave things in memory for one another: nothing else uses that memory."""
        ...


class CudaGraphs:
    """Captures as CUDA graphs that share a memory pool: a function leaves nothing in it, so they may follow freely.

    They share a stream too, for a pool's blocks are used again on their own stream only.
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
            if not self.graphs:  # a pool ends with the last graph that uses it
                self.pool = torch.cuda.graph_pool_handle()
                torch.cuda.empty_cache()  # what tiles and former graphs have left behind is of no use to the pool
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
            gc.disable()  # a graph or an event that is collected during a capture spoils it
            try:
                with torch.cuda.stream(self.stream):
                    # Thread-local: the thread that reads pixels goes on pinning memory.
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
    """What captures on a device; None where nothing is gained by it. Tests put another in its place."""
    return _graphs(device) if device.type == "cuda" else None


def captured(executor: Executor, run: Callable[[], None]) -> Callable[[], None] | None:
    """The work as a graph; None where it cannot be captured, which is told once per cause."""
    try:
        return executor.capture(run)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        warn_once(reason(error))
        return None


def captured_if_it_fits(executor: Executor, run: Callable[[], None]) -> Callable[[], None] | None:
    """As `captured`; None also where memory is too small, for work that can go on by smaller parts."""
    try:
        return captured(executor, run)
    except torch.OutOfMemoryError:
        return None


@functools.cache
def warn_once(cause: str) -> None:
    log.warning("a tile cannot be captured as a CUDA graph and runs op by op: %s", cause)


CHUNK_BYTES = 32 * 2**20
_ALIGNMENT = 512  # that of PyTorch's own allocations


class Arena:
    """Memory that several `GraphBuffers` use in turn, each from the beginning: none needs it when another works."""

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []

    def take(self, start: tuple[int, int], size: int, device: torch.device) -> tuple[Tensor, tuple[int, int]]:
        """Bytes after a place (chunk, offset), and the place after them."""
        chunk, offset = start
        while chunk < len(self.chunks) and offset + size > self.chunks[chunk].numel():
            chunk, offset = chunk + 1, 0
        if chunk == len(self.chunks):
            with torch.inference_mode(False):  # it will be written to within and without
                self.chunks.append(torch.empty(max(size, CHUNK_BYTES), dtype=torch.uint8, device=device))
        end = offset + -(-size // _ALIGNMENT) * _ALIGNMENT
        return self.chunks[chunk][offset : offset + size], (chunk, end)


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor in the memory order of another."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor.stride()  # the same also where an axis has size one
    return torch.empty_permuted(tensor.shape, memory_order(tensor), device="meta").stride()


class GraphBuffers:
    """Tensors at fixed addresses by name: `inputs` are loaded before captured work reads them, it gives `outputs`.

    Args:
        arena: where they lie, if they need not last longer than the work.
    """

    def __init__(self, arena: Arena | None = None) -> None:
        self.inputs: dict[Name, Tensor] = {}
        self.outputs: dict[Name, Tensor] = {}
        self._arena, self._end = arena, (0, 0)

    def _room(self, tensor: Tensor) -> Tensor:
        strides = _dense_strides(tensor)
        if self._arena is None or not tensor.numel():
            with torch.inference_mode(False):  # it will be written to within and without
                return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
        flat, self._end = self._arena.take(self._end, tensor.numel() * tensor.element_size(), tensor.device)
        flat = flat.view(tensor.dtype)
        # .data: the neighbours are other tensors, and autograd need not hear that one of them is written.
        return flat.as_strided(tensor.shape, strides, flat.storage_offset()).data

    def load(self, tensors: Mapping[Name, Tensor]) -> None:
        """Copy tensors in; the same names and shapes each time."""
        for name, tensor in tensors.items():
            if name not in self.inputs:
                self.inputs[name] = self._room(tensor)
        copy_all((self.inputs[name], tensor) for name, tensor in tensors.items())

    def give(self, name: Name, tensor: Tensor) -> None:
        """Copy a result to where it stays; called by the work that is captured."""
        if name not in self.outputs:
            self.outputs[name] = self._room(tensor)
        self.outputs[name].copy_(tensor)
