"""Several views of one exam as one sample: what a network gives of each becomes what it says of the exam.

With rows x_v (columns of the network for view v) the exam's is

    mean        sum_v x_v / V
    max         of labels, numbers and steps of an order max_v x_v; of two classes the row of the view with the highest
                log-odds of the second; of more classes max_v log softmax(x_v)
    attention   sum_v a_v x_v with a = softmax over the views of one further column

None of them depends on the order of the views, nor on what a softmax does not see. Attention is that of Ilse, Tomczak
and Welling (2018), of what each view says in the place of its features, so that what each adds can be told (as in
Javed et al., 2022).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Views = Literal["mean", "max", "attention"]
VIEWS: tuple[str, ...] = get_args(Views)


def pool(rows: Tensor, views: Views, *, exclusive: bool) -> Tensor:
    """What the views say together, (1, columns), differentiable.

    Args:
        rows: (views, columns), of "attention" (views, columns + 1).
        exclusive: the columns are logits of one softmax.
    """
    if views == "attention":
        return (torch.softmax(rows[:, -1:], 0) * rows[:, :-1]).sum(0, keepdim=True)
    if views == "mean":
        return rows.mean(0, keepdim=True)
    if exclusive and rows.shape[1] == 2:
        return rows[(rows[:, 1] - rows[:, 0]).argmax()][None]
    return (torch.log_softmax(rows, 1) if exclusive else rows).amax(0, keepdim=True)
