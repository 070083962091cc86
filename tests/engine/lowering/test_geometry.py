"""The frontier algebra against brute force: every index by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigamorph.engine.lowering.geometry import Access, Gather, Mirror, TransposedWindow, Window, same, schedule_axis

CHECKS = settings(max_examples=300, derandomize=True, deadline=None)


@st.composite
def windows(draw) -> Window:
    size, kernel = draw(st.integers(1, 20)), draw(st.integers(1, 5))
    stride, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    pad = draw(st.integers(-min(3, size - 1), dilation * (kernel - 1)))
    after = draw(st.integers(0, dilation * (kernel - 1)))
    out = (size + pad + after - dilation * (kernel - 1) - 1) // stride + 1
    return Window(size, max(out, 1), kernel, stride, pad, dilation)


@st.composite
def gathers(draw) -> Gather:
    size = draw(st.integers(1, 12))
    sources = sorted(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    last = tuple(min(i + 1, size - 1) for i in sources) if draw(st.booleans()) else None
    return Gather(size, len(sources), tuple(sources), last)


@st.composite
def spreads(draw) -> TransposedWindow:
    size, kernel = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    stride, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    reach = dilation * (kernel - 1)
    pad = draw(st.integers(0, reach))
    out = (size - 1) * stride - 2 * pad + reach + 1 + draw(st.integers(0, stride - 1))
    return TransposedWindow(size, max(out, 1), kernel, stride, pad, dilation)


@st.composite
def mirrors(draw) -> Mirror:
    size = draw(st.integers(1, 12))
    mode = draw(st.sampled_from(["reflect", "replicate", "symmetric"]))
    most = {"reflect": size - 1, "symmetric": size}.get(mode, 5)
    before, after = draw(st.integers(0, most)), draw(st.integers(0, most))
    return Mirror(size, size + before + after, before, mode)


def inputs_of(access: Access, output: int) -> set[int]:
    """The inputs that an output reads, by the definition of the access."""
    if isinstance(access, Gather):
        last = access.last or access.sources
        return {*range(access.sources[output], last[output] + 1)}
    if isinstance(access, Mirror):
        mode = "edge" if access.mode == "replicate" else access.mode
        return {int(np.pad(np.arange(access.size_in), (access.pad, access.after), mode=mode)[output])}
    if isinstance(access, TransposedWindow):
        observers = range(access.kernel)
        return {
            i
            for i in range(access.size_in)
            if any(i * access.stride - access.pad + access.dilation * t == output for t in observers)
        }
    assert isinstance(access, Window)
    reads = {output * access.stride - access.pad + access.dilation * t for t in range(access.kernel)}
    return reads & set(range(access.size_in))


@CHECKS
@given(st.one_of(windows(), gathers(), spreads(), mirrors()))
def test_ready(access):
    """As many outputs as have all their inputs known; once the input is complete, all of them."""
    for frontier in range(access.size_in + 1):
        ready = access.ready(frontier)
        assert 0 <= ready <= access.size_out
        for output in range(ready):
            assert all(i < frontier for i in inputs_of(access, output))
    assert access.ready(access.size_in) == access.size_out


@CHECKS
@given(st.one_of(windows(), gathers()))
def test_ready_waits_no_longer_than_needed(access):
    for frontier in range(1, access.size_in):
        ready = access.ready(frontier)
        if isinstance(access, Window):  # its last tap may lie in the padding only after the last input
            waits = ready < access.size_out and ready * access.stride - access.pad + access.reach >= frontier
        else:
            waits = ready < access.size_out and max(inputs_of(access, ready)) >= frontier
        assert waits or ready == access.size_out


@CHECKS
@given(st.one_of(windows(), gathers(), spreads(), mirrors()), st.data())
def test_span(access, data):
    """The span holds every input that the outputs read, and its start never moves back as the outputs move on."""
    lo = data.draw(st.integers(0, access.size_out - 1))
    hi = data.draw(st.integers(lo + 1, access.size_out))
    start, end = access.span(lo, hi)
    assert 0 <= start <= end <= access.size_in
    for output in range(lo, hi):
        assert all(start <= i < end for i in inputs_of(access, output))
        assert access.span(output, hi)[0] >= start
    for frontier in range(access.size_in + 1):
        if access.ready(frontier) >= hi:
            assert end <= frontier, "a block that is ready needs nothing unknown"


@CHECKS
@given(windows(), st.data())
def test_padding(access, data):
    """Clipped window and padding make up exactly what a kernel without padding needs for the block."""
    lo = data.draw(st.integers(0, access.size_out - 1))
    hi = data.draw(st.integers(lo + 1, access.size_out))
    start, end = access.span(lo, hi)
    before, after = access.padding(lo, hi)
    wanted = (hi - 1 - lo) * access.stride + access.reach + 1
    if start < end:
        assert before + (end - start) + after == wanted
        assert start - before == lo * access.stride - access.pad


@pytest.mark.parametrize(("size", "tile", "steps"), [(10, 3, 4), (9, 3, 3), (1, 5, 1), (7, 1, 7), (8, 100, 1)])
def test_steps(size, tile, steps):
    schedule = schedule_axis(tile, size, {0: size}, [])
    assert schedule.steps == steps
    assert [schedule.block(0, i) for i in range(steps)] == [(i * tile, min(size, (i + 1) * tile)) for i in range(steps)]


@CHECKS
@given(mirrors())
def test_mirror_source(access):
    assert [{access.source(o)} for o in range(access.size_out)] == [
        inputs_of(access, o) for o in range(access.size_out)
    ]


@st.composite
def chains(draw):
    """(size, tile, reads) of a vector program: a chain with a branch that waits for its longer twin."""
    size = draw(st.integers(1, 40))
    reads, sizes = [], [size]
    for value in range(1, draw(st.integers(2, 6))):
        source = draw(st.integers(max(0, value - 2), value - 1))
        kernel, stride = draw(st.integers(1, 5)), draw(st.integers(1, 3))
        pad = draw(st.integers(0, kernel - 1))
        out = (sizes[source] + 2 * pad - kernel) // stride + 1
        access = Window(sizes[source], out, kernel, stride, pad) if out > 0 else same(sizes[source])
        inputs = [(source, access)]
        mates = [v for v in range(value) if v != source and sizes[v] == access.size_out]
        if mates:
            inputs.append((draw(st.sampled_from(mates)), same(access.size_out)))
        reads.append(((value,), inputs))
        sizes.append(access.size_out)
    return size, draw(st.integers(1, 45)), reads, sizes


@CHECKS
@given(chains())
def test_schedule(chain):
    """Blocks cover every value once; each block's inputs are in the halo or in the block of the same step."""
    size, tile, reads, sizes = chain
    schedule = schedule_axis(tile, size, {0: size}, reads)
    for value, total in enumerate(sizes):
        blocks = [schedule.block(value, i) for i in range(schedule.steps)]
        assert blocks[0][0] == 0 and blocks[-1][1] == total
        assert all(a[1] == b[0] and a[0] <= a[1] for a, b in itertools.pairwise(blocks))
        for i in range(schedule.steps - 1):
            assert schedule.halo_out(value, i) == schedule.halo_in(value, i + 1)
        assert schedule.halo_in(value, 0) == (0, 0)
    for outputs, inputs in reads:
        for step in range(schedule.steps):
            lo, hi = schedule.block(outputs[0], step)
            if lo == hi:
                continue
            for value, access in inputs:
                start, end = access.span(lo, hi)
                with_halo, known = schedule.halo_in(value, step)
                assert end <= schedule.block(value, step)[1]
                assert start == end or start >= min(with_halo, known)
