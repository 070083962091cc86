"""The momentum of a BatchNorm that averages all batches: one over what its counter says, at every call anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .call_trees import Ref
from .values import Values


class CumulativeAverage(float):
    """Stands for the momentum of a BatchNorm that averages all batches: one over what its counter says.

    Attributes:
        module: the BatchNorm.
    """

    module: nn.modules.batchnorm._BatchNorm


def averaging(values: Values, leaf: Any) -> Any:
    """One over the counter as it is now, a tensor, in the place of such a momentum; anything else as it is."""
    if not isinstance(leaf, CumulativeAverage):
        return leaf
    counter = leaf.module.num_batches_tracked
    assert counter is not None
    twin = values.twin(counter)
    with torch.inference_mode(False):
        share = torch.empty((), dtype=torch.float64, device=twin.device)
    number = values.new_value(share)
    values.append(_reciprocal, "reciprocal", (Ref(values.present(twin)),), {}, (number,), ())
    return share


def _reciprocal(counter: Tensor) -> Tensor:
    return counter.to(torch.float32 if counter.device.type == "mps" else torch.float64).reciprocal()
