"""By how much the memory of a process grows that reads parts of large files."""

from __future__ import annotations

import os
import resource

import torch

from gigamorph.engine.images.open import open_pixels


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_growth(paths: list[str]) -> None:
    """Print for each file, read in a process of its own, the growth of the peak in bytes, and the file's pixels."""
    torch.set_num_threads(1)
    for path in paths:
        if os.fork():
            os.wait()
            continue
        source = open_pixels(path)
        source.read(0, 8, 0, 8)
        before = _peak()
        height, width = source.shape[1:]
        for top in range(0, height, height // 8):
            for left in range(0, width, 512):
                source.read(top, top + 512, left, left + 512)
        print(_peak() - before, height * width, flush=True)
        os._exit(0)
