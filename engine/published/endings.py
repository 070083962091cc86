"""What a network does last to its outputs: probabilities already, as autograd's record of a forward tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

_KNOWN = {"SoftmaxBackward0": "softmax", "SigmoidBackward0": "sigmoid"}
# What changes no number: only its place, its shape, or its type.
_MOVES = (
    "View",
    "UnsafeView",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Select",
    "Slice",
    "Index",
    "Clone",
    "ToCopy",
    "Alias",
)


def endings(network: nn.Module, image: Tensor, rows: int) -> list[str]:
    """What makes each of a network's outputs: "softmax" or "sigmoid" of its own, "" for others or where unknown.

    Args:
        rows: that `models.results.Columns` has put side by side; 0 where the network gives one row itself.
    """
    try:
        end = network(image.clone().requires_grad_() + 0).grad_fn  # not a leaf, which nothing may change in place
    except Exception:  # it may refuse gradients; what it is without them was looked at before
        end = None
    if not rows:
        return [_ending(end)]
    return [_ending(part) for part, _ in end.next_functions] if end is not None else [""] * rows


def _ending(node: Any) -> str:
    while node is not None and node.name().startswith(_MOVES) and node.next_functions:
        node = node.next_functions[0][0]
    if node is not None and node.name() == "CatBackward0":
        parts: Sequence[str] = [_ending(part) for part, _ in node.next_functions]
        return " and ".join(dict.fromkeys(parts)) if all(parts) else ""
    return "" if node is None else _KNOWN.get(node.name(), "")
