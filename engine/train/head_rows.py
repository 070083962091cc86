"""Initial weights of the last layer: rows are matched to classes by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..models.folder import folder_of, read_description, require_logits
from ..models.pretrained import TIMM
from ..models.registry import head_prefix, load_weights
from .stored import read_record
from .target import Target

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
