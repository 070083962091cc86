"""Mapping of a child's parameters to the parent's parameters that they come from; a morph may move and rename them.

The morph is repeated on a copy without weights. A module that is still in the copy retains its parameters, under any
name. A missing module was replaced by the module that is now at its path. Names alone are ambiguous: after a block with
the layer `block.1` is followed by a new layer, the new one is `block.1` and the old one is `block.0.1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import MorphError
from .copying import duplicate
from .merge import MergeStep
from .step import Step


@dataclass(frozen=True)
class Descent:
    """Mapping between the parameters of a parent and of a child that was not widened.

    Attributes:
        heirs: parent's name -> child's name, for each parameter that still exists with its values.
        origins: child's name -> parent's name, for every other parameter that replaces one of the parent's: grown,
            split, or computed from it. A parameter in neither mapping is new.
    """

    heirs: Mapping[str, str]
    origins: Mapping[str, str]


def descent(step: Step, parent: nn.Module, child: nn.Module) -> Descent:
    """Find the parameters that still exist, and those that replace others.

    Args:
        step: the step of the morph.
        parent: the network before the morph, with its weights of that time; it is not changed.
        child: the network after the morph, with its weights of that time.

    Raises:
        MorphError: a parameter that the morph does not change has other values in the child.
    """
    moved = _moved(step, parent)
    old, new = dict(parent.named_parameters()), dict(child.named_parameters())
    heirs: dict[str, str] = {}
    origins: dict[str, str] = {}
    unreplaced = {_join(where, leaf) for where in moved.values() for leaf in _leaves(child, where)}
    for name, p in old.items():
        path, _, leaf = name.rpartition(".")
        mine = _join(moved[path], leaf) if path in moved else ""
        nearby = [n for n in new if n not in unreplaced and n.startswith(f"{path}.") and n.rpartition(".")[2] == leaf]
        if mine not in new:
            equal = [n for n in nearby if _shares_values(new[n], p)]
            if len(equal) == 1:
                heirs[name] = equal[0]
            origins |= dict.fromkeys((n for n in nearby if n not in equal or len(equal) > 1), name)
        elif _shares_values(new[mine], p):
            heirs[name] = mine
        else:
            # If a weight lost a part of its values but not its shape, other parameters below the path hold the rest.
            rest = [n for n in nearby if new[n].shape == p.shape == new[mine].shape]
            if new[mine].shape == p.shape and not rest:
                raise MorphError(
                    f"'{mine}' of the child has other values than '{name}' of the parent, but this morph does not "
                    "change it; call grow_optimizer before either network is trained or cast"
                )
            origins |= dict.fromkeys([mine, *rest], name)
    return Descent(heirs, origins)


def shared_prefix(a: str, b: str) -> int:
    """Return the number of leading components that two names have in common."""
    parts = [x == y for x, y in zip(a.split("."), b.split("."), strict=False)]
    return parts.index(False) if False in parts else len(parts)


def _moved(step: Step, parent: nn.Module) -> dict[str, str]:
    """Return parent's path -> child's path, for each module that the morph does not replace."""
    if isinstance(step, MergeStep):  # it runs the network, which needs weights, and moves nothing
        return {path: path for path, _ in parent.named_modules()}
    copy = duplicate(parent, {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in parent.parameters()})
    before = {module: path for path, module in copy.named_modules()}
    return {before[module]: path for path, module in step.repeat(copy).named_modules() if module in before}


def _leaves(model: nn.Module, path: str) -> list[str]:
    return [name for name, _ in model.get_submodule(path).named_parameters(recurse=False)]


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _shares_values(child: Tensor, parent: Tensor) -> bool:
    return child.shape == parent.shape and torch.equal(child.to(parent), parent)
