"""Objects that a forward makes, keeps and comes back to: closures, containers, arrays, what modules return."""

from __future__ import annotations

import collections
import contextvars
import copy
import functools
import random
import types
import weakref
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .piece import Piece, Ways, conv, ramp

GAIN = contextvars.ContextVar("gain", default=1.0)


class Box:
    """An object with a method that changes it."""

    def __init__(self) -> None:
        self.count, self.items = 0, []

    def __repr__(self) -> str:
        return "Box()"

    def up(self) -> int:
        self.count += 1
        return self.count


class Slots:
    __slots__ = ("count", "mean")

    def __init__(self, count: int, mean: Tensor):
        self.count, self.mean = count, mean


@dataclass
class Record:
    count: int = 0
    items: list[Any] = field(default_factory=list)


class Both(NamedTuple):
    map: Tensor
    rest: Any


class Kept(Ways):
    """Makes an object around another at its first call, and changes one through the other at each."""

    weight = 4

    def closure(self, y: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = log = []
            self.other = lambda value: log.append(value) or len(log)
        return y * (1 + 0.1 * self.other(self.calls)) + len(self.kept)

    def cell(self, y: Tensor) -> Tensor:
        if self.other is None:
            count = 0

            def up() -> int:
                nonlocal count
                count += 1
                return count

            self.kept, self.other = up, lambda: count
        self.kept()
        return y + 0.1 * self.other()

    def default(self, y: Tensor) -> Tensor:
        if self.other is None:

            def add(value: int, all_of_them: list[int] = []) -> int:  # noqa: B006
                all_of_them.append(value)
                return sum(all_of_them)

            self.other = add
        return y + 0.1 * self.other(self.calls)

    def function_attribute(self, y: Tensor) -> Tensor:
        if self.other is None:
            self.other = lambda: None
            self.other.calls = 0
        self.other.calls += 1
        return y + 0.1 * self.other.calls

    def tensor_in_closure(self, y: Tensor) -> Tensor:
        before, mean = self.other, y.mean().detach()
        self.other = lambda: mean
        return y if before is None else y + before()

    def partial(self, y: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = Box()
            self.other = functools.partial(setattr, self.kept, "count")
        self.other(2 * self.calls)
        return y * (1 + 0.1 * self.kept.count)

    def method(self, y: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = Box()
            self.other = self.kept.up
        self.other()
        self.kept.items.append(self.calls)
        return y * (1 + 0.1 * self.kept.count) + len(self.kept.items)

    def weak(self, y: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = Box()
            self.other = weakref.ref(self.kept)
        return y + 0.1 * self.other().up()

    def keys(self, y: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = {}
            self.other = self.kept.keys()
        self.kept[self.calls] = 0.5
        return y + 0.1 * sum(self.other)

    def chain(self, y: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = {}
            self.other = collections.ChainMap(self.kept, {"usual": 1.0})
        self.other["calls"] = self.calls
        return y + self.kept["calls"] * self.other["usual"]

    def object_as_key(self, y: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = Box()
            self.other = {self.kept: 0}
        self.other[self.kept] += self.kept.up()
        return y + 0.1 * self.other[self.kept]

    def two_places(self, y: Tensor) -> Tensor:
        self.kept = self.other = [self.calls]
        self.kept.append(2)
        return y + 0.1 * sum(self.other)


class Collected(Ways):
    """Containers of every kind, each with something of the calls before."""

    weight = 4

    def make(self, width: int, dice: random.Random) -> None:
        super().make(width, dice)
        self.record, self.space = Record(), types.SimpleNamespace(mean=None)
        self.queue, self.ordered = collections.deque(maxlen=2), collections.OrderedDict()
        self.tally, self.usual, self.nested = collections.Counter(), collections.defaultdict(int), {}
        self.array = np.zeros(2)

    def deque(self, y: Tensor) -> Tensor:
        self.queue.append(y.mean().detach())
        return y + torch.stack(list(self.queue)).mean()

    def window(self, y: Tensor) -> Tensor:
        before = self.kept or ()
        self.kept = (*before[-2:], y.mean().detach())
        return y + sum(before)

    def pair(self, y: Tensor) -> Tensor:
        before, self.kept = self.kept, (y.mean().detach(), self.calls)
        return y if before is None else y * (1 + 0.1 * before[1]) + before[0]

    def slots(self, y: Tensor) -> Tensor:
        before, self.kept = self.kept, Slots(self.calls, y.mean().detach())
        return y if before is None else y * (1 + 0.1 * before.count) + before.mean

    def dataclass(self, y: Tensor) -> Tensor:
        self.record.items.append(self.calls)
        self.record = replace(self.record, count=self.record.count + 1)
        return y + 0.1 * self.record.count + len(self.record.items)

    def named_tuple(self, y: Tensor) -> Tensor:
        before, self.kept = self.kept, Both(y.mean((2, 3)).detach(), [self.calls])
        return y if before is None else y + before.map.mean() + before.rest[0]

    def namespace(self, y: Tensor) -> Tensor:
        before, self.space.mean = self.space.mean, y.mean().detach()
        return y if before is None else y + before

    def set(self, y: Tensor) -> Tensor:
        self.kept = (self.kept or set()) | {self.calls % 3}
        return y * len(self.kept)

    def counters(self, y: Tensor) -> Tensor:
        self.tally[y.shape[-1]] += 1
        self.usual["calls"] += 2
        return y + 0.1 * (self.tally.most_common(1)[0][1] + self.usual["calls"])

    def order(self, y: Tensor) -> Tensor:
        self.ordered[self.calls % 3] = self.calls
        self.ordered.move_to_end(self.calls % 3)
        return y + 0.1 * next(iter(self.ordered.values()))

    def dicts(self, y: Tensor) -> Tensor:
        self.nested.setdefault("a", {}).setdefault("b", []).append(y.mean().detach())
        return y + self.nested["a"]["b"][0]

    def sometimes(self, y: Tensor) -> Tensor:
        self.kept = y.mean().detach() if self.calls % 2 else None
        return y if self.kept is None else y * 2

    def copied(self, y: Tensor) -> Tensor:
        self.record = copy.deepcopy(self.record)
        self.record.items.append(0.5)
        return y + sum(self.record.items)

    def numbers(self, y: Tensor) -> Tensor:
        self.array += 1
        self.array[0] *= 2
        return y + 0.1 * float(self.array.sum())


class Arrays(Ways):
    """NumPy's arrays and tensors on one memory."""

    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        super().make(width, dice)
        self.array, self.shared = np.linspace(0.5, 1.5, width), ramp(width)

    def from_numpy(self, y: Tensor) -> Tensor:
        array = np.arange(3.0)
        tensor = torch.from_numpy(array)
        array[1] = 5
        tensor[0] = 2
        return y + tensor.mean() + array[0]

    def as_tensor(self, y: Tensor) -> Tensor:
        array = np.ones((2, 3))
        tensor = torch.as_tensor(array)
        tensor.mul_(2)
        return y * float(array.mean()) + tensor[1, 2]

    def frombuffer(self, y: Tensor) -> Tensor:
        memory = bytearray(16)
        tensor = torch.frombuffer(memory, dtype=torch.float64)
        tensor[1] = 3.0
        return y + tensor.sum() + sum(memory)

    def numpy(self, y: Tensor) -> Tensor:
        tensor = torch.ones(2, dtype=y.dtype)
        tensor.numpy()[0] = 4.0
        return y * tensor.mean()

    def kept_array(self, y: Tensor) -> Tensor:
        self.array = self.array + 1
        return y + torch.as_tensor(self.array)[:, None, None]

    def returned(self, y: Tensor) -> Tensor:
        self.kept = np.array([self.calls, y.shape[-1]], dtype=np.float64)
        return y + 0.01 * float(self.kept[1])

    def of_an_attribute(self, y: Tensor) -> Tensor:
        return y + float(self.shared.numpy().mean())

    def broadcast(self, y: Tensor) -> Tensor:
        return y * np.float64(0.5) + torch.tensor(np.array(2.0)) + torch.tensor(np.array([[1.0], [2.0]])).sum()


class Gives(nn.Module):
    """Returns its map in one of many ways."""

    def __init__(self, width: int, how: str):
        super().__init__()
        self.conv, self.how, self.seen = conv(width), how, []

    def forward(self, x: Tensor, *, scale: float = 1.0, options: tuple[int, ...] = ()) -> Any:
        self.seen = [*self.seen[-1:], (tuple(x.shape), scale, len(options))]
        y = self.conv(x) * scale
        if self.how == "object":
            box = Box()
            box.items.append(y)
            return box
        return {
            "tuple": lambda: (y, None, [y.shape]),
            "dict": lambda: {"map": y, "mean": y.mean(1)},
            "record": lambda: Record(len(options), [y]),
            "named tuple": lambda: Both(y, None),
            "generator": lambda: (y * n for n in range(1, 3)),
            "function": lambda: lambda by: y * by,
            "space": lambda: types.SimpleNamespace(map=y, size=y.shape),
        }[self.how]()


class Given(Piece):
    """Takes what a module of its own returns apart."""

    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        kinds = ["object", "tuple", "dict", "record", "named tuple", "generator", "function", "space"]
        self.inner = Gives(width, dice.choice(kinds))

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x, scale=2.0, options=(1, 2))
        if isinstance(found, (Box, Record)):
            return found.items[-1] * (1 + found.count)
        if isinstance(found, dict):
            return found["map"] + found["mean"].mean()
        if isinstance(found, tuple):
            return found[0]
        if isinstance(found, types.SimpleNamespace):
            return found.map * found.size[1]
        return sum(found) if isinstance(found, types.GeneratorType) else found(0.5)


class Setting(Ways):
    """A context variable, and values that are computed once."""

    @functools.cached_property
    def _table(self) -> Tensor:
        return ramp(1) + 1

    @functools.lru_cache  # noqa: B019
    def _of_size(self, size: int) -> float:
        return 0.1 * size

    def variable(self, y: Tensor) -> Tensor:
        return y * GAIN.get()

    def variable_set(self, y: Tensor) -> Tensor:
        token = GAIN.set(GAIN.get() + 1)
        try:
            return y * GAIN.get()
        finally:
            GAIN.reset(token)

    def once(self, y: Tensor) -> Tensor:
        return y * self._table

    def by_size(self, y: Tensor) -> Tensor:
        return y + self._of_size(y.shape[-1])
