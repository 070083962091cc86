"""The halo-carry scan: two passes over the tiles of an image, exact outputs and gradients in the memory of one tile.

Pass 1 (`forward.py`) goes through the tiles in raster order without a graph. Each tile is a function

    (pixels, halo from above, halo from the left, parameters) -> (outputs, halo for below, halo for the right)

and the halos that enter each tile are kept. Pass 2 (`backward.py`) goes through the tiles in reverse raster order: it
recomputes a tile from its stored halos with autograd on, and differentiates the tile's outputs together with the halos
that it handed on, whose gradients have come back from the tiles below and to the right. Every activation is computed
twice, every gradient once; nothing is recomputed in an overlap.

Here is what both passes go by: where pixels come from, on what they are computed, where things are kept.
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
from ..lowering.stages import Stage
from ..module import locks
from .arena import in_arena
from .halos import Rect, area, copy_all, cut, memory_order
from .memory_limit import MemoryLimit
from .page_pool import PagePool
from .prefetch import Prefetch
from .stage import TiledStage
from .stored_maps import Gradients, let_files_go

Observer = Callable[[Tensor, Rect], None]  # given every block of a map, and its place


class Pixels(Protocol):
    """A batch of maps that is read by region: the image (a tensor or a `PixelBatch`), or a stored map."""

    @property
    def shape(self) -> Any: ...

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor: ...


class StoredMap:
    """A map that an earlier stage has stored.

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
    """Told to `on_tile` after each tile: the pass, how many of how many tiles are done, and the pixels of this one."""

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


def cast_dtype(stage: Stage, value: int, dtype: torch.dtype, autocast: Autocast) -> torch.dtype:
    """The dtype a vector is given to the stage in: weights that autocast would cast in every tile are cast once."""
    if not autocast.enabled or dtype != torch.float32:
        return dtype
    return autocast.dtype if value in stage.cast_by_autocast else dtype


@dataclass(frozen=True)
class MapKeeping:
    """Where maps between stages live in a step.

    Attributes:
        readers: stored maps that stages alone read, and how many stages do.
        place: where those are kept: "device", "host" or "disk".
        gradients: of those, one for all stages that read a map.
        orders: of maps that the network hands out, the dimensions as they lie in memory, slowest first.
    """

    readers: Mapping[int, int] = field(default_factory=dict)
    place: str = "device"
    gradients: Gradients = field(default_factory=Gradients)
    orders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def place_of(self, value: int) -> str:
        return self.place if value in self.readers else "device"

    def order_of(self, value: int, like: Tensor) -> Sequence[int]:
        """The order in which a map like `like` is to lie in memory."""
        order = self.orders.get(value, ())
        return order if len(order) == like.dim() else memory_order(like)


