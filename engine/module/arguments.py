"""What `accelerate` is given, understood or refused in one line."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import GigamorphError, UnsupportedError
from .delegation import Delegate

_WRAPPERS = {  # and how to put them around an accelerated network, where they work
    "DistributedDataParallel": "DistributedDataParallel(accelerate(network))",
    "DataParallel": "DistributedDataParallel(accelerate(network))",
    "FullyShardedDataParallel": "FullyShardedDataParallel(accelerate(network), use_orig_params=True)",
    "FSDPModule": "fully_shard(accelerate(network))",
}


HALO_PLACES = ("auto", "device", "host", "disk")  # where halos are kept


def check_network(model: Any) -> None:
    """Refuse what is no network, and what shares one among processes or devices before it is accelerated.

    Raises:
        GigamorphError: with what to give instead.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        hint = "an instance of it" if isinstance(model, type) else "the network"
        raise GigamorphError(f"accelerate takes a torch.nn.Module, not {kind}; give {hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedError("the model is TorchScript; give the plain eager module")
    if "_parameters" not in vars(model):
        raise GigamorphError(f"{type(model).__name__} is not set up; call super().__init__() in its __init__")
    for name, module in model.named_modules():
        if isinstance(module, Delegate) and module is not model:
            raise GigamorphError(f"module '{name}' is accelerated already; accelerate the whole network, or that alone")
    refuse_wrapped(model)


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a network of which a part is shared among processes or devices.

    Raises:
        UnsupportedError: with what to wrap instead.
    """
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
                where = f"module '{name}'" if name else "the model"
                raise UnsupportedError(
                    f"{where} is wrapped in {kind.__name__}; wrap last, and only the whole: {_WRAPPERS[kind.__name__]}"
                )


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    """Refuse what is not one of an argument's values.

    Raises:
        GigamorphError: with those that there are.
    """
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        known = [f'"{choice}"' if choice else "None" for choice in choices]
        raise GigamorphError(f"{name}={value!r} is not known; give {', '.join(known[:-1])} or {known[-1]}")


def image_shape(shape: Any) -> tuple[int, ...]:
    """(N, C, H, W) of an image batch, or (B, V, C, H, W) of bags of images.

    Raises:
        GigamorphError: if these are not four or five whole positive numbers.
    """
    sizes = tuple(shape) if isinstance(shape, Sequence) else ()
    if len(sizes) not in (4, 5) or not all(is_whole(size) and size >= 1 for size in sizes):
        raise GigamorphError(f"the shape {shape!r} is not (N, C, H, W) of an image batch, or (B, V, C, H, W) of bags")
    return tuple(int(size) for size in sizes)


def tile_sides(tile: Any) -> tuple[int, int] | None:
    """Height and width of a tile, from a side or two of them.

    Raises:
        GigamorphError: if they are not whole positive numbers.
    """
    if tile is None:
        return None
    sides = list(tile) if isinstance(tile, Sequence) and not isinstance(tile, str) else [tile, tile]
    if len(sides) != 2 or not all(is_whole(side) for side in sides):
        raise GigamorphError(f"tile={tile!r} is not understood; give a side, or (height, width), in whole pixels")
    height, width = (int(side) for side in sides)
    if min(height, width) < 1:
        raise GigamorphError(f"tile={tile!r} must be positive")
    return height, width


def is_whole(side: Any) -> bool:
    """Whether something is a whole number, also one of numpy or a float."""
    if isinstance(side, bool) or not isinstance(side, numbers.Real):
        return False
    return float(side).is_integer()
