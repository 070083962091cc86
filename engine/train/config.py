"""The configuration of `gigamorph train`: all that its command line can say, as a file has it."""

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
from ..models.pretrained import TIMM as _TIMM
from ..models.pretrained import pretrained_scale
from ..models.registry import open_checked
from ..models.views import Views
from .inputs import Labels
from .options import Loss, TrainOptions, require
from .stages import Stage

Numbers = float | tuple[float, ...]


@dataclass(frozen=True)
class DataOptions:
    """How a table becomes images, and what of it is learnt."""

    task: Literal["classes", "labels", "ordinal", "numbers", "masks"] = "classes"
    """One of several classes; any of several labels (columns label_NAME); classes in their order; numbers (columns
    label_NAME); a class for each pixel (files of column mask_path)."""
    labels: tuple[str, ...] = ()
    """Of "labels" and "numbers": the columns' names without label_; all where none is named."""
    classes: tuple[str, ...] = ()
    """Names of the classes in their order; by default as the table has them, sorted. Of "masks" the names of 0 (the
    background), 1, ...; by default as many as the masks have."""
    channels: Literal[1, 3] = 1
    mean: Numbers | Literal["auto"] = 0.0
    """"auto" for mean and std takes both of a sample of the training images."""
    std: Numbers | Literal["auto"] = 1.0
    voi: str = "auto"
    for_processing: bool = False
    white: float | str | None = None
    augment: str | None = None
    downsample: int = 1
    """Average so many pixels in both directions: what a baseline of lower resolution sees."""
    skip_bad: bool = False
    views: Views | None = None
    """Take the views of an exam (patient_id, exam_id) as one sample: by the mean of their logits, the highest, or
    attention over the views."""
    folds: int | None = None
    """Cross-validation by patient: as many runs."""


