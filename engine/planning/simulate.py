"""Measures the peak memory of a computation by running it on tensors without values.

Autograd saves, frees and accumulates these tensors like ordinary ones. So the peak is counted, not estimated; it
includes saved activations, gradients and copies. Scratch memory of libraries and fragmentation are not counted.

A tile on the CPU runs on meta tensors. Fake tensors are twenty times as slow, but have a device, which autocast,
kernels and some rules query. They are used on a GPU, and where meta tensors fail.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..capture.higher_order import TensorHook
from ..capture.program import Op, Program, Value, call, op_autocast
from ..lowering.folding import FOLDED, Fold, folded_ops
from ..lowering.stages import ProgramStage
from ..tiling.grid import new_accumulator
from ..tiling.halos import HaloStore
from ..tiling.record import PassState, Recorded, consumers_of, run_tile
from ..tiling.scan import Autocast, Pixels, Scan, StoredMap, cast_dtype
from ..tiling.stage import TiledStage
from ..tiling.tile import Halos, Returned, Tile
from ..torch_private import (
    FakeTensorMode,
    TorchDispatchMode,
    memory_of,
    saved_tensors_hooks,
    suggest_memory_format,
    tree_leaves,
    tree_map_only,
)
from .interstage import value_bytes
from .meta_attention import AttentionOfTheCPU


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak."""

    sees_tiles = True  # runs tiles of accelerated networks; see `capture.dynamo`

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self.seen: set[int] = set()

    def _on_freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size

    def ignore(self, *trees: Any) -> None:
        """Exclude existing tensors from the count."""
        self.seen.update(memory_of(t) for t in tree_leaves(trees) if isinstance(t, Tensor))

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._on_freed, key, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result


class _FakePixels:
    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return torch.empty(
            (self.shape[0], self.shape[1], bottom - top, right - left), dtype=self.dtype, device=self.device
        )


def tile_peak(stage: ProgramStage, tiled: TiledStage, training: bool, wanted: Container[int]) -> tuple[int, int]:
    """Peak bytes of the heaviest tile, and bytes that its recorded graph holds before it is differentiated.

    Without training the tile runs forward only and the second number is 0. The halos that enter the tile, their
    gradients and the vectors are not included; the tile's own gradients of the vectors are.

    Args:
        stage: the stage.
        tiled: the stage, divided into tiles.
        training: whether there is a backward.
        wanted: the sources and vectors that require a gradient.
    """
    autocast = Autocast.current(stage.program.values[stage.image].device)
    return _without_values(stage.program, lambda: _tile_peak(stage, tiled, training, wanted, autocast))


def _without_values(program: Program, run: Callable[[], Any]) -> Any:
    """The result of a function that runs a program's ops on tensors without values."""
    values, device = program.values, program.values[program.image].device
    casts = torch.is_autocast_enabled(device.type) or any(op.autocast is not None for op in program.ops)
    with torch.autograd.set_detect_anomaly(False), _saved_as_they_are():  # a caller's hooks read values
        if device.type == "cpu" and not casts:
            with (
                contextlib.suppress(RuntimeError),
                on_devices(torch.device("meta"), values),
                _OnMeta(),
                AttentionOfTheCPU(),
            ):
                return run()
        # Rules may hold weights, which are not fake.
        with on_devices(None, values), FakeTensorMode(allow_non_fake_inputs=True):
            return run()


def _saved_as_they_are() -> contextlib.AbstractContextManager[Any]:
    if saved_tensors_hooks() is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def is_here(device: torch.device) -> bool:
    """Whether fake tensors on a device can be differentiated; false for a GPU that is not installed."""
    return device.type != "cuda" or torch.cuda.is_available()


@contextlib.contextmanager
def on_devices(device: torch.device | None, values: Sequence[Value]) -> Iterator[None]:
    """Context that moves values to another device; with None, from a GPU that is not installed to the CPU."""
    before = [value.device for value in values]
    used = {one: device or (one if is_here(one) else torch.device("cpu")) for one in set(before)}
    for value in values:
        value.device = used.get(value.device, value.device)  # some stand twice in the list
    try:
        yield
    finally:
        for value, own in zip(values, before, strict=True):
            value.device = own


