"""A network in a folder: weights, how to build it, its outputs and images, and logits to check it.

``model.json`` describes the network, ``model.safetensors`` has the weights by the network's own names, and
``reference.safetensors`` has a fixed image with the logits of ordinary PyTorch. An ensemble has a ``model.json`` that
names its members, which are sub-folders. Nothing in a folder is executed; only the network's factory is imported.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import check_plain, read_values
from ..errors import DataError, GigamorphError
from ..files import write_json
from ..images.pixels import Normalize
from ..parsing import parse_json
from .outputs import Head, Outputs
from .weights import sha256

FORMAT = 1
DESCRIPTION, WEIGHTS, REFERENCE = "model.json", "model.safetensors", "reference.safetensors"
_CHANNELS, _LONGEST = 4096, 2**15
_UNCHANGED = ("licence", "source", "reference", "versions")  # keys that are plain data in a description too
UNITS = "grey, 0 black to 1 white"

PerImage = Literal["minmax", "standard"]
Fit = Literal["pad", "widen", "stretch"]


@dataclass(frozen=True)
class Preprocessing:
    """How a file's pixels become the network's input.

    Attributes:
        channels: of the images.
        mean, std: the input is (grey - mean) / std, per channel.
        voi: grey scale of DICOM images, see `open_pixels`.
        per_image: "minmax": scale each image so that its darkest pixel is 0 and its brightest 1, before mean and std;
            "standard": use the image's own mean and standard deviation instead.
        size: (height, width) to which images are resized; None keeps every pixel.
        fit: how they are resized. "pad": as large as fits, with black borders. "widen": black at the sides of a
            narrower image, then stretched. "stretch".
    """

    channels: int = 1
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    voi: str = "auto"
    per_image: PerImage | None = None
    size: tuple[int, int] | None = None
    fit: Fit = "pad"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        if self.size is not None:
            object.__setattr__(self, "size", (int(self.size[0]), int(self.size[1])))
        if self.per_image not in (None, *get_args(PerImage)) or self.fit not in get_args(Fit):
            raise GigamorphError(
                f"preprocessing per_image {self.per_image!r}, fit {self.fit!r}: must be one of "
                f"{', '.join(get_args(PerImage))} or none, and one of {', '.join(get_args(Fit))}"
            )
        if not 0 < self.channels <= _CHANNELS or (self.size and not 0 < min(self.size) <= max(self.size) <= _LONGEST):
            raise GigamorphError(f"preprocessing channels {self.channels}, size {self.size}: out of range for images")
        self.normalize.per_channel(self.channels)

    @property
    def normalize(self) -> Normalize:
        return Normalize(self.mean, self.std)

    @property
    def streams(self) -> bool:
        """Whether images can be read tile by tile, without a change that needs the whole image."""
        return self.per_image is None and self.size is None


@dataclass(frozen=True)
class Description:
    """Content of ``model.json``.

    Attributes:
        model: the spec that builds the network, with all arguments, see `create_model`; "" for an ensemble.
        outputs: the network's outputs.
        preprocessing: the network's input.
        source: the file of the weights (name and SHA-256), its detected layout, and the key and prefix of the weights
            in it (place, prefix).
        key_map: pairs (beginning of their names, of ours); the first that fits applies.
        licence: of the weights, as their authors state it.
        reference: shape of the fixed image, and the difference of the logits that were computed by tiles.
        versions: of the packages with which the folder was made.
        members: sub-folders of an ensemble; their probabilities are averaged.
        flips: (left-right, up-down) flips of the images whose probabilities are averaged too.
    """

    model: str
    outputs: Outputs
    preprocessing: Preprocessing
    source: Mapping[str, Any] = field(default_factory=dict)
    key_map: tuple[tuple[str, str], ...] = ()
    licence: str = ""
    reference: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    flips: tuple[tuple[bool, bool], ...] = ((False, False),)

    def to_json(self) -> dict[str, Any]:
        """Plain containers; `from_json` reads them back."""
        found: dict[str, Any] = {"format": FORMAT}
        if self.members:
            found |= {"members": list(self.members), "mean of": "probabilities"}
        else:
            found |= {"model": self.model, "key_map": [list(pair) for pair in self.key_map]}
        found["flips"] = [list(pair) for pair in self.flips]
        found["outputs"] = self.outputs.to_json()
        found["input"] = {"units": UNITS, **asdict(self.preprocessing)}
        return found | {name: getattr(self, name) for name in _UNCHANGED}

    @classmethod
    def from_json(cls, found: dict[str, Any], source: str) -> Description:
        """Invert `to_json`; messages call the file ``source``.

        Raises:
            GigamorphError: a key is missing, or has another type or a value out of range.
        """
        made = check_plain(found, _ModelJson, source)
        plain = {name: getattr(made, name) for name in ("model", "key_map", "members", "flips", *_UNCHANGED)}
        return cls(outputs=Outputs(made.outputs), preprocessing=made.input, **plain)


@dataclass(frozen=True)
class _ModelJson:
    """The keys of ``model.json`` and their types."""

    outputs: tuple[Head, ...]
    input: Preprocessing
    flips: tuple[tuple[bool, bool], ...]
    licence: str
    source: dict[str, Any]
    reference: dict[str, Any]
    versions: dict[str, Any]
    model: str = ""
    key_map: tuple[tuple[str, str], ...] = ()
    members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, value in (("outputs", self.outputs), ("flips", self.flips), ("model", self.model or self.members)):
            if not value:
                raise DataError(f"key '{key}' is empty")
        for head in self.outputs:
            if head.activation == "number" and not len(head.center) == len(head.spread) == head.outputs:
                raise DataError(f"key 'outputs': center and spread must have {head.outputs} numbers")


def require_logits(folder: str | Path, description: Description) -> None:
    """Refuse to train a network that outputs probabilities, which losses would take for logits.

    Raises:
        DataError: it outputs probabilities; the message says what to import instead.
    """
    if any(head.activation == "probability" for head in description.outputs.heads):
        raise DataError(
            f"{folder}: its network outputs probabilities, but training needs logits; import it from a factory "
            "without its last softmax or sigmoid"
        )


def is_folder(path: str | Path) -> bool:
    """Whether `path` is the folder of a network."""
    return os.path.isfile(Path(path) / DESCRIPTION)  # Path.is_file raises if a name is too long


def folder_of(path: str | Path) -> Path | None:
    """Return the network's folder for its own path or that of its weights file; None if value is none."""
    path = Path(path)
    folder = path.parent if path.name == WEIGHTS else path
    return folder if is_folder(folder) else None


