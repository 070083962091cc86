"""What the morph engine is told of custom autograd Functions, which it cannot look into."""

from __future__ import annotations

import torch

from ..errors import MorphError
from . import families

KINDS = ("elementwise", "channelwise")


def declare(function: type[torch.autograd.Function], kind: str) -> None:
    """Say what a custom Function does, so that the channels that it meets can grow; undeclared ones are frozen.

    A wrong declaration is found out by the numeric check of each morph, as far as its random inputs show it.

    Args:
        function: the class whose `apply` a forward calls.
        kind: "elementwise": each element of its one output depends on the elements of its tensors at the same
            (broadcast) position. "channelwise": its first tensor is a map (N, C, ...), its one output has these
            channels on axis 1; each depends on that channel of the map and of its other tensors, vectors (C).

    Raises:
        MorphError: no such class or kind.
    """
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        raise MorphError(f"{function!r} is no class of torch.autograd.Function")
    if kind not in KINDS:
        raise MorphError(f"kind {kind!r} is unknown; take one of {', '.join(KINDS)}")
    families.DECLARED[custom_name(function)] = kind


def custom_name(function: type) -> str:
    """The name under which its calls are followed."""
    return f"{function.__module__}.{function.__qualname__}"
