"""Norms on the CPU whose gradients PyTorch misreads in some memory orders: the engine's are right in all of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from exactness import LIMIT, step, step_errors
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.capture import gradient_fixes

SHAPES = [(1, 3, 2, 4), (2, 3, 2, 4), (2, 3, 1, 1), (1, 3, 1, 4), (2, 3, 4, 1), (1, 1, 2, 4), (1, 3, 2, 2, 4)]


def orders(shape: tuple[int, ...], picked: random.Random, count: int) -> Iterator[Tensor]:
    """A tensor in many memory orders: permuted, cut out of a larger one, expanded."""
    rank = len(shape)
    values = torch.randn(shape, dtype=torch.float64)
    choices = list(itertools.product(itertools.permutations(range(rank)), (None, *range(rank))))
    for order, cut in picked.sample(choices, min(count, len(choices))):
        room = [size + 2 * (d == cut) for d, size in enumerate(shape)]
        tensor = torch.empty([room[d] for d in order], dtype=torch.float64).permute(
            [order.index(d) for d in range(rank)]
        )
        yield (tensor if cut is None else tensor.narrow(cut, 1, shape[cut])).copy_(values)
    for same in picked.sample([*itertools.product((False, True), repeat=rank)], count // 4):
        small = [1 if one else size for one, size in zip(same, shape, strict=True)]
        yield torch.randn(small, dtype=torch.float64).expand(shape)


def batch_norm(training: bool) -> Callable[..., Tensor]:
    def run(function: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = torch.full_like(bias, 0.3), torch.full_like(bias, 1.7)
        return function(x, mean, var, weight, bias, training, 0.1, 0.1)

    return run


def instance_norm(function: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return function(x, None, None, weight, bias, True, 0.1, 0.1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("own", "stock", "run"),
    [
        (gradient_fixes.batch_norm, F.batch_norm, batch_norm(False)),
        (gradient_fixes.batch_norm, F.batch_norm, batch_norm(True)),
        (gradient_fixes.instance_norm, F.instance_norm, instance_norm),
    ],
    ids=["frozen batch norm", "live batch norm", "instance norm"],
)
def test_gradients_in_every_memory_order(own, stock, run, shape):
    torch.manual_seed(0)
    picked = random.Random(0)
    if stock is F.instance_norm and shape[2:].count(1) == len(shape) - 2:
        pytest.skip("one value has no statistics")

    def gradients(function: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = x.detach().requires_grad_(), torch.linspace(1, 2, shape[1]).double().requires_grad_()
        bias = torch.zeros_like(weight, requires_grad=True)
        return torch.autograd.grad(run(function, x, weight, bias), (x, weight, bias), grad)

    for x, grad in itertools.product(orders(shape, picked, 16), orders(shape, picked, 16)):
        expected = gradients(stock, x.contiguous(), grad.contiguous())
        for got, want in zip(gradients(own, x, grad), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


class PlainNorm(nn.BatchNorm2d):
    """Given maps and gradients in the plain order, as PyTorch computes them rightly."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.contiguous())
        y.register_hook(lambda grad: grad.contiguous())
        return y


class Net(nn.Module):
    """A norm of one pooled image whose gradient comes from positions first, as attention over them makes it."""

    def __init__(self, norm: type[nn.BatchNorm2d]):
        super().__init__()
        self.conv, self.pool, self.qv = nn.Conv2d(2, 6, 3), nn.AdaptiveAvgPool2d((3, 4)), nn.Conv2d(6, 8, 1, bias=False)
        self.norm, self.last = norm(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        v = self.qv(self.pool(self.conv(x).relu())).split([3, 5], 1)[1]
        return self.last(self.norm(v).permute(2, 3, 0, 1).contiguous()).square().mean((0, 1))


@pytest.mark.parametrize("training", [False, True])
def test_a_norm_behind_the_sweeps(training):
    torch.manual_seed(0)
    image = torch.randn(1, 2, 25, 31, dtype=torch.float64)
    truth = Net(PlainNorm).double().train(training)
    model = Net(nn.BatchNorm2d).double().train(training)
    model.load_state_dict(truth.state_dict())
    found = step_errors(step(truth, image), step(accelerate(model, tile=8), image))
    assert max(found.values()) <= LIMIT, found