@dataclass(frozen=True)
class Reader:
    """Gives the sources' pixels to tiles: `read(source, rectangle)`; `advance()` before each tile."""

    read: Callable[[int, Rect], Tensor]
    advance: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Scan:
    """One training or inference step of a stage over one image batch.

    Attributes:
        tiled: the stage, cut into tiles.
        sources: what the stage reads, by value number.
        device: where tiles are computed.
        dtype: what the image's pixels are converted to.
        autocast: the state that tiles are computed in, in both passes.
        halo_place: where the halos are kept between the passes, see `HaloStore`.
        retained: how many of the last tiles keep their graph from pass 1, so that pass 2 need not recompute them.
        on_tile: called after each tile.
        memory_limit: of this process; kept after every tile.
        maps: where maps between stages are kept.
        observers: given every block of a map in pass 1.
        deferred: nobody will read what pass 1 stores; where it does nothing else it is omitted.
        whole: the one tile is all that statistics are taken of.
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
        """oneDNN has no float64 kernels and the fallback is at home in NCHW; everything else is faster in NHWC."""
        here = self.device.type in ("cpu", "meta")  # the plan runs a tile of the CPU on meta tensors
        nhwc = not here or self.dtype != torch.float64 or kernels.enabled(self.device)
        return torch.channels_last if nhwc else torch.contiguous_format

    @cached_property
    def taken(self) -> set[int]:
        """Maps that something besides local ops takes: reductions, stored maps, observers."""
        return {*self.tiled.reductions, *self.tiled.stage.stored, *self.observers}

    @cached_property
    def overwritten(self) -> set[int]:
        """Sources whose gradient has one share only at each place, so that it need not begin with zeros."""
        return {v for v in self.tiled.apportioned if self.maps.readers.get(v, 1) == 1}

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """In raster order."""
        return [(i, j) for i in range(self.tiled.rows.steps) for j in range(self.tiled.cols.steps)]

    @property
    def page_pool(self) -> PagePool | None:
        """Pages for new maps."""
        return None if self.memory_limit is None else self.memory_limit.page_pool

    @property
    def watch(self) -> Callable[[int | None], None] | None:
        """What is to be called before every op with the bytes that it makes, if anything is."""
        limit = self.memory_limit
        return limit.watch if limit is not None and limit.strict else None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A pass: blocks come from the arena, and memory is watched."""
        watched = contextlib.nullcontext() if self.memory_limit is None else self.memory_limit.watched()
        with in_arena(self.device), watched:
            yield

    def without_maps(self) -> Scan:
        """This scan for autograd to keep between the passes: stored maps it keeps itself, and lets them go."""
        return replace(self, sources={v: s for v, s in self.sources.items() if not isinstance(s, StoredMap)})

    def with_maps(self, tensors: Mapping[int, Tensor]) -> Scan:
        """This scan with the stored maps that `without_maps` has left out."""
        axes = self.tiled.stage.maps.axes
        return replace(self, sources={**{v: StoredMap(t, axes[v]) for v, t in tensors.items()}, **self.sources})

    def convert(self, pixels: Tensor) -> Tensor:
        """Pixels on the device, in the dtype and memory order they are computed in."""
        moved = pixels.to(device=self.device, dtype=self.dtype, non_blocking=True)
        return moved.contiguous(memory_format=self.memory_format)

    def read(self, source: int, rect: Rect) -> Tensor:
        """A rectangle of a source as it is computed with; of a stored map on the device a view."""
        return self._as_computed(source, self.sources[source].read(*rect))

    def _as_computed(self, source: int, pixels: Tensor) -> Tensor:
        if source != self.tiled.stage.image:  # maps that are there have the dtype that they are meant to have
            return pixels.to(self.device, non_blocking=True)
        image = self.sources[source]
        if isinstance(image, StoredBatch):
            pixels = image.develop(pixels.to(self.device, non_blocking=True))
        return self.convert(pixels)

    def _on_device(self, source: int) -> bool:
        """Whether a source is read where it is, by what computes.

        On the CPU, too: what a thread takes for an image's change of memory order lies in a part of the C library's
        heap that gives nothing back.
        """
        tensor = getattr(self.sources[source], "tensor", None)
        return tensor is not None and tensor.device.type == self.device.type

    @contextlib.contextmanager
    def reader(self, tiles: Iterable[tuple[int, int]]) -> Iterator[Reader]:
        """Reads the sources for these tiles, what is not on the device while the tile before is computed."""
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
        """Detached vectors, cast as autocast would, convolution weights in the memory order of maps and packed.

        Gradients of what is cast are summed in the vector's own dtype. `leaves` want a gradient.
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
        """A weight in the memory order of maps, and on the CPU with strides that say so.

        Where a convolution has one input channel, neither its weight's strides nor the image's tell an order, and its
        output would not be as the maps after it: for the first layers of a ResNet on a grey image six times the time.
        """
        weight = weight.contiguous(memory_format=self.memory_format)
        if weight.shape[1] != 1 or self.memory_format != torch.channels_last or self.device.type != "cpu":
            return weight
        height, width = weight.shape[2:]
        return weight.as_strided(weight.shape, (height * width, 1, width, 1))

    @contextlib.contextmanager
    def tile_state(self, seed: int, i: int, j: int, drawn: dict[tuple[int, int], int]) -> Iterator[None]:
        """For a tile the same autocast and random numbers in both passes; the caller's generators stay as they are.

        Args:
            drawn: tells for each tile what pass 1 has drawn; pass 2 is refused if it draws anything else.
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
        """Keep to the limit of memory, and tell `on_tile`; `maps` are those that the pass writes to."""
        if self.maps.place == "disk":
            let_files_go((*maps, *(s.tensor for s in self.sources.values() if isinstance(s, StoredMap))))
        if self.memory_limit is not None:
            self.memory_limit.keep()
        if self.on_tile is not None:
            source = self.tiled.stage.sources[0]
            pixels = area(self.tiled.block(source, i, j)) * self.sources[source].shape[0]
            self.on_tile(TileEvent(phase, done, self.tiled.tiles, pixels))
