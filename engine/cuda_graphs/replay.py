"""Tiles that are alike are captured once and replayed: the host then only copies, and runs no Python op by op.

A tile is computed on graph buffers, always at the same addresses:

    copy in    source windows, halos and, in pass 2, gradients of what the tile gives and the halos' own so far
    replay     the code of `Scan` and `Tile`, for the first tile of its kind (`signature.py`)
    copy out   halos handed on, shares of reductions, stored blocks; in pass 2 gradients

What is the same for all tiles (vectors, gradients of reductions) is copied in once per pass; gradients of vectors are
summed in graph buffers. The first tile of a kind runs on the graph buffers as it stands: that makes those it writes
to, measures and compiles kernels, warms libraries up. The second is captured. Recordings are kept across steps.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from functools import partial

import torch
from torch import Tensor

from ...kernels.choice import current_mode, reason
from ...kernels.precision import tf32_settings
from ..tiling.forward import Gathered
from ..tiling.grid import new_accumulator
from ..tiling.halos import HaloStore, Rect, area, copy_all, cut
from ..tiling.record import Kept, Read, Recorded, WindowGrads, run_tile
from ..tiling.reduce import Consumer, Consumers
from ..tiling.scan import Scan
from ..tiling.stage import TiledStage
from ..tiling.tile import Halos, Returned, Tile
from .buffers import Arena, Executor, GraphBuffers, Name
from .signature import Outline, Signature, axis_signature, translates

log = logging.getLogger("gigamorph")

MOST_KINDS = 64  # of tiles that are recorded; where strides do not divide the tile there are many
MOST_RECORDINGS = 4 * MOST_KINDS  # kept of a stage: both passes, and as many again for other outputs or settings

Kind = tuple[int, int]  # the first row and column of tiles of their signatures
Parts = Mapping[tuple[str, int], Rect]


class Recording(GraphBuffers):
    """The work of the tiles of one kind in one pass.

    Args:
        outline: what these tiles take and give; its tile is where the work believes itself to be.
        work: computes the tile on the graph buffers.
        arena: where these lie.
    """

    def __init__(self, outline: Outline, work: Callable[[Recording], None], arena: Arena):
        super().__init__(arena)
        self.outline, self.i, self.j = outline, outline.i, outline.j
        self.run = partial(work, self)
        self.replay: Callable[[], None] | None = None
        self.seen = False

    def __call__(self, tensors: Mapping[Name, Tensor], executor: Executor) -> None:
        """Do the work on these inputs."""
        self.load(tensors)
        if self.seen and self.replay is None:
            self.replay = self._captured(executor)
        (self.replay or self.run)()
        self.seen = True

    def _captured(self, executor: Executor) -> Callable[[], None]:
        """The work as a graph; as it is where it cannot be captured, which is told once per cause."""
        try:
            return executor.capture(self.run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _warn_once(reason(error))
            return self.run

    def halos(self, kind: str, parts: Parts) -> Halos:
        """The inputs (kind, side, value), as halos of which only these parts are here."""
        here = Halos({}, {})
        for (side, value), rect in parts.items():
            tensor = self.inputs.get((kind, side, value))
            if tensor is not None:
                getattr(here, side)[value] = tensor
                top, _, left, _ = self.outline.place(side, value, rect, self.i, self.j)
                here.origin[side, value] = top, left
        return here

    def pixels(self, source: int, rect: Rect) -> Tensor:
        """A window of a source."""
        return self.inputs["window", source, self.outline.relative("source", source, rect)]


@functools.cache
def _warn_once(cause: str) -> None:
    log.warning("a tile cannot be captured as a CUDA graph and runs op by op: %s", cause)


class Bench:
    """The recordings made under one set of settings, and the graph buffers that they share.

    Attributes:
        step: what is the same for all tiles of a pass.
        sums: gradients of the vectors, summed over the tiles of pass 2.
    """

    def __init__(self, tiled: TiledStage, scan: Scan, arena: Arena):
        self.tiled, self.arena = tiled, arena
        # Not `scan`: that would keep its image alive.
        self.scan = Scan(tiled, {}, scan.device, scan.dtype, scan.autocast)
        self.recordings: dict[Hashable, Recording] = {}
        self.step = GraphBuffers()
        self.sums: dict[int, Tensor] = {}

    def recording(self, i: int, j: int, key: Hashable, work: Callable[[Recording], None]) -> Recording:
        """The recording of a key, which is made for tile (i, j) if there is none."""
        if key not in self.recordings:
            while len(self.recordings) >= MOST_RECORDINGS:
                del self.recordings[next(iter(self.recordings))]  # the oldest
            self.recordings[key] = Recording(Outline(self.tiled, i, j, self.scan.taken), work, self.arena)
        return self.recordings[key]

    def vectors(self) -> dict[int, Tensor]:
        """The vectors; new tensors in the same memory, so that autograd knows nothing of them from earlier runs."""
        return {v: self.step.inputs["vector", v].detach() for v in self.tiled.stage.vectors}


class Replays:
    """The recordings of one stage; the `Replay` of its scans. Stages of one network share an arena."""

    def __init__(self, tiled: TiledStage, executor: Executor, arena: Arena):
        self.tiled, self.executor, self.arena = tiled, executor, arena
        self.benches: dict[Hashable, Bench] = {}
        self.rows, self.cols = (_first_alike(tiled, axis) for axis in (0, 1))
        counts = kinds(self.rows, self.cols)
        self.recorded = {kind for kind, _ in counts.most_common(MOST_KINDS)}

    def kind(self, i: int, j: int) -> Kind | None:
        """The kind of a tile that is replayed."""
        kind = (self.rows[i], self.cols[j])
        return kind if kind in self.recorded else None  # pyright: ignore[reportReturnType]

    def _bench(self, scan: Scan, vectors: Mapping[int, Tensor]) -> Bench | None:
        if not self.recorded or any(vector.device.type != scan.device.type for vector in vectors.values()):
            return None  # a number on the host would be captured as it is now
        settings = (
            current_mode(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            tf32_settings(),
        )
        key = scan.device, scan.dtype, scan.autocast, settings
        if key not in self.benches:
            self.benches.clear()  # other settings: what was recorded under the former ones is as large as this will be
            self.benches[key] = Bench(self.tiled, scan, self.arena)
        return self.benches[key]

    def forward(self, scan: Scan, vectors: Mapping[int, Tensor]) -> ReplayedForward | None:
        """Pass 1 of a step."""
        bench = self._bench(scan, vectors)
        return None if bench is None else ReplayedForward(self, bench, vectors)

    def backward(
        self, scan: Scan, kept: Kept, consumers: Consumers, stored: Mapping[int, Tensor]
    ) -> ReplayedBackward | None:
        """Pass 2 of a step."""
        bench = self._bench(scan, kept.vectors)
        return None if bench is None else ReplayedBackward(self, bench, kept, consumers, stored)


def _first_alike(tiled: TiledStage, axis: int) -> list[int | None]:
    """For each row (column) of tiles the first one like it; None for those that cannot be replayed."""
    steps = (tiled.rows, tiled.cols)[axis].steps
    first: dict[Signature, int] = {}
    signatures = [axis_signature(tiled, axis, step) if translates(tiled) else None for step in range(steps)]
    return [None if s is None else first.setdefault(s, step) for step, s in enumerate(signatures)]


def kinds(rows: list[int | None], cols: list[int | None]) -> Counter[Kind]:
    """How many tiles there are of each kind."""
    both = itertools.product(Counter(rows).items(), Counter(cols).items())
    return Counter({(i, j): m * n for (i, m), (j, n) in both if i is not None and j is not None})


def buffer_bytes(tiled: TiledStage, training: bool) -> int:
    """What the graph buffers of a stage's tile in the middle take; 0 if it cannot be replayed.

    The vectors and the sums of their gradients, which all tiles share, are not included.
    """
    if not translates(tiled):
        return 0
    values, maps = tiled.stage.program.values, tiled.stage.maps

    def size(value: int, rect: Rect) -> int:
        height, width = maps.size(value)
        return area(rect) * math.prod(values[value].shape) // (height * width) * values[value].dtype.itemsize

    i, j = tiled.rows.steps // 2, tiled.cols.steps // 2
    outline = Outline(tiled, i, j, {*tiled.reductions, *tiled.stage.stored})
    windows = sum(size(source, rect) for source, rect in outline.windows)
    entering = sum(size(value, rect) for (_, value), rect in outline.entering.items())
    leaving = sum(size(value, rect) for (_, value), rect in outline.leaving.items())
    stored = sum(size(value, tiled.block(value, i, j)) for value in tiled.stage.stored)
    return (2 if training else 1) * (windows + entering + stored) + leaving


def _entering(recording: Recording, i: int, j: int, read: Read, halos: Halos) -> dict[Name, Tensor]:
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
    """Views of parts of those halos (or gradients) that are there."""
    return {
        (kind, side, value): cut(getattr(halos, side)[value], tiled.axes(value), outline.place(side, value, rect, i, j))
        for (side, value), rect in parts.items()
        if value in getattr(halos, side)
    }


class ReplayedForward:
    """Tiles of pass 1 of one step."""

    def __init__(self, replays: Replays, bench: Bench, vectors: Mapping[int, Tensor]):
        self.replays, self.bench = replays, bench
        bench.step.load({("vector", v): vector.detach() for v, vector in vectors.items()})

    def __call__(self, i: int, j: int, read: Read, halos: Halos, gathered: Gathered) -> bool:
        kind = self.replays.kind(i, j)
        if kind is None:
            return False
        recording = self.bench.recording(i, j, ("forward", kind), partial(_compute, self.bench))
        recording(_entering(recording, i, j, read, halos), self.replays.executor)
        self._take(recording, i, j, gathered)
        return True

    def _take(self, recording: Recording, i: int, j: int, gathered: Gathered) -> None:
        """Copy out what a tile has given."""
        tiled, outline = self.bench.tiled, recording.outline
        pairs: list[tuple[Tensor, Tensor]] = []
        shares: dict[int, list[Tensor]] = {}
        for name, tensor in recording.outputs.items():
            if name[0] == "share":
                shares.setdefault(name[1], []).append(tensor.clone())
            elif name[0] == "stored":
                pairs.append((gathered.room_in_store(name[1], i, j, tensor), tensor))
            else:
                side, value = name
                rect = outline.place(side, value, outline.leaving[side, value], i, j)
                pairs.append((gathered.room_in_halo(side, value, rect, i, j, tensor), tensor))
        copy_all(pairs)
        for number, share in shares.items():
            value = tiled.stage.reductions[number].value
            width = tiled.stage.maps.size(value)[1]
            gathered.accumulators[number].merge(i, j, tuple(share), tiled.block(value, i, j), width)


def _compute(bench: Bench, recording: Recording) -> None:
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
    tile = Tile(tiled, recording.i, recording.j, recording.pixels, bench.vectors(), halos)
    with torch.no_grad(), bench.scan.autocast.enter():
        run_tile(bench.scan, tile, publish)


class ReplayedBackward:
    """Tiles of pass 2 of one step. The sums of `kept` become graph buffers, which are used again in the next step."""

    def __init__(self, replays: Replays, bench: Bench, kept: Kept, consumers: Consumers, stored: Mapping[int, Tensor]):
        self.replays, self.bench, self.kept, self.consumers, self.stored = replays, bench, kept, consumers, stored
        if bench.sums:
            torch._foreach_zero_(list(bench.sums.values()))
        kept.sums = bench.sums
        step: dict[Name, Tensor] = {("vector", v): vector.detach() for v, vector in kept.vectors.items()}
        self.form: list[tuple[int, int, tuple[bool, ...], bool]] = []  # of consumers: what is None from step to step
        for value, taken in consumers.items():
            for number, consumer in enumerate(taken):
                self.form.append(
                    (value, number, tuple(grad is not None for grad in consumer.grads), bool(consumer.shares))
                )
                if consumer.accumulator is None or consumer.accumulator.reduction.grid is not None:
                    continue  # a stored map, rows or columns: a part of the gradient for each tile
                for place, grad in enumerate(consumer.grads):
                    if grad is not None:
                        step["grad", value, number, place] = grad
                if consumer.of_block:
                    assert consumer.accumulator.total is not None
                    step["total", value, number] = consumer.accumulator.total
        bench.step.load(step)

    def __call__(self, i: int, j: int, read: Read, halos: Halos, returned: Returned) -> WindowGrads | None:
        kind, kept, tiled = self.replays.kind(i, j), self.kept, self.bench.tiled
        if kind is None:
            return None
        key = "backward", kind, tuple(self.form), tuple(kept.leaves), frozenset(kept.sources)
        work = partial(_differentiate, self.bench, self.form, kept.leaves, kept.sources, kept.needs)
        recording = self.bench.recording(i, j, key, work)
        outline = recording.outline
        grads = _parts("grad", tiled, outline, outline.entering, i, j, returned.grads)
        back = _parts("back", tiled, outline, outline.leaving, i, j, returned.handed_back)
        tensors = _entering(recording, i, j, read, halos) | grads | back | self._of_blocks(i, j)
        recording(tensors, self.replays.executor)
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
    bench: Bench,
    form: list[tuple[int, int, tuple[bool, ...], bool]],
    leaves: list[int],
    sources: set[int],
    needs: set[int],
    recording: Recording,
) -> None:
    """The work of a tile in pass 2."""
    scan, outline, vectors = bench.scan, recording.outline, bench.vectors()
    for value in leaves:
        vectors[value].requires_grad_()
    kept = Kept(HaloStore("device"), 0, vectors, leaves, sources, needs, [], sums=bench.sums)
    consumers = _buffered_consumers(bench, form, recording)
    place, entering = (recording.i, recording.j), recording.halos("halo", outline.entering)
    stored = {name[1]: tensor for name, tensor in recording.inputs.items() if name[0] == "kept"}
    with scan.autocast.enter():
        recorded = Recorded(scan, kept, place, entering, recording.pixels, consumers, stored=stored, alone=True)
    returned = Returned(recording.halos("grad", outline.entering), recording.halos("back", outline.leaving))
    for (source, rect), grad in recorded.differentiate(consumers, kept, returned):
        recording.give(("window", source, outline.relative("source", source, rect)), grad)


def _buffered_consumers(
    bench: Bench, form: list[tuple[int, int, tuple[bool, ...], bool]], recording: Recording
) -> Consumers:
    """The consumers of a step with graph buffers in the place of theirs."""
    stage, step = bench.tiled.stage, bench.step.inputs
    consumers: Consumers = {}
    for value, number, there, shared in form:
        numbers = bench.tiled.reductions.get(value, ())
        if number >= len(numbers):  # after the reductions of a map comes the map itself
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
