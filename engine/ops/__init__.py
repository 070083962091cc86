"""One rule per op: how it is computed tile by tile, or why it cannot be."""

from . import flat, grids, losses, movement, norms, pointwise, products, promote, reductions, reshape, upsample, window
from .base import Axes, Block, Env, Flat, Local, Maps, Node, Reduction, Refusal, Rule, Small, SumOf, Whole, find_rule

__all__ = [
    "Axes",
    "Block",
    "Env",
    "Flat",
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
    "flat",
    "grids",
    "losses",
    "movement",
    "norms",
    "pointwise",
    "products",
    "promote",
    "reductions",
    "reshape",
    "upsample",
    "window",
]
