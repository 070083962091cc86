"""Tensors at fixed addresses, and what captures work on them."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .carries import memory_order

Name = tuple[Any, ...]  # what a static tensor holds


class Executor(Protocol):
    """Captures functions that read and write static tensors, and besides them only what they make."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does again all that `run` does on the device. `run` is called for that, but need have no effect."""
        ...


class CudaGraphs:
    """Captures as CUDA graphs that share a memory pool: a function leaves nothing in it, so they may follow freely."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool: Any = None

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
                torch.cuda.empty_cache()  # blocks that ordinary tiles have left behind are of no use to the pool
            graph, stream, collecting = torch.cuda.CUDAGraph(), torch.cuda.Stream(), gc.isenabled()
            stream.wait_stream(torch.cuda.current_stream())
            gc.disable()  # a graph or an event that is collected during a capture spoils it
            try:
                with torch.cuda.stream(stream):
                    # Thread-local: the thread that reads pixels goes on pinning memory.
                    graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                    try:
                        run()
                    finally:
                        graph.capture_end()
            finally:
                if collecting:
                    gc.enable()
            torch.cuda.current_stream().wait_stream(stream)
        return graph.replay


@functools.cache
def _graphs(device: torch.device) -> CudaGraphs:
    return CudaGraphs(device)


def executor(device: torch.device) -> Executor | None:
    """What captures on a device; None where nothing is gained by it. Tests put another in its place."""
    return _graphs(device) if device.type == "cuda" else None


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy (target, source) pairs; those that lie alike in memory go in few launches."""
    groups: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        alike = target.stride() == source.stride()
        targets, sources = groups.setdefault((alike, target.dtype, source.dtype), ([], []))
        targets.append(target)
        sources.append(source)
    with torch.no_grad():
        for targets, sources in groups.values():
            torch._foreach_copy_(targets, sources)


def _dense_like(tensor: Tensor) -> Tensor:
    """Room for a tensor in its memory order."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return torch.empty_like(tensor)  # the same strides also where an axis has size one
    return torch.empty_permuted(tensor.shape, memory_order(tensor), dtype=tensor.dtype, device=tensor.device)


class Static:
    """Tensors at fixed addresses by name: `inputs` are loaded before captured work reads them, it gives `outputs`."""

    def __init__(self) -> None:
        self.inputs: dict[Name, Tensor] = {}
        self.outputs: dict[Name, Tensor] = {}

    def load(self, tensors: Mapping[Name, Tensor]) -> None:
        """Copy tensors in; the same names and shapes each time."""
        for name, tensor in tensors.items():
            if name not in self.inputs:
                self.inputs[name] = _dense_like(tensor)
        copy_all((self.inputs[name], tensor) for name, tensor in tensors.items())

    def give(self, name: Name, tensor: Tensor) -> None:
        """Copy a result to where it stays; called by the work that is captured."""
        if name not in self.outputs:
            self.outputs[name] = _dense_like(tensor)
        self.outputs[name].copy_(tensor)
