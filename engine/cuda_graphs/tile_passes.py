"""Both passes of a step by recordings: the copies to and from graph buffers for each tile, and the captured work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..tiling.forward import Gathered
from ..tiling.grid import new_accumulator
from ..tiling.halos import HaloStore, copy_all, cut
from ..tiling.record import PassState, Read, Recorded, WindowGrads, run_tile
from ..tiling.reduce import Consumer, Consumers
from ..tiling.stage import TiledStage
from ..tiling.tile import Halos, Returned, Tile
from ..torch_private import foreach_zero
from .buffers import Executor, Name
from .recording import Parts, RecordingPool, TileRecording
from .signature import Outline

Kind = tuple[int, int]  # the first row and column of tiles of their signatures
Kinds = Callable[[int, int], Kind | None]  # the kind of a tile; None if it is not replayed


def _entering(recording: TileRecording, i: int, j: int, read: Read, halos: Halos) -> dict[Name, Tensor]:
    """The source windows and halos that tile (i, j) reads."""
    outline, tiled = recording.outline, recording.outline.tiled
    windows = {
        ("window", source, rect): read(source, outline.place("source", source, rect, i, j))
        for source, rect in outline.windows
    }
    return windows | _parts("halo", tiled, outline, outline.entering, i, j, halos)


def _parts(
    kind: str, tiled: TiledStage, outline: Outline, parts: Parts, i: int, j: int, halos: Halos
) -> dict[Name, Tensor]:
    """Views of the given parts of halos (or gradients), as far as they exist."""
    return {
        (kind, side, value): cut(getattr(halos, side)[value], tiled.axes(value), outline.place(side, value, rect, i, j))
        for (side, value), rect in parts.items()
        if value in getattr(halos, side)
    }


class ReplayedForward:
    """Replays tiles in pass 1 of one step."""

    def __init__(self, bench: RecordingPool, kinds: Kinds, executor: Executor, vectors: Mapping[int, Tensor]):
        self.bench, self.kinds, self.executor = bench, kinds, executor
        bench.step.load({("vector", v): vector.detach() for v, vector in vectors.items()})

    def __call__(self, i: int, j: int, read: Read, halos: Halos, gathered: Gathered) -> bool:
        kind = self.kinds(i, j)
        if kind is None:
            return False
        recording = self.bench.recording(i, j, ("forward", kind), partial(_compute, self.bench))
        recording(_entering(recording, i, j, read, halos), self.executor)
        self._take(recording, i, j, gathered)
        return True

    def _take(self, recording: TileRecording, i: int, j: int, gathered: Gathered) -> None:
        """Copy the outputs of a tile from the graph buffers."""
        tiled, outline = self.bench.tiled, recording.outline
        pairs: list[tuple[Tensor, Tensor]] = []
        shares: dict[int, list[Tensor]] = {}
        for name, tensor in recording.outputs.items():
            if name[0] == "share":
                shares.setdefault(name[1], []).append(tensor.clone())
            elif name[0] == "stored":
                pairs.append((gathered.stored_view(name[1], i, j, tensor), tensor))
            else:
                side, value = name
                rect = outline.place(side, value, outline.leaving[side, value], i, j)
                pairs.append((gathered.halo_view(side, value, rect, i, j, tensor), tensor))
        copy_all(pairs)
        for number, share in shares.items():
            value = tiled.stage.reductions[number].value
            width = tiled.stage.maps.size(value)[1]
            gathered.accumulators[number].merge(i, j, tuple(share), tiled.block(value, i, j), width)


def _compute(bench: RecordingPool, recording: TileRecording) -> None:
    """The work of a tile in pass 1."""
    tiled, stage = bench.tiled, bench.tiled.stage
    accumulators = [new_accumulator(r, stage) for r in stage.reductions]

    def publish(tile: Tile, value: int, block: Tensor) -> None:
        rect = tiled.block(value, tile.i, tile.j)
        for number in tiled.reductions.get(value, ()):
            shared = tile.shares.get(value)
            for place, part in enumerate(accumulators[number].share(block, shared, rect, look=False)):
                recording.give(("share", number, place), part)
        if value in stage.stored:
            recording.give(("stored", value), block)
        for side, own, _ in tile.hands_on(value) if value in tiled.with_halo else ():
            recording.give((side, value), cut(block, tiled.axes(value), own))

    halos = recording.halos("halo", recording.outline.entering)
    place, whole = (recording.i, recording.j), bench.scan.whole
    tile = Tile(tiled, *place, recording.pixels, bench.vectors(), halos, whole=whole)
    with torch.no_grad(), bench.scan.autocast.enter():
        run_tile(bench.scan, tile, publish)


class ReplayedBackward:
    """Replays tiles in pass 2 of one step. The sums of `kept` become graph buffers that later steps reuse."""

    def __init__(
        self,
        bench: RecordingPool,
        kinds: Kinds,
        executor: Executor,
        kept: PassState,
        consumers: Consumers,
        stored: Mapping[int, Tensor],
    ):
        self.bench, self.kinds, self.executor = bench, kinds, executor
        self.kept, self.consumers, self.stored = kept, consumers, stored
        if bench.sums:
            foreach_zero(list(bench.sums.values()))
        kept.sums = bench.sums
        step: dict[Name, Tensor] = {("vector", v): vector.detach() for v, vector in kept.vectors.items()}
        self.form: list[tuple[int, int, tuple[bool, ...], bool]] = []  # consumers and their gradients
        for value, taken in consumers.items():
            for number, consumer in enumerate(taken):
                self.form.append(
                    (value, number, tuple(grad is not None for grad in consumer.grads), bool(consumer.shares))
                )
                if consumer.accumulator is None or consumer.accumulator.reduction.grid is not None:
                    continue  # stored maps, rows and columns: each tile gets a part of the gradient
                for place, grad in enumerate(consumer.grads):
                    if grad is not None:
                        step["grad", value, number, place] = grad
                if consumer.of_block:
                    assert consumer.accumulator.total is not None
                    step["total", value, number] = consumer.accumulator.total
        bench.step.load(step)

    def __call__(self, i: int, j: int, read: Read, halos: Halos, returned: Returned) -> WindowGrads | None:
        kind, kept, tiled = self.kinds(i, j), self.kept, self.bench.tiled
        if kind is None:
            return None
        key = "backward", kind, tuple(self.form), tuple(kept.leaves), frozenset(kept.sources)
        work = partial(_differentiate, self.bench, self.form, kept.leaves, kept.sources, kept.needs)
        recording = self.bench.recording(i, j, key, work)
        outline = recording.outline
        grads = _parts("grad", tiled, outline, outline.entering, i, j, returned.grads)
        back = _parts("back", tiled, outline, outline.leaving, i, j, returned.handed_back)
        tensors = _entering(recording, i, j, read, halos) | grads | back | self._of_blocks(i, j)
        recording(tensors, self.executor)
        copy_all((grad, recording.inputs[name]) for name, grad in grads.items())
        return [
            ((source, outline.place("source", source, rect, i, j)), grad)
            for (_, source, rect), grad in recording.outputs.items()
        ]

    def _of_blocks(self, i: int, j: int) -> dict[Name, Tensor]:
        """Per tile: gradients of stored blocks, stored blocks themselves, and the shares of maxima."""
        tiled, found = self.bench.tiled, {}
        for value, number, there, shared in self.form:
            consumer = self.consumers[value][number]
            if not any(there) or not tiled.computes(value, i, j):
                continue
            place = tiled.axes(value), tiled.block(value, i, j)
            if consumer.accumulator is not None and consumer.accumulator.reduction.grid is not None:
                parts: dict[Name, Tensor | None] = {("grad", value, number, k): g for k, g in enumerate(consumer.grads)}
                parts["total", value, number] = consumer.accumulator.total if consumer.of_block else None
                rect = place[1]
                found.update((n, consumer.accumulator.part_of(t, rect)) for n, t in parts.items() if t is not None)
            if consumer.accumulator is None:
                found["stored", value] = cut(consumer.grads[0], *place)  # pyright: ignore[reportArgumentType]
            elif consumer.of_block and value in tiled.unvalued:
                found["kept", value] = cut(self.stored[value], *place)
            elif shared:
                found["share", value, number] = consumer.shares[i, j]
        return found


def _differentiate(
    bench: RecordingPool,
    form: list[tuple[int, int, tuple[bool, ...], bool]],
    leaves: list[int],
    sources: set[int],
    needs: set[int],
    recording: TileRecording,
) -> None:
    """The work of a tile in pass 2."""
    scan, outline, vectors = bench.scan, recording.outline, bench.vectors()
    for value in leaves:
        vectors[value].requires_grad_()
    kept = PassState(HaloStore("device"), 0, vectors, leaves, sources, needs, [], sums=bench.sums)
    consumers = _buffered_consumers(bench, form, recording)
    place, entering = (recording.i, recording.j), recording.halos("halo", outline.entering)
    stored = {name[1]: tensor for name, tensor in recording.inputs.items() if name[0] == "kept"}
    with scan.autocast.enter():
        recorded = Recorded(scan, kept, place, entering, recording.pixels, consumers, stored=stored, alone=True)
    returned = Returned(recording.halos("grad", outline.entering), recording.halos("back", outline.leaving))
    for (source, rect), grad in recorded.differentiate(consumers, kept, returned):
        recording.give(("window", source, outline.relative("source", source, rect)), grad)


def _buffered_consumers(
    bench: RecordingPool, form: list[tuple[int, int, tuple[bool, ...], bool]], recording: TileRecording
) -> Consumers:
    """The consumers of a step, with graph buffers instead of their tensors."""
    stage, step = bench.tiled.stage, bench.step.inputs
    consumers: Consumers = {}
    for value, number, there, shared in form:
        numbers = bench.tiled.reductions.get(value, ())
        if number >= len(numbers):  # the map itself follows its reductions
            consumers.setdefault(value, []).append(Consumer(None, (recording.inputs.get(("stored", value)),), {}))
            continue
        reduction = stage.reductions[numbers[number]]
        accumulator = new_accumulator(reduction, stage)
        given = step if reduction.grid is None else recording.inputs
        accumulator.total = given.get(("total", value, number))
        grads = tuple(given.get(("grad", value, number, k)) if wanted else None for k, wanted in enumerate(there))
        share = recording.inputs.get(("share", value, number))
        shares = {(recording.i, recording.j): share} if shared and share is not None else {}
        consumers.setdefault(value, []).append(Consumer(accumulator, grads, shares))
    return consumers
