"""Published weights that recipes start from: their names, where they are from, and the inputs they are used to.

A configuration names a file, or says "random". A file that is known by its name or by its bytes brings the
normalisation that it was trained with, from which that of the configuration may not be far: a network takes inputs of
another scale without a word.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError, GigamorphError
from ..models.checkpoints import is_state, load_inert
from ..models.folder import is_folder
from ..models.registry import load_weights
from ..models.weights import sha256
from ..train.run import Run
from .keras_names import keras_state
from .published_weights import PUBLISHED, Published, keras_weights

RANDOM = "random"
_FACTOR = 2.0  # between the scale of inputs and that which weights are used to
_SHIFT = 3.0  # between the means, in standard deviations of grey values
_SPREAD = 0.226  # of the grey values of ImageNet, from 0 to 1
_H5 = (".h5", ".hdf5")
_LISTED = 10


def find_weights(weights: str, mean: Sequence[float], std: Sequence[float], run: Run | None = None) -> Path | None:
    """The file that a configuration names, looked for as it is named and where torch and Keras keep what they fetch.

    An h5 file that is not known is taken for one of Keras, whose ResNet-50 and VGG-16 have inputs from 0 to 255.

    Args:
        weights: a file, or "random".
        mean, std: of the configuration's inputs, grey values from 0 to 1.
        run: told which weights it starts from.

    Returns:
        None for random weights.

    Raises:
        GigamorphError: there is no such file, or inputs of another scale than its own.
        DataError: a published name on another file.
    """
    if weights == RANDOM:
        if run is not None:
            run.say("weights: random, nothing was trained before")
        return None
    path = Path(weights)
    known = PUBLISHED.get(path.name)
    if not path.exists():
        path = next((folder / path.name for folder in _fetched() if (folder / path.name).exists()), path)
    if not path.exists():
        where = f"fetch it from {known.source}" if known else "name another"
        raise GigamorphError(f'weights {weights!r}: no such file; {where}, or write weights = "{RANDOM}"')
    told = path.name
    if path.is_file():
        digest = sha256(path)
        told += f", SHA-256 {digest[:8]}"
        if known is not None:
            _check_digest(path, known, digest)
        known = known or next((k for k in PUBLISHED.values() if k.sha256 and digest.startswith(k.sha256)), None)
        known = known or (keras_weights("") if path.suffix in _H5 else None)
    if known is not None:
        check_inputs(told, known, mean, std)
    if run is not None:
        run.say(f"weights: {told}{f', {known.source}' if known and known.source else ''}")
    return path


def _fetched() -> tuple[Path, Path]:
    keras = os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras")  # it stays so for an account without a home
    return Path(torch.hub.get_dir()) / "checkpoints", Path(keras) / "models"


def _check_digest(path: Path, known: Published, digest: str) -> None:
    own, wanted, told = digest, (known.sha256,), "SHA-256"
    if known.md5:
        with path.open("rb") as file:
            own = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        wanted, told = known.md5, "MD5"
    if not own.startswith(wanted):
        raise DataError(
            f"{path}: its {told} begins with {own[:8]}, not with {' or '.join(wanted)} as that of {known.source}; "
            "fetch it again, or give it another name"
        )


def check_inputs(name: str, known: Published, mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse inputs that are far from those which weights are used to."""
    ratio = float(np.mean(known.std) / np.mean(std))
    shift = abs(float(np.mean(known.mean) - np.mean(mean))) / _SPREAD
    if not 1 / _FACTOR <= ratio <= _FACTOR or shift > _SHIFT:
        what = f"{ratio:.3g} times as large as" if shift <= _SHIFT else "far from"
        raise GigamorphError(
            f"mean = {list(mean)}, std = {list(std)} make inputs {what} those that {name} was trained on; take "
            f"mean = {list(known.mean)}, std = {list(known.std)}, or other weights"
        )


# Where the files of VISSL (SimCLR), SwAV and DINO keep the backbone's tensors, and what they put before their names.
_PATHS = (("classy_state_dict", "base_model", "model", "trunk"), ("teacher",), ("state_dict",), ("model",))
_PREFIXES = ("module.", "backbone.", "_feature_blocks.")
# What was trained beside the backbone, or is the classifier of one.
_HEADS = ("projection_head.", "prototypes.", "head.", "fc.", "pre_logits.", "classifier.", "last_layer.", "mlp.")


def load_pretrained(network: nn.Module, path: str | Path) -> list[str]:
    """Load the weights of a backbone: safetensors, torch files as torchvision, timm, VISSL, SwAV and DINO publish, h5.

    The last linear layer of the network stays as it is where the file has none of its shape. A folder of `gigamorph
    import` and checkpoints of ours serve too.

    Returns:
        The names of tensors of projection heads, prototypes and classifiers, which are omitted.

    Raises:
        DataError: the file cannot be read without running code in it, or does not fit the network.
    """
    path = Path(path)
    if is_folder(path):
        return load_weights(network, path)
    state = keras_state(path, network) if path.suffix in _H5 else _strip(_unwrap(_read(path), path))
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


def _read(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return load_inert(path)
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such weights file") from error
    except Exception as error:  # the library's own errors for a damaged file
        raise DataError(f"{path}: not a readable weights file: {str(error).splitlines()[0]}") from error


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    for keys in _PATHS:
        inner = loaded
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            loaded = inner
            break
    if not is_state(loaded):
        raise DataError(f"{path}: holds no state_dict; save one with torch.save(network.state_dict(), path)")
    return loaded


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes, which some files have on every tensor and others on the backbone's only."""
    found = dict(state)
    if all(name.startswith("net.") for name in found):  # our checkpoints
        found = {name.removeprefix("net."): value for name, value in found.items()}
    for prefix in _PREFIXES:
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found