def require_no_run(folder: str | Path) -> None:
    """Refuse the folder of a `gigamorph train` run where the folder of a network is expected.

    Raises:
        DataError: it is the folder of a run; the message says which file to name.
    """
    run = Path(folder) / "best.ckpt"
    if run.is_file():
        raise DataError(f"{folder}: is the folder of a run; use its checkpoint, {run}")
    fold = Path(folder) / "fold1" / "best.ckpt"
    if fold.is_file():
        raise DataError(
            f"{folder}: contains the runs of a cross-validation; predict and explain use their mean if given its "
            f"config.toml; here use the checkpoint of one fold, {fold}"
        )


def read_description(folder: str | Path) -> Description:
    """Read ``model.json`` of a network's folder.

    Raises:
        DataError: it is not such a folder, or its description is damaged or of another version of gigamorph.
    """
    path = Path(folder) / DESCRIPTION
    try:
        found = parse_json(path.read_text())
    except FileNotFoundError as error:
        require_no_run(folder)
        raise DataError(f"{folder}: has no {DESCRIPTION}; make a model folder with gigamorph import") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}; import it again") from error
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise DataError(f"{path}: has format {version!r}, not {FORMAT}; import it again with this gigamorph")
    try:
        return Description.from_json(found, str(path))
    except GigamorphError as error:
        raise DataError(f"{error}; import it again") from error


def write_description(folder: str | Path, description: Description) -> None:
    """Write ``model.json``."""
    write_json(Path(folder) / DESCRIPTION, description.to_json(), "description")


def check_weights(folder: str | Path, description: Description) -> Path:
    """Return the path of a folder's weights after a check of their SHA-256.

    Raises:
        DataError: the file is missing, or is not the one that was checked at the import.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise DataError(f"{path}: no such weights file; import the network again")
    if sha256(path) != description.source.get("weights_sha256"):
        raise DataError(f"{path}: is not the file that was checked at the import; import the network again")
    return path


CONFIG = "config.toml"


def fold_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoint of each fold; empty if the folder is not that of a cross-validation.

    Raises:
        DataError: a fold is not finished; the message names it.
    """
    folder = Path(folder)
    config = folder / CONFIG
    if not config.is_file():  # it has the number of folds
        return []
    if (folder / "last.ckpt").is_file():  # the folder of a single fold, which has the same config.toml
        return []
    count = read_values(config).get("data", {}).get("folds")
    if count is None:
        return []
    folds = [folder / f"fold{number}" for number in range(1, count + 1)]
    # A fold with another config.toml is not finished for this run: with more epochs, say, the folds resume in order.
    finished = [
        fold
        for fold in folds
        if all((fold / name).is_file() for name in ("best.ckpt", "metrics.json", CONFIG))
        and (fold / CONFIG).read_bytes() == config.read_bytes()
    ]
    if left := [number for number, fold in enumerate(folds, 1) if fold not in finished]:
        one = f"; or use the checkpoint of a finished one, {finished[0] / 'best.ckpt'}" if finished else ""
        raise DataError(
            f"{folder}: fold {left[0]} of {count} is not finished; run gigamorph train --resume --out {folder}{one}"
        )
    return [fold / "best.ckpt" for fold in folds]


def digest_of(path: str | Path) -> str:
    """Return the SHA-256 of a checkpoint, or of a folder's description, which contains the hashes of all its weights.

    For a folder of folds, it is the hash of the checkpoints' hashes in order.

    Raises:
        DataError: see `read_description` and `fold_checkpoints`.
    """
    path = Path(path)
    if not path.is_dir():
        return sha256(path)
    if folds := fold_checkpoints(path):
        return hashlib.sha256("".join(map(sha256, folds)).encode()).hexdigest()
    read_description(path)
    return sha256(path / DESCRIPTION)
