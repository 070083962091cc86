"""Where the cells of every map lie in the image, and how much of it they see: read off the steps of a program.

An op's accesses (`geometry.py`) say which inputs each output reads. Followed from the image on, they give for every map
and axis the middle of what a cell sees, a straight line over the cells:

    convolution or pooling, kernel k, stride s, padding p, dilation d:   centre of output o = centre of input
        o s - p + d (k - 1) / 2,     and it sees d (k - 1) input cells more

so that cell i of a ResNet, whose padding is symmetric, is centred on pixel 32 i and not on 32 i + 16. Padding counts as
if the image went on: cells at the border have their centre as all others have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from statistics import fmean

import numpy as np

from .geometry import Access, Chain, Mirror, TransposedWindow, Window
from .stages import Stage, StagedProgram


@dataclass(frozen=True, slots=True)
class ReceptiveField:
    """What the cells of a map see along one axis: `extent` pixels around pixel `first + stride i`.

    Attributes:
        first: the middle of what cell 0 sees, as a pixel's index; fractional where that is between two pixels.
        stride: from one cell's middle to the next one's, in pixels.
        extent: how many pixels a cell sees, from the first to the last, were the image without end.
        sharpest: of several paths from the image, how many the one sees that sees least; the middle is that one's.
    """

    first: float
    stride: float
    extent: float
    sharpest: float

    def through(self, access: Access) -> ReceptiveField | None:
        """That of an op's output, this being its input's; None where outputs do not follow the input's axis."""
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
        """Of cells `step` input cells apart, the first in the middle of input `start`, seeing `more` cells more."""
        more *= self.stride
        first, stride = self.first + self.stride * start, self.stride * step
        return ReceptiveField(first, stride, self.extent + more, self.sharpest + more)


Fields = tuple[ReceptiveField, ReceptiveField]  # along rows and columns


def receptive_fields(staged: StagedProgram) -> dict[int, Fields]:
    """Those of all maps that depend on the image's pixels one by one, by value number."""
    maps, program = staged.maps, staged.program
    pixel = ReceptiveField(0.0, 1.0, 1.0, 1.0)
    size = maps.size(program.image)
    found = {v: (pixel, pixel) for v in (program.image, *program.inputs) if maps.size(v) == size}
    for step in staged.steps:
        if isinstance(step, Stage):
            for local in step.locals:
                paths = [_through(found[v], access) for v, access in local.reads.items() if v in found]
                there = [fields for fields in paths if fields is not None]
                if there:
                    joined = _joined([path[0] for path in there]), _joined([path[1] for path in there])
                    found.update(dict.fromkeys(local.op.outputs, joined))
            continue
        # An op on whole maps, as attention over all positions: its outputs lie as its inputs do.
        inputs = [v for v in step.inputs if v in found]
        found.update((v, found[i]) for v in step.outputs if v in maps for i in inputs if maps.size(i) == maps.size(v))
    return found


def _through(fields: Fields, access: tuple[Access, Access]) -> Fields | None:
    rows, columns = (field.through(along) for field, along in zip(fields, access, strict=True))
    return None if rows is None or columns is None else (rows, columns)


def _joined(paths: Sequence[ReceptiveField]) -> ReceptiveField:
    """Of an op that several paths lead to.

    A path spreads a pixel over what it sees, so that the sharpest one, a skip connection, shows it highest.
    """
    sharpest = min(path.sharpest for path in paths)
    chosen = [path for path in paths if path.sharpest == sharpest]
    first, stride = (fmean(getattr(path, name) for path in chosen) for name in ("first", "stride"))
    low = min(path.first - path.extent / 2 for path in paths)
    high = max(path.first + path.extent / 2 for path in paths)
    return ReceptiveField(first, stride, high - low, sharpest)


def _line(access: Access) -> tuple[float, float, float]:
    """The straight line nearest to an access (least squares): step and start in input cells, and the further cells.

    Neighbouring outputs of a resampling may read the same inputs: the middle of those outputs lies on the middle of
    those inputs. At the ends they are cut off, and left out where there are others.
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
