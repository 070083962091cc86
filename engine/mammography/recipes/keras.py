"""Reads weights of ResNet-50 and VGG from Keras' h5 files, written by Keras 1 or 2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import DataError, GigamorphError
from ...models.resnet import EPS, OLD_EPS
from ...models.weights import first_line

Array = np.ndarray[Any, np.dtype[Any]]
Layers = dict[str, dict[str, Array]]

# Keras 1 names weights LAYER_W_1:0, Keras 2 LAYER/kernel:0. Keras 1's running_std is the variance.
_PARAMETER = re.compile(
    r"[_/](kernel|W|bias|b|gamma|beta|moving_mean|running_mean|moving_variance|running_std)(?:_\d+)?(?::\d+)?$"
)
_KERAS_2_NAMES = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}


def read_keras(path: Path) -> tuple[Layers, Layers]:
    """Read the arrays of each layer of an h5 file, with the names of Keras 2 (kernel, bias, gamma, ...).

    Returns:
        The layers, and those on top of a network that is itself one layer of the model; these are empty if all layers
        are those of the model.

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
    own: Layers = {}
    nested: Layers = {}
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
    return (nested, own) if nested else (own, {})


def _layers(group: Any, name: str, path: Path) -> Layers:
    """Return the layers of one group: the group itself, or the layers of the network that it contains."""
    weights = _names(group, "weight_names", path)
    found: Layers = {}
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


_OLD = re.compile(r"(res|bn)([2-5])([a-z])_branch(1|2a|2b|2c)")
_NEW = re.compile(r"conv([2-5])_block(\d{1,3})_([0-3])_(conv|bn)")
_STEM = {"conv1": "conv1", "bn_conv1": "bn1", "conv1_conv": "conv1", "conv1_bn": "bn1"}
_VGG = re.compile(r"block([1-5])_conv(\d)")
_BATCH_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_FIRST = ("conv1.weight", "features.0.weight")
_CLASSIFIERS = ("fc1000", "probs", "predictions")
# The dense layers of VGG in timm and in torchvision.
_DENSE = ({"fc1": "pre_logits.fc1", "fc2": "pre_logits.fc2"}, {"fc1": "classifier.0", "fc2": "classifier.3"})
_LAST = ("fc", "head.fc", "classifier.6")


def keras_state(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Read the weights of a Keras h5 file with a network's tensor names and layouts.

    The first convolution is converted from Keras' order blue, green, red to red, green, blue. Biases of convolutions
    before a BatchNorm, which the network lacks, are moved into its running mean: function and training stay the same.
    Dense layers that the network lacks are named head.LAYER; unknown layers keep their names.


    Raises:
        DataError: see `read_keras`; or the network is a ResNet with other strides or another BatchNorm eps.
    """
    layers, outer_layers = read_keras(path)
    _check(path, network, layers)
    modules = dict(network.named_modules())
    state: dict[str, Tensor] = {}
    for layer, arrays in layers.items():
        state |= _tensors(layer, arrays, _module_of(layer, arrays, layers, modules), modules)
    for layer, arrays in outer_layers.items():
        state |= {f"head.{layer}.{name}": torch.from_numpy(array) for name, array in arrays.items()}
    for name in _FIRST:
        if name in state and state[name].shape[1] == 3:
            state[name] = state[name].flip(1)
    return _without_biases(state, network.state_dict())


def _module_of(layer: str, arrays: Mapping[str, Array], layers: Mapping[str, object], modules: Mapping) -> str:
    """Return the network's name of a layer."""
    if layer in _STEM:
        return _STEM[layer]
    if match := _OLD.fullmatch(layer):
        kind, stage, block, branch = match.groups()
        part = 0 if branch == "1" else "abc".index(branch[1]) + 1
        return _part(int(stage), ord(block) - ord("a"), part, kind == "bn")
    if match := _NEW.fullmatch(layer):
        stage, block, part, kind = match.groups()
        return _part(int(stage), int(block) - 1, int(part), kind == "bn")
    if match := _VGG.fullmatch(layer):
        block, number = int(match[1]), int(match[2])
        depths = [
            max((int(m[2]) for m in map(_VGG.fullmatch, layers) if m and int(m[1]) == b), default=0)
            for b in range(1, block)
        ]
        return f"features.{sum(2 * depth + 1 for depth in depths) + 2 * (number - 1)}"
    if "kernel" not in arrays or arrays["kernel"].ndim != 2:
        return layer
    known = [names[layer] for names in _DENSE if layer in names] + (list(_LAST) if layer in _CLASSIFIERS else [])
    return next((name for name in known if name in modules), f"head.{layer}")


def _part(stage: int, block: int, part: int, norm: bool) -> str:
    """Return the name of a part of a residual block; part 0 is the shortcut."""
    own = f"{'bn' if norm else 'conv'}{part}" if part else f"downsample.{int(norm)}"
    return f"layer{stage - 1}.{block}.{own}"


def _tensors(layer: str, arrays: Mapping[str, Array], name: str, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    found = {}
    for parameter, array in arrays.items():
        if parameter in _BATCH_NORM:
            found[f"{name}.{_BATCH_NORM[parameter]}"] = torch.from_numpy(array)
        elif parameter == "bias":
            found[f"{name}.bias"] = torch.from_numpy(array)
        else:
            own = getattr(modules.get(name), "weight", None)
            shape = None if own is None else tuple(own.shape)
            kernel = array.transpose(3, 2, 0, 1) if array.ndim == 4 else _dense(array, shape, layer == "fc1")
            found[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
    return found


def _dense(array: Array, shape: tuple[int, ...] | None, of_maps: bool) -> Array:
    """Convert a dense kernel (in, out); inputs of VGG's first one are channels-last maps of 7 x 7."""
    if of_maps and shape is not None and len(array) % 49 == 0:
        array = array.reshape(7, 7, -1, array.shape[1]).transpose(3, 2, 0, 1)
        return array if len(shape) == 4 else array.reshape(len(array), -1)
    return array.T[:, :, None, None] if shape is not None and len(shape) == 4 else array.T


def _without_biases(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name in [name for name in state if name.endswith(".bias") and name not in own]:
        conv = name.removesuffix(".bias")
        norm = conv[:-1] + "1" if conv.endswith("downsample.0") else conv.replace("conv", "bn")
        mean = f"{norm}.running_mean"
        if norm != conv and mean in state:
            state[mean] = state[mean] - state.pop(name)
    return state


def _check(path: Path, network: nn.Module, layers: Mapping[str, object]) -> None:
    """Refuse a ResNet with fitting names and shapes that computes another function with the weights."""
    old = any(map(_OLD.fullmatch, layers))
    if not old and not any(map(_NEW.fullmatch, layers)):
        return
    eps, modules = OLD_EPS if old else EPS, dict(network.named_modules())
    take = f"resnet50_v1{f'?eps={eps:g}' if old else ''}"
    convs = [modules.get(f"layer{stage}.0.conv1") for stage in (2, 3, 4)]
    if any(isinstance(conv, nn.Conv2d) and conv.stride != (2, 2) for conv in convs):
        raise DataError(
            f"{path}: Keras' ResNet-50 has the stride in the first convolution of a block, the network does not; "
            f"use the network {take}"
        )
    norm = modules.get("bn1")
    if isinstance(norm, nn.BatchNorm2d) and abs(norm.eps / eps - 1) > 0.01:
        raise DataError(
            f"{path}: the BatchNorm of its layers has eps {eps:g}, the network's {norm.eps:g}; use the network {take}"
        )
