"""What `gigamorph import` does: a network and its weights become a folder, once its logits by tiles are those of stock.

The folder is written beside its place and put there when everything in it is checked: it is whole or absent.
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
from ..models.checkpoints import State, read_state
from ..models.folder import Description, Preprocessing, read_description, write_description
from ..models.own_code import nothing_fetched
from ..models.reference import Reference
from ..models.spec import Spec
from ..models.weights import sha256, subtree, unwrapped
from ..versions import versions_of_results
from . import pickled
from .layouts import parts_of
from .layouts.layout import trained
from .one import Say, Wishes, channels_in, import_state
from .sources import cached, hub_folder, timm_preprocessing, weights_in


@nothing_fetched()
def import_network(source: str, out: str | Path, wishes: Wishes, say: Say = print) -> list[Path]:
    """Write the folder of a network.

    Args:
        source: a spec (`create_model`) whose weights ``wishes`` names; a Hugging Face folder of a timm model; or a
            checkpoint of a known layout, of which an ensemble becomes a folder of folders.
        say: called with what is worth knowing, a line each.

    Returns:
        The folders that hold a network.

    Raises:
        GigamorphError: what is wrong in one line; nothing was written.
    """
    path = Path(source)
    if path.exists():
        hub = hub_folder(path)
        if hub is not None:
            chosen = replace(wishes, classes=wishes.classes or hub.classes, licence=wishes.licence or hub.licence)
            with new_folder(out) as folder:
                state = _read(hub.weights, chosen, say)
                import_state(hub.spec, state, hub.preprocessing, (), folder, chosen, say, hub.outputs)
            return [Path(out)]
        return _import_layout(weights_in(path), out, wishes, say)
    if not {":", "?"} & {*source} and (path.suffix or len(path.parts) > 1):
        raise GigamorphError(f"{source}: no such file or folder")
    spec = Spec.parse(source)
    if wishes.layout is not None:
        raise GigamorphError(f"--layout is of a checkpoint file; {source!r} is no file that is here")
    if wishes.weights is None:
        raise GigamorphError(
            f"{source!r}: name its weights, --weights FILE, or --weights cache for those that timm has fetched before"
        )
    weights = cached(spec) if wishes.weights == "cache" and spec.kind == "timm" else weights_in(Path(wishes.weights))
    with new_folder(out) as folder:
        if wishes.trust and pickled.holds_module(weights):
            _import_pickled(spec, weights, folder, wishes, say)
        else:
            state = _read(weights, wishes, say)
            wanted, chosen = _wanted(spec, state.tensors, wishes)
            import_state(spec, state, wanted, (), folder, chosen, say)
    return [Path(out)]


def import_ensemble(folders: Sequence[str | Path], out: str | Path, flips: Sequence[tuple[bool, bool]]) -> Path:
    """Copy networks into one folder whose prediction is the mean of their probabilities, of mirrored images too.

    Args:
        flips: (left-right, up-down) besides the image as it is.

    Raises:
        GigamorphError: their outputs have other names, or one is no folder of a network.
    """
    found = [read_description(folder) for folder in folders]
    for folder, one in zip(folders, found, strict=True):
        if one.members or one.flips != ((False, False),):
            raise GigamorphError(f"{folder}: is an ensemble already; name the networks in it")
        if not one.outputs.predicts:
            raise GigamorphError(f"{folder}: its network gives features, no predictions, which cannot be averaged")
        if one.outputs.names != found[0].outputs.names:
            raise GigamorphError(
                f"{folder}: predicts {', '.join(one.outputs.names)}, not {', '.join(found[0].outputs.names)} as "
                f"{folders[0]}"
            )
        if one.outputs.exclusive != found[0].outputs.exclusive:
            one_holds, any_may = "classes of which one holds", "labels any of which may hold"
            own, other = (one_holds, any_may) if one.outputs.exclusive else (any_may, one_holds)
            raise GigamorphError(f"{folder}: predicts {own}, not {other} as {folders[0]}")
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
    state = _read(path, wishes, say)
    state = replace(state, tensors=unwrapped(state.tensors))
    own_part = trained(state) if wishes.layout is None else None
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
            own = State(path, tensors, state.place)
            one = import_state(
                Spec.parse(part.model), own, part.preprocessing, part.key_map, target, chosen, say, part.outputs
            )
            source = {**one.source, "layout": name, "prefix": asked + part.prefix}
            made.append(replace(one, source=source | ({"training": part.training} if part.training else {})))
            write_description(target, made[-1])
        if len(parts) > 1:
            _write_ensemble(folder, [part.name for part in parts], made)
    return [Path(out) / part.name if len(parts) > 1 else Path(out) for part in parts]


def _wanted(spec: Spec, tensors: Mapping[str, Tensor], wishes: Wishes) -> tuple[Preprocessing, Wishes]:
    """What a network takes as its source says; and the wishes, with licence and fixed size where those say none.

    The licence is known of the weights that timm has fetched; a file may hold anybody's.
    """
    channels = _channels_of(spec, tensors, wishes)
    if spec.kind != "timm":
        return Preprocessing(channels), wishes
    wanted, licence, fixed = timm_preprocessing(spec, channels)
    if fixed is not None:  # or that of the network as its arguments have it, to which images are brought
        fixed = (wishes.preprocessing or {}).get("size") or fixed
    known = licence if wishes.weights == "cache" else ""
    return wanted, replace(wishes, licence=wishes.licence or known, size=wishes.size or fixed)


def _channels_of(spec: Spec, tensors: Mapping[str, Tensor], wishes: Wishes) -> int:
    """What is said, else what the network's first convolution takes in the file, else 1."""
    said = (wishes.preprocessing or {}).get("channels")
    for name in ("in_chans", "in_channels"):
        said = spec.arguments.get(name, said)
        if said is not None and not isinstance(said, int):
            raise GigamorphError(f"{str(spec)!r}: {name} is {said!r}, not a number of channels")
    if said is not None:
        return said
    return channels_in(spec, tensors) or 1


