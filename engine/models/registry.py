"""Builds a network from a short text: a built-in name, ``timm:NAME``, ``module:factory``, or a folder."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..applications import is_layout
from ..errors import DataError, GigamorphError
from ..trust import require_trusted, trust_named
from .checkpoints import read_state
from .compat import make_torchvision_importable
from .folder import check_weights, is_folder, read_description
from .lesionnet import LesionNet
from .outputs import Columns, set_outputs
from .own_code import imported, nothing_fetched, working_directory_on_path
from .pretrained import TIMM, import_timm, pretrained_state
from .reference import require_stored_logits
from .resnet import resnet18, resnet34, resnet50, resnet50_v1
from .spec import Spec
from .unet import UNet
from .weights import bounded, common_prefix, differences, first_line, load_exactly, subtree, unwrapped

log = logging.getLogger("gigamorph")

_LONGEST = 4096

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lesionnet": LesionNet,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet50_v1": resnet50_v1,
    "unet": UNet,
}


def create_model(spec: str, num_classes: int = 2, in_channels: int = 1, weights: str | Path | None = None) -> nn.Module:
    """Build a network by name; a module of your own in the name is trusted from then on.

    Args:
        spec: a name in `MODELS`, ``timm:NAME``, ``module:factory``, or the folder of an imported network
            (`gigamorph import`), which sets its own weights, outputs and channels. A factory is a function or class of
            a module that Python can import, also from the working directory. It returns a `torch.nn.Module` that maps
            (N, channels, H, W) to logits (N, classes). It is called with ``num_classes`` and ``in_channels``, each
            only if its signature names it; ``**kwargs`` counts as naming ``num_classes``, which torchvision's
            functions pass on. Other arguments follow a question mark and override those given here, as in
            ``timm:resnet18?global_pool=max&drop_rate=0.2``.
        num_classes: outputs of the classifier.
        in_channels: channels of the image.
        weights: a safetensors or torch file. See `load_weights`.

    Raises:
        GigamorphError: the network is unknown or cannot be built.
        DataError: the weights do not fit.
    """
    if not is_folder(spec):
        trust_named(spec)
    return build_model(spec, num_classes, in_channels, weights)


def build_model(spec: str, num_classes: int = 2, in_channels: int = 1, weights: str | Path | None = None) -> nn.Module:
    """Build a network whose name may come from a file; its module is imported only if the user trusts it.

    Raises:
        UntrustedError: the module is neither in a registry nor trusted, see `trust`.
    """
    model = _build_from_folder(Path(spec)) if is_folder(spec) else _build(_parse(spec), num_classes, in_channels)
    if weights is not None:
        load_weights(model, weights)
    return model


def open_checked(folder: str | Path) -> nn.Module:
    """Build the network of a folder in float32 and evaluation mode, and check the logits of its import.

    The state of the random number generators stays unchanged.

    Raises:
        DataError: the logits differ because the code has changed, or the folder is damaged.
        GigamorphError: it cannot be built, or is an ensemble.
    """
    with torch.random.fork_rng(devices=[]):
        network = build_model(str(folder)).float().eval()  # the factory may choose another dtype or mode
        require_stored_logits(network, Path(folder))
    return network


def _parse(text: str) -> Spec:
    if len(text) > _LONGEST:
        raise GigamorphError(f"model {text[:60]!a}...: a name must have at most {_LONGEST} characters, not {len(text)}")
    return Spec.parse(text)


def _build(spec: Spec, num_classes: int, in_channels: int, folder: Path | None = None) -> nn.Module:
    model = _make(spec, num_classes, in_channels, folder)
    if spec.results:
        model.register_forward_hook(Columns(spec.results))
    return model


def _make(spec: Spec, num_classes: int, in_channels: int, folder: Path | None) -> nn.Module:
    if spec.kind in ("hf-hub", "hf_hub"):
        raise GigamorphError(
            f"model {str(spec)!r} would be downloaded; run hf download {spec.name} --local-dir FOLDER yourself "
            "and pass the folder to gigamorph import"
        )
    if spec.kind == "timm":
        return _build_from_timm(spec, num_classes, in_channels)
    if spec.kind:
        return _build_from_factory(spec, num_classes, in_channels, folder)
    if spec.name not in MODELS:
        own = ", ".join(sorted(MODELS))
        hint = "; a folder made by gigamorph import has a model.json" if os.path.isdir(spec.name) else ""
        file = Path(spec.name.removesuffix(".py") + ".py")
        if os.path.isfile(file):
            hint = f"; name the function or class in {file} too, as in {file.stem}:factory"
        if spec.name.endswith(".ckpt"):
            hint = f"; gigamorph import {spec.name} --out FOLDER makes a model folder from a checkpoint"
        if spec.name.startswith("timm/"):
            hint = f"; for timm's write timm:{spec.name.removeprefix('timm/')}"
        raise GigamorphError(f"unknown model {spec.name!r}; use one of {own}, timm:NAME or module:factory{hint}")
    make = MODELS[spec.name]
    for name, value in spec.arguments.items():
        wanted = inspect.signature(make).parameters.get(name)
        if wanted is not None and wanted.annotation == "int" and not isinstance(value, int):
            raise GigamorphError(f"model {str(spec)!r}: {name} must be a whole number, not {value!r}")
    try:
        return make(**{"num_classes": num_classes, "in_channels": in_channels, **spec.arguments})
    except Exception as error:  # such as a negative width, or one that does not fit memory
        raise GigamorphError(f"model {str(spec)!r} cannot be built: {first_line(error)}") from error


def _build_from_folder(folder: Path) -> nn.Module:
    description = read_description(folder)
    if description.members:
        raise GigamorphError(
            f"{folder}: is an ensemble of {len(description.members)} networks, which can only predict; use one of its "
            f"members, such as {folder / description.members[0]}"
        )
    spec = _parse(description.model)
    columns = description.outputs.columns if description.outputs.predicts else 0
    path = check_weights(folder, description)
    weights = read_state(path).tensors
    with nothing_fetched(), bounded(weights):
        model = _build(spec, columns, description.preprocessing.channels, folder)
    load_exactly(model, weights, path)
    set_outputs(model, description.outputs)
    return model


def _build_from_timm(spec: Spec, num_classes: int, in_channels: int) -> nn.Module:
    timm = import_timm(f"model 'timm:{spec.name}'")
    if ":" in spec.name or spec.arguments.get("pretrained"):
        raise GigamorphError(
            f"model {str(spec)!r} would be downloaded; download its files yourself and pass them to gigamorph import"
        )
    if reads := [name for name in _FILE_ARGUMENTS if name in spec.arguments]:  # some timm versions execute such files
        raise GigamorphError(
            f"model {str(spec)!r}: {reads[0]} names a file, which a model's name must not; use --weights"
        )
    given = {"num_classes": num_classes, "in_chans": in_channels, **spec.arguments}
    try:
        return timm.create_model(spec.name, **given)
    except Exception as error:
        near = [] if timm.is_model(spec.name) else difflib.get_close_matches(spec.name, timm.list_models(), 3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        name = str(spec).removeprefix("timm:")
        raise GigamorphError(f"timm cannot build {name!r}: {first_line(error)}{hint}") from error


_FILE_ARGUMENTS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


@contextlib.contextmanager
def factory_of(spec: Spec) -> Iterator[Any]:
    """Provide the function or class of a module that makes a network.

    The working directory is on Python's path while the context is open, because the user's factory may import more
    when it is called. It is not for networks of a registry: the folder may have any author.

    Raises:
        UntrustedError: the module is neither in a registry nor trusted.
        GigamorphError: the factory does not exist.
    """
    make_torchvision_importable()
    what = f"model {str(spec)!r}"
    path = contextlib.nullcontext()
    if not _registered(spec):
        require_trusted(what, spec.kind)
        path = working_directory_on_path()
    with path:
        factory = imported(what, spec.kind, spec.name)
        if not callable(factory):
            raise GigamorphError(f"{what} is a {type(factory).__name__}, not a function or class; correct its name")
        yield factory


def _registered(spec: Spec) -> bool:
    """Whether the spec names a network of torchvision's registry, or one of ours that was published with weights."""
    if is_layout(spec.kind):
        found = getattr(sys.modules[spec.kind], spec.name, None)
        return isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == spec.kind
    if f"{spec.kind}.".startswith("torchvision.models."):
        from torchvision import models

        return spec.name in models.list_models() and _of_torchvision(models.get_model_builder(spec.name))
    return False


