"""Rules of ops: each returns how an op is computed tile by tile, or raises a refusal."""

from . import (  # noqa: F401  (importing a module registers its rules)
    attention,
    axis_ops,
    contract,
    custom,
    flat,
    grids,
    indices,
    losses,
    movement,
    norms,
    pointwise,
    products,
    reductions,
    reshape,
    tiles,
    upsample,
    window,
    writes,
)
from .base import Axes, Block, Env, Flat, Local, Maps, Node, Reduction, Refusal, Rule, SumOf, VectorOp, Whole, find_rule  # noqa: F401
