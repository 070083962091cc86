"""Reads weights from Keras' h5 files: of a model or of its weights only, written by Keras 1 or 2."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError, GigamorphError
from ...models.weights import first_line

Array = np.ndarray[Any, np.dtype[Any]]

# Keras 1 names weights LAYER_W_1:0, Keras 2 LAYER/kernel:0. Keras 1's running_std is the variance.
_PARAMETER = re.compile(
    r"[_/](kernel|W|bias|b|gamma|beta|moving_mean|running_mean|moving_variance|running_std)(?:_\d+)?(?::\d+)?$"
)
_KERAS_2_NAMES = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}


@dataclass(frozen=True)
class KerasFile:
    """The content of a file.

    Attributes:
        layers: the arrays of each layer, with the names of Keras 2 (kernel, bias, gamma, ...).
        outer_layers: layers on top of a network that is itself one layer of the model; empty if all layers are those
            of the model.
    """

    layers: dict[str, dict[str, Array]]
    outer_layers: dict[str, dict[str, Array]]


def read_keras(path: Path) -> KerasFile:
    """Read the layers of an h5 file.

    Raises:
        GigamorphError: h5py is not installed.
        DataError: the file is missing, damaged, or has another layout.
    """
    try:
        import h5py
    except ImportError as error:
        raise GigamorphError(f"{path}: h5 files need h5py; pip install 'gigamorph[keras]'") from error
    if not path.is_file():
        raise DataError(f"{path}: no such weights file")
    own: dict[str, dict[str, Array]] = {}
    nested: dict[str, dict[str, Array]] = {}
    try:
        with h5py.File(path, "r") as file:
            root: Any = file.get("model_weights", file)
            if _text(root.attrs.get("backend", "")) == "theano":
                raise DataError(
                    f"{path}: was written by Keras on Theano, whose kernels are flipped; convert it in Keras"
                )
            for group in _names(root, "layer_names", path):
                found = _layers(root[group], group, path)
                (nested if len(found) > 1 else own).update(found)
    except DataError:
        raise
    except Exception as error:  # h5py raises many types for damaged files
        raise DataError(f"{path}: not a readable h5 file: {first_line(error)}") from error
    return KerasFile(nested, own) if nested else KerasFile(own, {})


def _layers(group: Any, name: str, path: Path) -> dict[str, dict[str, Array]]:
    """Return the layers of one group: the group itself, or the layers of the network that it contains."""
    weights = _names(group, "weight_names", path)
    found: dict[str, dict[str, Array]] = {}
    for weight in weights:
        match = _PARAMETER.search(weight)
        if match is None:
            raise DataError(f"{path}: weight {weight!r} of layer {name!r} does not occur in ResNet-50 or VGG")
        parameter = _KERAS_2_NAMES.get(match[1], match[1])
        found.setdefault(weight[: match.start()].rpartition("/")[2], {})[parameter] = _values(
            group[weight], weight, path
        )
    # TensorFlow renumbers a layer of a second model (conv1_1/kernel:0): its group has the true name.
    return {name: next(iter(found.values()))} if len(found) == 1 else found


def _values(stored: Any, name: str, path: Path) -> Array:
    """Read a dataset that is stored in this file; HDF5 links could point to any file on the disk."""
    if stored.file.filename != str(path) or stored.external or stored.is_virtual:
        raise DataError(f"{path}: weight {name!r} is in another file; save all weights in one")
    return np.asarray(stored)


def _names(group: Any, attribute: str, path: Path) -> list[str]:
    """Return a list of names; Keras splits long ones into NAME0, NAME1, ..."""
    attributes = group.attrs
    parts = [attribute] if attribute in attributes else []
    while f"{attribute}{len(parts)}" in attributes:
        parts.append(f"{attribute}{len(parts)}")
    if not parts:
        raise DataError(f'{path}: has no {attribute}; write it with model.save_weights("NAME.h5") of Keras 2')
    return [_text(name) for part in parts for name in attributes[part]]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