def _import_pickled(spec: Spec, weights: Path, folder: Path, wishes: Wishes, say: Say) -> None:
    """A pickled module becomes a state dict in a process of its own; the spec's network must give the same logits."""
    found = pickled.extract(weights, wishes.prefix)
    say(f"{weights.name}: a pickled {found.kind}, opened in a process of its own")
    wanted, chosen = _wanted(spec, found.state.tensors, wishes)
    description = import_state(spec, found.state, wanted, (), folder, chosen, say)
    image = Reference.read(folder).image
    network = build_model(str(folder)).eval()
    with torch.no_grad():
        given = network(image)
    if image.shape[1] == 1 and channels_in(spec, found.state.tensors) == 3:  # they were summed for grey images
        image = image.expand(-1, 3, -1, -1)
    pickled.same_logits(found, pickled.logits(weights, image, wishes.prefix), given, str(spec))
    source = {**description.source, "pickled": found.kind}
    write_description(folder, replace(description, source=source))


def _read(path: Path, wishes: Wishes, say: Say) -> State:
    state = read_state(path, wishes.prefix)
    if state.others:
        say(f"{path.name}: takes the weights of {state.place}, not those of {', '.join(state.others)}")
    if state.extras:
        say(f"{path.name}: leaves out what is no tensor: {', '.join(state.extras)}")
    return state


@contextlib.contextmanager
def new_folder(out: str | Path, keep: bool = True) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, if nothing is raised and `keep` says so.

    Raises:
        GigamorphError: `out` is there already, or cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GigamorphError(f"{out}: already exists; name another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = temporary_name(out)
        aside.mkdir(mode=0o700)
    except OSError as error:
        raise GigamorphError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        yield aside
        if keep:
            aside.chmod(0o755)
            if out.exists():
                out.rmdir()
            aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
