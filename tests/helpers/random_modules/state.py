"""State that a forward changes: buffers, counters, lists, caches, features and losses left in attributes."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .piece import Piece, conv, ramp

TALLY: list[Any] = []
CACHE: dict[Any, Tensor] = {}


@functools.lru_cache(maxsize=8)
def _grid(height: int, width: int) -> Tensor:
    return ramp(height, 1) * ramp(1, width)


@dataclass(frozen=True)
class Watched:
    """A value outside of networks that code of the foreign pieces reads or changes.

    Attributes:
        read: returns the value.
        write: sets it.
        first: returns the value of a new run.
    """

    read: Callable[[], Any]
    write: Callable[[Any], Any]
    first: Callable[[], Any]


WATCHED: dict[str, Watched] = {}


def reset() -> None:
    """Forget what former networks left in this file, and restore what is watched."""
    TALLY.clear()
    CACHE.clear()
    _grid.cache_clear()
    for one in WATCHED.values():
        one.write(one.first())


def left_behind() -> dict[str, Any]:
    """What networks have left in this file, and what is watched."""
    return {"tally": TALLY, "cache": CACHE, **{name: one.read() for name, one in WATCHED.items()}}


def saved() -> Callable[[], None]:
    """Saves what `left_behind` shows; the result restores it after other runs."""
    tally, cache, watched = list(TALLY), dict(CACHE), {name: one.read() for name, one in WATCHED.items()}

    def restore() -> None:
        reset()
        TALLY.extend(tally)
        CACHE.update(cache)
        for name, value in watched.items():
            WATCHED[name].write(value)

    return restore


class OwnStatistics(Piece):
    """Running statistics of one's own, kept in one of many ways."""

    weight = 4

    def make(self, width: int, dice: random.Random) -> None:
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("flat", torch.zeros(2 * width))
        self.how = dice.choice(
            "assign data copy_ muladd view lerp_ no_grad flat index setattr used item functional".split()
        )
        self.conv, self.keeps = conv(width), dice.random() < 0.3

    def update(self, new: Tensor) -> None:
        half = self.flat.shape[0] // 2
        if self.how == "assign":
            self.mean = 0.9 * self.mean + 0.1 * new
        elif self.how == "data":
            self.mean.data = self.mean.data * 0.9 + new * 0.1
        elif self.how == "copy_":
            self.mean.copy_(self.mean * 0.9 + new * 0.1)
        elif self.how in ("muladd", "used"):
            self.mean.mul_(0.9).add_(new, alpha=0.1)
        elif self.how == "view":
            self.flat.view(2, half)[0].mul_(0.9).add_(0.1 * new)
        elif self.how == "lerp_":
            self.mean.data.lerp_(new, 0.1)
        elif self.how == "flat":
            self.flat.copy_(torch.cat([new, new + self.flat[half:]]))
        elif self.how == "index":
            self.flat[half:] = new
            self.flat[0] += 1
        elif self.how == "setattr":
            self.mean = self._buffers["mean"].clone().add_(new)
        elif self.how == "item":
            self.mean.fill_(float(self.mean.sum().item()) + 1.0)
        elif self.how == "functional":
            F.batch_norm(new[None, :, None].expand(2, -1, 3), self.flat[:half], self.flat[half:], training=True)
        else:
            with torch.no_grad():
                self.mean += 0.1 * (new - self.mean)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.training or self.keeps:
            self.update(y.mean((0, 2, 3)).detach())
        return y - self.mean[:, None, None] if self.how == "used" or not self.training else y


class RunningNorm(Piece):
    """A batch norm of one's own."""

    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.how = dice.choice(["functional", "written", "no_grad stats"])

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "functional":
            return F.batch_norm(x, self.running_mean, self.running_var, training=self.training, momentum=0.2)
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            with torch.no_grad():
                self.running_mean = 0.8 * self.running_mean + 0.2 * mean
                self.running_var.copy_(0.8 * self.running_var + 0.2 * var)
            if self.how == "no_grad stats":
                mean, var = mean.detach(), var.detach()
        return (x - mean[:, None, None]) / (var[:, None, None] + 1e-3).sqrt()


class Counter(Piece):
    """Counts its calls; the count may decide what is computed."""

    weight = 3

    def make(self, width: int, dice: random.Random) -> None:
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.calls = 0
        self.how = dice.choice("python buffer assigned branch scale item warm".split())

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "buffer":
            self.count += 1
        elif self.how == "assigned":
            self.count = self.count + 1
        elif self.how == "item":
            self.count += 1
            return x * (1 + 0.1 * self.count.item())
        elif self.how == "warm":
            self.count += 1
            return x * (self.count / (self.count + 1.0))
        else:
            self.calls += 1
        if self.how == "branch":
            return x.relu() if self.calls > 2 else x
        return x * (1 + 0.1 * self.calls) if self.how == "scale" else x


