"""What becomes of freed memory."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from gigamorph.engine.tiling.memory import freed_pages_kept, return_free_pages, used_bytes

MIB = 1 << 20


def grow_and_free() -> int:
    """Bytes that the process still holds of 256 MiB in blocks of 4 MiB."""
    return_free_pages()
    before = used_bytes()
    blocks = [torch.ones(MIB) for _ in range(64)]
    assert used_bytes() - before > 200 * MIB
    del blocks
    return used_bytes() - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_pages_are_kept_and_then_returned() -> None:
    before = used_bytes()
    with freed_pages_kept():
        assert grow_and_free() > 200 * MIB
    assert used_bytes() - before < 50 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts resident pages by process")
def test_a_forked_process_counts_its_own_pages() -> None:
    before = used_bytes()  # opens what the child must not read
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        first = used_bytes()
        _grown = bytearray(os.urandom(1)) * (300 * MIB)
        os.write(writing, str(used_bytes() - first).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reading, 64)) > 200 * MIB and abs(used_bytes() - before) < 50 * MIB
