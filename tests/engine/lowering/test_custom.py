"""Custom autograd functions on maps: arithmetic on each position goes by tile, all else is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness import assert_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gigamorph import UnsupportedError, accelerate

calls: list[int] = []
STRENGTH = torch.tensor(0.7)


class Swish(torch.autograd.Function):
    """As efficientnet_pytorch has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x * torch.sigmoid(x)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x = ctx.saved_tensors[0]
        s = torch.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))


class OfItsOutput(torch.autograd.Function):
    """Its gradient is not the derivative, hangs on its output, a number given, and the size of the whole image."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        y = (x * scale).tanh()
        ctx.scale, ctx.count = scale, x.shape[2] * x.shape[3]
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y) * ctx.scale * (1 + 1 / ctx.count), None


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x > 0, x.ceil(), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Reversed(torch.autograd.Function):
    """A gradient reversal, its strength a number; a view of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.neg() * ctx.strength, None


class ReversedByTensor(torch.autograd.Function):
    """Its strength a tensor of one number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: Tensor) -> Tensor:
        ctx.save_for_backward(x, strength)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _, strength = ctx.saved_tensors
        return -strength * grad if ctx.needs_input_grad[0] else None, None


class Masked(torch.autograd.Function):
    """As PyTorch's tutorial has it: it writes to a copy of the gradient, where a mask is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > 0, 1.0, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        made = grad.clone()
        made[x.abs() > 1] = 0
        made[grad < 0] = 0.5
        return made.mul_(x.exp()).masked_fill_(x > 0.8, 2)


class Rewritten(torch.autograd.Function):
    """What it keeps is written to later, also through a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.sign()
        y = ctx.kept * x
        ctx.kept.view_as(x).add_(x)
        return y.clamp_(max=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.kept


class Cutting(torch.autograd.Function):
    """It writes to the gradient that it is given, which may be that of others, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad[x < 0] = 0
        return grad * 2


class Overwriting(torch.autograd.Function):
    """It writes to its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Placed(torch.autograd.Function):
    """It writes at places, not by a mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        made = grad.clone()
        made[(grad > 0).long()] = 0
        return made


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean()


class Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        calls.append(1)
        return grad * 2


