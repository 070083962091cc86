"""Where what was measured and built for this machine is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`GIGAMORPH_CACHE`, `XDG_CACHE_HOME` or ~/.cache, and in it a folder of ours."""
    base = os.environ.get("GIGAMORPH_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gigamorph"
