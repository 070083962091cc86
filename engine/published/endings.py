"""Detects, from the autograd graph, whether a network's last operation is a softmax or a sigmoid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

_PROBABILITIES = {"SoftmaxBackward0": "softmax", "SigmoidBackward0": "sigmoid"}
# Operations that move, reshape or copy values without changing them.
_MOVEMENTS = (
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
    """Return the last operation of each of a network's outputs: "softmax", "sigmoid", or "" for others.

    Args:
        rows: number of outputs that `models.results.Columns` has concatenated; 0 if the network has a single output.
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
