"""Builds C++ sources once with this machine's compiler and stores the libraries in the cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .cache import cache_folder, is_private, make_private

COMPILERS = ("c++", "g++", "clang++")
_PATIENCE = 120  # seconds for the compiler, which takes one or two


def built(source: Path, compiling: Sequence[str] = (), linking: Sequence[str] = ()) -> Path:
    """The library of a source for this PyTorch, from the cache or built.

    Args:
        compiling, linking: options of each step.

    Raises:
        OSError: if there is no compiler, or it fails, or the cache is read-only or writable by other accounts.
        subprocess.SubprocessError: if the compiler does not end.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    machine = platform.machine(), torch.backends.cpu.get_cpu_capability(), *platform.libc_ver()
    steps = " ".join((torch.__version__, *machine, *compiling, "", *linking))
    digest = hashlib.sha256(source.read_bytes() + steps.encode()).hexdigest()[:16]
    folder = cache_folder() / source.stem
    target = folder / f"{source.stem}-{digest}-{_version(compiler)}.so"
    candidates = [target] if compiler is not None else folder.glob(f"{source.stem}-{digest}-*.so")
    if found := next((one for one in candidates if one.exists() and is_private(one)), None):
        return found
    if compiler is None:
        raise OSError("no C++ compiler; install g++ or set CXX")
    make_private(folder)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        compiled, made = Path(own) / "compiled.o", Path(own) / target.name
        _run([compiler, "-std=c++20", "-fPIC", *compiling, "-c", str(source), "-o", str(compiled)])
        _run([compiler, "-shared", str(compiled), *linking, "-o", str(made)])
        made.chmod(0o700)
        made.replace(target)
    if not is_private(target):
        raise OSError(
            f"other accounts can write to {folder}; set GIGAMORPH_CACHE to a folder that only you can write to"
        )
    return target


def _version(compiler: str | None) -> str:
    """A digest that identifies a compiler without running it."""
    if compiler is None:
        return ""
    path = os.path.realpath(compiler)
    found = os.stat(path)
    return hashlib.sha256(f"{path} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:8]


def _run(command: Sequence[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    if ran.returncode:
        raise OSError(f"{command[0]} cannot build the library: {' '.join(ran.stderr.split())[:300]}")
