"""Published weights from which recipes start: names, sources, and the normalisation of their inputs.

A configuration names a file, or "random". A file that is known by name or by content has the normalisation of its
training. The configuration's may not be far from it, because a network accepts inputs of another scale silently.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import DataError, GigamorphError
from ...models import build_model
from ...models.checkpoints import is_state, load_inert, read_state
from ...models.folder import is_folder
from ...models.registry import load_weights
from ...models.weights import sha256
from ...train.run import Run
from .keras import keras_state

_TORCHVISION = "https://download.pytorch.org/models/"
_META = "https://dl.fbaipublicfiles.com/"
_KERAS = "https://github.com/keras-team/keras-applications/releases/download/resnet/"
_CHOLLET = "https://github.com/fchollet/deep-learning-models/releases/download/"


@dataclass(frozen=True)
class ImageNetWeights:
    """A file of ImageNet weights.

    Attributes:
        source: where it can be downloaded.
        sha256: first digits of its hash, as published; empty if unknown.
        md5: published hashes of files with this name.
        mean, std: of its training images, with grey values from 0 to 1.
    """

    source: str
    sha256: str = ""
    md5: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def keras_weights(source: str, *md5: str) -> ImageNetWeights:
    """Describe Keras weights with Caffe's inputs: 0 to 255 minus the mean of each channel (red, green, blue here)."""
    return ImageNetWeights(source, md5=md5, mean=(123.68 / 255, 116.779 / 255, 103.939 / 255), std=(1 / 255,) * 3)


def _keras_resnet(name: str, *md5: str) -> ImageNetWeights:
    return keras_weights(f"{_KERAS}{name} or, with the layers' old names, {_CHOLLET}v0.2/{name}", *md5)


_NOTOP = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
_TOP = "resnet50_weights_tf_dim_ordering_tf_kernels.h5"
_VGG_NOTOP = "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
_VGG_TOP = "vgg16_weights_tf_dim_ordering_tf_kernels.h5"

# torchvision's names end with the first digits of their SHA-256.
PUBLISHED: dict[str, ImageNetWeights] = {
    **{
        name: ImageNetWeights(_TORCHVISION + name, name.removesuffix(".pth").rpartition("-")[2])
        for name in (
            "alexnet-owt-7be5be79.pth",
            "densenet121-a639ec97.pth",
            "resnet18-f37072fd.pth",
            "resnet50-0676ba61.pth",
            "resnet50-11ad3fa6.pth",
            "vgg16-397923af.pth",
            "vgg16_bn-6c64b313.pth",
            "vgg19-dcbb9e9d.pth",
        )
    },
    "model_final_checkpoint_phase999.torch": ImageNetWeights(
        _META + "vissl/model_zoo/simclr_rn50_1000ep_simclr_8node_resnet_16_07_20.afe428c7/"
        "model_final_checkpoint_phase999.torch"
    ),
    "swav_800ep_pretrain.pth.tar": ImageNetWeights(_META + "deepcluster/swav_800ep_pretrain.pth.tar"),
    "dino_deitsmall8_pretrain.pth": ImageNetWeights(
        _META + "dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", "230cd5"
    ),
    _NOTOP: _keras_resnet(_NOTOP, "4d473c1dd8becc155b73f8504c6f6626", "a268eb855778b3df3c7506639542a6af"),
    _TOP: _keras_resnet(_TOP, "2cb95161c43110f7111970584f804107", "a7b3fe01876f51b976af0dea6bc144eb"),
    _VGG_NOTOP: keras_weights(f"{_CHOLLET}v0.1/{_VGG_NOTOP}", "6d6bbae143d832006294945121d1f1fc"),
    _VGG_TOP: keras_weights(f"{_CHOLLET}v0.1/{_VGG_TOP}", "64373286793e3c8b2b4e3219cbf3544b"),
}


RANDOM = "random"
_FACTOR = 2.0  # allowed between the scales of inputs and of the weights' training
_SHIFT = 3.0  # allowed between the means, in standard deviations of grey values
_SPREAD = 0.226  # standard deviation of ImageNet's grey values, from 0 to 1
_H5 = (".h5", ".hdf5")
_LISTED = 10


def find_weights(weights: str, mean: Sequence[float], std: Sequence[float], run: Run | None = None) -> Path | None:
    """Find the file that a configuration names: at its path, or in the download folders of torch and Keras.

    An unknown h5 file counts as Keras', whose ResNet-50 and VGG-16 have inputs from 0 to 255.


    Args:
        weights: a file, or "random".
        mean, std: of the configuration's inputs, with grey values from 0 to 1.
        run: reports which weights it starts from.

    Returns:
        The path; None for random weights.

    Raises:
        GigamorphError: the file does not exist, or was trained on inputs of another scale.
        DataError: a file with a published name has another content.
    """
    if weights == RANDOM:
        if run is not None:
            run.say("weights: random, without pretraining")
        return None
    path = Path(weights)
    known = PUBLISHED.get(path.name)
    if not path.exists():
        path = next((folder / path.name for folder in _download_folders() if (folder / path.name).exists()), path)
    if not path.exists():
        where = f"download it from {known.source}" if known else "use another"
        raise GigamorphError(f'weights {weights!r}: no such file; {where}, or write weights = "{RANDOM}"')
    label = path.name
    if path.is_file():
        digest = sha256(path)
        label += f", SHA-256 {digest[:8]}"
        if known is not None:
            _check_digest(path, known, digest)
        known = known or next((k for k in PUBLISHED.values() if k.sha256 and digest.startswith(k.sha256)), None)
        known = known or (keras_weights("") if path.suffix in _H5 else None)
    if known is not None:
        check_inputs(label, known, mean, std)
    if run is not None:
        run.say(f"weights: {label}{f', {known.source}' if known and known.source else ''}")
    return path


