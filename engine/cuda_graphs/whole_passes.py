"""Captures whole passes of a step with few tiles, so that the host only launches two replays.

Recordings of equivalent tiles (`replay.py`) serve any number of tiles. But the host copies the halos between them, and
a tile whose graph is retained runs op by op. With few tiles, both passes are captured as a whole, including all tiles
and all copies between them:

    copy in    the image and the vectors; in pass 2 the gradients of the reductions
    replay     `ForwardPass.run`; in pass 2 `BackwardPass.run`
    copy out   values of the reductions; in pass 2 the sums of the vectors' gradients

The first step runs op by op, which tunes and compiles kernels and warms up libraries; the second is captured. The halos
and graphs of retained tiles that pass 1 stores for pass 2 are in memory that nothing else uses. So pass 1 is not
replayed while a forward waits for its backward: other forwards run op by op.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial

from torch import Tensor

from ..tiling.backward import BackwardPass
from ..tiling.forward import ForwardPass
from ..tiling.halos import copies
from ..tiling.record import PassState
from ..tiling.scan import Scan, StoredMap
from ..tiling.stage import TiledStage
from .buffers import Executor, GraphBuffers, captured_if_it_fits
from .recording import settings
from .signature import axis_signature, translates

MOST_TILES = 16  # tiles of an image; about 700 launches are captured for each
MEMORY_SHARE = 0.5  # share of the free memory for a captured step, whose memory is not freed between steps

Form = tuple[bool, ...]  # which results of a stage have gradients


def can_be_captured(tiled: TiledStage) -> bool:
    """Whether both passes of a stage are the same device work in each step, and return only reductions."""
    stage = tiled.stage
    plain = stage.sources == [stage.image] and not stage.stored and stage.offsets is None
    sums = all(reduction.kind != "moments" for reduction in stage.reductions)
    if not (plain and sums and tiled.tiles <= MOST_TILES and translates(tiled)):
        return False
    axes = ((0, tiled.rows), (1, tiled.cols))
    return all(axis_signature(tiled, axis, n) is not None for axis, schedule in axes for n in range(schedule.steps))


class WholePasses:
    """Both passes of a stage, captured under the settings of the latest step.

    Attributes:
        failed: whether the capture failed; later steps then run without it.
    """

    def __init__(self, tiled: TiledStage, executor: Executor):
        self.tiled, self.executor = tiled, executor
        self.failed = False
        self._key: Hashable = None
        self._captured: _Captured | None = None

    def forward(
        self, scan: Scan, vectors: Sequence[Tensor], wants: Sequence[bool] = ()
    ) -> tuple[tuple[Tensor, ...], Replayed] | None:
        """Pass 1: the values of the reductions, and the object for pass 2; None if it cannot be replayed.

        Args:
            scan: the scan of the stage.
            vectors: the tensors of `stage.vectors`.
            wants: which vectors require a gradient.
        """
        if self._captured is not None and self._captured.failed:
            self.failed, self._captured = True, None
        if self.failed or scan.observers or any(t.device.type != scan.device.type for t in vectors):
            return None
        key = settings(scan), tuple(wants)
        if key != self._key:
            self._key, self._captured = key, None
            return None
        if self._captured is None:
            self._captured = _Captured(self.tiled, self.executor.apart(), wants)
        return self._captured.replay(scan, vectors)


class Replayed:
    """A replayed pass 1. It does not refer to its results, whose graph may refer to it.

    Attributes:
        kept: the state for pass 2.
        over: whether no further backward will run.
    """

    def __init__(self, captured: _Captured, kept: PassState | None):
        self.kept, self.over = kept, False
        self._captured: _Captured | None = captured

    def backward(self, scan: Scan, grads: Sequence[Tensor | None], last: bool) -> dict[int, Tensor] | None:
        """Gradients of the vectors by value number; None if pass 2 must run from `kept` without replay.

        Pass 2 overwrites the state of pass 1, so it is replayed only once.

        Args:
            scan: the scan of the stage.
            grads: gradients of the results, None for zero.
            last: whether this is the last backward of this pass.
        """
        captured, self._captured = self._captured, None
        try:
            return None if captured is None else captured.replay_backward(scan, grads)
        finally:
            self.over = last


class _Captured:
    """Both passes under one set of settings."""

    def __init__(self, tiled: TiledStage, executor: Executor, wants: Sequence[bool]):
        self.tiled, self.executor, self.wants = tiled, executor, wants
        self.failed = False
        self.buffers = GraphBuffers()
        self.scan: Scan | None = None
        self.first: Callable[[], None] | None = None
        self.results: tuple[Tensor, ...] = ()
        self.kept: PassState | None = None
        self.second: dict[Form, Callable[[], None]] = {}
        self.sums: dict[Form, dict[int, Tensor]] = {}
        self.latest: weakref.ref[Replayed] | None = None

    def replay(self, scan: Scan, vectors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Replayed] | None:
        """Replay pass 1; None if an earlier one waits for its backward."""
        latest = None if self.latest is None else self.latest()
        if latest is not None and not latest.over:
            return None
        self._load(scan, vectors)
        if self.first is None:
            self.first = self._capture(self._run_forward)
        if self.first is None:
            return None
        self.first()
        for n, (i, j) in enumerate(scan.tiles):
            scan.after_tile("forward", i, j, n + 1, ())
        replayed = Replayed(self, self.kept)
        self.latest = weakref.ref(replayed) if self.kept is not None else None
        return tuple(t.clone() for t in self.results), replayed

    def replay_backward(self, scan: Scan, grads: Sequence[Tensor | None]) -> dict[int, Tensor] | None:
        form = tuple(grad is not None for grad in grads)
        self.buffers.load({("grad", n): grad for n, grad in enumerate(grads) if grad is not None})
        if form not in self.second:
            work = self._capture(partial(self._run_backward, form))
            if work is None:
                return None
            self.second[form] = work
        self.second[form]()
        for n, (i, j) in enumerate(reversed(scan.tiles)):
            scan.after_tile("backward", i, j, n + 1, ())
        return copies(self.sums[form])

    def _capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        work = captured_if_it_fits(self.executor, run)
        self.failed = self.failed or work is None
        return work

    def _load(self, scan: Scan, vectors: Sequence[Tensor]) -> None:
        stage = self.tiled.stage
        height, width = stage.maps.size(stage.image)
        prepared = scan.prepare(vectors)
        tensors = {("vector", v): prepared[v] for v in stage.vectors}
        self.buffers.load({**tensors, ("image",): scan.read(stage.image, (0, height, 0, width))})
        if self.scan is None:
            image = StoredMap(self.buffers.inputs["image",], stage.maps.axes[stage.image])
            given = scan.device, scan.dtype, scan.autocast
            self.scan = Scan(self.tiled, {stage.image: image}, *given, retained=scan.retained, whole=scan.whole)

    def _vectors(self) -> list[Tensor]:
        return [self.buffers.inputs["vector", v] for v in self.tiled.stage.vectors]

    def _run_forward(self) -> None:
        assert self.scan is not None
        work = ForwardPass(self.scan, self._vectors(), self.wants)
        self.results, self.kept = work.run(), work.kept

    def _run_backward(self, form: Form) -> None:
        assert self.scan is not None and self.kept is not None
        grads = [self.buffers.inputs["grad", n] if there else None for n, there in enumerate(form)]
        self.sums[form] = BackwardPass(self.scan, self.kept, self._vectors(), {}).run(grads, {}, last=True)