class KeepsFeatures(Piece):
    """Leaves a map, a pooled map or a loss in an attribute."""

    weight = 4

    def make(self, width: int, dice: random.Random) -> None:
        self.kept: Any = None
        self.store: dict[str, Any] = {}
        self.losses: list[Any] = []
        self.how = dice.choice("map pooled detached dict list loss shape number numpy aux cleared append_map".split())
        self.conv = conv(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        pooled = y.mean((2, 3))
        if self.how == "map":
            self.kept = y
        elif self.how == "pooled":
            self.kept = pooled
        elif self.how == "detached":
            self.kept = pooled.detach()
        elif self.how == "dict":
            self.store["pooled"] = pooled.detach()
            self.store["calls"] = self.store.get("calls", 0) + 1
        elif self.how == "list":
            self.losses.append(pooled.square().mean().detach())
        elif self.how == "append_map":
            self.losses.append(y.detach())
        elif self.how == "loss":
            self.kept = y.abs().mean()
        elif self.how == "aux":
            self.aux_loss = y.square().mean()  # the trial adds it to the loss
        elif self.how == "shape":
            self.kept = tuple(y.shape)
        elif self.how == "number":
            self.losses.append(pooled.detach().sum().item())
        elif self.how == "numpy":
            self.kept = pooled.detach().numpy()
        else:
            self.losses.clear()
            self.losses.append(len(self.store))
        return y


class Lazy(Piece):
    """Makes something at its first call, by the data or by the size."""

    weight = 3

    def make(self, width: int, dice: random.Random) -> None:
        self.how = dice.choice("actnorm grid cache lru global attribute".split())
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.shift = nn.Parameter(torch.zeros(width, 1, 1))
        self.done = False
        self.grids: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[-2:])
        if self.how == "actnorm":
            if not self.done:
                with torch.no_grad():
                    self.shift.copy_(-x.mean((0, 2, 3))[:, None, None])
                self.done = True
            return x + self.shift
        if self.how == "grid":
            if not hasattr(self, "grid") or self.grid.shape != size:
                self.register_buffer("grid", ramp(*size), persistent=False)
            return x + self.grid
        if self.how == "cache":
            if size not in self.grids:
                self.grids[size] = ramp(*size)
            return x * self.grids[size]
        if self.how == "lru":
            return x + _grid(*size)
        if self.how == "global":
            if size not in CACHE:
                CACHE[size] = ramp(*size)
            return x + CACHE[size]
        self.offset = getattr(self, "offset", 0.0) + 0.5
        return x + self.offset


class GlobalTally(Piece):
    """Tells a list of its file what it saw."""

    def make(self, width: int, dice: random.Random) -> None:
        self.how = dice.choice(["number", "tensor", "shape"])

    def forward(self, x: Tensor) -> Tensor:
        seen = {"number": len(TALLY), "tensor": x.mean((2, 3)).detach(), "shape": x.shape}[self.how]
        TALLY.append(seen)
        return x


class ClampedWeight(Piece):
    """Changes its own weight in the forward."""

    weight = 1.5

    def make(self, width: int, dice: random.Random) -> None:
        self.conv, self.how = conv(width), dice.choice(["data", "no_grad", "copy_", "renorm"])

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "data":
            self.conv.weight.data.clamp_(-0.15, 0.15)
        elif self.how == "renorm":
            self.conv.weight.data = self.conv.weight.data.renorm(2, 0, 0.5)
        else:
            with torch.no_grad():
                if self.how == "no_grad":
                    self.conv.weight.clamp_(-0.15, 0.15)
                else:
                    self.conv.weight.copy_(self.conv.weight.clamp(-0.15, 0.15))
        return self.conv(x)


class PowerIteration(Piece):
    """A spectral norm of one's own, whose vector moves at each training step."""

    def make(self, width: int, dice: random.Random) -> None:
        self.conv = conv(width)
        self.register_buffer("u", F.normalize(torch.randn(width), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(weight.t() @ self.u, dim=0)
            if self.training:
                self.u.copy_(F.normalize(weight @ v, dim=0))
        sigma = self.u.clone() @ weight @ v
        return F.conv2d(x, self.conv.weight / sigma, self.conv.bias, padding=1)


class Feedback(Piece):
    """Uses what its last call left."""

    weight = 1.5

    def make(self, width: int, dice: random.Random) -> None:
        self.before: Tensor | None = None
        self.how = dice.choice(["pooled", "buffer"])
        self.register_buffer("memory", torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        now = x.mean((0, 2, 3), keepdim=True).detach()
        if self.how == "buffer":
            y = x + self.memory
            self.memory.copy_(now)
            return y
        y = x if self.before is None else x + self.before
        self.before = now
        return y


class InPlaceInput(Piece):
    """Changes the map that it was given."""

    weight = 1.5

    def make(self, width: int, dice: random.Random) -> None:
        self.how = dice.choice(["mul_", "relu_", "slice", "pixel", "channel", "masked_fill_"])

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        if self.how == "slice":
            x[:, 0] = x[:, -1] * 0.5
        elif self.how == "pixel":
            x[:, :, 0, 0] = 0.0
        elif self.how == "channel":
            x[:, :1] += 1
        elif self.how == "masked_fill_":
            x.masked_fill_(x < 0, 0.1)
        else:
            x = x.mul_(0.5) if self.how == "mul_" else x.relu_()
        return x


class SeededNoise(Piece):
    """The same random numbers at each call."""

    def make(self, width: int, dice: random.Random) -> None:
        self.how = dice.choice(["generator", "own", "global", "fork"])
        self.dice = torch.Generator().manual_seed(1) if self.how == "own" else None

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[1], 1, 1)
        if self.how == "generator":
            return x + torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        if self.how == "own":
            return x + torch.randn(shape, generator=self.dice.manual_seed(3), dtype=x.dtype)
        if self.how == "global":
            torch.manual_seed(0)
            return x + torch.randn(shape, dtype=x.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return x + torch.randn(shape, dtype=x.dtype)
