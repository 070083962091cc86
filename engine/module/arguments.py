"""Checks of the arguments of `accelerate` and `plan`; invalid values raise one-line errors."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import GigamorphError, UnsupportedError
from .delegation import Delegate

_WRAPPERS = {  # how to wrap an accelerated network instead
    "DistributedDataParallel": "DistributedDataParallel(accelerate(network))",
    "DataParallel": "DistributedDataParallel(accelerate(network))",
    "FullyShardedDataParallel": "FullyShardedDataParallel(accelerate(network), use_orig_params=True)",
    "FSDPModule": "fully_shard(accelerate(network))",
}


HALO_STORAGE = ("auto", "device", "host", "disk")


def check_network(model: Any) -> None:
    """Check that a model is a network that can be accelerated.

    Raises:
        GigamorphError: the model is not a plain `nn.Module`, or a part of it is wrapped or already accelerated.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        hint = "an instance of it" if isinstance(model, type) else "the network"
        raise GigamorphError(f"the model must be a torch.nn.Module, not {kind}; pass {hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedError("the model is a TorchScript module, which cannot be recorded; pass the eager module")
    if "_parameters" not in vars(model):
        raise GigamorphError(f"{type(model).__name__} is not initialised; call super().__init__() in its __init__")
    for name, module in model.named_modules():
        if isinstance(module, Delegate) and module is not model:
            raise GigamorphError(
                f"module '{name}' is already accelerated; accelerate only the whole network, or only that module"
            )
    refuse_wrapped(model)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise an error if a part of a network is wrapped in DDP, FSDP or DataParallel.

    Raises:
        UnsupportedError: a part is wrapped; the message shows how to wrap the accelerated network.
    """
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
                where = f"module '{name}'" if name else "the model"
                raise UnsupportedError(
                    f"{where} is wrapped in {kind.__name__}; accelerate first, then wrap the whole network: "
                    f"{_WRAPPERS[kind.__name__]}"
                )


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    """Check that the value of an argument is one of its choices.

    Raises:
        GigamorphError: it is not; the message lists the choices.
    """
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        known = [f'"{choice}"' if choice else "None" for choice in choices]
        raise GigamorphError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, not {value!r}")


def check_storage(halos: Any, fallback: Any) -> Any:
    """Check `halos` and `fallback`; return the latter, which gigamorph 0.2 called "whole" instead of "untiled"."""
    check_choice("halos", halos, HALO_STORAGE)
    if isinstance(fallback, str) and fallback == "whole":
        warnings.warn('fallback="whole" is now fallback="untiled"', DeprecationWarning, stacklevel=3)
        fallback = "untiled"
    check_choice("fallback", fallback, ("untiled", None))
    return fallback


def image_shape(shape: Any) -> tuple[int, ...]:
    """The shape (N, C, H, W) of an image batch, or (B, V, C, H, W) of bags of images, as a tuple of integers.

    Raises:
        GigamorphError: the shape is not four or five positive whole numbers.
    """
    sizes = tuple(shape) if isinstance(shape, Sequence) else ()
    if len(sizes) not in (4, 5) or not all(is_whole(size) and size >= 1 for size in sizes):
        raise GigamorphError(f"shape must be (N, C, H, W), or (B, V, C, H, W) for bags of images, not {shape!r}")
    return tuple(int(size) for size in sizes)


def tile_sides(tile: Any) -> tuple[int, int] | None:
    """Height and width of a tile, from one side or from (height, width).

    Raises:
        GigamorphError: the sides are not positive whole numbers.
    """
    if tile is None:
        return None
    sides = list(tile) if isinstance(tile, Sequence) and not isinstance(tile, str) else [tile, tile]
    if len(sides) != 2 or not all(is_whole(side) for side in sides):
        raise GigamorphError(f"tile must be a side or (height, width) in whole pixels, not {tile!r}")
    height, width = (int(side) for side in sides)
    if min(height, width) < 1:
        raise GigamorphError(f"tile must be positive, not {tile!r}")
    return height, width


def is_whole(side: Any) -> bool:
    """Whether a value is a whole number, including NumPy numbers and floats."""
    if isinstance(side, bool) or not isinstance(side, numbers.Real):
        return False
    return float(side).is_integer()
