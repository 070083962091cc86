"""Recurrent layers on fake tensors: one step determines the shapes of all, where PyTorch would compute every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_BATCH_FIRST = 8  # the last argument of (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, ...)


def of_one_step(name: str, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """The result of a recurrent layer, computed from the first step of its sequences; None for other calls."""
    if name not in LAYERS or kwargs or len(args) != _BATCH_FIRST + 1 or not isinstance(args[3], bool):
        return None
    x, axis = args[0], int(args[_BATCH_FIRST])
    if x.dim() != 3 or x.shape[axis] < 2:
        return None
    output, *states = func(x.narrow(axis, 0, 1), *args[1:])
    steps = output.transpose(0, axis).expand(x.shape[axis], -1, -1).clone(memory_format=torch.contiguous_format)
    return (steps.transpose(0, axis), *states)
