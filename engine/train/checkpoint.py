"""Checkpoints that are whole or absent, and what a run must know to be repeated."""

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
from ..morph.files import ENDING, SUFFIXES, recipe_of
from .stored import REMEDY, require_record

make_torchvision_importable()

from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written aside and then renamed; by the process that leads, all have the same."""

    def __init__(self, leads: bool = True) -> None:
        super().__init__()
        self._leads = leads

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if self._leads:
            save_torch(checkpoint, path, "checkpoint")


def save_torch(content: object, path: str | Path, what: str) -> None:
    """torch.save to a file that is whole or absent, as `write_atomically`.

    Through a file of Python: where torch opens the file itself, the system's reason for a failure is lost.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(content, file)

    write_atomically(path, write, what)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a gigamorph checkpoint without running any code in it.

    Raises:
        DataError: if it cannot be read or is not a checkpoint of `run_stages`; or what is used of its record lacks, or
            is of another type or range.
    """
    path = Path(path)
    if path.name.endswith(ENDING) or (path.suffix in SUFFIXES and path.is_file() and recipe_of(path).morphs):
        raise DataError(
            f"{path}: is of gigamorph morph, and does not hold which model it began as, its classes and preprocessing; "
            "train on with gigamorph train --init, and name the run's best.ckpt here"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch has many errors for a damaged file
        if _is_cut_off(path):
            raise DataError(f"{path}: is cut off, as by a full disk or a copy that stopped; copy it again") from error
        told = first_line(error) if isinstance(error, OSError | RuntimeError | UnpicklingError) else "no file of torch"
        raise DataError(f"{path}: not a readable checkpoint: {told}") from error
    if not isinstance(checkpoint, dict) or "gigamorph" not in checkpoint:
        raise DataError(f"{path}: not written by gigamorph train; gigamorph train --init starts from weights")
    require_record(checkpoint["gigamorph"], path)
    weights = checkpoint.get("state_dict")
    if weights != {} and not is_state(weights):
        raise DataError(f"{path}: key 'state_dict' is missing or no table of tensors; {REMEDY}")
    return checkpoint


def _is_cut_off(path: Path) -> bool:
    """Whether a zip archive, as torch writes it, lacks its directory, which stands at its end."""
    with path.open("rb") as file:
        return file.read(2) == b"PK" and not zipfile.is_zipfile(path)
