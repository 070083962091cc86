"""The engine: ConvNets on images of any size, exactly, in the memory you have."""

from .accelerate import Accelerated, accelerate
from .dense import dense_loss, write_map
from .errors import BudgetError, DataError, GigamorphError, UnsupportedError
from .images.open import open_pixels
from .planning.plan import Plan, plan
from .tiling.scan import TileEvent

__all__ = [
    "Accelerated",
    "BudgetError",
    "DataError",
    "GigamorphError",
    "Plan",
    "TileEvent",
    "UnsupportedError",
    "accelerate",
    "dense_loss",
    "open_pixels",
    "plan",
    "write_map",
]
