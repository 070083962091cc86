"""Builds the network that a checkpoint's record describes, with new, initial or trained parameters.

Rows of the last layer of initial weights are matched to classes by name.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..accelerate import Accelerated, accelerate
from ..errors import DataError, GigamorphError, MorphError
from ..models import build_model
from ..models.folder import folder_of, read_description, require_logits
from ..models.outputs import Outputs, set_outputs
from ..models.pretrained import TIMM
from ..models.registry import head_prefix, load_weights
from ..models.weights import bounded
from .checkpoint import read_record
from .mask_target import MaskTarget
from .target import Target


def target_of(record: Mapping[str, Any]) -> Target:
    """The target of a checkpoint's network."""
    if "target" in record and record["target"]["kind"] == "masks":
        return MaskTarget.from_plain(record["target"])
    return Target.from_plain(record["target"]) if "target" in record else Target(tuple(record["classes"]))


def outputs_of_record(record: Mapping[str, Any]) -> Outputs:
    """The outputs of a checkpoint's network, for a folder that describes it.

    Raises:
        GigamorphError: if the network combines views, which a folder cannot describe, or returns maps.
    """
    target = target_of(record)
    if target.views is not None:
        raise GigamorphError(
            f"cannot export a network of exams with several views (views {target.views!r}), because other programs "
            "would treat them as single images; predict with its checkpoint"
        )
    if target.kind == "masks":
        raise GigamorphError("cannot export a network of --task masks because it returns maps, not image classes")
    return target.outputs or Outputs.of("softmax", len(target.names), target.names)


def build_network(
    record: dict[str, Any],
    weights: str | Path | None = None,
    split: Any = False,
    trained: Mapping[str, Tensor] | None = None,
) -> Accelerated:
    """The accelerated network that a checkpoint's record describes, on its device, without trained parameters.

    Args:
        record: of a checkpoint.
        weights: initial weights.
        split: see `accelerate`.
        trained: the parameters that will be loaded; a much larger network is refused before it allocates memory.
    """
    options, target = record["options"], target_of(record)
    with contextlib.nullcontext() if trained is None else bounded(trained):
        if "grown" in record:
            from ..morph.files import Origin  # imports all morphs

            model = Origin.from_record(record["grown"]).build(options["model"], target.width)
        else:
            model = build_model(options["model"], target.width, record["channels"])
    if weights is not None:
        start_from(model, weights, target)
    model = model.to(options["device"])
    net = accelerate(model, memory_budget=options["memory_budget"], batch_norm=options.get("batch_norm"), split=split)
    if target.outputs is not None:
        set_outputs(net, target.outputs)
    return net


def restore_network(
    checkpoint: dict[str, Any], path: str | Path, *, memory_budget: int | None, device: str
) -> Accelerated:
    """The trained network of a checkpoint (`load_checkpoint`), with the given memory budget and device.

    Raises:
        DataError: naming the file, if the network cannot be built or the parameters do not fit.
    """
    record = checkpoint["gigamorph"]
    here = {**record["options"], "memory_budget": memory_budget, "device": device}
    trained = {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()}
    try:
        net = build_network({**record, "options": here}, trained=trained)
        net.load_state_dict(trained)
    except GigamorphError as error:
        if type(error) not in (DataError, GigamorphError, MorphError):
            raise  # about the device, or about untrusted code
        raise DataError(f"{path}: {error}") from error
    except RuntimeError as error:
        raise DataError(
            f"{path}: the checkpoint's weights do not fit {here['model']!r} as it is built now: "
            f"{str(error).strip().splitlines()[-1].strip()}"
        ) from error
    return net


log = logging.getLogger("gigamorph")
_ATTENTION = "attention over views"  # the row of the attention logit; no column of a table has this name


def start_from(model: nn.Module, weights: str | Path, target: Target) -> None:
    """Load weights into a network for a target, see `load_weights`.

    If the weights name their classes, rows of the last layer are assigned to the classes of the same name, and other
    classes get new rows. If no class has the same name, the rows stay in their order.

    Raises:
        DataError: if the weights do not fit, have the same ordinal classes in another order, or belong to a folder
            whose network returns probabilities.
    """
    if folder := folder_of(weights):
        require_logits(folder, read_description(folder))
    head = head_prefix(model.state_dict())
    new = {name: value.clone() for name, value in _rows(model, head, target.width)}
    if load_weights(model, weights):
        return
    theirs, ordered = _names(weights)
    ours = _with_attention(target.names, target.views)
    if theirs == ours or len(theirs) != len(ours) or not new:
        return
    if ordered or target.kind == "ordinal":
        _refuse_reordered(theirs, ours, weights)
    elif set(theirs) & set(ours):
        _sort(model, head, new, [theirs.index(name) if name in theirs else None for name in ours])
        if fresh := [name for name in ours if name not in theirs]:
            log.warning("%s: has no class %s; its rows of the last layer are new", weights, ", ".join(fresh))
        return
    names = ", ".join(theirs), ", ".join(ours)
    log.warning("%s: the last layer of %s initialises that of %s, in this order", weights, *names)


def _refuse_reordered(theirs: Sequence[str], ours: Sequence[str], weights: str | Path) -> None:
    """Refuse the same ordinal classes in another order: their outputs are steps between classes."""
    if sorted(theirs) == sorted(ours):
        named = "[" + ", ".join(f'"{name}"' for name in theirs) + "]"
        raise DataError(
            f"{weights}: its classes are {' < '.join(theirs)}, not {' < '.join(ours)}; set -o 'data.classes={named}'"
        )


def _with_attention(names: Sequence[str], views: str | None) -> list[str]:
    return [*names, *([_ATTENTION] if views == "attention" else [])]


def _names(weights: str | Path) -> tuple[list[str], bool]:
    """The classes, labels or numbers of the last layer's rows, and whether they are ordinal."""
    path = Path(weights)
    if str(weights).startswith(TIMM):
        return [], False
    if folder := folder_of(path):
        outputs = read_description(folder).outputs
        return outputs.names if outputs.predicts else [], any(h.activation == "ordinal" for h in outputs.heads)
    if path.suffix == ".safetensors":
        return [], False
    record = read_record(path)
    if record is None or "classes" not in record:
        return [], False
    target = record.get("target", {"names": record["classes"]})
    return _with_attention(target["names"], target.get("views")), target.get("kind") == "ordinal"


def _rows(model: nn.Module, head: str, width: int) -> list[tuple[str, Tensor]]:
    """The tensors of the last layer that have one row per output."""
    own = [(name, value) for name, value in model.state_dict().items() if name.startswith(head)]
    return [(name, value) for name, value in own if value.ndim and len(value) == width]


def _sort(model: nn.Module, head: str, new: dict[str, Tensor], sources: Sequence[int | None]) -> None:
    """Reorder the rows of the last layer by their source rows; None takes the row of the newly built network."""
    with torch.no_grad():
        for name, value in _rows(model, head, len(sources)):
            found = value.clone()
            for row, source in enumerate(sources):
                value[row] = new[name][row] if source is None else found[source]
