"""The halo-carry scan: exact outputs and gradients from two passes over the tiles, in the memory of one tile.

Pass 1 (`forward.py`) goes through the tiles in row-major order without a graph. Each tile is a function

    (pixels, halo from above, halo from the left, parameters) -> (outputs, halo for below, halo for the right)

and the halos that enter each tile are stored. Pass 2 (`backward.py`) goes through the tiles in reverse row-major order.
It recomputes a tile from its stored halos with autograd on, and differentiates the tile's outputs together with the
halos that it passed on. The gradients of these halos come from the tiles below and to the right. Every activation is
computed twice and every gradient once; no overlap is recomputed.

This module holds the settings and inputs that both passes share: pixel sources, device, dtype and storage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ... import kernels
from ..images.batches import StoredBatch
from ..lowering.stages import ProgramStage
from ..module import locks
from .arena import in_arena
from .halos import Rect, area, copy_all, cut, memory_order
from .memory_limit import MemoryLimit
from .prefetch import Prefetch
from .stage import TiledStage
from .stored_maps import Gradients, let_files_go

Observer = Callable[[Tensor, Rect], None]  # called with every block of a map, and its rectangle


class Pixels(Protocol):
    """A batch of maps that is read by region: the image (a tensor or a `PixelBatch`), or a stored map."""

    @property
    def shape(self) -> Any: ...

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor: ...


class StoredMap:
    """A map that an earlier stage stored.

    Args:
        tensor: the map.
        axes: its image axes.
    """

    def __init__(self, tensor: Tensor, axes: tuple[int, int]):
        self.tensor, self.axes, self.shape = tensor, axes, tensor.shape

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return cut(self.tensor, self.axes, (top, bottom, left, right))


@dataclass(frozen=True, slots=True)
class TileEvent:
    """The argument of `on_tile` after each tile.

    Attributes:
        phase: "forward" or "backward".
        done: number of tiles done in this pass.
        total: number of tiles of the pass.
        pixels: number of pixels of this tile, over the whole batch.
    """

    phase: str
    done: int
    total: int
    pixels: int


@dataclass(frozen=True)
class Autocast:
    """The autocast state that the forward ran in; the backward's recomputation enters it again."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device: torch.device) -> Autocast:
        kind = device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def enter(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


def cast_dtype(stage: ProgramStage, value: int, dtype: torch.dtype, autocast: Autocast) -> torch.dtype:
    """The dtype in which a stage gets a vector: weights that autocast would cast in every tile are cast once."""
    if not autocast.enabled or dtype != torch.float32:
        return dtype
    return autocast.dtype if value in stage.cast_by_autocast else dtype


@dataclass(frozen=True)
class MapKeeping:
    """Storage of the maps between stages in a step.

    Attributes:
        readers: number of stages that read each stored map, for maps that only stages read.
        place: storage of these maps: "device", "host" or "disk".
        gradients: the gradients of these maps, one for all stages that read a map.
        orders: memory order of the maps that the network returns: their dimensions, slowest first.
    """

    readers: Mapping[int, int] = field(default_factory=dict)
    place: str = "device"
    gradients: Gradients = field(default_factory=Gradients)
    orders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def place_of(self, value: int) -> str:
        return self.place if value in self.readers else "device"

    def order_of(self, value: int, like: Tensor) -> Sequence[int]:
        """The memory order of a map: its dimensions, slowest first; by default that of `like`."""
        order = self.orders.get(value, ())
        return order if len(order) == like.dim() else memory_order(like)


@dataclass(frozen=True)
class Reader:
    """Reads the pixels of tiles: call `advance()` before each tile, then `read(source, rectangle)`."""

    read: Callable[[int, Rect], Tensor]
    advance: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Scan:
    """One training or inference step of a stage over one image batch.

    Attributes:
        tiled: the stage, divided into tiles.
        sources: the inputs of the stage (the image and stored maps), by value number.
        device: the device that computes the tiles.
        dtype: the dtype to which the image's pixels are converted.
        autocast: the autocast state of both passes.
        halo_place: storage of the halos between the passes, see `HaloStore`.
        retained: number of final tiles whose graphs are retained from pass 1, so that pass 2 need not recompute them.
        on_tile: called after each tile.
        memory_limit: memory limit of this process, enforced after every tile.
        maps: storage of the maps between stages.
        observers: called with every block of a map in pass 1, by value number.
        deferred: whether the maps that pass 1 stores are unused; then pass 1 is omitted if it only stores maps.
        whole: whether a single tile contains all pixels that statistics are computed from.
    """

    tiled: TiledStage
    sources: Mapping[int, Pixels]
    device: torch.device
    dtype: torch.dtype
    autocast: Autocast
    halo_place: str = "device"
    retained: int = 0
    on_tile: Callable[[TileEvent], None] | None = None
    memory_limit: MemoryLimit | None = None
    maps: MapKeeping = field(default_factory=MapKeeping)
    observers: Mapping[int, Sequence[Observer]] = field(default_factory=dict)
    deferred: bool = False
    whole: bool = False

    @cached_property
    def memory_format(self) -> torch.memory_format:
        """The memory format of maps: NHWC, except NCHW in float64 on the CPU, where oneDNN has no kernels."""
        here = self.device.type in ("cpu", "meta")  # the plan runs a tile of the CPU on meta tensors
        nhwc = not here or self.dtype != torch.float64 or kernels.enabled(self.device)
        return torch.channels_last if nhwc else torch.contiguous_format

    @cached_property
    def taken(self) -> set[int]:
        """Maps that are read outside local ops: by reductions or observers, or because they are stored."""
        return {*self.tiled.reductions, *self.tiled.stage.stored, *self.observers}

    @cached_property
    def overwritten(self) -> set[int]:
        """Sources whose gradient gets a single summand per position, so that it is written instead of accumulated."""
        return {v for v in self.tiled.apportioned if self.maps.readers.get(v, 1) == 1}

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """(row, column) of all tiles in row-major order."""
        return [(i, j) for i in range(self.tiled.rows.steps) for j in range(self.tiled.cols.steps)]

    @property
    def watch(self) -> Callable[[int | None], None] | None:
        """The function to call before every op with the bytes that it allocates; None without a strict limit."""
        limit = self.memory_limit
        return limit.watch if limit is not None and limit.strict else None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Context of a pass: blocks come from the arena, and the memory limit applies."""
        watched = contextlib.nullcontext() if self.memory_limit is None else self.memory_limit.watched()
        with in_arena(self.device), watched:
            yield

    def without_maps(self) -> Scan:
        """This scan without stored maps, for the autograd context: autograd itself saves and frees these maps."""
        return replace(self, sources={v: s for v, s in self.sources.items() if not isinstance(s, StoredMap)})

    def with_maps(self, tensors: Mapping[int, Tensor]) -> Scan:
        """This scan with the stored maps that `without_maps` removed."""
        axes = self.tiled.stage.maps.axes
        return replace(self, sources={**{v: StoredMap(t, axes[v]) for v, t in tensors.items()}, **self.sources})

    def convert(self, pixels: Tensor) -> Tensor:
        """Pixels on the device, in the dtype and memory format of the computation."""
        moved = pixels.to(device=self.device, dtype=self.dtype, non_blocking=True)
        return moved.contiguous(memory_format=self.memory_format)

    def read(self, source: int, rect: Rect) -> Tensor:
        """A rectangle of a source, converted for the computation; for a stored map on the device, a view."""
        return self._as_computed(source, self.sources[source].read(*rect))

    def _as_computed(self, source: int, pixels: Tensor) -> Tensor:
        stage = self.tiled.stage
        if source != stage.image:  # stored maps already have their final dtype, volumes of files do not
            return pixels.to(self.device, stage.program.values[source].dtype, non_blocking=True)
        image = self.sources[source]
        if isinstance(image, StoredBatch):
            pixels = image.develop(pixels.to(self.device, non_blocking=True))
        return self.convert(pixels)

    def _on_device(self, source: int) -> bool:
        """Whether a source is on the computing device, so that the computing thread reads it directly.

        This includes the CPU: a prefetching thread would reorder the image in a heap arena that is never trimmed.
        """
        tensor = getattr(self.sources[source], "tensor", None)
        return tensor is not None and tensor.device.type == self.device.type

    @contextlib.contextmanager
    def reader(self, tiles: Iterable[tuple[int, int]]) -> Iterator[Reader]:
        """Context with a reader for these tiles; sources on other devices are prefetched."""
        away = [source for source in self.tiled.stage.sources if not self._on_device(source)]
        if not away:
            yield Reader(self.read, lambda: None)
            return
        rects = (
            [(s, rect) for s in away for rect in self.tiled.source_rects(s, i, j, s in self.taken)] for i, j in tiles
        )
        with Prefetch(lambda s, rect: self.sources[s].read(*rect), self._as_computed, self.device, rects) as fetched:
            yield Reader(lambda s, rect: fetched(s, rect) if s in away else self.read(s, rect), fetched.advance)

    def prepare(self, vectors: Sequence[Tensor], leaves: Iterable[int] = ()) -> dict[int, Tensor]:
        """Prepare the vectors for tiles: detached, cast as by autocast, weights in the maps' memory order and packed.

        Gradients of cast vectors are summed in the vector's own dtype.

        Args:
            vectors: the tensors of `stage.vectors`.
            leaves: the vectors that require a gradient, by value number.
        """
        prepared, stage, casts = {}, self.tiled.stage, list[tuple[Tensor, Tensor]]()
        packings = stage.packings
        packed = {packing.weight for packing in packings if not packing.reads_weight}
        for value, vector in zip(stage.vectors, vectors, strict=True):
            vector = vector.detach()
            kernel = value in stage.kernels and value not in packed
            maps = kernel and vector.device.type == self.device.type
            dtype = cast_dtype(stage, value, vector.dtype, self.autocast)
            if dtype != vector.dtype:
                form = self.memory_format if maps else torch.preserve_format
                casts.append((torch.empty_like(vector, dtype=dtype, memory_format=form), vector))
                vector = casts[-1][0]
            elif maps:
                vector = self._in_order_of_maps(vector)
            prepared[value] = vector
        copy_all(casts)
        for packing in packings:
            prepared[packing.packed] = packing.make(*(prepared[v] for v in (packing.weight, *packing.factors)))
        for value in leaves:
            prepared[value].requires_grad_()
        return prepared

    def _in_order_of_maps(self, weight: Tensor) -> Tensor:
        """A weight in the memory format of maps, on the CPU with strides that express it.

        With one input channel, the strides of weight and image are ambiguous, so the convolution's output could have
        another memory format than later maps. The first layers of a ResNet on a grey image then take six times as long.
        """
        weight = weight.contiguous(memory_format=self.memory_format)
        if weight.shape[1] != 1 or self.memory_format != torch.channels_last or self.device.type != "cpu":
            return weight
        height, width = weight.shape[2:]
        return weight.as_strided(weight.shape, (height * width, 1, width, 1))

    @contextlib.contextmanager
    def tile_state(self, seed: int, i: int, j: int, drawn: dict[tuple[int, int], int]) -> Iterator[None]:
        """Context of a tile: equal autocast and random numbers in both passes; restores the caller's generators.

        Args:
            drawn: per tile, a checksum of the random numbers that pass 1 drew; pass 2 raises an error if it differs.
        """
        if not self.tiled.random:
            with self.autocast.enter():
                yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with locks.RANDOM, torch.random.fork_rng(devices=devices), self.autocast.enter():
            torch.manual_seed((seed + i * self.tiled.cols.steps + j) % 2**63)
            yield
            if self.device.type == "cpu":
                locks.check_drawn(drawn.setdefault((i, j), locks.drawn()))

    def after_tile(self, phase: str, i: int, j: int, done: int, maps: Iterable[Tensor | None]) -> None:
        """Enforce the memory limit and call `on_tile`; `maps` are the maps that the pass writes."""
        if self.maps.place == "disk":
            let_files_go((*maps, *(s.tensor for s in self.sources.values() if isinstance(s, StoredMap))))
        if self.memory_limit is not None:
            self.memory_limit.keep()
        if self.on_tile is not None:
            source = self.tiled.stage.sources[0]
            pixels = area(self.tiled.block(source, i, j)) * self.sources[source].shape[0]
            self.on_tile(TileEvent(phase, done, self.tiled.tiles, pixels))