def _build_from_factory(spec: Spec, num_classes: int, in_channels: int, folder: Path | None) -> nn.Module:
    text = str(spec)
    with factory_of(spec) as factory:
        try:
            taken = inspect.signature(factory).parameters
        except (TypeError, ValueError):
            taken = {}
        if folder is not None:
            _refuse_other_functions(spec, factory, taken, folder)
        wanted: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
        if _of_torchvision(factory) and "weights_backbone" in taken:
            wanted["weights_backbone"] = None  # otherwise it is downloaded
        # torchvision's functions pass further keywords on to networks that accept num_classes but not in_channels.
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
            taken = {**taken, "num_classes": None}
        try:
            model = factory(**{**{key: value for key, value in wanted.items() if key in taken}, **spec.arguments})
        except Exception as error:
            contract = f"; {_CONTRACT}" if isinstance(error, TypeError) else ""
            if type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
                contract = "; it requests pretrained weights, and an import downloads nothing: build it without them"
            raise GigamorphError(f"model {text!r} cannot be built: {first_line(error)}{contract}") from error
    if not isinstance(model, nn.Module):
        raise GigamorphError(f"model {text!r} returns a {type(model).__name__}; it must be a torch.nn.Module")
    return model


def _refuse_other_functions(spec: Spec, factory: Callable[..., Any], taken: Mapping[str, Any], folder: Path) -> None:
    """Refuse to call an installed function that does not make networks: a folder may have any author."""
    network = isinstance(factory, type) and issubclass(factory, nn.Module)
    if not (network or _of_torchvision(factory) or "num_classes" in taken):
        raise GigamorphError(
            f"{folder}: names {spec.kind}:{spec.name} as the factory of its network, which is neither a "
            "torch.nn.Module class nor a function that takes num_classes; it is not called"
        )


