"""Reading checkpoints, and writing them atomically.

A checkpoint may come from an untrusted source, so types and ranges of its record are checked.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import check_plain
from ..errors import DataError
from ..files import write_atomically
from ..images.grayscale import check_voi
from ..images.levels import White, require_white
from ..images.pixels import Normalize
from ..models.checkpoints import WeightFile, is_state, read_state
from ..models.outputs import Views
from ..models.weights import first_line
from .options import Kind
from .state import State


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


_CHANNELS = 4096  # a limit on the lists of numbers that are allocated
REMEDY = "the file is damaged; take another copy of it"


@dataclass(frozen=True)
class _Options:
    model: str
    device: str
    seed: int
    batch_norm: Literal["frozen"] | None = None
    epochs: int = 1

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, "options.seed", self.seed)


@dataclass(frozen=True)
class _Target:
    names: tuple[str, ...]
    kind: Kind
    center: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    views: Views | None = None
    binary: bool = False

    def __post_init__(self) -> None:
        least = 2 if self.kind in ("classes", "ordinal", "masks") else 1
        _require(len(self.names) >= least, "target.names", list(self.names))
        for name, values in (("center", self.center), ("spread", self.spread)):
            _require(len(values) == len(self.names) * (self.kind == "numbers"), f"target.{name}", list(values))


@dataclass(frozen=True)
class _Scale:
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        _require(len(self.mean) > 0, "preprocessing.normalize.mean", [])
        Normalize(self.mean, self.std)


@dataclass(frozen=True)
class _Graded:
    normalize: _Scale


@dataclass(frozen=True)
class _Preprocessing:
    normalize: _Scale
    voi: str
    flip: bool | Literal["auto"]
    downsample: int
    for_processing: bool = False
    white: White | None = None
    volume: bool = False

    def __post_init__(self) -> None:
        _require(0 < self.downsample < 2**16, "preprocessing.downsample", self.downsample)
        require_white(self.white)
        check_voi(self.voi)


@dataclass(frozen=True)
class _Prepared:
    """The values that are needed to open images; `Data` made in Python may have other preprocessing."""

    channels: int
    preprocessing: _Preprocessing

    def __post_init__(self) -> None:
        means = len(self.preprocessing.normalize.mean)
        _require(means in (1, self.channels), "preprocessing.normalize.mean", f"of {means} channels")


@dataclass(frozen=True)
class _Split:
    sha256: str
    train: int
    val: int
    test: int


@dataclass(frozen=True)
class _Grown:
    recipe: str
    classes: int
    channels: int

    def __post_init__(self) -> None:
        _require(0 < self.classes < 2**20, "grown.classes", self.classes)
        _require(0 < self.channels <= _CHANNELS, "grown.channels", self.channels)


@dataclass(frozen=True)
class _Trained:
    """The values that are used of a record of `gigamorph train`."""

    options: _Options
    classes: tuple[str, ...]
    channels: int
    preprocessing: dict[str, Any]
    split: _Split
    versions: dict[str, Any]
    target: _Target | None = None
    images_at_once: int = 1
    grown: _Grown | None = None

    def __post_init__(self) -> None:
        _require(0 < self.channels <= _CHANNELS, "channels", self.channels)
        named = self.target is None or self.target.names == self.classes
        _require(named and len(self.classes) > 0, "classes", list(self.classes))


@dataclass(frozen=True)
class _Recipe:
    """The values that are used of a recipe's record."""

    recipe: str = ""
    classes: tuple[str, ...] = ()
    target: _Target | None = None


@dataclass(frozen=True)
class _Stage:
    epochs: int


@dataclass(frozen=True)
class _Settings:
    stages: tuple[_Stage, ...]

    def __post_init__(self) -> None:
        _require(len(self.stages) > 0, "settings.stages", [])


