"""Pools a network's outputs for several views of one exam into one output for the exam.

With rows x_v (the network's columns for view v), the exam's row is

    mean        sum_v x_v / V
    max         for labels, numbers and ordinal columns max_v x_v; for two classes the row of the view with the
                highest log-odds of the second; for more classes max_v log softmax(x_v)
    attention   sum_v a_v x_v with a = softmax over the views of one further column

No pooling depends on the order of the views, nor on offsets that a softmax ignores. Attention follows Ilse, Tomczak
and Welling (2018), applied to each view's outputs instead of its features, so that each view's contribution is known
(as in Javed et al., 2022).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Views = Literal["mean", "max", "attention"]
VIEWS: tuple[str, ...] = get_args(Views)


def pool(rows: Tensor, views: Views, *, exclusive: bool) -> Tensor:
    """Pool the rows of the views to one row (1, columns), differentiable.

    Args:
        rows: (views, columns); with "attention" (views, columns + 1).
        exclusive: whether the columns are logits of one softmax.
    """
    if views == "attention":
        return (torch.softmax(rows[:, -1:], 0) * rows[:, :-1]).sum(0, keepdim=True)
    if views == "mean":
        return rows.mean(0, keepdim=True)
    if exclusive and rows.shape[1] == 2:
        return rows[(rows[:, 1] - rows[:, 0]).argmax()][None]
    return (torch.log_softmax(rows, 1) if exclusive else rows).amax(0, keepdim=True)
