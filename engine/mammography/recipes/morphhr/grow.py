"""Builds the child: an exact front for larger images on the parent; and the control, whose front is new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ....morph.activation import PAct, insert_activation
from ....morph.decompose import decompose
from ....morph.deepen import insert_identity
from ....morph.files import Grown, add_morph
from ....morph.front import FrontStep, front
from ....morph.step import Report
from ....morph.widen import widen
from ....train.run import seed_of
from ....train.stages import Stage
from .config import MorphHRConfig


def grow(parent: Grown, config: MorphHRConfig, seed: int, *, renew: bool = False) -> tuple[Grown, list[Report]]:
    """Return the morphed child of a parent: child(x) == parent(mean of r x r pixels of x), in evaluation mode.

    Every morph is verified in float64 and in the network's own dtype; see `gigamorph.engine.morph`. With ``renew`` the
    front and the stem are new (`renew_front`), and the equality does not hold.

    Raises:
        MorphError: the configured morph cannot be exact.
    """
    reports: list[Report] = []
    example = parent.example()
    for path in config.deepen:
        if config.deepen_by == "netmorph":
            kernel = getattr(parent.network.get_submodule(path), "kernel_size", 1)
            child, report = decompose(
                parent.network, example, path, (kernel, 3), method="stable", act=config.act, seed=seed_of(seed)
            )
        else:
            child, report = insert_identity(parent.network, example, path)
            reports.append(report)
            parent = add_morph(parent, child, report)
            child, report = insert_activation(parent.network, example, f"{path}.1", config.act)
        reports.append(report)
        parent = add_morph(parent, child, report)
    child, report = front(
        parent.network, example, config.factor, config.front, filters=config.filters, act=config.act, seed=seed_of(seed)
    )
    reports.append(report)
    if renew:
        renew_front(child, report.step, seed)
    if config.front == "stages":
        _centre(child, report.step)
    grown = add_morph(parent, child, report)
    if config.widen is not None:
        child, report = widen(grown.network, grown.example(), factor=config.widen, seed=seed_of(seed, 1))
        reports.append(report)
        grown = add_morph(grown, child, report)
    return grown, reports


def renew_front(child: nn.Module, step: FrontStep, seed: int) -> None:
    """Give random weights to the front that a step added and to the stem that reads it.

    This is the control of the ablation: the same architecture and trunk, but the front must be learnt. Convolutions get
    He's initialisation; P-activations are ordinary activations from the start.

    Args:
        child: changed in place.
        step: from the report of `gigamorph.engine.morph.front.front`.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, 2))
    for path in step.at or ["front"]:
        for module in child.get_submodule(path).modules():
            if isinstance(module, nn.Conv2d):
                with torch.no_grad():
                    std = (2 / module.weight[0].numel()) ** 0.5
                    module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
                    if module.bias is not None:
                        module.bias.zero_()
            elif isinstance(module, PAct):
                nn.init.ones_(module.a)


def _centre(child: nn.Module, step: FrontStep) -> None:
    """Set the mean of the random filters on the image to zero, so that slow grey levels do not drown fine detail.

    The layer after them has zero weights, so the child's function does not change.
    """
    path = f"{step.at[0]}.front" if step.at else "front"
    first = next(m for m in child.get_submodule(path).modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        new = first.weight[step.channels :]
        new -= new.mean((2, 3), keepdim=True)


def without_decay(stages: Sequence[Stage], network: nn.Module) -> list[Stage]:
    """Return stages that exclude the slopes of P-activations from weight decay: zero is a function, not less weight."""
    slopes = [f"{name}.a" for name, module in network.named_modules() if isinstance(module, PAct)]
    return [replace(stage, undecayed=(*stage.undecayed, *slopes)) for stage in stages]
