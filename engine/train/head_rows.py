"""The last layer of the weights that a training starts from: each row goes to the class that it is of."""

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
_ATTENTION = "attention over views"  # the row that is no class; no column of a table has such a name


def start_from(model: nn.Module, weights: str | Path, target: Target) -> None:
    """Load weights into a network for a target, see `load_weights`.

    Where the weights say which classes they are of, rows of the last layer go to the classes of the same name; a class
    that they do not know has a new row. Where they know none of the classes, the rows stay in their order.

    Raises:
        DataError: the weights do not fit, or tell the same classes apart in another order of theirs; or a folder's
            network gives probabilities.
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
        _require_other(theirs, ours, weights)
    elif set(theirs) & set(ours):
        _sort(model, head, new, [theirs.index(name) if name in theirs else None for name in ours])
        if fresh := [name for name in ours if name not in theirs]:
            log.warning("%s: knows no %s, whose part of the last layer is new", weights, ", ".join(fresh))
        return
    told = ", ".join(theirs), ", ".join(ours)
    log.warning("%s: its last layer, of %s, begins as that of %s in this order", weights, *told)


def _require_other(theirs: Sequence[str], ours: Sequence[str], weights: str | Path) -> None:
    """Steps from class to class have no other order than that of their classes."""
    if sorted(theirs) == sorted(ours):
        named = "[" + ", ".join(f'"{name}"' for name in theirs) + "]"
        raise DataError(
            f"{weights}: its classes are {' < '.join(theirs)}, not {' < '.join(ours)}; give -o 'data.classes={named}'"
        )


def _with_attention(names: Sequence[str], views: str | None) -> list[str]:
    return [*names, *([_ATTENTION] if views == "attention" else [])]


def _names(weights: str | Path) -> tuple[list[str], bool]:
    """The classes, labels or numbers whose rows the last layer has, and whether they are steps of an order."""
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
    """The tensors of the last layer that have a row for each output."""
    own = [(name, value) for name, value in model.state_dict().items() if name.startswith(head)]
    return [(name, value) for name, value in own if value.ndim and len(value) == width]


def _sort(model: nn.Module, head: str, new: dict[str, Tensor], places: Sequence[int | None]) -> None:
    """Put the rows of the last layer in places; where there is none, those that the network was built with stay."""
    with torch.no_grad():
        for name, value in _rows(model, head, len(places)):
            found = value.clone()
            for row, place in enumerate(places):
                value[row] = new[name][row] if place is None else found[place]
