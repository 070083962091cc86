"""Stock PyTorch on images of several sizes whose BatchNorms see the pixels of all of them.

Each image goes through the network in a thread of its own, in a copy that shares the parameters. At a live BatchNorm
they wait for each other; stock's `batch_norm` gets all pixels as one map of one row, and each takes its own back.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_batch_norm = F.batch_norm


class Meeting:
    """`batch_norm` for threads that call it at the same time; the first one's running statistics are kept."""

    def __init__(self, number: int):
        self.here, self.barrier = threading.local(), threading.Barrier(number, timeout=60)
        self.given: list[Any] = [None] * number
        self.taken: list[Any] = [None] * number

    def __call__(
        self,
        x: Tensor,
        mean: Any,
        var: Any,
        weight: Any = None,
        bias: Any = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return _batch_norm(x, mean, var, weight, bias, training, momentum, eps)
        self.given[self.here.number] = x
        self.barrier.wait()
        if self.here.number == 0:
            pixels = torch.cat([one.transpose(0, 1).flatten(1) for one in self.given], 1)
            normed = _batch_norm(pixels[None], mean, var, weight, bias, True, momentum, eps)[0]
            sizes = [one.numel() // one.shape[1] for one in self.given]
            self.taken = [
                part.unflatten(1, (one.shape[0], *one.shape[2:])).transpose(0, 1)
                for part, one in zip(normed.split(sizes, 1), self.given, strict=True)
            ]
        self.barrier.wait()
        return self.taken[self.here.number]


def several_sizes(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """The concatenated outputs of stock PyTorch; buffers of `model` are updated as in one step."""
    twins = [model] + [copy.deepcopy(model) for _ in images[1:]]
    for twin in twins[1:]:
        for own, shared in zip(twin.modules(), model.modules(), strict=True):
            own._parameters = shared._parameters
    meeting, found = Meeting(len(images)), [None] * len(images)
    failed: list[BaseException] = []

    def run(number: int) -> None:
        meeting.here.number = number
        try:
            found[number] = twins[number](images[number])
        except BaseException as error:
            failed.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(images))]
    with mock.patch.object(F, "batch_norm", meeting):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]
    return torch.cat(found)  # pyright: ignore[reportArgumentType, reportCallIssue]


class Listed(nn.Module):
    """A network on a list of images, which come and have their gradients as one flat tensor."""

    def __init__(self, inner: nn.Module, shapes: Sequence[tuple[int, int, int, int]], stock: bool):
        super().__init__()
        self.inner, self.shapes, self.stock = inner, shapes, stock

    def forward(self, flat: Tensor) -> Tensor:
        parts = flat.split([torch.Size(shape).numel() for shape in self.shapes])
        images = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return several_sizes(self.inner, images) if self.stock else self.inner(images)
