"""Reading checkpoints, and writing them atomically."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..errors import DataError
from ..files import write_atomically
from ..models.checkpoints import is_state
from ..models.compat import make_torchvision_importable
from ..models.weights import first_line
from .stored import REMEDY, require_record

make_torchvision_importable()

from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints atomically, in the leading process only: all processes have the same state."""

    def __init__(self, leads: bool = True) -> None:
        super().__init__()
        self._leads = leads

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if self._leads:
            save_torch(checkpoint, path, "checkpoint")


def save_torch(content: object, path: str | Path, what: str) -> None:
    """`torch.save` by `write_atomically`.

    The file is opened by Python: if torch opens it, the system's reason for a failure is lost.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(content, file)

    write_atomically(path, write, what)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a gigamorph checkpoint without running any code in it.

    Raises:
        DataError: if it cannot be read or is not a checkpoint of `run_stages`, or a value of its record that is needed
            is missing or has another type or range.
    """
    path = Path(path)
    if path.suffix != ".ckpt":
        from ..morph.files import ENDING, SUFFIXES, recipe_of  # imports all morphs

        if path.name.endswith(ENDING) or (path.suffix in SUFFIXES and path.is_file() and recipe_of(path).morphs):
            raise DataError(
                f"{path}: is a file of gigamorph morph, without the original model, classes and preprocessing; train "
                "it with gigamorph train --init, and use the run's best.ckpt here"
            )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch has many errors for a damaged file
        if _is_truncated(path):
            raise DataError(f"{path}: is truncated (full disk, or interrupted copy); copy it again") from error
        text = first_line(error) if isinstance(error, OSError | RuntimeError | UnpicklingError) else "not a torch file"
        raise DataError(f"{path}: not a readable checkpoint: {text}") from error
    if not isinstance(checkpoint, dict) or "gigamorph" not in checkpoint:
        raise DataError(f"{path}: not a checkpoint of gigamorph train; to start from weights use --init")
    require_record(checkpoint["gigamorph"], path)
    weights = checkpoint.get("state_dict")
    if weights != {} and not is_state(weights):
        raise DataError(f"{path}: key 'state_dict' is missing or not a table of tensors; {REMEDY}")
    return checkpoint


def _is_truncated(path: Path) -> bool:
    """Whether a zip archive, as torch writes it, lacks the directory at its end."""
    with path.open("rb") as file:
        return file.read(2) == b"PK" and not zipfile.is_zipfile(path)