# Ops whose outputs are channels_last on the CPU if one of these arguments is. On meta tensors they never are, and the
# next op would count a copy that does not exist.
_IN_ORDER_OF = {
    "convolution": (0, 1),  # input, weight
    "convolution_backward": (1, 2),
    "channel_shuffle": (0,),
    "pixel_shuffle": (0,),
    "pixel_unshuffle": (0,),
    "reflection_pad2d": (0,),
    "reflection_pad2d_backward": (1,),
    "replication_pad2d": (0,),
    "replication_pad2d_backward": (1,),
    "roll": (0,),
}


class _OnMeta(TorchDispatchMode):
    """Runs every op on meta tensors; other inputs (weights that rules hold) and new tensors are moved to meta."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(not tensor.is_meta for tensor in given):
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        elif not given and any(argument.name == "device" for argument in func._schema.arguments):
            kwargs = {**kwargs, "device": "meta"}
        result = func(*args, **kwargs)
        places = _IN_ORDER_OF.get(func.overloadpacket.__name__, ())
        if any(suggest_memory_format(args[place]) == torch.channels_last for place in places):
            return tree_map_only(Tensor, _channels_last, result)
        return result


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 4:
        return tensor
    return tensor.as_strided(tensor.shape, torch.empty_like(tensor, memory_format=torch.channels_last).stride())


def _tile_peak(
    stage: ProgramStage, tiled: TiledStage, training: bool, wanted: Container[int], autocast: Autocast
) -> tuple[int, int]:
    values = stage.program.values
    image = values[stage.image]
    i, j = heaviest_tile(tiled)
    sources = {v: _fake_source(stage, v) for v in stage.sources}
    whole = tiled.tiles == 1 and stage.offsets is None
    scan = Scan(tiled, sources, image.device, image.dtype, autocast, whole=whole)

    def vector(value: int) -> Tensor:
        info = values[value]
        return torch.empty(info.shape, dtype=cast_dtype(stage, value, info.dtype, autocast), device=info.device)

    vectors = scan.prepare([vector(v) for v in stage.vectors])
    entering = _entering(stage, tiled, i, j, scan.memory_format)
    if not training:
        tile = Tile(tiled, i, j, scan.read, vectors, entering, whole=whole)
        with StorageMeter() as meter, torch.no_grad():
            meter.ignore(vectors, entering.above, entering.left, _stored_tensors(sources))
            run_tile(scan, tile, lambda *_: None)
        return meter.peak, 0
    leaves = [v for v in vectors if v in wanted]
    for value in leaves:
        vectors[value].requires_grad_()
    inputs = {v for v in stage.sources if v in wanted}
    needs = tiled.needs_grad({*leaves, *inputs})
    accumulators = [new_accumulator(r, stage) for r in stage.reductions]
    for one in accumulators:
        if one.reduction.kind == "moments":
            one.total = torch.empty(values[one.reduction.outputs[0]].shape, device=image.device)
    kept = PassState(HaloStore("device"), 0, vectors, leaves, inputs, needs, accumulators)
    grads = [torch.empty(values[v].shape, dtype=values[v].dtype, device=image.device) for v in stage.results]
    consumers = consumers_of(scan, kept, grads)
    below = _entering(stage, tiled, i + 1, j, scan.memory_format).above
    right = _entering(stage, tiled, i, j + 1, scan.memory_format).left
    stored = {v: torch.empty(values[v].shape, dtype=values[v].dtype) for v in tiled.unvalued}
    sums = {v: torch.empty(values[v].shape, dtype=values[v].dtype, device=image.device) for v in inputs}
    with StorageMeter() as meter:
        meter.ignore(vectors, entering.above, entering.left, below, right, grads, sums, stored)
        meter.ignore(_stored_tensors(sources))
        recorded = Recorded(scan, kept, (i, j), entering, scan.read, consumers, stored=stored)
        held = meter.alive
        recorded.differentiate(consumers, kept, Returned(entering, Halos(below, right)))
    return meter.peak, held


def tile_weights(tiled: TiledStage) -> np.ndarray:
    """Bytes of all blocks that each tile computes: (rows, columns) of tiles.

    Deep maps lag behind the image by half of their receptive field, and the last tile computes the rest. In networks
    with large receptive fields that is several times as much as in a tile in the middle.
    """
    stage = tiled.stage
    values = [value for local in stage.locals for value in local.op.outputs]
    sizes = [math.prod(stage.maps.size(value)) for value in values]
    pixel = [value_bytes(stage.program.values[v]) / max(1, size) for v, size in zip(values, sizes, strict=True)]
    lengths = [
        np.array([[hi - lo for lo, hi in (axis.block(value, step) for value in values)] for step in range(axis.steps)])
        for axis in (tiled.rows, tiled.cols)
    ]
    down, across = (each.reshape(len(each), len(values)).astype(float) for each in lengths)
    return (down * np.array(pixel)) @ across.T


def heaviest_tile(tiled: TiledStage) -> tuple[int, int]:
    """(row, column) of the tile with the largest blocks."""
    row, column = divmod(int(tile_weights(tiled).argmax()), tiled.cols.steps)
    return row, column


def _fake_source(stage: ProgramStage, value: int) -> Pixels:
    """A source of fake tensors: pixels of the image are created on reading, a stored map exists before."""
    info = stage.program.values[value]
    if value == stage.image:
        return _FakePixels(info.shape, info.dtype, info.device)
    tensor = torch.empty(info.shape, dtype=info.dtype, device=info.device)
    axes = stage.maps.axes[value]
    nhwc = tensor.ndim == 4 and axes == (2, 3)  # heads (N, heads, h, w, d) also have these axes
    return StoredMap(tensor.contiguous(memory_format=torch.channels_last) if nhwc else tensor, axes)


def _stored_tensors(sources: Mapping[int, Pixels]) -> list[Tensor]:
    return [source.tensor for source in sources.values() if isinstance(source, StoredMap)]


def halo_shape(stage: ProgramStage, value: int, height: int, width: int) -> list[int]:
    """Shape of a map with another height and width."""
    shape = list(stage.program.values[value].shape)
    h, w = stage.maps.axes[value]
    shape[h], shape[w] = height, width
    return shape


def _entering(stage: ProgramStage, tiled: TiledStage, i: int, j: int, memory_format: torch.memory_format) -> Halos:
    """Fake tensors for the halos that enter a tile."""
    above: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}
    for value in tiled.with_halo:
        info = stage.program.values[value]
        for side, height, width in tiled.halo_sizes(value, i, j):
            shape = halo_shape(stage, value, height, width)
            tensor = torch.empty(shape, dtype=info.dtype, device=info.device)
            if len(shape) == 4 and stage.maps.axes[value] == (2, 3):
                tensor = tensor.contiguous(memory_format=memory_format)
            (above if side == "above" else left)[value] = tensor
    return Halos(above, left)


def stock_peak(program: Program, training: bool, folds: bool = False) -> int:
    """Peak bytes of the same step in stock PyTorch on the whole image, without the inputs and parameters.

    The backward is that of a sum of the outputs. Hooks are not called.

    Args:
        folds: whether frozen norms are folded into convolutions.
    """
    ops = folded_ops(program) if folds else [(op, None) for op in program.ops]
    return _without_values(program, lambda: _stock_peak(program, ops, training))


def _stock_peak(program: Program, ops: Sequence[tuple[Op, Fold | None]], training: bool) -> int:
    values, kept, every = program.values, set(program.given_away()), program.ended([op for op, _ in ops])
    env: dict[int, Tensor] = {}
    for v in (program.image, *program.inputs, *program.vectors, *program.state()):
        made = torch.empty(values[v].shape, dtype=values[v].dtype, device=values[v].device)
        env[v] = made.requires_grad_(values[v].trainable)
    inputs = list(env.values())  # kept, so that no other tensor gets the address of one that is ignored
    with StorageMeter() as meter, torch.set_grad_enabled(training):
        meter.ignore(inputs)
        for (op, fold), ended in zip(ops, every, strict=True):
            if fold is not None:
                env.update(zip((ref.value for ref in FOLDED), fold(env), strict=True))
            if isinstance(op.func, TensorHook):
                results = [env[v] for v in op.inputs]
            else:
                with op_autocast(op, values[program.image].device):
                    results = call(op, env, [v for v in op.mutated if v not in ended])
            env.update(zip(op.outputs, results, strict=False))
            for v in ended:
                env.pop(v, None)
        roots = [env[v].sum() for v in kept if env[v].requires_grad]
        env.clear()
        if training and roots:
            torch.autograd.grad(roots, [tensor for tensor in inputs if tensor.requires_grad], allow_unused=True)
    return meter.peak
