"""Imports one network with its weights into a folder, after a check of its logits by tiles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import GigamorphError
from ..files import write_tensors
from ..models import build_model
from ..models.checkpoints import WeightFile
from ..models.folder import WEIGHTS, Description, Preprocessing, write_description
from ..models.outputs import Activation, Columns, Head, Outputs, format_tensors, is_row, tensors_in
from ..models.reference import forward
from ..models.spec import Spec
from ..models.weights import common_prefix, first_line, load_exactly, own_tensors, renamed, sha256, subtree, unwrapped
from ..versions import versions_of_results
from .reference import compute, fixed_image, verified

_PROBABILITIES = {"SoftmaxBackward0": "softmax", "SigmoidBackward0": "sigmoid"}
# Operations that move, reshape or copy values without changing them.
_MOVEMENTS = tuple("View UnsafeView Reshape Squeeze Unsqueeze Select Slice Index Clone ToCopy Alias".split())


def endings(network: nn.Module, image: Tensor, rows: int) -> list[str]:
    """Return the last operation of each of a network's outputs: "softmax", "sigmoid", or "" for others.

    Args:
        rows: number of outputs that `models.outputs.Columns` has concatenated; 0 if the network has a single output.
    """
    try:
        end = network(image.clone().requires_grad_() + 0).grad_fn  # not a leaf: in-place operations are allowed
    except Exception:  # it may refuse gradients; the forward without them was checked before
        end = None
    if not rows:
        return [_ending(end)]
    return [_ending(part) for part, _ in end.next_functions] if end is not None else [""] * rows


def _ending(node: Any) -> str:
    while node is not None and node.name().startswith(_MOVEMENTS) and node.next_functions:
        node = node.next_functions[0][0]
    if node is not None and node.name() == "CatBackward0":
        parts: Sequence[str] = [_ending(part) for part, _ in node.next_functions]
        return " and ".join(dict.fromkeys(parts)) if all(parts) else ""
    return "" if node is None else _PROBABILITIES.get(node.name(), "")


SIZE = (320, 256)
Say = Callable[[str], object]


@dataclass(frozen=True)
class Wishes:
    """The user's options for an import; None and empty values are derived from the weights.

    Attributes:
        weights: a file, a Hugging Face folder, or "cache".
        prefix: selects the network's sub-tree in the checkpoint.
        layout: one of `LAYOUTS`.
        activation, classes: for a single head.
        heads: for several heads: pairs (name, text) such as ("density", "softmax:A,B,C,D").
        preprocessing: fields of `Preprocessing` that override the source's.
        licence: licence of the weights.
        size: (height, width) of the image for the check.
        trust: whether a pickled module may execute its code, in a separate process.
    """

    weights: str | None = None
    prefix: str = ""
    layout: str | None = None
    activation: Activation | None = None
    classes: tuple[str, ...] = ()
    heads: tuple[tuple[str, str], ...] = ()
    preprocessing: Mapping[str, Any] | None = None
    licence: str = ""
    size: tuple[int, int] | None = None
    trust: bool = False


def import_state(
    spec: Spec,
    state: WeightFile,
    preprocessing: Preprocessing,
    key_map: tuple[tuple[str, str], ...],
    folder: Path,
    wishes: Wishes,
    say: Say,
    known: Outputs | None = None,
) -> Description:
    """Build, load, check and write one network.

    Args:
        known: its outputs, if the source describes them.
    """
    channels = preprocessing.channels
    tensors = renamed(state.tensors, key_map)
    network, tensors, prefix, asked = _build_for_weights(replace(spec, results=()), tensors, channels, known)
    if prefix:
        say(f"{state.path.name}: removed the prefix {prefix} from all names")
        tensors, key_map = subtree(tensors, prefix, state.path), ((prefix, ""), *key_map)
    converted = _load(network, spec, tensors, channels, state.path, say)
    wanted = replace(preprocessing, **(wishes.preprocessing or {}))
    image = fixed_image(wanted, wishes.size or SIZE)
    taken = _select_outputs(network, spec, image, wishes, say)
    if taken:
        spec = replace(spec, results=tuple(taken))
        network.register_forward_hook(Columns(spec.results))
    reference = compute(network, image, str(spec))
    ends = [""] * max(1, len(taken)) if known is not None else endings(network, image, len(taken))
    outputs = _outputs(wishes, known, reference.logits32.shape[1], taken, ends)
    _report_endings(outputs, ends, spec, say)
    checked = verified(network, reference, str(spec))
    if wanted.size is None and wishes.size is not None:
        _report_fixed_size(network, fixed_image(wanted, (2 * wishes.size[0], 2 * wishes.size[1])), spec, say)
    write_tensors(folder / WEIGHTS, own_tensors(network), "weights")
    reference.write(folder)
    source = {
        "file": state.path.name,
        "sha256": sha256(state.path),
        "place": state.place,
        "prefix": wishes.prefix,
        "weights_sha256": sha256(folder / WEIGHTS),
    }
    source |= {"shards_sha256": {shard.name: sha256(shard) for shard in state.shards}} if state.shards else {}
    source |= {"converted": converted} if converted else {}
    description = Description(
        model=str(_stored_spec(spec, channels, asked, outputs)),
        outputs=outputs,
        preprocessing=wanted,
        source=source,
        key_map=key_map,
        licence=wishes.licence,
        reference=checked,
        versions=versions_of_results(),
    )
    write_description(folder, description)
    build_model(str(folder))  # refuse a folder that cannot be opened again
    return description


def _report_fixed_size(network: nn.Module, twice: Tensor, spec: Spec, say: Say) -> None:
    try:
        forward(network, twice, str(spec))
    except GigamorphError as error:
        say(
            f"{spec.name}: does not accept images of every size, such as {twice.shape[2]} x {twice.shape[3]} "
            f"({first_line(error.__cause__ or error)}); with --resize HxW, predict resizes them to one that it accepts"
        )


def _select_outputs(network: nn.Module, spec: Spec, image: Tensor, wishes: Wishes, say: Say) -> dict[str, int]:
    """Return the output tensors to use, with their columns; empty if the network returns a single row itself.

    They are those that the spec names after #, else those with the names of heads, else all rows of numbers.

    Raises:
        GigamorphError: there is no such tensor.
    """
    result = forward(network.float().eval(), image, str(spec))
    if isinstance(result, Tensor) and result.ndim == 2 and not spec.results:
        return {}
    found = tensors_in(result)
    rows = {name: value for name, value in found.items() if is_row(value) and len(value) == 1}
    if not spec.results:
        _refuse_without_row(spec, found, rows)
    heads = [name for name, _ in wishes.heads]
    names = list(spec.results) or (heads if heads and set(heads) <= set(rows) else list(rows))
    unknown = [name for name in names if name not in rows]
    if unknown or not names:
        what = f"no row of numbers {unknown[0]!r}" if unknown else "no row of numbers"
        raise GigamorphError(
            f"model {str(spec)!r} has {what} for an image, only {format_tensors(found)}; name rows of numbers, as in "
            "module:factory#logits, or use a factory whose network returns (images, outputs)"
        )
    rest = {name: value for name, value in found.items() if name not in names}
    say(f"{spec.name}: uses {', '.join(names)}" + (f" of its outputs, not {format_tensors(rest)}" if rest else ""))
    return {name: rows[name].numel() for name in names}


def _refuse_without_row(spec: Spec, found: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
    """Refuse a detector (even if it finds one box, which is a row) or a network of maps only; suggest alternatives."""
    gives = f"model {str(spec)!r} outputs no row of numbers for an image, but "
    if any(name.split(".")[-1] == "boxes" for name in found):
        raise GigamorphError(
            f"{gives}boxes: {format_tensors(found)}; an import cannot contain a detector: in Python, "
            "accelerate(its backbone) computes the maps for its heads"
        )
    if not rows and any(value.ndim == 4 for value in found.values()):
        raise GigamorphError(
            f"{gives}maps: {format_tensors(found)}; in Python, write_map writes them and dense_loss trains on them; "
            "gigamorph train --task masks --init FILE accepts a network with a single map"
        )


def _stored_spec(spec: Spec, channels: int, asked: int, outputs: Outputs) -> Spec:
    """Return the spec that builds the network with the number of outputs in its folder, and its own channels.

    Args:
        asked: num_classes that it was built with; stored in the spec if the number of outputs differs.
    """
    arguments = {name: value for name, value in spec.arguments.items() if name != "num_classes"}
    if spec.kind == "timm":
        arguments.setdefault("in_chans", channels)
    without_count = replace(spec, arguments=arguments)
    if not outputs.predicts or outputs.columns == asked or not spec.results:
        return without_count
    with_count = replace(spec, arguments={**arguments, "num_classes": asked})
    try:
        build_model(str(with_count), asked, channels)
    except GigamorphError:  # it has no argument num_classes
        return without_count
    return with_count


def _build_for_weights(
    spec: Spec, tensors: Mapping[str, Tensor], channels: int, known: Outputs | None
) -> tuple[nn.Module, dict[str, Tensor], str, int]:
    """Return the network for the weights, the weights without wrappers, the common prefix of their names, num_classes.

    num_classes is inferred from the first dimensions of tensors that follow it and differ in the file.
    """
    prefix, columns = "", None if known is None else known.columns if known.predicts else 0
    own = own_tensors(build_model(str(spec), 2 if columns is None else columns, channels))
    tensors = unwrapped(tensors, own)
    if columns is None:
        prefix = common_prefix(own, tensors)
        theirs = {name: tensors[prefix + name].shape for name in own if prefix + name in tensors}
        follow = [
            shape[0]
            for name, shape in theirs.items()
            if shape and own[name].shape and own[name].shape[0] == 2 != shape[0] and shape[1:] == own[name].shape[1:]
        ]
        columns = int(spec.arguments.get("num_classes", follow[-1] if follow else 2))
    return build_model(str(spec), columns, channels), tensors, prefix, columns


def channels_in(spec: Spec, tensors: Mapping[str, Tensor]) -> int | None:
    """Return the image channels that weights were trained for, 1 or 3; None if they do not show it.

    These are the channels with which the network's shapes match the file. If its arguments prevent a match, they are
    those of the convolution that depends on the number of channels, or else of the first convolution.
    """
    plain, made = str(replace(spec, results=())), {}
    for channels in (1, 3):
        with contextlib.suppress(GigamorphError):  # a first convolution with groups=3 refuses grey images
            made[channels] = own_tensors(build_model(plain, 2, channels))
    if len(made) < 2:
        return next(iter(made), None)
    own, other = made.values()
    tensors = unwrapped(tensors, own)
    prefix = common_prefix(own, tensors)
    theirs = {name: tensors[prefix + name].shape for name in own if prefix + name in tensors}
    fitting = [
        channels
        for channels, one in made.items()
        if all(one[name].shape == shape for name, shape in theirs.items() if own[name].shape != other[name].shape)
    ]
    if len(fitting) == 1:
        return fitting[0]
    convs = [name for name, value in own.items() if value.ndim == 4 and prefix + name in tensors]
    convs.sort(key=lambda name: own[name].shape == other[name].shape)  # stable: otherwise in the network's order
    first = tensors[prefix + convs[0]].shape if convs else ()
    return first[1] if len(first) == 4 and first[1] in (1, 3) else None


def _load(
    network: nn.Module, spec: Spec, tensors: Mapping[str, Tensor], channels: int, path: Path, say: Say
) -> list[str]:
    """Load the weights; as timm does for its models, sum a first convolution for colour over its channels.

    Returns:
        Names of the converted tensors.
    """
    own = own_tensors(network)
    convertible = [
        name
        for name, value in tensors.items()
        if name in own
        and value.ndim == own[name].ndim == 4
        and value.shape[1] == 3
        and own[name].shape == (len(value), channels, *value.shape[2:])
        and channels != 3
    ]
    if spec.kind != "timm" or len(convertible) != 1:
        load_exactly(network, tensors, path)
        return []
    from timm.models import adapt_input_conv

    (name,) = convertible
    changed = {**tensors, name: adapt_input_conv(channels, tensors[name])}
    load_exactly(network, changed, path)
    say(f"{name}: converted from 3 channels to {channels} by timm's sum over channels")
    return [name]


def _report_endings(outputs: Outputs, ends: Sequence[str], spec: Spec, say: Say) -> None:
    again = {head.activation for head in outputs.heads} & {"softmax", "sigmoid"}
    for end in dict.fromkeys(filter(None, ends)):
        so = "its outputs are probabilities"
        if again:
            so += f", to which a {' and a '.join(sorted(again))} is applied; --activation probability applies none"
        say(f"{spec.name}: ends in a {end}; {so}")


def _outputs(
    wishes: Wishes, known: Outputs | None, columns: int, taken: Mapping[str, int], ends: Sequence[str]
) -> Outputs:
    """Return the outputs by the user's options, the layout, the network's last operation or the number of columns.

    Args:
        taken: columns of each tensor in use, if there are several; each is a head by default.
        ends: for each of them, or the single output, its last operation if that makes probabilities.

    Raises:
        GigamorphError: names do not fit the columns, or belong to other outputs of the network.
    """
    if wishes.heads:
        outputs = Outputs(tuple(_parse_head(name, text) for name, text in wishes.heads))
        _require_own_names(outputs.heads, taken)
    elif wishes.activation is None and not wishes.classes and known is not None:
        outputs = known
    elif len(taken) > 1:
        names = wishes.classes or tuple(taken)
        if len(names) != len(taken) or (wishes.classes and columns > len(taken)):
            raise GigamorphError(
                f"the network has {len(taken)} outputs ({', '.join(taken)}) of {columns} numbers, but --classes has "
                f"{len(names)} names; name them one by one, as in --head {next(iter(taken))}=softmax:A,B"
            )
        heads = zip(names, taken.values(), ends, strict=True)
        outputs = Outputs(
            tuple(_default_head(n, count, wishes.activation or _activation(count, end)) for n, count, end in heads)
        )
        _require_own_names(outputs.heads, taken)
    else:
        outputs = Outputs.of(wishes.activation or _activation(columns, ends[0]), columns, wishes.classes)
    if outputs.columns != columns:
        raise GigamorphError(f"the network has {columns} outputs, but the named heads have {outputs.columns}")
    return outputs


def _require_own_names(heads: Sequence[Head], taken: Mapping[str, int]) -> None:
    """Refuse heads whose columns belong to other outputs by the network's own names.

    Raises:
        GigamorphError: a head has the name of another output, or spans columns of two outputs.
    """
    owners = [name for name, count in taken.items() for _ in range(count)]
    start = 0
    for head in heads:
        own = list(dict.fromkeys(owners[start : start + head.outputs]))
        if len(own) > 1 or (own and head.name in taken and own != [head.name]):
            order = ", ".join(f"{name} ({count})" for name, count in taken.items())
            raise GigamorphError(
                f"head {head.name!r} would contain columns of {' and '.join(own)}: the network's outputs are {order}; "
                "use these names for all heads, or list the heads in this order"
            )
        start += head.outputs


def _activation(columns: int, end: str) -> Activation:
    if end:
        return "probability"
    return "softmax" if columns > 1 else "sigmoid"


def _default_head(name: str, columns: int, activation: Activation) -> Head:
    classes = tuple(str(i) for i in range(columns)) if columns > 1 else (name,)
    return Head(classes, activation, columns, name)


def _parse_head(name: str, text: str) -> Head:
    activation, _, names = text.partition(":")
    classes = tuple(one.strip() for one in names.split(",")) if names else (name,)
    return Head(classes, activation, len(classes), name)  # type: ignore[arg-type]
