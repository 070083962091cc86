"""`gigamorph import`: converts a network and its weights into a folder, after a check of its logits by tiles.

The folder is written next to its target and moved there after all checks: it is complete or absent.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import GigamorphError
from ..files import temporary_name
from ..models import build_model
from ..models.checkpoints import WeightFile, read_state
from ..models.folder import Description, Preprocessing, read_description, write_description
from ..models.own_code import nothing_fetched
from ..models.reference import Reference
from ..models.spec import Spec
from ..models.weights import sha256, subtree, unwrapped
from ..versions import versions_of_results
from . import pickled
from .layout import part_of_training, parts_of
from .one import Say, Wishes, channels_in, import_state
from .sources import cached, hub_folder, timm_preprocessing, weights_in


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
