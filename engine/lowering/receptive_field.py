"""Receptive fields: the centre and extent in the image of the cells of every map, computed from a program's steps.

The accesses of an op (`geometry.py`) state which inputs each output reads. Composed from the image on, they give the
centre of a cell's receptive field along each axis as a linear function of the cell's index:

    convolution or pooling, kernel k, stride s, padding p, dilation d:   centre of output o = centre of input
        o s - p + d (k - 1) / 2,     and its field is d (k - 1) input cells wider

A ResNet's padding is symmetric, so its cell i is centred on pixel 32 i and not on 32 i + 16. The padding counts as part
of the image: the same formula gives the centres of cells at the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from statistics import fmean

import numpy as np

from .geometry import Access, Chain, Mirror, TransposedWindow, Window
from .stages import ProgramStage, StagedProgram


@dataclass(frozen=True, slots=True)
class ReceptiveField:
    """Receptive fields of a map's cells along one axis: `extent` pixels around pixel `first + stride i`.

    Attributes:
        first: the centre of the field of cell 0, as a pixel index; fractional between two pixels.
        stride: the distance of the centres of neighbouring cells, in pixels.
        extent: the width of a field in an unbounded image, in pixels.
        sharpest: the extent along the narrowest path from the image, which also determines the centre.
    """

    first: float
    stride: float
    extent: float
    sharpest: float

    def through(self, access: Access) -> ReceptiveField | None:
        """The field of an op's output if this is its input's; None if outputs do not follow the input's axis."""
        if isinstance(access, Chain):
            between = self.through(access.first)
            return None if between is None else between.through(access.second)
        if isinstance(access, Window):
            return self._along(access.stride, access.reach / 2 - access.pad, access.reach) if access.stride else None
        if isinstance(access, TransposedWindow):
            inputs = access.reach // access.stride
            return self._along(1 / access.stride, (access.pad - access.reach / 2) / access.stride, inputs)
        if isinstance(access, Mirror):
            return self._along(1, -access.pad, 0)
        return self._along(*_line(access))

    def _along(self, step: float, start: float, more: float) -> ReceptiveField:
        """The field of cells `step` input cells apart, the first at input `start`, which read `more` more cells."""
        more *= self.stride
        first, stride = self.first + self.stride * start, self.stride * step
        return ReceptiveField(first, stride, self.extent + more, self.sharpest + more)


Fields = tuple[ReceptiveField, ReceptiveField]  # along rows and columns


def receptive_fields(staged: StagedProgram) -> dict[int, Fields]:
    """The receptive fields of all maps that depend on the image's pixels by position, by value number."""
    maps, program = staged.maps, staged.program
    pixel = ReceptiveField(0.0, 1.0, 1.0, 1.0)
    size = maps.size(program.image)
    found = {v: (pixel, pixel) for v in (program.image, *program.inputs) if maps.size(v) == size}
    for step in staged.steps:
        if isinstance(step, ProgramStage):
            for local in step.locals:
                paths = [_through(found[v], access) for v, access in local.reads.items() if v in found]
                known = [fields for fields in paths if fields is not None]
                if known:
                    joined = _joined([path[0] for path in known]), _joined([path[1] for path in known])
                    found.update(dict.fromkeys(local.op.outputs, joined))
            continue
        # An op on whole maps, such as attention over all positions: its outputs have the centres of its inputs.
        inputs = [v for v in step.inputs if v in found]
        found.update((v, found[i]) for v in step.outputs if v in maps for i in inputs if maps.size(i) == maps.size(v))
    return found


def _through(fields: Fields, access: tuple[Access, Access]) -> Fields | None:
    rows, columns = (field.through(along) for field, along in zip(fields, access, strict=True))
    return None if rows is None or columns is None else (rows, columns)


def _joined(paths: Sequence[ReceptiveField]) -> ReceptiveField:
    """The field of an op with several paths from the image.

    A path spreads a pixel over its extent, so the response is highest along the sharpest one, a skip connection.
    """
    sharpest = min(path.sharpest for path in paths)
    chosen = [path for path in paths if path.sharpest == sharpest]
    first, stride = (fmean(getattr(path, name) for path in chosen) for name in ("first", "stride"))
    low = min(path.first - path.extent / 2 for path in paths)
    high = max(path.first + path.extent / 2 for path in paths)
    return ReceptiveField(first, stride, high - low, sharpest)


def _line(access: Access) -> tuple[float, float, float]:
    """The least-squares line of an access: step and start in input cells, and the number of further cells.

    Neighbouring outputs of a resampling may read the same inputs: the centre of these outputs is the centre of these
    inputs. Such runs are cut off at the ends, so the line excludes the end runs if there are others.
    """
    spans = [access.span(o, o + 1) for o in range(access.size_out)]
    runs = [(span, [o for o, _ in group]) for span, group in groupby(enumerate(spans), key=itemgetter(1))]
    wide = max(end - start for start, end in spans)
    runs = runs[1:-1] if len(runs) > 3 else runs
    if len(runs) < 2:
        ratio = access.size_in / access.size_out
        return ratio, ratio / 2 - 0.5, wide - 1
    step, start = np.polyfit([fmean(o) for _, o in runs], [(lo + hi - 1) / 2 for (lo, hi), _ in runs], 1)
    return float(step), float(start), wide - 1
