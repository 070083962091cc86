"""Files as Keras wrote them, with random weights, and what Keras computes with them: in float64, channels last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Layers = dict[str, dict[str, np.ndarray[Any, np.dtype[Any]]]]
STAGES = ((2, 3, 1), (3, 4, 2), (4, 6, 2), (5, 3, 2))
"""Number of a stage, its blocks, its stride."""
VGG16, VGG19 = (2, 2, 3, 3, 3), (2, 2, 4, 4, 4)
CAFFE = np.array([103.939, 116.779, 123.68])
"""Means of blue, green, red."""
_KERAS_1 = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")


def names(stage: int, block: int, part: int, new: bool) -> tuple[str, str]:
    """Of a convolution and its BatchNorm; part 0 is the shortcut."""
    if new:
        return f"conv{stage}_block{block + 1}_{part}_conv", f"conv{stage}_block{block + 1}_{part}_bn"
    own = f"{stage}{'abcdef'[block]}_branch{'1' if part == 0 else '2' + 'abc'[part - 1]}"
    return f"res{own}", f"bn{own}"


def resnet50(width: int, new: bool, classes: int = 0) -> Layers:
    rng = np.random.default_rng(0)
    found: Layers = {}

    def conv(pair: tuple[str, str], side: int, inputs: int, outputs: int) -> None:
        scale = (side * side * inputs) ** -0.5
        found[pair[0]] = {
            "kernel": rng.normal(0, scale, (side, side, inputs, outputs)).astype(np.float32),
            "bias": rng.normal(0, 0.3, outputs).astype(np.float32),
        }
        values = rng.uniform(0.5, 1.5, (4, outputs)).astype(np.float32) - np.float32([[0], [1], [1], [0]])
        found[pair[1]] = dict(zip(_NORM, values, strict=True))

    conv(("conv1_conv", "conv1_bn") if new else ("conv1", "bn_conv1"), 7, 3, width)
    inputs = width
    for number, (stage, blocks, _) in enumerate(STAGES):
        depth = width * 2**number
        for block in range(blocks):
            if block == 0:
                conv(names(stage, block, 0, new), 1, inputs, 4 * depth)
            conv(names(stage, block, 1, new), 1, inputs, depth)
            conv(names(stage, block, 2, new), 3, depth, depth)
            conv(names(stage, block, 3, new), 1, depth, 4 * depth)
            inputs = 4 * depth
    if classes:
        found["probs" if new else "fc1000"] = dense(rng, inputs, classes)
    return found


def vgg(
    widths: tuple[int, ...] = (64, 128, 256, 512, 512), fc: tuple[int, ...] = (), depths: tuple[int, ...] = VGG16
) -> Layers:
    rng = np.random.default_rng(1)
    found: Layers = {}
    inputs = 3
    for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for conv in range(depth):
            found[f"block{number + 1}_conv{conv + 1}"] = {
                "kernel": rng.normal(0, (2 / 9 / inputs) ** 0.5, (3, 3, inputs, width)).astype(np.float32),
                "bias": rng.normal(0, 0.1, width).astype(np.float32),
            }
            inputs = width
    inputs *= 49
    for name, outputs in zip(("fc1", "fc2", "predictions"), fc, strict=False):
        found[name], inputs = dense(rng, inputs, outputs), outputs
    return found


def dense(rng: np.random.Generator, inputs: int, outputs: int) -> dict[str, Any]:
    return {
        "kernel": rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32),
        "bias": rng.normal(0, 0.1, outputs).astype(np.float32),
    }


def write(path: Path, layers: Layers, form: str = "keras2", beside: Layers | None = None) -> Path:
    """A file of weights ("keras1", "keras2"), of a model, or of one in which the layers are a network of their own.

    Args:
        beside: layers on top, of "nested".
    """
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if form in ("model", "nested") else file
        if form in ("model", "nested"):
            file.create_group("optimizer_weights")
        root.attrs["backend"], root.attrs["keras_version"] = b"tensorflow", b"2.0.8"
        if form == "nested":
            groups: dict[str, Layers] = {
                "input_2": {},
                "model_1": layers,
                **{k: {k: v} for k, v in (beside or {}).items()},
            }
        else:  # layers without weights have groups, too
            groups = {"input_1": {}, **{name: {name: arrays} for name, arrays in layers.items()}, "avg_pool": {}}
        root.attrs["layer_names"] = [name.encode() for name in groups]
        for name, held in groups.items():
            _group(root.create_group(name), held, form)
    return path


def _group(group: Any, layers: Layers, form: str) -> None:
    names = []
    for layer, arrays in layers.items():
        for parameter, array in arrays.items():
            old = f"{layer}_{_KERAS_1.get(parameter, parameter)}_1:0"
            names.append(old if form == "keras1" else f"{layer}/{parameter}:0")
            group[names[-1]] = array
    if len(names) > 100:  # cut as Keras cuts what is too long for an attribute
        group.attrs["weight_names0"] = [name.encode() for name in names[:100]]
        group.attrs["weight_names1"] = [name.encode() for name in names[100:]]
    else:
        group.attrs["weight_names"] = np.array([name.encode() for name in names], "S40")


# -------------------------------------------------------------------------------------------------- what Keras computes


def conv2d(x: Tensor, layer: dict[str, Any], stride: int = 1, padding: int = 0) -> Tensor:
    """(N, H, W, C); the sum over the kernel's places, one matrix product each."""
    kernel, bias = (torch.from_numpy(layer[name]).double() for name in ("kernel", "bias"))
    x = F.pad(x, (0, 0, padding, padding, padding, padding))
    height, width = ((x.shape[axis] - kernel.shape[0]) // stride + 1 for axis in (1, 2))
    out = bias.expand(len(x), height, width, -1).clone()
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            part = x[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
            out += part @ kernel[i, j]
    return out


def norm(x: Tensor, layer: dict[str, Any], eps: float) -> Tensor:
    gamma, beta, mean, var = (torch.from_numpy(layer[name]).double() for name in _NORM)
    return gamma * (x - mean) / (var + eps).sqrt() + beta


def pool(x: Tensor, side: int, padding: int = 0) -> Tensor:
    """Stride 2, beyond the border 0."""
    x = F.pad(x, (0, 0, padding, padding, padding, padding))
    height, width = ((x.shape[axis] - side) // 2 + 1 for axis in (1, 2))
    parts = [x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] for i in range(side) for j in range(side)]
    return torch.stack(parts).amax(0)


def preprocessed(rgb: np.ndarray[Any, Any]) -> Tensor:
    """Colours (H, W, 3) from 0 to 255 as the networks take them: blue, green, red, less their means."""
    return torch.from_numpy(rgb[..., ::-1].astype(np.float64) - CAFFE)[None]


def resnet50_maps(layers: Layers, x: Tensor, new: bool, padding: int) -> Tensor:
    """The last maps; ``padding`` of the first pooling."""
    eps = 1.001e-5 if new else 1e-3
    stem = ("conv1_conv", "conv1_bn") if new else ("conv1", "bn_conv1")

    def both(x: Tensor, pair: tuple[str, str], stride: int = 1, padding: int = 0) -> Tensor:
        return norm(conv2d(x, layers[pair[0]], stride, padding), layers[pair[1]], eps)

    x = pool(both(x, stem, 2, 3).relu(), 3, padding)
    for stage, blocks, stride in STAGES:
        for block in range(blocks):
            own = stride if block == 0 else 1
            out = both(x, names(stage, block, 1, new), own).relu()
            out = both(both(out, names(stage, block, 2, new), 1, 1).relu(), names(stage, block, 3, new))
            x = (out + (both(x, names(stage, block, 0, new), own) if block == 0 else x)).relu()
    return x


def vgg_maps(layers: Layers, x: Tensor, depths: tuple[int, ...] = VGG16) -> Tensor:
    for block, depth in enumerate(depths):
        for conv in range(depth):
            x = conv2d(x, layers[f"block{block + 1}_conv{conv + 1}"], 1, 1).relu()
        x = pool(x, 2)
    return x