def _of_torchvision(factory: Callable[..., Any]) -> bool:
    return str(getattr(factory, "__module__", "")).startswith("torchvision.models")


_CONTRACT = (
    "it is called with num_classes, in_channels if its signature names it, and the arguments after a question mark, "
    "as in module:factory?width=32"
)


def load_weights(model: nn.Module, path: str | Path) -> list[str]:
    """Load parameters from a safetensors or torch file (``weights_only``: no code is executed).

    A gigamorph or Lightning checkpoint, a folder of `gigamorph import`, or ``timm:NAME`` (timm's pretrained weights)
    works as well. If the network takes one channel, a first convolution for colour is summed over its channels, so that
    a grey image gives the same as three equal channels. Tensors of the last layer with another shape (another number
    of classes) are skipped with a warning that names them; any other difference is an error. If a folder has no last
    layer (features), that layer stays new; a single sigmoid becomes two classes with the same probabilities.

    Returns:
        The names of the skipped tensors.

    Raises:
        DataError: the file cannot be read or does not fit the network, or a folder's code has changed since its
            import, see `open_checked`.
    """
    own = model.state_dict()
    head = head_prefix(own)
    if str(path).startswith(TIMM):
        found = pretrained_state(str(path))
    else:
        found = _folder_weights(Path(path), own, head) if is_folder(path) else _file_weights(Path(path), own)
    state = _sum_colour_channels(found, own, path)
    skipped = [
        key for key, value in state.items() if key in own and own[key].shape != value.shape and key.startswith(head)
    ]
    wanted, fitting = ({k: v for k, v in tensors.items() if k not in skipped} for tensors in (own, state))
    if problems := differences(wanted, fitting):
        raise DataError(f"{path}: weights do not fit the model: {'; '.join(problems)}")
    model.load_state_dict(fitting, strict=False)
    if skipped:
        log.warning("%s: classifier of another shape skipped: %s", path, ", ".join(skipped))
    return skipped


def _sum_colour_channels(state: dict[str, Tensor], own: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Sum weights for colour over their channels if the network takes one; grey images then give the same."""
    found = dict(state)
    for key, value in state.items():
        if (
            key in own
            and value.ndim == 4
            and value.shape[1] == 3
            and own[key].shape == (len(value), 1, *value.shape[2:])
        ):
            found[key] = value.sum(1, keepdim=True)
            log.warning("%s: %s is for colour; its channels are summed for grey images", path, key)
    return found


def _folder_weights(folder: Path, own: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    """Read the weights of a folder, with a last layer that fits the outputs of the network to be trained."""
    description = read_description(folder)
    state = open_checked(folder).state_dict()
    new = [name for name in own if name.startswith(head) and name not in state]
    if new and not description.outputs.predicts:
        state |= {name: own[name] for name in new}
        log.warning("%s: outputs features; the classifier is new: %s", folder, ", ".join(new))
    if description.outputs.heads[0].binary and description.outputs.columns == 1:
        for name in (n for n in own if n.startswith(head) and n in state):
            if len(own[name]) == 2 and state[name].shape == (1, *own[name].shape[1:]):
                state[name] = torch.cat([torch.zeros_like(state[name]), state[name]])  # softmax (0, s) is sigmoid s
    return state


def _file_weights(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read weights by the network's names, without the prefixes of wrappers and a LightningModule."""
    state = read_state(path)
    if state.others:
        log.warning("%s: uses the weights under %s, not those under %s", path, state.place, ", ".join(state.others))
    found = unwrapped(state.tensors, own)
    prefix = common_prefix(own, found)
    return subtree(found, prefix, path) if prefix else found


def head_prefix(state: dict[str, Tensor]) -> str:
    """Return the prefix of the classifier: the last layer with a weight, in the order of the state_dict."""
    weights = [key for key, value in state.items() if key.endswith("weight") and value.ndim >= 2]
    return weights[-1].removesuffix("weight") if weights else "\0"