def _download_folders() -> tuple[Path, Path]:
    keras = os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras")  # "~" stays for an account without a home
    return Path(torch.hub.get_dir()) / "checkpoints", Path(keras) / "models"


def _check_digest(path: Path, known: ImageNetWeights, digest: str) -> None:
    own, wanted, kind = digest, (known.sha256,), "SHA-256"
    if known.md5:
        with path.open("rb") as file:
            own = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        wanted, kind = known.md5, "MD5"
    if not own.startswith(wanted):
        raise DataError(
            f"{path}: its {kind} begins with {own[:8]}, not with {' or '.join(wanted)} as that of {known.source}; "
            "download it again, or rename it"
        )


def check_inputs(name: str, known: ImageNetWeights, mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse inputs whose scale is far from that of the weights' training."""
    ratio = float(np.mean(known.std) / np.mean(std))
    shift = abs(float(np.mean(known.mean) - np.mean(mean))) / _SPREAD
    if not 1 / _FACTOR <= ratio <= _FACTOR or shift > _SHIFT:
        what = f"{ratio:.3g} times as large as" if shift <= _SHIFT else "far from"
        raise GigamorphError(
            f"mean = {list(mean)}, std = {list(std)} make inputs {what} those that {name} was trained on; use "
            f"mean = {list(known.mean)}, std = {list(known.std)}, or other weights"
        )


def build_pretrained(model: str, outputs: int, channels: int, weights: str | Path | None) -> nn.Module:
    """Build a network, see `build_model`, with the weights of a file, see `load_pretrained`; None keeps random ones."""
    network = build_model(model, outputs, channels)
    if weights is not None:
        load_pretrained(network, weights)
    return network


# Keys of the backbone's tensors in the files of VISSL (SimCLR), SwAV and DINO, and prefixes of their names.
_PATHS = (("classy_state_dict", "base_model", "model", "trunk"), ("teacher",), ("state_dict",), ("model",))
_PREFIXES = ("module.", "backbone.", "_feature_blocks.")
# Names of heads trained with the backbone, and of classifiers.
_HEADS = ("projection_head.", "prototypes.", "head.", "fc.", "pre_logits.", "classifier.", "last_layer.", "mlp.")


def load_pretrained(network: nn.Module, path: str | Path) -> list[str]:
    """Load backbone weights: safetensors; torch files as published by torchvision, timm, VISSL, SwAV and DINO; h5.

    The network's last linear layer stays unchanged if the file has none of its shape. A folder of `gigamorph import`
    and gigamorph's checkpoints also work.


    Returns:
        The names of omitted tensors: projection heads, prototypes and classifiers.

    Raises:
        DataError: the file cannot be read without executing code, or does not fit the network.
    """
    path = Path(path)
    if is_folder(path):
        return load_weights(network, path)
    state = keras_state(path, network) if path.suffix in _H5 else _strip(_unwrap(path))
    own = network.state_dict()
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    head = f"{linear[-1]}." if linear else "\0"
    fits = {name for name, value in state.items() if name in own and own[name].shape == value.shape}
    left_out = [name for name in state if name not in fits and name.startswith((*_HEADS, head))]
    problems = [
        f"{name} is {tuple(value.shape)}, the network has {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and name not in fits and name not in left_out
    ]
    wanted = [name for name in own if not name.endswith("num_batches_tracked") and not name.startswith(head)]
    problems += [f"{name} is missing" for name in wanted if name not in state or name in left_out]
    problems += [f"{name} is not in the network" for name in state if name not in own and name not in left_out]
    if problems:
        rest = f" (and {len(problems) - _LISTED} more)" if len(problems) > _LISTED else ""
        raise DataError(f"{path}: weights do not fit the network: {'; '.join(problems[:_LISTED])}{rest}")
    network.load_state_dict({name: state[name] for name in fits}, strict=False)
    return left_out


def _unwrap(path: Path) -> dict[str, Tensor]:
    loaded = read_state(path).tensors if path.suffix == ".safetensors" else load_inert(path)
    for keys in _PATHS:
        inner = loaded
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            loaded = inner
            break
    if not is_state(loaded):
        raise DataError(f"{path}: contains no state_dict; save one with torch.save(network.state_dict(), path)")
    return loaded


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove prefixes, which some files have on every tensor and others only on the backbone's."""
    found = dict(state)
    if all(name.startswith("net.") for name in found):  # gigamorph's checkpoints
        found = {name.removeprefix("net."): value for name, value in found.items()}
    for prefix in _PREFIXES:
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found
