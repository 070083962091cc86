"""`gigamorph import`: converts a network and its weights into a folder, after a check of its logits by tiles.

The folder is written next to its target and moved there after all checks: it is complete or absent.
Weights are a file, a local Hugging Face folder, or in a cache; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, GigamorphError
from ..files import temporary_name
from ..models import build_model
from ..models.checkpoints import INDEX, WeightFile, read_state
from ..models.folder import Description, Preprocessing, read_description, require_no_run, write_description
from ..models.outputs import Outputs
from ..models.own_code import nothing_fetched
from ..models.pretrained import import_timm
from ..models.reference import Reference
from ..models.spec import Spec
from ..models.weights import first_line, sha256, subtree, unwrapped
from ..parsing import parse_json
from ..versions import versions_of_results
from . import pickled
from .layout import part_of_training, parts_of
from .one import Say, Wishes, channels_in, import_state

_NAMES = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_SHARDED = tuple(name + INDEX for name in _NAMES[:2])
# ImageNet's, timm's default if a config.json has none.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@nothing_fetched()
def import_network(source: str, out: str | Path, wishes: Wishes, say: Say = print) -> list[Path]:
    """Write the folder of a network.

    Args:
        source: a spec (`create_model`) with its weights in ``wishes``; a Hugging Face folder of a timm model; or a
            checkpoint of a known layout, where an ensemble becomes a folder of folders.
        say: called with each line of the report.

    Returns:
        The folders that contain a network.

    Raises:
        GigamorphError: the import fails; nothing was written.
    """
    path = Path(source)
    if path.exists():
        hub = hub_folder(path)
        if hub is not None:
            chosen = replace(wishes, classes=wishes.classes or hub.classes, licence=wishes.licence or hub.licence)
            with new_folder(out) as folder:
                state = _read_weights(hub.weights, chosen, say)
                import_state(hub.spec, state, hub.preprocessing, (), folder, chosen, say, hub.outputs)
            return [Path(out)]
        return _import_layout(weights_in(path), out, wishes, say)
    if not {":", "?"} & {*source} and (path.suffix or len(path.parts) > 1):
        raise GigamorphError(f"{source}: no such file or folder")
    spec = Spec.parse(source)
    if wishes.layout is not None:
        raise GigamorphError(f"--layout applies to a checkpoint file; {source!r} is not an existing file")
    if wishes.weights is None:
        raise GigamorphError(
            f"{source!r}: needs its weights: --weights FILE, or --weights cache for those that timm downloaded before"
        )
    weights = cached(spec) if wishes.weights == "cache" and spec.kind == "timm" else weights_in(Path(wishes.weights))
    with new_folder(out) as folder:
        if wishes.trust and pickled.holds_module(weights):
            _import_pickled(spec, weights, folder, wishes, say)
        else:
            state = _read_weights(weights, wishes, say)
            wanted, chosen = _source_preprocessing(spec, state.tensors, wishes)
            import_state(spec, state, wanted, (), folder, chosen, say)
    return [Path(out)]


def import_ensemble(folders: Sequence[str | Path], out: str | Path, flips: Sequence[tuple[bool, bool]]) -> Path:
    """Copy networks into one folder that predicts the mean of their probabilities, also over mirrored images.

    Args:
        flips: (left-right, up-down) flips in addition to the unflipped image.

    Raises:
        GigamorphError: the names of their outputs differ, or a folder is not that of a network.
    """
    found = [read_description(folder) for folder in folders]
    for folder, one in zip(folders, found, strict=True):
        if one.members or one.flips != ((False, False),):
            raise GigamorphError(f"{folder}: is already an ensemble; use the networks in it")
        if not one.outputs.predicts:
            raise GigamorphError(f"{folder}: its network outputs features, which cannot be averaged like predictions")
        if one.outputs.names != found[0].outputs.names:
            raise GigamorphError(
                f"{folder}: predicts {', '.join(one.outputs.names)}, not {', '.join(found[0].outputs.names)} like "
                f"{folders[0]}"
            )
        if one.outputs.exclusive != found[0].outputs.exclusive:
            one_holds, any_may = "exclusive classes", "labels any of which may apply"
            own, other = (one_holds, any_may) if one.outputs.exclusive else (any_may, one_holds)
            raise GigamorphError(f"{folder}: predicts {own}, not {other} like {folders[0]}")
        mine, first = one.preprocessing, found[0].preprocessing
        if (mine.channels, mine.voi) != (first.channels, first.voi):
            raise GigamorphError(f"{folder}: takes other channels or another grey scale than {folders[0]}")
    names = [f"member{number}" for number in range(len(folders))]
    with new_folder(out) as target:
        for name, folder in zip(names, folders, strict=True):
            shutil.copytree(folder, target / name)
        _write_ensemble(target, names, found, tuple(flips))
    return Path(out)


def _write_ensemble(
    folder: Path, names: Sequence[str], members: Sequence[Description], flips: tuple[tuple[bool, bool], ...] = ()
) -> None:
    first = members[0]
    # The members' descriptions have the hashes of their weights.
    source = {"members_sha256": {name: sha256(folder / name / "model.json") for name in names}}
    licence = ", ".join(dict.fromkeys(m.licence for m in members if m.licence))
    description = Description(
        model="",
        outputs=first.outputs,
        preprocessing=replace(first.preprocessing, mean=(0.0,), std=(1.0,), per_image=None, size=None),
        source=source,
        licence=licence,
        versions=versions_of_results(),
        members=tuple(names),
        flips=((False, False), *flips),
    )
    write_description(folder, description)


def _import_layout(path: Path, out: str | Path, wishes: Wishes, say: Say) -> list[Path]:
    state = _read_weights(path, wishes, say)
    state = replace(state, tensors=unwrapped(state.tensors))
    own_part = part_of_training(state) if wishes.layout is None else None
    name, parts = ("gigamorph train", [own_part]) if own_part else parts_of(state, wishes.layout)
    say(f"{path.name}: layout {name}, {len(parts)} network{'s' if len(parts) > 1 else ''}")
    with new_folder(out) as folder:
        asked = wishes.prefix.removesuffix(".") + "." if wishes.prefix else ""
        targets = [folder / part.name if len(parts) > 1 else folder for part in parts]
        made = []
        for part, target in zip(parts, targets, strict=True):
            target.mkdir(exist_ok=True)
            chosen = replace(wishes, licence=wishes.licence or part.licence, size=wishes.size or part.size)
            tensors = subtree(state.tensors, part.prefix, path) if part.prefix else state.tensors
            tensors = {key: t for key, t in tensors.items() if not key.startswith(part.ignored or ("\0",))}
            own = WeightFile(path, tensors, state.place)
            one = import_state(
                Spec.parse(part.model), own, part.preprocessing, part.key_map, target, chosen, say, part.outputs
            )
            source = {**one.source, "layout": name, "prefix": asked + part.prefix}
            made.append(replace(one, source=source | ({"training": part.training} if part.training else {})))
            write_description(target, made[-1])
        if len(parts) > 1:
            _write_ensemble(folder, [part.name for part in parts], made)
    return [Path(out) / part.name if len(parts) > 1 else Path(out) for part in parts]


def _source_preprocessing(spec: Spec, tensors: Mapping[str, Tensor], wishes: Wishes) -> tuple[Preprocessing, Wishes]:
    """Return the preprocessing that the source implies, and the wishes with its licence and fixed size as defaults.

    The licence is known only for weights that timm downloaded; a file may come from anybody.
    """
    channels = _channels_of(spec, tensors, wishes)
    if spec.kind != "timm":
        return Preprocessing(channels), wishes
    wanted, licence, fixed = timm_preprocessing(spec, channels)
    if fixed is not None:  # --resize replaces timm's size
        fixed = (wishes.preprocessing or {}).get("size") or fixed
    known = licence if wishes.weights == "cache" else ""
    return wanted, replace(wishes, licence=wishes.licence or known, size=wishes.size or fixed)


def _channels_of(spec: Spec, tensors: Mapping[str, Tensor], wishes: Wishes) -> int:
    """Return the channels that options set, else those of the first convolution in the file, else 1."""
    said = (wishes.preprocessing or {}).get("channels")
    for name in ("in_chans", "in_channels"):
        said = spec.arguments.get(name, said)
        if said is not None and not isinstance(said, int):
            raise GigamorphError(f"{str(spec)!r}: {name} must be a number of channels, not {said!r}")
    if said is not None:
        return said
    return channels_in(spec, tensors) or 1


def _import_pickled(spec: Spec, weights: Path, folder: Path, wishes: Wishes, say: Say) -> None:
    """Extract a pickled module's state dict in a separate process; the spec's network must output the same logits."""
    state, kind = pickled.extract(weights, wishes.prefix)
    say(f"{weights.name}: a pickled {kind}, opened in a separate process")
    wanted, chosen = _source_preprocessing(spec, state.tensors, wishes)
    description = import_state(spec, state, wanted, (), folder, chosen, say)
    image = Reference.read(folder).image
    network = build_model(str(folder)).eval()
    with torch.no_grad():
        given = network(image)
    if image.shape[1] == 1 and channels_in(spec, state.tensors) == 3:  # they were summed for grey images
        image = image.expand(-1, 3, -1, -1)
    pickled.same_logits(kind, pickled.logits(weights, image, wishes.prefix), given, str(spec))
    source = {**description.source, "pickled": kind}
    write_description(folder, replace(description, source=source))


def _read_weights(path: Path, wishes: Wishes, say: Say) -> WeightFile:
    state = read_state(path, wishes.prefix)
    if state.others:
        say(f"{path.name}: uses the weights under {state.place}, not those under {', '.join(state.others)}")
    if state.extras:
        say(f"{path.name}: ignores values that are not tensors: {', '.join(state.extras)}")
    return state


@contextlib.contextmanager
def new_folder(out: str | Path, keep: bool = True) -> Iterator[Path]:
    """Provide a folder next to `out` that replaces it on success if `keep` is set.

    Raises:
        GigamorphError: `out` already exists, or cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GigamorphError(f"{out}: already exists; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(out)
        temporary.mkdir(mode=0o700)
    except OSError as error:
        raise GigamorphError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        yield temporary
        if keep:
            temporary.chmod(0o755)
            if out.exists():
                out.rmdir()
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
