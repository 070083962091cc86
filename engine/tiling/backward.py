"""Pass 2 of the scan: recomputes the tiles in reverse row-major order with autograd on and differentiates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from .forward import ForwardReplays, passed_on
from .halos import copies, cut, memory_order
from .record import PassState, Read, Recorded, WindowGrads, consumers_of, has_grad
from .reduce import Consumers
from .scan import Reader, Scan
from .stored_maps import can_be_taken, has_readers, let_rows_go, new_map, on_pages
from .tile import Halos, Returned


class BackwardReplay(Protocol):
    """Computes and differentiates a tile of pass 2 by replay instead of op by op; returns None if it cannot."""

    def __call__(self, i: int, j: int, read: Read, halos: Halos, returned: Returned) -> WindowGrads | None: ...


class Replay(ForwardReplays, Protocol):
    """Replays tiles that are equivalent to earlier ones, in both passes (see `cuda_graphs/`)."""

    def backward(
        self, scan: Scan, kept: PassState, consumers: Consumers, stored: Mapping[int, Tensor]
    ) -> BackwardReplay | None:
        """Returns a replay for pass 2. It may put its own tensors into `kept.sums` and reuse them in the next step."""
        ...


class BackwardPass:
    """One backward of a stage.

    Args:
        scan: the same scan as in pass 1.
        kept: the state that pass 1 returned.
        vectors: the tensors of `stage.vectors`.
        stored: maps that pass 1 stored and pass 2 reads, by value number.
        replay: replays tiles that are equivalent to earlier ones.

    Attributes:
        touched: sources for which at least one tile returned a gradient.
    """

    def __init__(
        self,
        scan: Scan,
        kept: PassState,
        vectors: Sequence[Tensor],
        stored: Mapping[int, Tensor],
        replay: Replay | None = None,
    ):
        self.scan, self.kept, self.stored, self.replay = scan, kept, stored, replay
        self.touched: set[int] = set()
        self._given: set[tuple[int, tuple[int, int, int, int]]] = set()  # blocks with a gradient
        self._awaited: dict[int, Callable[[], Tensor]] = {}  # creates a gradient if no tile does
        kept.sums = {}
        if not kept.vectors:
            kept.vectors = scan.prepare(vectors, kept.leaves)

    def source_grads(self, sources: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], set[int]]:
        """Tensors for the gradients of sources, and the set of new ones, which are returned to autograd.

        `run` adds the gradients that a single tile creates as a whole.
        """
        scan, maps = self.scan, self.scan.maps

        def make(value: int, source: Tensor) -> Tensor:
            zero, limit = value not in scan.overwritten, scan.memory_limit
            later = zero and limit is not None and not limit.has_room(source.nbytes)
            return new_map(source, None, maps.place_of(value), zero=zero, later=later)

        found, made = {}, set(sources)
        for value, source in sources.items():
            if value in maps.readers and self._may_be_made(value):
                self._awaited[value] = partial(make, value, source)
            elif value in maps.readers:
                found[value], new = maps.gradients.begin(value, partial(make, value, source))
                made -= set() if new else {value}
            else:
                found[value] = make(value, source)
        return found, made

    def _may_be_made(self, value: int) -> bool:
        """Whether a single tile may create the whole gradient of a source, to which no other stage adds."""
        scan = self.scan
        here = scan.maps.place_of(value) == "device" and not on_pages(scan.device)
        return here and value in scan.overwritten and scan.tiled.tiles == 1

    def run(
        self, grads: Sequence[Tensor | None], source_grads: dict[int, Tensor], last: bool = False
    ) -> dict[int, Tensor]:
        """Returns the gradients of the vectors that require one, by value number; fills `source_grads` in place.

        Args:
            grads: gradients of the reductions and of the stored maps; None for zero.
            source_grads: tensors like the sources that require a gradient; zeros except for `scan.overwritten`.
            last: whether this is the last backward of this pass; then maps are freed row by row after their last read.
        """
        scan, kept, tiled = self.scan, self.kept, self.scan.tiled
        consumers = consumers_of(scan, kept, grads)
        replay = None if self.replay is None else self.replay.backward(scan, kept, consumers, self.stored)
        if tiled.tiles > 1 and not all(map(has_grad, chain.from_iterable(consumers.values()))):
            kept.recorded.clear()  # these graphs expect a gradient for every consumer
        grads_below: dict[int, Tensor] = {}
        ending = self._ending(grads) if last else []
        files = [*self.stored.values(), *grads, *source_grads.values()]
        if scan.memory_limit is not None:
            scan.memory_limit.must_keep(kept)  # `recorded` now determines which tiles are recomputed
        again = [tile for tile in reversed(scan.tiles) if tile not in kept.recorded]
        with scan.watched(), scan.reader(again) as reader:
            for i in reversed(range(tiled.rows.steps)):
                above = {v: kept.store.get(h) for v, h in kept.above[i].items()}
                grads_above = self._returned(0, i, above, grads_below)
                grads_right: dict[int, Tensor] = {}
                for j in reversed(range(tiled.cols.steps)):
                    left = {v: kept.store.get(h) for v, h in kept.left[i, j].items()}
                    grads_left = self._returned(1, j, left, grads_right)
                    returned = Returned(Halos(grads_above, grads_left), Halos(grads_below, grads_right))
                    windows, own = self._tile(i, j, Halos(above, left), returned, consumers, reader, replay)
                    self._add_to_sources(source_grads, windows, own)
                    grads_right = grads_left
                    scan.after_tile("backward", i, j, tiled.tiles - (i * tiled.cols.steps + j), files)
                for value, tensor in ending if scan.memory_limit is None or scan.memory_limit.near else ():
                    let_rows_go(tensor, tiled.axes(value), tiled.block(value, i, 0)[0])
                grads_below = grads_above
        self._zero_the_rest(source_grads)
        if not kept.recorded:
            kept.vectors = {}
        return kept.sums if replay is None else copies(kept.sums)

    def _tile(
        self,
        i: int,
        j: int,
        halos: Halos,
        returned: Returned,
        consumers: Consumers,
        reader: Reader,
        replay: BackwardReplay | None,
    ) -> tuple[WindowGrads, bool]:
        """Differentiate a tile, recomputing it if it was not retained; also returns whether it ran without replay."""
        scan, kept = self.scan, self.kept
        recorded = kept.recorded.pop((i, j), None)
        if recorded is None:
            reader.advance()
            windows = None if replay is None else replay(i, j, reader.read, halos, returned)
            if windows is not None:
                return windows, False
            with scan.tile_state(kept.seed, i, j, kept.drawn):
                recorded = Recorded(scan, kept, (i, j), halos, reader.read, consumers, stored=self.stored)
        return recorded.differentiate(consumers, kept, returned), True

    def _ending(self, grads: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
        """The stored maps, and their gradients, that are not read after this backward."""
        own = dict(zip(self.scan.tiled.stage.results, grads, strict=True))
        pairs = [(v, t) for v, t in self.stored.items() if not has_readers(t)]
        return [(v, t) for v, t in (*pairs, *own.items()) if v in self.scan.maps.readers and t is not None]

    def _add_to_sources(self, source_grads: dict[int, Tensor], windows: WindowGrads, own: bool) -> None:
        """Add or copy a tile's gradients into `source_grads`; with `own`, a gradient may be used without a copy."""
        maps = self.scan.tiled.stage.maps
        for (source, rect), grad in windows:
            make = self._awaited.pop(source, None)
            if make is not None:
                taken = own and can_be_taken(grad, maps.shape(source), memory_order(grad))
                source_grads[source] = grad if taken else make()
            if source not in source_grads:  # no gradient reaches this source
                continue
            self.touched.add(source)
            place = cut(source_grads[source], maps.axes[source], rect)
            if source in self.scan.overwritten:
                if source_grads[source] is not grad:
                    place.copy_(grad)
                self._given.add((source, rect))
            else:
                place.add_(grad.to(place.device))

    def _zero_the_rest(self, source_grads: dict[int, Tensor]) -> None:
        """Write zeros where no tile returned a gradient of an overwritten source."""
        tiled = self.scan.tiled
        source_grads.update((source, make()) for source, make in self._awaited.items())
        for source in self.scan.overwritten & source_grads.keys():
            for tile in self.scan.tiles:
                if (source, rect := tiled.block(source, *tile)) not in self._given:
                    cut(source_grads[source], tiled.axes(source), rect).zero_()

    def _returned(
        self, along: int, step: int, halos: dict[int, Tensor], handed_back: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """Gradients of the halos that enter a step of rows (`along` 0) or columns (1), to which the step adds.

        They start from zero, plus the returned gradients of halos that the step passed on unchanged.
        """
        tiled = self.scan.tiled
        axis = (tiled.rows, tiled.cols)[along]
        grads = {v: torch.zeros_like(t) for v, t in halos.items() if v in self.kept.needs}
        for value, grad in grads.items():
            lo, end, start, _ = passed_on(axis, value, step)
            if value in handed_back and lo < end:
                dim = tiled.axes(value)[along]
                grad.narrow(dim, lo - start, end - lo).add_(handed_back[value].narrow(dim, 0, end - lo))
        return grads
