"""One function that builds a network from a short text: our own name, ``timm:NAME`` or ``module:factory``."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, GigamorphError
from .compat import make_torchvision_importable
from .lesionnet import LesionNet
from .resnet import resnet18, resnet34, resnet50

log = logging.getLogger("gigamorph")

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lesionnet": LesionNet,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
}


def create_model(spec: str, num_classes: int = 2, in_channels: int = 1, weights: str | Path | None = None) -> nn.Module:
    """Build a network.

    Args:
        spec: a name in `MODELS`, ``timm:NAME``, or ``module:factory``: a function or class of a module that Python can
            import, also from the working directory. It gives a `torch.nn.Module` that maps (N, channels, H, W) to
            logits (N, classes). It is called with ``num_classes`` and ``in_channels``, each only if its signature names
            it; ``**kwargs`` counts as naming ``num_classes``, which torchvision's functions hand on.
        num_classes: outputs of the classifier.
        in_channels: channels of the image.
        weights: a safetensors or torch file. See `load_weights`.

    Raises:
        GigamorphError: if the network is unknown or cannot be built.
        DataError: if the weights do not fit.
    """
    kind, colon, name = spec.partition(":")
    if not colon:
        if spec not in MODELS:
            own = ", ".join(sorted(MODELS))
            raise GigamorphError(f"model {spec!r} is unknown; take one of {own}, timm:NAME or module:factory")
        model = MODELS[spec](num_classes=num_classes, in_channels=in_channels)
    elif kind == "timm":
        model = _timm(name, num_classes, in_channels)
    else:
        model = _factory(kind, name, num_classes, in_channels)
    if weights is not None:
        load_weights(model, weights)
    return model


def _timm(name: str, num_classes: int, in_channels: int) -> nn.Module:
    make_torchvision_importable()
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
        raise GigamorphError(
            f"model 'timm:{name}' needs timm, which cannot be imported ({_first_line(error)}); "
            "pip install timm, with the torchvision build that matches torch"
        ) from error
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    except (RuntimeError, TypeError, ValueError) as error:
        raise GigamorphError(f"timm cannot build {name!r}: {_first_line(error)}") from error


def _factory(module_name: str, name: str, num_classes: int, in_channels: int) -> nn.Module:
    spec = f"{module_name}:{name}"
    make_torchvision_importable()
    with _working_directory_on_path():
        factory = _imported(spec, module_name, name)
        try:
            taken = inspect.signature(factory).parameters
        except (TypeError, ValueError):
            taken = {}
        wanted = {"num_classes": num_classes, "in_channels": in_channels}
        # torchvision's functions hand further keywords on to networks that know the one and not the other.
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
            taken = {**taken, "num_classes": None}
        try:
            model = factory(**{key: value for key, value in wanted.items() if key in taken})
        except Exception as error:
            contract = f"; {_CONTRACT}" if isinstance(error, TypeError) else ""
            raise GigamorphError(f"model {spec!r} cannot be built: {_first_line(error)}{contract}") from error
    if not isinstance(model, nn.Module):
        raise GigamorphError(f"model {spec!r} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


_CONTRACT = "it is called with num_classes and, where its signature names it, in_channels, and nothing else"


def _imported(spec: str, module_name: str, name: str) -> Callable[..., Any]:
    try:
        found = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):  # the module was found
            raise GigamorphError(f"model {spec!r} cannot be imported: {_first_line(error)}") from error
        raise GigamorphError(
            f"model {spec!r} cannot be imported: there is no module {error.name!r} in {Path.cwd()} or on Python's "
            "path; run this in the folder that holds it, or put that folder into PYTHONPATH"
        ) from error
    except Exception as error:
        # The module is the user's: whatever it raises is the answer to "why can it not be imported".
        raise GigamorphError(f"model {spec!r} cannot be imported: {_first_line(error)}") from error
    if not callable(found):
        raise GigamorphError(
            f"model {spec!r} is a {type(found).__name__}, not a function or class that makes a network"
        )
    return found


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """A console script does not have the working directory on its path; a user's own module lies there."""
    added = str(Path.cwd())
    sys.path.insert(0, added)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(added)


def load_weights(model: nn.Module, path: str | Path) -> list[str]:
    """Load parameters from a safetensors file or a torch file (``weights_only``: no code is run).

    A gigamorph or Lightning checkpoint serves as well. Tensors of the last layer whose shape differs are skipped with
    a warning that names them (another number of classes); any other difference is an error.

    Returns:
        The names of the skipped tensors.

    Raises:
        DataError: if the file cannot be read, or does not fit the network.
    """
    path = Path(path)
    state = _read(path)
    own = model.state_dict()
    head = _head_prefix(own)
    skipped = [
        key for key, value in state.items() if key in own and own[key].shape != value.shape and key.startswith(head)
    ]
    wrong = [
        f"{key} is {tuple(value.shape)}, the model has {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and own[key].shape != value.shape and key not in skipped
    ]
    # Older files lack BatchNorm's counter, which no result depends on.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    problems = wrong + [f"{key} is missing" for key in missing] + [f"{key} is not in the model" for key in extra]
    if problems:
        rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"{path}: weights do not fit the model: {problems[0]}{rest}")
    model.load_state_dict({key: value for key, value in state.items() if key not in skipped}, strict=False)
    if skipped:
        log.warning("%s: classifier of another shape skipped: %s", path, ", ".join(skipped))
    return skipped


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such weights file") from error
    except Exception as error:  # each reader has its own errors for a damaged file
        raise DataError(f"{path}: not a readable weights file: {_first_line(error)}") from error
    if isinstance(loaded, dict):
        for key in ("state_dict", "model", "model_state_dict"):
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise DataError(f"{path}: holds no state_dict; save one with torch.save(model.state_dict(), path)")
    for prefix in ("net.", "module."):  # our LightningModule's and DDP's
        if loaded and all(key.startswith(prefix) for key in loaded):
            loaded = {key.removeprefix(prefix): value for key, value in loaded.items()}
    return loaded


def _head_prefix(state: dict[str, Tensor]) -> str:
    """The last layer that has a weight, by the order of the state_dict: the classifier."""
    weights = [key for key, value in state.items() if key.endswith("weight") and value.ndim >= 2]
    return weights[-1].removesuffix("weight") if weights else "\0"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
