"""Widening of averaged weights (EMA): they grow by the same linear map as the weights of the network."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..errors import MorphError
from .copying import duplicate
from .report import Report
from .stock import stock
from .verify import require_equal
from .widen import WidenStep

Averaged = TypeVar("Averaged", bound=nn.Module)


@torch.inference_mode(False)
def grow_ema(average: Averaged, parent: nn.Module, child: nn.Module, report: Report) -> Averaged:
    """Widen an average of the parent's weights by the same linear map as the weights.

    Seed and tensor name determine the shares, so the average of widened weights equals the widened average. New
    channels have no history and get the child's weights.

    Args:
        average: a network of the parent's architecture (an EMA or momentum copy) or an `AveragedModel` of one; it is
            not changed.
        parent: the network before the widening.
        child: the network after the widening.
        report: the report of the widening.

    Raises:
        MorphError: the morph is not a widening, the average has another architecture, or a check fails.
    """
    parent, child = stock(parent), stock(child)
    average = stock(average)  # pyright: ignore[reportAssignmentType]  the same class, or the network it accelerates
    step = report.step
    if not isinstance(step, WidenStep):
        raise MorphError(f"averages can follow a widening only, not '{report.transform}'; start a new average")
    if isinstance(average, AveragedModel):
        module = average.module
        average.module = nn.Module()  # avoids a copy of weights that are replaced below
        try:
            wrapper = copy.deepcopy(average)
        finally:
            average.module = module
        wrapper.module = grow_ema(module, parent, child, report)
        return wrapper
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (parent, average)]
    if shapes[0] != shapes[1]:
        raise MorphError("the average has other parameters than the parent; give an average of the parent's weights")
    # The recorded inputs are float32 on the CPU, so the architecture is rebuilt there before the weights are set.
    grown = step.repeat(duplicate(average).float().cpu())
    maps = step.tensor_maps(duplicate(parent).float().cpu())
    targets, sources = child.state_dict(), average.state_dict()
    for name, tensor in [*grown.named_parameters(), *grown.named_buffers()]:
        if name not in sources:
            continue
        value, made = sources[name], maps.get(name)
        if made is None:
            value = value.detach().clone()
        else:
            value, _ = step.grow_tensor(name, value, made)
            if made.free is not None and made.axis is not None and bool(made.free.any()):
                at = made.free.nonzero().reshape(-1).to(value.device)
                value.index_copy_(made.axis, at, targets[name].to(value).index_select(made.axis, at))
        tensor.data = value
    device = next((p.device for p in average.parameters()), torch.device("cpu"))
    given = step.inputs()
    example = replace(given, tensors=tuple(x.to(device) for x in given.tensors))
    require_equal(average, grown, example)
    return grown.train(average.training)
