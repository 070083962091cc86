"""One rule per op: how it is computed tile by tile, or why it cannot be."""

from . import movement, pointwise, upsample, window
from .base import Axes, Block, Env, Local, Maps, Reduction, Refusal, Rule, SumOf, Whole, find_rule

__all__ = [
    "Axes",
    "Block",
    "Env",
    "Local",
    "Maps",
    "Reduction",
    "Refusal",
    "Rule",
    "SumOf",
    "Whole",
    "find_rule",
    "movement",
    "pointwise",
    "upsample",
    "window",
]
