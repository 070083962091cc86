"""C++ sources of ours: built once for this machine's compiler and kept in the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .cache import cache_folder

COMPILERS = ("c++", "g++", "clang++")
_PATIENCE = 120  # seconds for the compiler, which takes one or two


def built(source: Path, compiling: Sequence[str] = (), linking: Sequence[str] = ()) -> Path:
    """The library of a source for this PyTorch: from the cache, or built.

    Args:
        compiling, linking: options of each step.

    Raises:
        OSError: if there is no compiler, it fails, or the cache cannot be written.
        subprocess.SubprocessError: if it does not end.
    """
    steps = " ".join((torch.__version__, *compiling, "", *linking))
    digest = hashlib.sha256(source.read_bytes() + steps.encode()).hexdigest()[:16]
    target = cache_folder() / source.stem / f"{source.stem}-{digest}.so"
    if target.exists():
        return target
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        raise OSError("no C++ compiler; install g++ or set CXX")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as own:
        compiled, made = Path(own) / "compiled.o", Path(own) / target.name
        _run([compiler, "-std=c++20", "-fPIC", *compiling, "-c", str(source), "-o", str(compiled)])
        _run([compiler, "-shared", str(compiled), *linking, "-o", str(made)])
        made.replace(target)
    return target


def _run(command: Sequence[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    if ran.returncode:
        raise OSError(f"{command[0]} cannot build it: {' '.join(ran.stderr.split())[:300]}")
