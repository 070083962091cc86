"""One rule per op: how it is computed tile by tile, or why it cannot be."""

from . import movement, norms, pointwise, upsample, window
from .base import Axes, Block, Env, Local, Maps, Node, Reduction, Refusal, Rule, Small, SumOf, Whole, find_rule

__all__ = [
    "Axes",
    "Block",
    "Env",
    "Local",
    "Maps",
    "Node",
    "Reduction",
    "Refusal",
    "Rule",
    "Small",
    "SumOf",
    "Whole",
    "find_rule",
    "movement",
    "norms",
    "pointwise",
    "upsample",
    "window",
]