@dataclass(frozen=True)
class TrainConfig(TrainOptions):
    """A run of `gigamorph train`; what is not set takes the defaults."""

    init: str | None = None
    """Where weights come from: a file, a folder of gigamorph import (which says model and preprocessing), or
    timm:NAME, whose pretrained weights timm fetches."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int | None = None
    devices_per_image: int | None = None
    """As many of the devices share each image, in the place of all (``split_image``)."""
    timeout: float = 7200.0
    """Seconds that processes wait for each other."""
    log: tuple[str, ...] = ()
    """Further logs: csv, tensorboard, wandb, mlflow, or module:name of a logger of Lightning."""
    callbacks: tuple[str, ...] = ()
    """module:name of callbacks of Lightning."""
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        if (self.data.mean == "auto") != (self.data.std == "auto"):
            raise GigamorphError("data.mean and data.std are taken of the images together; make both auto")
        super().__post_init__()
        require("data.downsample", self.data.downsample, 1)
        require("data.folds", self.data.folds, 2)
        check_voi(self.data.voi)
        self.data_arguments()
        self._require_use()
        for name in ("devices", "devices_per_image", "timeout"):
            require(name, getattr(self, name), 1)

    def _require_use(self) -> None:
        """Refuse what would have no effect, and names that are there twice."""
        if self.stages and self.epochs != TrainOptions.epochs:
            raise GigamorphError(
                f"epochs is {self.epochs}, but each of the stages has its own; leave it out, or set those"
            )
        of_numbers = self.data.task == "numbers"
        for name in ("class_weights", "label_smoothing", "focal") if of_numbers else ("regression",):
            if getattr(self.loss, name) != getattr(Loss(), name):
                whose = "classes and labels; numbers have none" if of_numbers else "--task numbers; leave it out"
                raise GigamorphError(f"loss.{name} is of {whose}")
        optimizer = self.optimizer.name
        if self.optimizer.momentum is not None and optimizer.lower() != "sgd":
            raise GigamorphError(
                f"optimizer.momentum is of sgd; of {optimizer} it is in optimizer.options, if it has one"
            )
        for name, tasks in (("labels", ("labels", "numbers")), ("classes", ("classes", "ordinal", "masks"))):
            if getattr(self.data, name) and self.data.task not in tasks:
                whose = f"{', '.join(tasks[:-1])} and {tasks[-1]}"
                raise GigamorphError(f"data.{name} is of --task {whose}; leave it out, or set data.task")
        for name in ("labels", "classes"):
            given = getattr(self.data, name)
            if twice := [one for number, one in enumerate(given) if one in given[:number]]:
                raise GigamorphError(f"data.{name} names {twice[0]!r} twice; name each once")

    @property
    def split(self) -> bool | int:
        """What `TrainOptions.split_image` is."""
        return self.devices_per_image or self.split_image

    def options(self) -> TrainOptions:
        """What `fit` takes."""
        values = {own.name: getattr(self, own.name) for own in fields(TrainOptions)}
        values["split_image"] = self.split
        return TrainOptions(**values)

    def data_arguments(self) -> dict[str, Any]:
        """What `training_data` takes, without the table.

        Raises:
            GigamorphError: for values that no image can be prepared by.
        """
        own = self.data
        normalize: Any = "auto" if own.mean == "auto" else Normalize(_numbers(own.mean), _numbers(own.std))
        return {
            "labels": Labels(own.task, own.labels, own.classes, own.views),
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
    """A configuration from the values that were said; what a network of --init is made for fills what was not.

    Args:
        values: nested, by the names of `TrainConfig`.
        source: what messages call it.
        warn: called with a line where the images are not those that the network was made for.

    Raises:
        GigamorphError: a key or value that does not fit.
    """
    config = from_plain(dict(values), TrainConfig, source)
    values, init = without_nulls(values), config.init
    if init is not None and "model" not in values and (folder := folder_of(init)):
        init = str(folder)  # also where its file of weights is named
    if init is None:
        if not is_folder(config.model):
            return config
        init = config.model
    elif "model" in values and (init.startswith(_TIMM) or Path(init).is_dir()):
        raise GigamorphError("--init says the model; omit --model")
    if config.weights is not None:
        raise GigamorphError(f"--weights {config.weights}: {init} has its own weights; omit them")
    if init.startswith(_TIMM):
        return from_plain(_of_timm(values, init, config.data.channels), TrainConfig, source)
    if Path(init).is_dir():
        return from_plain(_of_folder(values, init, warn), TrainConfig, source)
    own = _of_folder(values, config.model, warn) if is_folder(config.model) else _without(values, "init")
    return from_plain({**own, "weights": init}, TrainConfig, source)


def read_saved(path: str | Path) -> dict[str, Any]:
    """What stands in the file that a run has kept, which goes on as it was begun.

    Those of older versions say of every optimizer the momentum that only sgd has taken.

    Raises:
        GigamorphError: as `read_values`.
    """
    match values := read_values(path):
        case {"optimizer": {"name": str(name), "momentum": Stage.momentum}} if name.lower() != "sgd":
            del values["optimizer"]["momentum"]
    return values


def _of_timm(values: Mapping[str, Any], init: str, channels: int) -> dict[str, Any]:
    """Values with a model of timm, its weights, and the mean and std that it was made for, where they do not say them.

    A grey image is the mean of equal channels, so it takes the mean of their means and standard deviations.
    """
    mean, std = pretrained_scale(init)
    if channels == 1:
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    data = {"mean": mean, "std": std, **values.get("data", {})}
    return {**_without(values, "init"), "model": init, "weights": init, "data": data}


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _of_folder(values: Mapping[str, Any], folder: str, warn: Callable[[str], object]) -> dict[str, Any]:
    """Values with the model, weights, channels, mean, std and grey scale of a folder, where they do not say them."""
    found = read_description(folder)
    if found.members:
        raise GigamorphError(f"{folder}: is an ensemble; fine-tune one of its members, as {folder}/{found.members[0]}")
    require_logits(folder, found)
    open_checked(folder)  # said before any image is read
    own, said = found.preprocessing, dict(values.get("data", {}))
    if not own.streams and not {"mean", "std"} <= said.keys():
        size = f"{own.size[0]} x {own.size[1]} pixels" if own.size else ""
        by = f"{own.per_image} of each image" if own.per_image else ""
        warn(
            f"{folder} was made for images brought to {' and '.join(filter(None, (size, by)))}; here it "
            "learns on every pixel, normalised by --mean and --std"
        )
    given = {"channels": own.channels, "mean": list(own.mean), "std": list(own.std), "voi": own.voi}
    data = {**given, **said}
    return {**_without(values, "init"), "model": found.model, "weights": folder, "data": data}
