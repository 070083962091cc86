"""The configuration of `gigamorph train`: all options of its command line, as read from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..config import from_plain, read_values, without_nulls
from ..datasets.augment import Augment
from ..errors import GigamorphError
from ..images.grayscale import check_voi
from ..images.levels import parse_white
from ..images.pixels import Normalize
from ..models.folder import folder_of, is_folder, read_description, require_logits
from ..models.outputs import Views
from ..models.pretrained import TIMM as _TIMM
from ..models.pretrained import pretrained_scale
from ..models.registry import open_checked
from .inputs import Labels
from .options import Loss, TrainOptions, require
from .stages import Stage

Numbers = float | tuple[float, ...]


@dataclass(frozen=True)
class DataOptions:
    """How the images of a table are prepared, and which of its labels are learnt."""

    task: Literal["classes", "labels", "ordinal", "numbers", "masks"] = "classes"
    """"classes": one of several; "labels": any of several (columns label_NAME); "ordinal": ordered classes; "numbers":
    columns label_NAME; "masks": a class for each pixel (files in column mask_path)."""
    labels: tuple[str, ...] = ()
    """For "labels" and "numbers": the columns' names without label_; all columns by default."""
    classes: tuple[str, ...] = ()
    """Names of the classes in their order; by default those of the table, sorted. For "masks" the names of the values 0
    (background), 1, ...; by default as many as the masks have."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other names of the table's columns: {"label": "cancer"} reads its column cancer as label."""
    channels: Literal[1, 3] = 1
    mean: Numbers | Literal["auto"] = 0.0
    """"auto" for mean and std measures both on a sample of the training images."""
    std: Numbers | Literal["auto"] = 1.0
    voi: str = "auto"
    for_processing: bool = False
    white: float | str | None = None
    augment: str | None = None
    downsample: int = 1
    """Average this many pixels in each direction: the input of a baseline at lower resolution."""
    skip_bad: bool = False
    views: Views | None = None
    """Combine the views of an exam (patient_id, exam_id) into one sample: by the mean of their logits, their maximum,
    or attention over the views."""
    folds: int | None = None
    """Number of runs of a cross-validation by patient."""