class CountedApart(torch.autograd.Function):
    """What it keeps for its backward is set elsewhere."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        calls.append(1)
        ctx.count = len(calls)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.count


class CountedByDefault(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counted: Any = calls) -> Tensor:
        counted.append(1)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Ramp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.arange(x.shape[3], dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Normed(torch.autograd.Function):
    """A norm over the channels with a weight and a bias, as NAFNet has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        _, count, _, _ = x.size()
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        y = (x - mean) / (var + eps).sqrt()
        ctx.save_for_backward(y, var, weight)
        return weight.view(1, count, 1, 1) * y + bias.view(1, count, 1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _, count, _, _ = grad.size()
        y, var, weight = ctx.saved_tensors
        g = grad * weight.view(1, count, 1, 1)
        mean = (g * y).mean(dim=1, keepdim=True)
        dx = 1.0 / torch.sqrt(var + ctx.eps) * (g - y * mean - g.mean(dim=1, keepdim=True))
        return dx, (grad * y).sum(dim=3).sum(dim=2).sum(dim=0), grad.sum((0, 2, 3)), None


class Rounded(torch.autograd.Function):
    """A quantisation with a learnt step of one number, whose gradient is a sum over all; another it does not use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, unused: Tensor) -> Tensor:
        ctx.save_for_backward(x, step)
        return (x / step).clamp(-3, 3).round() * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, step = ctx.saved_tensors
        q = x / step
        inside = (q.abs() < 3).to(grad.dtype)
        return grad * inside, (grad * (inside * (q.round() - q) + (1 - inside) * q.sign())).sum().unsqueeze(0), None


class OneOfAll(torch.autograd.Function):
    """The gradient of its vector is no sum over the image, and would count for each tile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x * weight.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return grad * weight.view(1, -1, 1, 1), weight * 2


class MeanOfAll(OneOfAll):
    """That of its vector is a mean over the image, of which a tile has another part."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return grad * weight.view(1, -1, 1, 1), grad.mean((0, 2, 3))


class SquareOfSum(OneOfAll):
    """That of its vector is no linear function of a sum."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return grad * weight.view(1, -1, 1, 1), grad.sum((0, 2, 3)) ** 2


class OfTheSum(OneOfAll):
    """That of its map reads a sum over the image."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return grad * weight.view(1, -1, 1, 1) + grad.sum((2, 3), keepdim=True), grad.sum((0, 2, 3))


class WritesToItsWeight(OneOfAll):
    """It writes to its weight, through a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x * weight.detach().view(1, -1, 1, 1).mul_(2)


class ByColumn(torch.autograd.Function):
    """A value for each column."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return grad * weight, None


class Learnt(nn.Module):
    def __init__(self, function: Any, *given: Any):
        super().__init__()
        self.function = function
        self.vectors = nn.ParameterList([g for g in given if isinstance(g, Tensor)])
        self.plain = [g for g in given if not isinstance(g, Tensor)]

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, *list(self.vectors), *self.plain)  # PyTorch 2.12 fails at *self.vectors


class Apply(nn.Module):
    def __init__(self, function: Any, *given: Any):
        super().__init__()
        self.function, self.given = function, given
        if given and isinstance(given[0], Tensor):
            self.register_buffer("strength", given[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, *([self.strength] if "strength" in self._buffers else self.given))


def network(function: Any, *given: Any) -> nn.Module:
    torch.manual_seed(0)
    ends = nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)
    return nn.Sequential(*ends[:2], Apply(function, *given), ends[2]).double()


def learnt(function: Any, *given: Any) -> nn.Module:
    torch.manual_seed(0)
    ends = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 3, 3)
    return nn.Sequential(ends[0], Learnt(function, *given), ends[1]).double()


OWN = [
    (Swish,),
    (OfItsOutput, 1.5),
    (StraightThrough,),
    (Reversed, 0.3),
    (ReversedByTensor, STRENGTH),
    (Masked,),
    (Rewritten,),
]


@pytest.mark.parametrize("own", OWN, ids=lambda own: own[0].__name__)
@settings(max_examples=3)
@given(
    live=st.booleans(),
    height=st.integers(12, 40),
    width=st.integers(12, 40),
    tile=st.tuples(st.integers(5, 30), st.integers(5, 30)),
)
def test_elementwise_functions_are_exact(own, live, height, width, tile):
    x = torch.randn(2, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_exact(network(*own).train(live), x, tile=tile)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    net, x = learnt(Normed, torch.rand(4) + 0.5, torch.rand(4), 1e-6), torch.randn(2, 2, 24, 20, dtype=torch.float64)
    with mode():
        torch.testing.assert_close(accelerate(net, tile=8)(x), net(x), rtol=1e-12, atol=1e-12)


OTHERS = [Centred, Noisy, Ramp, Cutting, Placed]
NO_RULE = r"\(test_custom.py:\d+\): no exact tile-by-tile rule for 'autograd.Function'"


@pytest.mark.parametrize("function", OTHERS)
def test_others_are_refused(function):
    with pytest.raises(UnsupportedError, match=NO_RULE):
        accelerate(network(function), tile=8)(torch.randn(1, 2, 24, 20, dtype=torch.float64))


@pytest.mark.parametrize(
    ("function", "message"),
    [(Counted, r"in backward\) .*outside the scope"), (Overwriting, r"in forward\) .*mark_dirty")],
)
def test_others_that_cannot_be_recorded_are_refused(function, message):
    before = list(calls)
    # Older releases of PyTorch record it; then no rule exists, or the written input is noticed.
    older = r"^module '2' \(test_custom.* no exact|^a custom .* \(mark_dirty\)"
    with pytest.raises(UnsupportedError, match=rf"^test_custom.py:\d+ \({message}|{older}"):
        accelerate(network(function), tile=8)(torch.randn(1, 2, 24, 20, dtype=torch.float64))
    assert calls == before


@pytest.mark.parametrize("function", [Centred, Counted, Ramp, Cutting, Overwriting, Placed])
def test_others_are_exact_with_their_maps_whole(function):
    x = torch.randn(2, 2, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_exact(network(function), x, tile=8, fallback="untiled")


@pytest.mark.parametrize("function", [CountedApart, CountedByDefault])
def test_side_effects_in_the_forward_are_those_of_stock(function):
    """They are done once in each call, and what they change is read in the next, at another size too."""
    net = network(function)
    accelerated = accelerate(net, tile=8)
    for width in (20, 20, 25, 31):
        found = []
        for one in (net, accelerated):
            calls[:] = [1] * width
            x = torch.randn(1, 2, 24, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            y = one(x.requires_grad_())
            y.square().sum().backward()
            found.append((y.detach(), x.grad, len(calls)))
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("own", [(OfItsOutput, 1.5), (Swish,)], ids=lambda own: own[0].__name__)
def test_functions_are_exact_at_several_sizes(own):
    """From the second size on, sizes are numbers among the arguments of the recorded function."""
    net = network(*own).eval()
    accelerated = accelerate(net, tile=8)
    for size in ((24, 20), (25, 31), (17, 40)):
        x = torch.randn(1, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found = []
        for one in (net, accelerated):
            leaf = x.clone().requires_grad_()
            y = one(leaf)
            y.square().sum().backward()
            found.append((y.detach(), leaf.grad))
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


LEARNT = [
    (Normed, torch.rand(4) + 0.5, torch.rand(4), 1e-6),
    (Rounded, torch.rand(1) / 4 + 0.1, torch.rand(2)),
]


@pytest.mark.parametrize("own", LEARNT, ids=lambda own: own[0].__name__)
@pytest.mark.parametrize("tile", [7, (16, 9), 64])
def test_functions_with_weights_are_exact(own, tile):
    x = torch.randn(2, 2, 35, 29, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    network = learnt(*own)
    assert_exact(network, x, tile=tile)
    network[1].vectors[0].requires_grad_(False)
    assert_exact(network, x, tile=tile)


@pytest.mark.parametrize("function", [OneOfAll, MeanOfAll, SquareOfSum, OfTheSum, WritesToItsWeight, ByColumn])
def test_functions_that_take_no_position_by_itself_are_refused(function):
    network = learnt(function, torch.rand(10 if function is ByColumn else 4))
    with pytest.raises(UnsupportedError, match=NO_RULE):
        accelerate(network, tile=8)(torch.randn(1, 2, 24, 20, dtype=torch.float64))
