"""Checkpoints that are whole or absent, and what a run must know to be repeated."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, GigamorphError
from ..models.compat import make_torchvision_importable

make_torchvision_importable()

from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402

# It can only be read by setting it, which is not for threads: once, at the start.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path: str | Path, write: Callable[[Path], object], what: str = "file") -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in the place of ``path`` in one step.

    Raises:
        GigamorphError: if it cannot be written (a full disk); a former file at ``path`` is untouched.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        os.chmod(temporary, 0o666 & ~_UMASK)  # temporary files are private, what the user asked for is not
        os.replace(temporary, path)
    # torch's zip writer turns ENOSPC into a RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).splitlines()[0]
        kept = "; the former one is kept" if path.exists() else ""
        raise GigamorphError(f"{path}: the {what} cannot be written: {reason}{kept}; free some space") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written aside and then renamed; by the process that leads, all have the same."""

    def __init__(self, leads: bool = True) -> None:
        super().__init__()
        self._leads = leads

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if self._leads:
            write_atomically(path, lambda temporary: torch.save(checkpoint, temporary), "checkpoint")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a gigamorph checkpoint without running any code in it.

    Raises:
        DataError: if it cannot be read or is not a checkpoint of ``gigamorph train``.
    """
    path = Path(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch has many errors for a damaged file
        raise DataError(f"{path}: not a readable checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(checkpoint, dict) or "gigamorph" not in checkpoint:
        raise DataError(f"{path}: not written by gigamorph train; to start from weights take --weights")
    return checkpoint


def versions() -> dict[str, str]:
    """The versions of what the result of a run depends on."""
    found = {"python": platform.python_version()}
    for name in ("gigamorph", "torch", "lightning", "numpy", "pydicom", "timm", "triton", "scikit-learn"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
