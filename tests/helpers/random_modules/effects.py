"""What a forward does on its way: writes through views, contexts, hooks for a moment, shared buffers, loops."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .piece import Piece, Ways, conv, ramp


class WrittenView(Ways):
    """Writes to a map through a view of it."""

    weight = 3

    def reshaped(self, y: Tensor) -> Tensor:
        z = y.clone()
        z.view(z.shape[0], -1)[:, 0] = 0.5
        return z

    def transposed(self, y: Tensor) -> Tensor:
        z = y * 1
        z.transpose(2, 3).mul_(0.5)
        return z

    def selected(self, y: Tensor) -> Tensor:
        z = y.clone()
        z.select(1, 0).add_(1)
        return z

    def narrow(self, y: Tensor) -> Tensor:
        z = y * 1
        first = z.narrow(1, 0, 1)
        first.copy_(z[:, -1:])
        return z * first

    def rows(self, y: Tensor) -> Tensor:
        z = y.clone()
        z[:, :, ::2] *= 0.5
        return z

    def view_of_view(self, y: Tensor) -> Tensor:
        z = y.clone()
        view = z[:, 1:]
        view[..., :1].zero_()
        return z + view.mean()

    def read_after(self, y: Tensor) -> Tensor:
        z = y.clone()
        view = z.permute(0, 2, 3, 1)
        z.relu_()
        return view.permute(0, 3, 1, 2) + z

    def vector(self, y: Tensor) -> Tensor:
        mean = y.mean((2, 3))
        mean[:, 0] = 0
        mean.t()[-1].add_(1)
        return y + mean[:, :, None, None]

    def masked(self, y: Tensor) -> Tensor:
        z = y.clone()
        z[z > 0] = 0.25
        return z

    def weight_written(self, y: Tensor) -> Tensor:
        weight = self.conv.weight.clone()
        weight[:, 0].mul_(0.5)
        weight.flatten(1)[:, -1] = 0
        return F.conv2d(y, weight, padding=1)

    def scattered(self, y: Tensor) -> Tensor:
        mean = y.mean((2, 3))
        index = mean.argmax(1, keepdim=True)
        return y * torch.zeros_like(mean).scatter_(1, index, mean.gather(1, index))[:, :, None, None]


class Counts(TorchFunctionMode):
    """Calls that pass, and what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Contexts(Ways):
    """Contexts of its own, and what is set for a moment."""

    weight = 3

    def make(self, width: int, dice: random.Random) -> None:
        super().make(width, dice)
        self.second, self.norm, self.left = conv(width), nn.BatchNorm2d(width), 0

    @contextlib.contextmanager
    def _counted(self) -> Iterator[int]:
        self.left += 1
        try:
            yield self.left
        finally:
            self.left += 10

    def own(self, y: Tensor) -> Tensor:
        with self._counted() as count:
            return y + 0.1 * count

    def stack(self, y: Tensor) -> Tensor:
        with contextlib.ExitStack() as exits:
            exits.callback(setattr, self, "left", self.calls)
            exits.enter_context(torch.no_grad())
            mean = y.mean()
        return y - mean

    def raised(self, y: Tensor) -> Tensor:
        with contextlib.suppress(KeyError), torch.no_grad():
            self.left += 1
            raise KeyError
        return y * (1 if torch.is_grad_enabled() else 2)

    def function_mode(self, y: Tensor) -> Tensor:
        with Counts() as mode:
            y = self.second(y).relu()
        self.left = mode.count > 0
        return y

    def eval_for_a_moment(self, y: Tensor) -> Tensor:
        was = self.norm.training
        self.norm.eval()
        y = self.norm(y)
        self.norm.train(was)
        return self.second(y)

    def hook_for_a_moment(self, y: Tensor) -> Tensor:
        handle = self.second.register_forward_hook(lambda _module, _args, result: result * 2)
        y = self.second(y)
        handle.remove()
        return self.second(y)

    def hook_that_removes_itself(self, y: Tensor) -> Tensor:
        def once(_module: nn.Module, _args: Any, result: Tensor) -> Tensor:
            handle.remove()
            return result * 2

        handle = self.second.register_forward_hook(once)
        return self.second(self.second(y))

    def forward_replaced(self, y: Tensor) -> Tensor:
        self.second.forward = lambda x: F.conv2d(x, self.second.weight, padding=1)
        try:
            return self.second(y)
        finally:
            del self.second.forward

    def gradients_off_for_a_moment(self, y: Tensor) -> Tensor:
        self.second.requires_grad_(False)
        y = self.second(y)
        self.second.requires_grad_(True)
        return y

    def autocast_off(self, y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.second(y)

    def saved_tensors(self, y: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return self.second(y).sigmoid()

    def checkpointed_closure(self, y: Tensor) -> Tensor:
        scale = y.mean((2, 3), keepdim=True)
        return checkpoint(lambda x: self.second(x).tanh() * scale, y, use_reentrant=False)

    def functional(self, y: Tensor) -> Tensor:
        state = {name: value * 0.5 for name, value in self.second.named_parameters()}
        return torch.func.functional_call(self.second, state, (y,))

    def copied_module(self, y: Tensor) -> Tensor:
        return copy.deepcopy(self.second)(y)


class SharedBuffer(Ways):
    """Buffers under several names, swapped, made anew, there or not."""

    weight = 3

    def make(self, width: int, dice: random.Random) -> None:
        super().make(width, dice)
        self.register_buffer("count", torch.ones(1))
        self.register_buffer("none", None)
        self.second = nn.Module()
        self.second.register_buffer("same", self.count)
        self.tensors = [self.count]

    def both(self, y: Tensor) -> Tensor:
        self.count += 1
        return y * self.second.same

    def listed(self, y: Tensor) -> Tensor:
        self.tensors[0].mul_(1.5)
        return y * self.count

    def swapped(self, y: Tensor) -> Tensor:
        self.count, self.second.same = self.count + 1, self.count
        return y * self.second.same

    def registered(self, y: Tensor) -> Tensor:
        self.register_buffer("made", torch.full((1,), float(self.calls), dtype=y.dtype))
        return y * self.made

    def sometimes(self, y: Tensor) -> Tensor:
        self.none = self.count * 2 if self.none is None else None
        return y if self.none is None else y * self.none

    def parted(self, y: Tensor) -> Tensor:
        if self.calls == 2:
            self.count = self.count.clone()
        self.count.add_(1)
        return y * self.second.same + self.count

    def view_of_it(self, y: Tensor) -> Tensor:
        self.count.view(1, 1)[0] += 1
        return y * self.count

    def all_of_them(self, y: Tensor) -> Tensor:
        return y + sum(buffer.sum() for _, buffer in self.named_buffers())


class Loops(Ways):
    """Recursion, generators, loops whose length the size tells, several scales."""

    weight = 2

    def _halved(self, y: Tensor, depth: int) -> Tensor:
        if depth == 0 or min(y.shape[-2:]) < 4:
            return self.conv(y)
        below = self._halved(F.avg_pool2d(y, 2), depth - 1)
        return self.conv(y) + F.interpolate(below, y.shape[-2:])

    def scales(self, y: Tensor) -> Tensor:
        return self._halved(y, 2)

    def generator(self, y: Tensor) -> Tensor:
        return sum(y * weight for weight in (0.1 * n for n in range(1, 4)))

    def until_small(self, y: Tensor) -> Tensor:
        z = y
        while min(z.shape[-2:]) > 4:
            z = F.avg_pool2d(z, 2)
        return y + z.mean((2, 3), keepdim=True)

    def popped(self, y: Tensor) -> Tensor:
        left = [y, y * 2, y.relu()]
        while len(left) > 1:
            left.append(left.pop() + left.pop())
        return left.pop()

    def matched(self, y: Tensor) -> Tensor:
        match tuple(y.shape):
            case (1, *_):
                return y * 2
            case (_, _, height, width) if height > width:
                return y * 3
        return y


class Odd(Ways):
    """Complex numbers, integers, masks, constants in `where`, odd broadcasts."""

    weight = 2

    def complex(self, y: Tensor) -> Tensor:
        z = torch.complex(y, y * 0.5)
        return (z * z.conj()).real + z.abs()

    def integers(self, y: Tensor) -> Tensor:
        return y * (y * 3).long().remainder(3)

    def mask(self, y: Tensor) -> Tensor:
        return y * ((y > 0) & ~(y > 1)).to(y.dtype)

    def where(self, y: Tensor) -> Tensor:
        return torch.where(y > 0, y, 0.5) + torch.where(y > y.mean(), 1.0, -1.0)

    def row_of_numbers(self, y: Tensor) -> Tensor:
        return y + ramp(1, y.shape[-1]) * ramp(y.shape[-2], 1)

    def image_mean_of_rows(self, y: Tensor) -> Tensor:
        return y + y.mean(2, keepdim=True)

    def gathered(self, y: Tensor) -> Tensor:
        index = y.mean((0, 2, 3)).argsort()
        return y[:, index] + y.index_select(1, index.flip(0))

    def batch_mixed(self, y: Tensor) -> Tensor:
        return y + 0.5 * y.roll(1, 0).detach()

    def sorted_channels(self, y: Tensor) -> Tensor:
        return y.sort(1).values + y.cumsum(1)

    def outer(self, y: Tensor) -> Tensor:
        return torch.einsum("nchw,nd->ndhw", y, y.amax((2, 3)))


class _Two(torch.autograd.Function):
    """Two results, one without a gradient; the gradient is one of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Any:
        ctx.save_for_backward(x, weight)
        sign = x > 0
        ctx.mark_non_differentiable(sign)
        return x * weight, sign

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _sign: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return 2 * grad * weight, (grad * x).sum().reshape(1) if ctx.needs_input_grad[1] else None


class _Setup(torch.autograd.Function):
    """With `setup_context`, and a gradient that may be none."""

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.scale = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        return None if grad is None else grad * ctx.scale * 0.5, None


class OwnGradient(Piece):
    """Custom functions on a map and on vectors."""

    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        self.conv, self.scale = conv(width), nn.Parameter(torch.ones(1))
        self.how = dice.choice(["two", "two of vectors", "setup", "setup of vectors", "partly used"])

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        mean = y.mean((2, 3), keepdim=True)
        if self.how == "two":
            result, sign = _Two.apply(y, self.scale)
            return result * sign
        if self.how == "two of vectors":
            return y + _Two.apply(mean, self.scale)[0]
        if self.how == "partly used":
            return y + _Two.apply(mean, self.scale)[1]
        return _Setup.apply(y, 0.5) if self.how == "setup" else y + _Setup.apply(mean, 2.0)
