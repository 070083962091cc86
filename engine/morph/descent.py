"""From which of the parent's parameters each of a child's comes, where a morph may move them and rename them.

The morph is repeated on a copy without weights: a module that is still in it has kept its parameters, under whatever
name. One that is gone has been replaced by what stands at its place now. Names alone do not tell: behind a block with
the layer `block.1` a new layer is `block.1`, and the old one has become `block.0.1`.
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
    """What becomes of the parent's parameters in a child that was not widened.

    Attributes:
        heirs: parent's name -> child's, of each parameter that is still there with its values.
        origins: child's name -> parent's, of every other one that stands where a parent's parameter stood: grown,
            split, or computed from it. What is in neither is new.
    """

    heirs: Mapping[str, str]
    origins: Mapping[str, str]


def descent(step: Step, parent: nn.Module, child: nn.Module) -> Descent:
    """Which parameters live on, and which stand for others.

    Args:
        step: of the morph.
        parent: the network before it, with the weights that it had then; it is not changed.
        child: the network after it, with the weights that it had then.

    Raises:
        MorphError: a parameter that the morph leaves alone has other values in the child, so that nothing can be told.
    """
    moved = _moved(step, parent)
    old, new = dict(parent.named_parameters()), dict(child.named_parameters())
    heirs: dict[str, str] = {}
    origins: dict[str, str] = {}
    kept = {_join(here, leaf) for here in moved.values() for leaf in _leaves(child, here)}
    for name, p in old.items():
        path, _, leaf = name.rpartition(".")
        mine = _join(moved[path], leaf) if path in moved else ""
        beside = [n for n in new if n not in kept and n.startswith(f"{path}.") and n.rpartition(".")[2] == leaf]
        if mine not in new:
            equal = [n for n in beside if _same(new[n], p)]
            if len(equal) == 1:
                heirs[name] = equal[0]
            origins |= dict.fromkeys((n for n in beside if n not in equal or len(equal) > 1), name)
        elif _same(new[mine], p):
            heirs[name] = mine
        else:
            # The rest of a weight that has lost a part of its values, and not its shape, is in others beside it.
            rest = [n for n in beside if new[n].shape == p.shape == new[mine].shape]
            if new[mine].shape == p.shape and not rest:
                raise MorphError(
                    f"'{mine}' of the child has other values than '{name}' of the parent, though this morph leaves it "
                    "alone; go on with the training state before either network is trained or cast"
                )
            origins |= dict.fromkeys([mine, *rest], name)
    return Descent(heirs, origins)


def shared_prefix(a: str, b: str) -> int:
    """How many components two names have in common from the first on."""
    parts = [x == y for x, y in zip(a.split("."), b.split("."), strict=False)]
    return parts.index(False) if False in parts else len(parts)


def _moved(step: Step, parent: nn.Module) -> dict[str, str]:
    """Parent's path -> child's, of each module that the morph leaves or changes, but does not replace."""
    if isinstance(step, MergeStep):  # it runs the network, which wants weights, and moves nothing
        return {path: path for path, _ in parent.named_modules()}
    copy = duplicate(parent, {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in parent.parameters()})
    before = {module: path for path, module in copy.named_modules()}
    return {before[module]: path for path, module in step.repeat(copy).named_modules() if module in before}


def _leaves(model: nn.Module, path: str) -> list[str]:
    return [name for name, _ in model.get_submodule(path).named_parameters(recurse=False)]


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _same(child: Tensor, parent: Tensor) -> bool:
    return child.shape == parent.shape and torch.equal(child.to(parent), parent)
