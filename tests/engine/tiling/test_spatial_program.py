"""The rows that one of several processes computes: what windows read of a band, and the tiles of one."""

from __future__ import annotations

import itertools

import pytest

from gigamorph.engine.lowering.geometry import Chain, Gather, Mirror, TransposedWindow, Window, needed, schedule_axis


@pytest.mark.parametrize("window", [Window(3, 12, 1, 1, 4), Window(4, 7, 3, 2, 6), Window(9, 3, 2, 1, -4)])
def test_padding_of_any_rows(window):
    """What is read and the padding beside it are what the kernel moves over."""
    for lo in range(window.size_out):
        for hi in range(lo + 1, window.size_out + 1):
            top, bottom = window.span(lo, hi)
            assert sum(window.padding(lo, hi)) + bottom - top == (hi - lo - 1) * window.stride + window.kernel


ACCESSES = [
    [Window(29, 29, 3, 1, 1), Window(29, 14, 4, 2, 0), Window(14, 14, 5, 1, 4, 2), TransposedWindow(14, 27, 3, 2, 1)],
    [Mirror(29, 35, 3), Window(35, 11, 7, 3, 1), Gather(11, 22, tuple(i // 2 for i in range(22)))],
    [Chain(Window(29, 27, 3), Window(27, 13, 3, 2)), Mirror(13, 17, 2, "replicate"), Window(17, 9, pad=-4)],
]


@pytest.mark.parametrize("chain", ACCESSES)
@pytest.mark.parametrize("tile", [1, 4, 29])
def test_schedules_of_bands(chain, tile):
    """Blocks follow each other from the first to the last index needed; what a block reads is known and kept."""
    reads = [((number + 1,), ((number, access),)) for number, access in enumerate(chain)]
    last = len(chain)
    for lo in range(chain[-1].size_out):
        for hi in range(lo, chain[-1].size_out + 1):
            cut = ((last + 1,), ((last, Window(chain[-1].size_out, hi - lo, pad=-lo)),))
            own = needed({last + 1: (0, hi - lo)}, [*reads, cut])
            axis = schedule_axis(tile, 29, {0: 29}, [*reads, cut], targets=[last + 1])
            for value in range(last + 2):
                start, end = own.get(value, (0, 0))
                blocks = [axis.block(value, i) for i in range(axis.steps)]
                assert blocks[0][0] == start and blocks[-1][1] == end
                assert all(a[1] == b[0] for a, b in itertools.pairwise(blocks))
            for outputs, ((value, access),) in [*reads, cut]:
                for i in range(axis.steps):
                    top, bottom = axis.block(outputs[0], i)
                    if top < bottom:
                        first, end = access.span(top, bottom)
                        assert axis.halo_in(value, i)[0] <= first and end <= axis.frontier[value][i]
