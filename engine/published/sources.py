"""Locates a published network's weights: a file, a local Hugging Face folder, or a cache. Nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, GigamorphError
from ..models.checkpoints import INDEX
from ..models.folder import Description, Preprocessing, require_no_run
from ..models.outputs import Outputs
from ..models.pretrained import import_timm
from ..models.spec import Spec
from ..models.weights import first_line
from ..parsing import parse_json

_NAMES = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_SHARDED = tuple(name + INDEX for name in _NAMES[:2])
# ImageNet's, timm's default if a config.json has none.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class HubFolder:
    """A timm model as the ``config.json`` of a Hugging Face folder describes it; its outputs if gigamorph wrote it."""

    weights: Path
    spec: Spec
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    licence: str
    outputs: Outputs | None = None


def weights_in(path: Path) -> Path:
    """Return the weights file itself, or the one in a Hugging Face folder.

    Raises:
        DataError: the folder has none.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in (*_NAMES, *_SHARDED) if (path / name).is_file()), None)
    if found is None:
        require_no_run(path)
        raise DataError(f"{path}: contains none of {', '.join(_NAMES)}; pass the weights file itself")
    return found


def hub_folder(path: Path) -> HubFolder | None:
    """Read a Hugging Face folder whose ``config.json`` names a timm architecture; None for others.

    Raises:
        DataError: its config.json cannot be read, or it has no weights.
    """
    config = path / "config.json"
    if not config.is_file():
        return None
    try:
        found = parse_json(config.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{config}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not isinstance(found.get("architecture"), str):
        return None
    try:
        return _parse_config(path, found)
    except GigamorphError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{config}: is not in timm's format: {first_line(error)}") from error


def _parse_config(path: Path, found: Mapping[str, Any]) -> HubFolder:
    """Read a configuration as timm does: older files have the keys of ``pretrained_cfg`` at the top level."""
    about = {"mean": _MEAN, "std": _STD, **(found.get("pretrained_cfg", found) or {})}
    arguments = dict(found.get("model_args") or {})
    if found.get("global_pool"):
        arguments.setdefault("global_pool", found["global_pool"])
    if found.get("num_classes") is not None:
        arguments.setdefault("num_classes", found["num_classes"])
    size = about.get("input_size") or (3,)
    arguments.setdefault("in_chans", size[0])
    if "gigamorph" in found:  # written by gigamorph export
        ours = Description.from_json(found["gigamorph"], f"{path / 'config.json'}: gigamorph")
        spec = Spec("timm", found["architecture"], arguments)
        return HubFolder(weights_in(path), spec, ours.preprocessing, (), ours.licence, ours.outputs)
    labels = found.get("label_names") or about.get("label_names") or found.get("labels") or ()
    return HubFolder(
        weights=weights_in(path),
        spec=Spec("timm", found["architecture"], arguments),
        preprocessing=_preprocessing(about, arguments["in_chans"]),
        classes=tuple(str(name) for name in (labels.values() if isinstance(labels, dict) else labels)),
        licence=_licence(path) or str(found.get("license") or about.get("license") or ""),
    )


def _licence(folder: Path) -> str:
    """Return the model card's licence; `config.json` has that of the weights from which these were fine-tuned."""
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    head = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    said = head and re.search(r"^license:[ \t]*(\S.*?)\s*$", head[1], re.MULTILINE)
    return said[1].strip("\"'") if said else ""


def timm_preprocessing(spec: Spec, channels: int) -> tuple[Preprocessing, str, tuple[int, int] | None]:
    """Return timm's preprocessing (mean, std) for a pretrained model, its licence, and its input size if fixed."""
    about = pretrained_config(spec)
    size = about.get("input_size")
    fixed = (int(size[1]), int(size[2])) if size and about.get("fixed_input_size") else None
    return _preprocessing(about, channels), str(about.get("license") or ""), fixed


def _preprocessing(about: Mapping[str, Any], channels: int) -> Preprocessing:
    mean, std = tuple(about.get("mean") or (0.0,)), tuple(about.get("std") or (1.0,))
    if len(mean) not in (1, channels):  # grey images for a colour network: the average
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return Preprocessing(channels, mean, std)


def pretrained_config(spec: Spec) -> Mapping[str, Any]:
    """Return timm's own description of a model's weights; empty if there is none."""
    timm = import_timm(f"model {str(spec)!r}")
    found = timm.get_pretrained_cfg(spec.name) if timm.is_model(spec.name) else None
    return {} if found is None else found.to_dict()


def cached(spec: Spec) -> Path:
    """Return the weights of a timm model in the caches of Hugging Face or torch.hub.

    Raises:
        GigamorphError: they are not there; the message lists the locations and how to download them.
    """
    about = pretrained_config(spec)
    looked = []
    repository = about.get("hf_hub_id")
    if repository:
        from huggingface_hub import constants, try_to_load_from_cache

        for name in _NAMES:
            found = try_to_load_from_cache(repository, name)
            if isinstance(found, str):
                return Path(found)
        looked.append(f"{repository} in {constants.HF_HUB_CACHE}")
    url = about.get("url")
    if url:
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if path.is_file():
            return path
        looked.append(str(path))
    where = "; searched " + " and ".join(looked) if looked else "; timm has no weights for it"
    fetch = f"; download them, for example with hf download {repository} model.safetensors" if repository else ""
    raise GigamorphError(f"{str(spec)!r}: its weights are not in a cache{where}{fetch}")
