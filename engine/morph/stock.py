"""Morphs of accelerated networks: the underlying network grows, and the child is accelerated too."""

from __future__ import annotations

from torch import nn

from ..accelerate import Accelerated, accelerate
from ..errors import MorphError


def stock(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Return the underlying network with its ordinary forward.

    Raises:
        MorphError: `model` is not a network, has weights on the meta device, or is accelerated and `inplace` is set.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MorphError(f"the model is a {type(model).__name__}; give an nn.Module")
    if isinstance(model, Accelerated):
        if inplace:
            raise MorphError(
                "inplace=True needs the network itself, not the accelerated one; use the network that the morph returns"
            )
        model = model.__dict__["_network"]
    if name := next((name for name, p in model.named_parameters() if p.is_meta), ""):
        raise MorphError(
            f"'{name}' is on the meta device and has no values to compare; load weights into the network, or grow a "
            "weights file by its recipe (recipe.grow_file)"
        )
    return model


def as_given(child: nn.Module, model: nn.Module) -> nn.Module:
    """Return the child of a morph, accelerated with the same settings if `model` is accelerated."""
    if not isinstance(model, Accelerated):
        return child
    settings = model.memory_budget, model.tile, model.batch_norm, model.halos, model.fallback, model.split
    net = accelerate(child, *settings)
    net.on_tile = model.on_tile
    return net
