"""Train and run ordinary ConvNets on gigapixel images, exactly, in the memory you have.

    from gigamorph import accelerate, open_pixels

    net = accelerate(model, memory_budget="8GiB")  # trains and predicts as `model` does, on its own parameters
    loss = criterion(net([open_pixels("exam.dcm")]), target)

The public API for daily use is here. A name is imported at its first use, because PyTorch takes seconds to load.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.accelerate import Accelerated, accelerate
    from .engine.dense import dense_loss, write_map
    from .engine.errors import BudgetError, DataError, GigamorphError, MorphError, UnsupportedError, UntrustedError
    from .engine.images.open import open_pixels
    from .engine.images.pixels import Normalize, PixelSource
    from .engine.models import create_model
    from .engine.morph.decompose import decompose, insert_module, split_parallel
    from .engine.morph.deepen import deepen, insert_identity, insert_pair, insert_residual
    from .engine.morph.front import front
    from .engine.morph.head import grow_head, split_class
    from .engine.morph.inputs import add_planes, to_grey, to_rgb
    from .engine.morph.kernel_size import grow_kernel
    from .engine.morph.merge import merge
    from .engine.morph.optimizer import grow_ema, grow_optimizer
    from .engine.morph.planner import plan_growth
    from .engine.morph.recipe import Recipe
    from .engine.morph.spaces import find_spaces
    from .engine.morph.volume import to_volume
    from .engine.morph.widen import widen
    from .engine.planning.plan import Plan
    from .engine.planning.preview import plan
    from .engine.tilewise import tilewise
    from .engine.tiling.scan import TileEvent
    from .engine.trained import Trained, TrainedMasks, load

__version__ = "0.3.0"

if not os.path.isdir(os.path.join(__path__[0], "engine")):  # in a checkout, engine, kernels and cli are siblings
    __path__.append(os.path.dirname(__path__[0]))

_NAMES_OF_MODULES = {
    "accelerate": "Accelerated accelerate",
    "dense": "dense_loss write_map",
    "errors": "BudgetError DataError GigamorphError MorphError UnsupportedError UntrustedError",
    "images.open": "open_pixels",
    "images.pixels": "Normalize PixelSource",
    "models": "create_model",
    "morph.decompose": "decompose insert_module split_parallel",
    "morph.deepen": "deepen insert_identity insert_pair insert_residual",
    "morph.front": "front",
    "morph.head": "grow_head split_class",
    "morph.inputs": "add_planes to_grey to_rgb",
    "morph.kernel_size": "grow_kernel",
    "morph.merge": "merge",
    "morph.optimizer": "grow_ema grow_optimizer",
    "morph.planner": "plan_growth",
    "morph.recipe": "Recipe",
    "morph.spaces": "find_spaces",
    "morph.volume": "to_volume",
    "morph.widen": "widen",
    "planning.plan": "Plan",
    "planning.preview": "plan",
    "tilewise": "tilewise",
    "tiling.scan": "TileEvent",
    "trained": "Trained TrainedMasks load",
}
_MODULES = {name: module for module, names in _NAMES_OF_MODULES.items() for name in names.split()}

__all__ = [  # noqa: RUF022  (sorted by use, not alphabetically)
    "accelerate",
    "plan",
    "open_pixels",
    "write_map",
    "dense_loss",
    "tilewise",
    "create_model",
    "load",
    "widen",
    "merge",
    "deepen",
    "insert_identity",
    "insert_pair",
    "insert_residual",
    "insert_module",
    "decompose",
    "split_parallel",
    "grow_kernel",
    "grow_head",
    "split_class",
    "to_grey",
    "to_rgb",
    "add_planes",
    "to_volume",
    "front",
    "find_spaces",
    "plan_growth",
    "grow_optimizer",
    "grow_ema",
    "Recipe",
    "Accelerated",
    "Plan",
    "Trained",
    "TrainedMasks",
    "Normalize",
    "PixelSource",
    "TileEvent",
    "GigamorphError",
    "BudgetError",
    "DataError",
    "MorphError",
    "UnsupportedError",
    "UntrustedError",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gigamorph' has no attribute {name!r}")
    try:
        module = importlib.import_module(f".engine.{_MODULES[name]}", __name__)
    except ModuleNotFoundError as error:
        missing = f"gigamorph.{name} needs the package {error.name}; install all that it needs: pip install gigamorph"
        raise ModuleNotFoundError(missing, name=error.name) from None
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
