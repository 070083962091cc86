"""Compares the results of two peers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .results import Check

Tensors = Mapping[str, Mapping[str, Tensor]]
# Relative L2 norms. In float32 the outputs of stock PyTorch in two memory formats differ by 2e-7, but their gradients
# by 4e-5 (ResNet-18), because rounding switches some ReLUs. A wrong border, or a gradient counted twice, causes a
# percent or more. The float64 comparison shows how exact a peer is.
BOUNDS = {"fp64": 1e-12, "fp32": 1e-3, "bf16": 1e-1}


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the relative L2 norm of the difference over all tensors; infinite if names or shapes differ."""
    if found.keys() != expected.keys() or any(found[n].shape != t.shape for n, t in expected.items()):
        return float("inf")
    wrong = sum(float((found[n].double() - t.double()).square().sum()) for n, t in expected.items())
    return (wrong / max(sum(float(t.double().square().sum()) for t in expected.values()), 1e-300)) ** 0.5


def compare(found: Tensors, expected: Tensors, against: str, untrained: frozenset[str] = frozenset()) -> Check:
    """Compare a peer's results with the expected ones.

    Args:
        against: the peer that computed the expected results.
        untrained: parameters that the peer does not train by design; they count as `missing`.
    """
    outputs = distance(found["outputs"], expected["outputs"])
    gradients, worst = None, None
    wanted = {n: g for n, g in expected["gradients"].items() if n not in untrained}
    if wanted:
        gradients = distance({n: g for n, g in found["gradients"].items() if n in wanted}, wanted)
        scale = torch.stack([g.norm() for g in wanted.values()]).max().item()
        each = {
            name: distance({name: found["gradients"][name]}, {name: g})
            for name, g in wanted.items()
            if name in found["gradients"] and g.norm() > 1e-6 * scale
        }
        name = max(each, key=lambda n: each[n], default="")
        worst = (name, each[name]) if name else None
    buffers = None
    if expected["buffers"]:
        known = {n: b for n, b in found["buffers"].items() if n in expected["buffers"]}
        buffers = distance(known, expected["buffers"])
    return Check(against, outputs, gradients, worst, buffers, len(expected["gradients"]) - len(wanted))


def complaint(check: Check, precision: str) -> str | None:
    """Return a sentence on a result that exceeds its bound, or None."""
    bound = BOUNDS[precision]
    for what, error in (
        ("the output", check.outputs),
        ("the gradients", check.gradients),
        ("the running statistics", check.buffers),
    ):
        if error is not None and not error <= bound:
            return f"{what} differ{'s' if what == 'the output' else ''} from {check.against}'s by {error:.1e}"
    return None
