"""Declarations of custom autograd Functions, which the morph engine cannot trace."""

from __future__ import annotations

import torch

from ..errors import MorphError
from . import families

KINDS = ("elementwise", "channelwise")


def declare(function: type[torch.autograd.Function], kind: str) -> None:
    """Declare how a custom Function maps its inputs, so that channels that pass through it can grow.

    Channels that meet an undeclared Function are frozen. The numeric check of each morph finds a wrong declaration if
    its random inputs expose it.

    Args:
        function: the subclass of `torch.autograd.Function` that the forward applies.
        kind: "elementwise": each element of the single output depends on the elements of the input tensors at the
            same (broadcast) position. "channelwise": the first tensor is a map (N, C, ...), and the single output has
            these channels on axis 1. Each output channel depends on that channel of the map and of the other tensors,
            which are vectors (C).

    Raises:
        MorphError: `function` is not a subclass of `torch.autograd.Function`, or `kind` is unknown.
    """
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        raise MorphError(f"{function!r} is not a subclass of torch.autograd.Function")
    if kind not in KINDS:
        raise MorphError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")
    families.DECLARED[custom_name(function)] = kind


def custom_name(function: type) -> str:
    """Return the name of the Function in the trace."""
    return f"{function.__module__}.{function.__qualname__}"
