"""Boxes of raw arrays: the same pixels however many rows are read at once, in few reads."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigamorph.engine.images import rawfile
from gigamorph.engine.images.rawfile import FileBytes, RawPixels

HEADER = b"seven b"


@pytest.fixture(scope="module", params=[((50, 61), "<u2"), ((3, 40, 61), ">u2"), ((40, 61, 3), "<f4")], ids=str)
def stored(request, tmp_path_factory):
    shape, dtype = request.param
    array = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    path = tmp_path_factory.mktemp("raw") / "array.bin"
    path.write_bytes(HEADER + array.tobytes())
    pixels = RawPixels(path, len(HEADER), shape, np.dtype(dtype))
    whole = array.transpose(pixels.order)
    return pixels, whole if whole.ndim == 3 else whole[None]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), together=st.sampled_from([1, 500, 1 << 20]))
def test_a_box_is_what_lies_there(stored, data, together):
    pixels, whole = stored
    _, height, width = pixels.shape
    top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, height)] * 2)))
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, width)] * 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rawfile, "_READ_BYTES", together)
        found = pixels.read(top, bottom, left, right)
    assert found.dtype == whole.dtype
    assert np.array_equal(found, whole[:, top:bottom, left:right])


def test_rows_that_lie_close_are_read_at_once_and_others_alone(tmp_path, monkeypatch):
    path = tmp_path / "array.bin"
    path.write_bytes(bytes(100 * 1000))
    pixels, reads = RawPixels(path, 0, (100, 1000), np.dtype("u1")), []
    monkeypatch.setattr(pixels._bytes, "read_into", lambda offset, target: reads.append((offset, len(target))))
    pixels.read(10, 60, 300, 700)
    assert reads == [(10_300, 49 * 1000 + 400)]
    reads.clear()
    pixels.read(10, 60, 300, 310)
    assert reads == [(1000 * row + 300, 10) for row in range(10, 60)]


def test_no_thread_reads_at_the_position_of_another():
    class Slow(io.BytesIO):
        def seek(self, *args):
            found = super().seek(*args)
            time.sleep(0.005)
            return found

    file = FileBytes(Path("array.bin"))
    file._file = Slow(bytes(range(8)))
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda offset: file.read(offset, 1), range(8))] == [bytes([offset]) for offset in range(8)]
