"""Opens and reads image files with little memory and time for each, and prints what happened.

`read_all` runs in a process of its own, because a decoder that crashes ends its process. It prints one line of JSON per
file: its name, the error's type and message or null, seconds, and the growth of the peak of resident memory in bytes.
"""

import json
import logging
import resource
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from gigamorph.engine.images import dicom, tiff, whole, zarrs  # noqa: F401 (loaded before memory is limited)
from gigamorph.engine.images.open import open_pixels

# Pixels that are read of an image, so that a sound one of any size takes no time.
ENOUGH = 2**22


def late(*_: object) -> None:
    raise TimeoutError("took more than 20 s")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attempt(name: str) -> dict[str, Any]:
    before, start = peak(), time.perf_counter()
    error = None
    zero = False
    signal.alarm(20)
    try:
        source = open_pixels(name, frame=0)
        _, height, width = source.shape
        rows = min(height, max(1, ENOUGH // width))
        first = source.read(0, rows, 0, min(width, ENOUGH))
        last = source.read(height - rows, height, max(0, width - ENOUGH), width)
        zero = not bool(first.any() or last.any())
    except Exception as caught:
        error = type(caught).__name__, str(caught)
    signal.alarm(0)
    return {
        "name": name,
        "error": error and error[0],
        "message": error and error[1],
        "zero": zero,
        "seconds": time.perf_counter() - start,
        "grown": peak() - before,
    }


def read_all(memory: int, names: list[str]) -> None:
    """Read each file; this process may take so many bytes more than it has now."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, late)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in names:
        print(json.dumps(attempt(name)), flush=True)
