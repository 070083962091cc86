"""Configurations of `gigamorph train` from files and networks; `options` declares their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import from_plain, read_values, without_nulls
from ..errors import GigamorphError
from ..models.folder import folder_of, is_folder, read_description, require_logits
from ..models.pretrained import TIMM as _TIMM
from ..models.pretrained import pretrained_scale
from ..models.registry import open_checked
from .options import Stage, TrainConfig


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