@dataclass(frozen=True)
class TrainConfig(TrainOptions):
    """The configuration of a run of `gigamorph train`."""

    init: str | None = None
    """Initial weights: a file, a folder of gigamorph import (which sets model and preprocessing), or timm:NAME, whose
    pretrained weights timm downloads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int | None = None
    devices_per_image: int | None = None
    """Number of devices that share each image, instead of all devices (``split_image``)."""
    timeout: float = 7200.0
    """Seconds that processes wait for each other."""
    log: tuple[str, ...] = ()
    """Additional loggers: csv, tensorboard, wandb, mlflow, or module:name of a Lightning logger."""
    callbacks: tuple[str, ...] = ()
    """Lightning callbacks, as module:name."""
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        if (self.data.mean == "auto") != (self.data.std == "auto"):
            raise GigamorphError("data.mean and data.std must both be auto, or neither")
        super().__post_init__()
        require("data.downsample", self.data.downsample, 1)
        require("data.folds", self.data.folds, 2)
        check_voi(self.data.voi)
        self.data_arguments()
        self._refuse_unused()
        for name in ("devices", "devices_per_image", "timeout"):
            require(name, getattr(self, name), 1)

    def _refuse_unused(self) -> None:
        """Refuse options without effect, and duplicate names."""
        if self.stages and self.epochs != TrainOptions.epochs:
            raise GigamorphError(
                f"epochs is {self.epochs}, but each stage has its own epochs; leave it out, or set those of the stages"
            )
        of_numbers = self.data.task == "numbers"
        for name in ("class_weights", "label_smoothing", "focal") if of_numbers else ("regression",):
            if getattr(self.loss, name) != getattr(Loss(), name):
                what = "classes and labels, not to numbers" if of_numbers else "--task numbers; leave it out"
                raise GigamorphError(f"loss.{name} applies only to {what}")
        optimizer = self.optimizer.name
        if self.optimizer.momentum is not None and optimizer.lower() != "sgd":
            raise GigamorphError(
                f"optimizer.momentum applies only to sgd; set the momentum of {optimizer}, if any, in optimizer.options"
            )
        for name, tasks in (("labels", ("labels", "numbers")), ("classes", ("classes", "ordinal", "masks"))):
            if getattr(self.data, name) and self.data.task not in tasks:
                listed = f"{', '.join(tasks[:-1])} and {tasks[-1]}"
                raise GigamorphError(f"data.{name} applies only to --task {listed}; leave it out, or set data.task")
        for name in ("labels", "classes"):
            given = getattr(self.data, name)
            if twice := [one for number, one in enumerate(given) if one in given[:number]]:
                raise GigamorphError(f"data.{name} names {twice[0]!r} twice; name each once")

    @property
    def split(self) -> bool | int:
        """The value of `TrainOptions.split_image`."""
        return self.devices_per_image or self.split_image

    def options(self) -> TrainOptions:
        """The options for `fit`."""
        values = {own.name: getattr(self, own.name) for own in fields(TrainOptions)}
        values["split_image"] = self.split
        return TrainOptions(**values)

    def data_arguments(self) -> dict[str, Any]:
        """The arguments of `training_data`, without the table.

        Raises:
            GigamorphError: for invalid values.
        """
        own = self.data
        normalize: Any = "auto" if own.mean == "auto" else Normalize(_numbers(own.mean), _numbers(own.std))
        return {
            "labels": Labels(own.task, own.labels, own.classes, own.views),
            "columns": own.columns,
            "channels": own.channels,
            "normalize": normalize,
            "voi": own.voi,
            "downsample": own.downsample,
            "for_processing": own.for_processing,
            "white": None if own.white is None else parse_white(str(own.white)),
            "augment": None if own.augment is None else Augment.parse(own.augment),
            "skip_bad": own.skip_bad,
            "seed": self.seed,
        }


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (float(value),)


def make_config(values: Mapping[str, Any], source: str, warn: Callable[[str], object]) -> TrainConfig:
    """A configuration from the given values; missing ones are taken from the network of --init.

    Args:
        values: nested, by the names of `TrainConfig`.
        source: the name of the configuration in messages.
        warn: called with a line if the images are prepared differently than the network expects.

    Raises:
        GigamorphError: for an unknown key or an invalid value.
    """
    config = from_plain(dict(values), TrainConfig, source)
    values, init = without_nulls(values), config.init
    if init is not None and "model" not in values and (folder := folder_of(init)):
        init = str(folder)  # also if --init names the folder's weights file
    if init is None:
        if not is_folder(config.model):
            return config
        init = config.model
    elif "model" in values and (init.startswith(_TIMM) or Path(init).is_dir()):
        raise GigamorphError("--init determines the model; omit --model")
    if config.weights is not None:
        raise GigamorphError(f"--weights {config.weights}: {init} has its own weights; omit them")
    if init.startswith(_TIMM):
        return from_plain(_of_timm(values, init, config.data.channels), TrainConfig, source)
    if Path(init).is_dir():
        return from_plain(_of_folder(values, init, warn), TrainConfig, source)
    own = _of_folder(values, config.model, warn) if is_folder(config.model) else _without(values, "init")
    return from_plain({**own, "weights": init}, TrainConfig, source)


def read_saved(path: str | Path) -> dict[str, Any]:
    """The values in the configuration file that a run has stored, for resuming it.

    Files of older versions hold a momentum for every optimizer, although only sgd used it.

    Raises:
        GigamorphError: as `read_values`.
    """
    match values := read_values(path):
        case {"optimizer": {"name": str(name), "momentum": Stage.momentum}} if name.lower() != "sgd":
            del values["optimizer"]["momentum"]
    return values


def _of_timm(values: Mapping[str, Any], init: str, channels: int) -> dict[str, Any]:
    """Values with a timm model, its weights, and its mean and std as defaults.

    The channels of a grey image are equal, so its mean and std are the averages over the channels.
    """
    mean, std = pretrained_scale(init)
    if channels == 1:
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    data = {"mean": mean, "std": std, **values.get("data", {})}
    return {**_without(values, "init"), "model": init, "weights": init, "data": data}


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _of_folder(values: Mapping[str, Any], folder: str, warn: Callable[[str], object]) -> dict[str, Any]:
    """Values with the model and weights of a folder, and its channels, mean, std and grey scale as defaults."""
    found = read_description(folder)
    if found.members:
        raise GigamorphError(f"{folder}: is an ensemble; fine-tune a member, such as {folder}/{found.members[0]}")
    require_logits(folder, found)
    open_checked(folder)  # so that errors are raised before any image is read
    own, said = found.preprocessing, dict(values.get("data", {}))
    if not own.streams and not {"mean", "std"} <= said.keys():
        size = f"{own.size[0]} x {own.size[1]} pixels" if own.size else ""
        by = f"{own.per_image} of each image" if own.per_image else ""
        warn(
            f"{folder} expects images scaled to {' and '.join(filter(None, (size, by)))}; here it is trained on every "
            "pixel, normalised by --mean and --std"
        )
    given = {"channels": own.channels, "mean": list(own.mean), "std": list(own.std), "voi": own.voi}
    data = {**given, **said}
    return {**_without(values, "init"), "model": found.model, "weights": folder, "data": data}