@dataclass(frozen=True)
class _Resumed:
    """The values that are used of a record to resume its run."""

    settings: _Settings
    state: State
    task: dict[str, Any]

    def __post_init__(self) -> None:
        for name, value in vars(self.state).items():
            if type(value) is int:
                _require(0 <= value < 2**31, f"state.{name}", value)
        _require(self.state.stage < len(self.settings.stages), "state.stage", self.state.stage)
        _require(self.state.best is None or len(self.state.best) == 2, "state.best", self.state.best)


@dataclass(frozen=True)
class _Row:
    """The values that are used of a row of ``log.csv``."""

    train_loss: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class _Rows:
    rows: tuple[_Row, ...]


def require_record(record: Any, path: str | Path) -> None:
    """Refuse a record with a required value that is missing or has a wrong type or range.

    Raises:
        DataError: naming file and key.
    """
    if not isinstance(record, dict):
        raise DataError(f"{path}: key 'gigamorph' is {_shown(record)}, not a table; {REMEDY}")
    for name in ("target", "grown"):
        if not isinstance(record.get(name, {}), dict):
            raise DataError(f"{path}: key '{name}' is {_shown(record[name])}, not a table; {REMEDY}")
    check_plain(record, _Trained if "options" in record else _Recipe, str(path))


def preprocessing_of(record: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The preprocessing of images in a checkpoint of `gigamorph train`.

    Raises:
        DataError: naming file and key.
    """
    check_plain(record, _Prepared, str(path))
    return record["preprocessing"]


def scale_of(record: dict[str, Any], path: str | Path) -> dict[str, Any] | None:
    """Mean and std of the grey values that a checkpoint's network was trained on; None if not recorded.

    Raises:
        DataError: naming file and key.
    """
    prepared = record.get("preprocessing")
    if not isinstance(prepared, dict) or prepared.get("normalize") is None:
        return None
    check_plain(prepared, _Graded, str(path), "preprocessing.")
    return prepared["normalize"]


def record_of(weights: WeightFile) -> dict[str, Any] | None:
    """The record of the checkpoint that contains these weights; None for other files."""
    record = weights.rest.get("gigamorph")
    if record is None:
        return None
    require_record(record, weights.path)
    return record


def read_record(path: str | Path) -> dict[str, Any] | None:
    """`record_of` for a file."""
    return record_of(read_state(path))


def stored_state(checkpoint: Mapping[str, Any], module: nn.Module, path: str) -> State:
    """The progress of a checkpoint's run, after checks of all values that resuming needs.

    Args:
        checkpoint: the result of `load_checkpoint`.
        module: the trained module.
        path: of the checkpoint, for messages.

    Raises:
        DataError: naming file and key.
    """
    record, own = checkpoint["gigamorph"], module.state_dict()
    check_plain(record, _Resumed, path)
    check_plain(record["state"], _Rows, path, "state.")
    _require_tensors(record.get("gradients"), own, f"{path}: key 'gradients'")
    if "average" in record:
        average = record["average"] if isinstance(record["average"], dict) else {}
        if type(average.get("steps")) is not int:
            raise DataError(f"{path}: key 'average.steps' is {_shown(average.get('steps'))}; {REMEDY}")
        _require_tensors(average.get("values"), own, f"{path}: key 'average.values'")
    known = {one.name for one in fields(State)}
    return State(**{name: value for name, value in record["state"].items() if name in known and value is not None})


def _require_tensors(found: Any, own: Mapping[str, Tensor], what: str) -> None:
    if not isinstance(found, dict):
        raise DataError(f"{what} is {_shown(found)}, not a table of tensors; {REMEDY}")
    for name, value in found.items():
        if not isinstance(value, Tensor) or name not in own or value.shape != own[name].shape:
            raise DataError(f"{what} holds {_shown(name)}, which does not fit the network; {REMEDY}")


def _require(fits: bool, key: str, value: object) -> None:
    if not fits:
        raise DataError(f"key '{key}' is {_shown(value)}, which is not valid; {REMEDY}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
