"""Pass 2: the tiles in reverse raster order, computed again with autograd on and differentiated."""

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
    """Computes and differentiates a tile of pass 2 in another way than op by op; None if it cannot."""

    def __call__(self, i: int, j: int, read: Read, halos: Halos, returned: Returned) -> WindowGrads | None: ...


class Replay(ForwardReplays, Protocol):
    """What computes tiles that are like earlier ones (cuda_graphs/), in both passes."""

    def backward(
        self, scan: Scan, kept: PassState, consumers: Consumers, stored: Mapping[int, Tensor]
    ) -> BackwardReplay | None:
        """May put tensors of its own into `kept.sums`, which are used again in the next step."""
        ...


class BackwardPass:
    """One backward of a stage.

    Args:
        scan: as in pass 1.
        kept: what that has left.
        vectors: the tensors of `stage.vectors`.
        stored: the maps that pass 1 has stored and that are read again.
        replay: computes tiles that are like earlier ones in another way than op by op.

    Attributes:
        touched: sources that some tile has a gradient for.
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
        self._given: set[tuple[int, tuple[int, int, int, int]]] = set()  # parts of `overwritten` that have a gradient
        self._awaited: dict[int, Callable[[], Tensor]] = {}  # sources whose gradient the only tile makes, or this
        kept.sums = {}
        if not kept.vectors:
            kept.vectors = scan.prepare(vectors, kept.leaves)

    def source_grads(self, sources: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], set[int]]:
        """Tensors for the gradients of sources, and which of them are new: those are given to autograd.

        `run` adds those that the only tile makes.
        """
        scan, maps = self.scan, self.scan.maps

        def make(value: int, source: Tensor) -> Tensor:
            zero, limit = value not in scan.overwritten, scan.memory_limit
            later = zero and limit is not None and not limit.has_room(source.nbytes)
            return new_map(source, None, maps.place_of(value), zero=zero, page_pool=scan.page_pool, later=later)

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
        """Whether a tile may make a source's gradient as a whole, which nobody adds to."""
        scan = self.scan
        here = scan.maps.place_of(value) == "device" and not on_pages(scan.device)
        return here and value in scan.overwritten and scan.tiled.tiles == 1

    def run(
        self, grads: Sequence[Tensor | None], source_grads: dict[int, Tensor], last: bool = False
    ) -> dict[int, Tensor]:
        """Gradients of the vectors that want one, by value number; those of sources are put into `source_grads`.

        Args:
            grads: gradients of the reductions and of the stored maps, None for zero.
            source_grads: tensors like the sources that want a gradient; zeros but for `scan.overwritten`.
            last: there is no further backward of this pass: maps that nobody else will read may go while it runs.
        """
        scan, kept, tiled = self.scan, self.kept, self.scan.tiled
        consumers = consumers_of(scan, kept, grads)
        replay = None if self.replay is None else self.replay.backward(scan, kept, consumers, self.stored)
        if tiled.tiles > 1 and not all(map(has_grad, chain.from_iterable(consumers.values()))):
            kept.recorded.clear()  # what hands gradients on was laid out for all of them
        grads_below: dict[int, Tensor] = {}
        ending = self._ending(grads) if last else []
        files = [*self.stored.values(), *grads, *source_grads.values()]
        if scan.memory_limit is not None:
            scan.memory_limit.must_keep(kept)  # from here on it says which tiles are read again
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
        """Differentiate a tile, which is computed again if it was not retained; whether the results are no replay's."""
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
        """The maps that nobody reads after this backward: what was stored, and the gradients of that."""
        own = dict(zip(self.scan.tiled.stage.results, grads, strict=True))
        pairs = [(v, t) for v, t in self.stored.items() if not has_readers(t)]
        return [(v, t) for v, t in (*pairs, *own.items()) if v in self.scan.maps.readers and t is not None]

    def _add_to_sources(self, source_grads: dict[int, Tensor], windows: WindowGrads, own: bool) -> None:
        """Put the gradients of a tile's windows of the sources where they belong; those that are its `own` may stay."""
        maps = self.scan.tiled.stage.maps
        for (source, rect), grad in windows:
            make = self._awaited.pop(source, None)
            if make is not None:
                taken = own and can_be_taken(grad, maps.shape(source), memory_order(grad))
                source_grads[source] = grad if taken else make()
            if source not in source_grads:  # the gradients that there are do not reach it
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
        """Zeros where no tile has given a gradient of a source that is not added up."""
        tiled = self.scan.tiled
        source_grads.update((source, make()) for source, make in self._awaited.items())
        for source in self.scan.overwritten & source_grads.keys():
            for tile in self.scan.tiles:
                if (source, rect := tiled.block(source, *tile)) not in self._given:
                    cut(source_grads[source], tiled.axes(source), rect).zero_()

    def _returned(
        self, along: int, step: int, halos: dict[int, Tensor], handed_back: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """Zeros for the gradients of halos that enter a step of rows (0) or columns (1).

        To them is added what comes back for those that it only passed on.
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
