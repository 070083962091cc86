"""Generators, closures, caches, pattern matching, enumerations, dunder methods, generated code."""
# ruff: noqa: B009

from __future__ import annotations

import copy
import enum
import functools
import inspect
import itertools
import json
import operator
import pickle
import random
import sys
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..piece import ramp
from .base import VALUES, Foreign
from .harness import watch, watch_call

_HERE = sys.modules[__name__]


class Queues(Foreign):
    """Queues and heaps of the last values, read in the next call."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.last: deque[Any] = deque(maxlen=dice.choice([1, 2, 3]))
        self.recent: OrderedDict[int, int] = OrderedDict()
        self.items: list[Any] = []

    def means(self, y: Tensor) -> Tensor:
        self.last.append(y.mean((0, 2, 3)).detach())
        return y + torch.stack(tuple(self.last)).mean(0)[:, None, None]

    def numbers(self, y: Tensor) -> Tensor:
        self.last.append(y.detach().mean().item())
        return y + sum(self.last) / len(self.last)

    def read_before(self, y: Tensor) -> Tensor:
        before = self.last[-1] if self.last else 0.0
        self.last.append(y.detach().mean())
        return y + before

    def extended(self, y: Tensor) -> Tensor:
        self.last.extendleft([len(self.last), y.shape[1]])
        self.last.rotate(1)
        return y * (1 + 0.1 * self.last[0])

    def least_recent(self, y: Tensor) -> Tensor:
        self.recent[len(self.recent) % 2] = y.shape[1]
        self.recent.move_to_end(0)
        return y * (1 + len(self.recent))

    def slice_assigned(self, y: Tensor) -> Tensor:
        self.items[:] = [*self.items[-2:], len(self.items)]
        return y * (1 + 0.1 * sum(self.items))

    def full(self, y: Tensor) -> Tensor:
        self.last.append(1)
        return y.relu() if len(self.last) == self.last.maxlen else y.tanh()

    def change(self, net: nn.Module, number: int) -> None:
        if number == 2:
            self.last.clear()


SCALE = VALUES[0]
watch("cached scale", _HERE, "SCALE")


@functools.lru_cache(maxsize=4)
def _table(size: int) -> Tensor:
    return ramp(size, 1, 1) + 1


@functools.cache
def _scale_once() -> float:
    return SCALE


@functools.lru_cache(maxsize=None)  # noqa: UP033
def _rank(shape: tuple[int, ...]) -> int:
    return len(shape)


def _fill(entries: int) -> None:
    """Empties the cache of the scale, and fills it as the first call does."""
    global SCALE
    _scale_once.cache_clear()
    now, SCALE = SCALE, VALUES[0]
    if entries:
        _scale_once()
    SCALE = now


watch_call("entries of the cache", lambda: _scale_once.cache_info().currsize, _fill)
watch_call("table", lambda: None, lambda _: _table.cache_clear())


class CachedValues(Foreign):
    """Values that are computed once; a change of what they were computed from has no effect."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.scale, self.memo = VALUES[0], {}
        self.register_buffer("shift", ramp(width, 1, 1) + 1)

    @functools.cached_property
    def _doubled(self) -> float:
        return 2 * self.scale

    @functools.cached_property
    def _of_weights(self) -> float:
        return self.conv.weight.detach().abs().mean().item()

    @functools.cached_property
    def _of_buffer(self) -> Tensor:
        return self.shift * 2

    @functools.lru_cache  # noqa: B019
    def _of_self(self, channels: int) -> float:
        return self.scale * channels

    def property(self, y: Tensor) -> Tensor:
        return y * self._doubled

    def property_of_weights(self, y: Tensor) -> Tensor:
        return y * self._of_weights

    def property_of_buffer(self, y: Tensor) -> Tensor:
        return y * self._of_buffer

    def property_deleted(self, y: Tensor) -> Tensor:
        return y * self._doubled

    def method(self, y: Tensor) -> Tensor:
        return y * self._of_self(y.shape[1])

    def function(self, y: Tensor) -> Tensor:
        return y * _table(y.shape[1])

    def function_of_global(self, y: Tensor) -> Tensor:
        return y * _scale_once()

    def function_of_shape(self, y: Tensor) -> Tensor:
        return y * _rank(tuple(y.shape))

    def cache_information(self, y: Tensor) -> Tensor:
        _scale_once()
        return y * (1 + _scale_once.cache_info().currsize)

    def own_memo(self, y: Tensor) -> Tensor:
        if "scale" not in self.memo:
            self.memo["scale"] = self.scale
        return y * self.memo["scale"]

    def change(self, net: nn.Module, number: int) -> None:
        global SCALE
        SCALE = self.scale = VALUES[number]
        if self.how == "property_deleted":
            self.__dict__.pop("_doubled", None)
        with torch.no_grad():
            self.shift.add_(1)


def _parts(y: Tensor, count: int) -> Iterator[Tensor]:
    for n in range(count):
        yield y * (n + 1)


def _nested(y: Tensor) -> Iterator[Tensor]:
    yield y
    yield from _parts(y.tanh(), 2)


def _running() -> Iterator[float]:
    total = 0.0
    while True:
        total += yield total  # noqa: RUF100


class Generators(Foreign):
    """Generators and iterators, some of which live through many calls."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.own: Any = None
        if self.how == "kept":
            self.own = iter(range(1, 100))
        if self.how == "cycle":
            self.own = itertools.cycle((1.0, 2.0, 3.0))
        if self.how in ("kept_generator", "sent"):
            self.own = _running()
            next(self.own)

    def function(self, y: Tensor) -> Tensor:
        return sum(_parts(y, 3))

    def nested(self, y: Tensor) -> Tensor:
        return torch.stack(list(_nested(y))).mean(0)

    def kept(self, y: Tensor) -> Tensor:
        return y * next(self.own)

    def cycle(self, y: Tensor) -> Tensor:
        return y * next(self.own)

    def kept_generator(self, y: Tensor) -> Tensor:
        return y * (1 + self.own.send(0.5))

    def sent(self, y: Tensor) -> Tensor:
        return y * (1 + self.own.send(y.shape[1]))

    def made_and_kept(self, y: Tensor) -> Tensor:
        if self.own is None:
            self.own = (0.5 * n for n in range(1, 50))
        return y * next(self.own)

    def tools(self, y: Tensor) -> Tensor:
        pairs = itertools.pairwise(itertools.accumulate((1, 2, 3)))
        return y * sum(a * b for a, b in itertools.islice(pairs, 2))

    def zipped(self, y: Tensor) -> Tensor:
        for n, (part, scale) in enumerate(zip(y.split(1, 1), itertools.count(1), strict=False)):
            y = y + part * scale * (n + 1)
        return y

    def not_finished(self, y: Tensor) -> Tensor:
        return next(_parts(y, 3)).relu()


def _counter(start: int) -> tuple[Callable[[], int], Callable[[], int]]:
    count = start

    def up() -> int:
        nonlocal count
        count += 1
        return count

    return up, lambda: count


def _decorated(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        wrapped.calls += 1
        return call(*args, **kwargs)

    wrapped.calls = 0
    return wrapped


@_decorated
def _relu(x: Tensor) -> Tensor:
    return x.relu() * (1 + 0.1 * _relu.calls)


watch("calls of a decorated function", _relu, "calls")


class _Callable:
    def __init__(self, scale: float):
        self.scale, self.calls = scale, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.scale


class Closures(Foreign):
    """Functions that carry state."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.up, self.count = _counter(dice.randint(0, 3))
        scale = [VALUES[0]]
        self.cell, self.scaled = scale, lambda t: t * scale[0]
        self.object = _Callable(VALUES[0])
        self.partial = functools.partial(torch.mul, other=VALUES[0])
        self.caller = operator.methodcaller("relu")

    def counter(self, y: Tensor) -> Tensor:
        return y * (1 + 0.1 * self.up())

    def counter_read(self, y: Tensor) -> Tensor:
        return y * (1 + 0.1 * self.count())

    def counter_unused(self, y: Tensor) -> Tensor:
        self.up()
        return y.relu()

    def list_in_cell(self, y: Tensor) -> Tensor:
        return self.scaled(y)

    def callable_object(self, y: Tensor) -> Tensor:
        return self.object(y)

    def partial_function(self, y: Tensor) -> Tensor:
        return self.partial(y)

    def method_caller(self, y: Tensor) -> Tensor:
        return self.caller(y)

    def decorated(self, y: Tensor) -> Tensor:
        return _relu(y)

    def late_binding(self, y: Tensor) -> Tensor:
        calls = [lambda t: t * n for n in (1, 2, 3)]  # noqa: B023
        return sum(call(y) for call in calls)

    def local_counter(self, y: Tensor) -> Tensor:
        up, count = _counter(0)
        for _ in range(3):
            up()
        return y * count()

    def change(self, net: nn.Module, number: int) -> None:
        self.cell[0] = self.object.scale = VALUES[number]
        self.partial = functools.partial(torch.mul, other=VALUES[number])
        self.up()


class Act(enum.Enum):
    RELU = "relu"
    TANH = "tanh"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 3


class Flags(enum.Flag):
    NONE = 0
    RELU = enum.auto()
    SCALE = enum.auto()


class Kind(enum.StrEnum):
    MEAN = "mean"
    AMAX = "amax"


class Enums(Foreign):
    """Enumerations."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.act, self.level, self.flags, self.kind = Act.RELU, Level.LOW, Flags.RELU, Kind.MEAN

    def identity(self, y: Tensor) -> Tensor:
        return y.relu() if self.act is Act.RELU else y.tanh()

    def value(self, y: Tensor) -> Tensor:
        return getattr(torch, self.act.value)(y)

    def arithmetic(self, y: Tensor) -> Tensor:
        return y * self.level + Level.HIGH

    def flag(self, y: Tensor) -> Tensor:
        y = y.relu() if Flags.RELU in self.flags else y
        return y * 2 if self.flags & Flags.SCALE else y

    def text(self, y: Tensor) -> Tensor:
        return y + getattr(y, self.kind)((2, 3), keepdim=True)

    def looked_up(self, y: Tensor) -> Tensor:
        return {Act.RELU: torch.relu, Act.TANH: torch.tanh}[Act(self.act.value)](y)

    def members(self, y: Tensor) -> Tensor:
        return y * sum(member.value for member in Level) + len(Act)

    def change(self, net: nn.Module, number: int) -> None:
        self.act, self.kind = (Act.TANH, Act.RELU)[number - 1], (Kind.AMAX, Kind.MEAN)[number - 1]
        self.level, self.flags = (Level.HIGH, Level.LOW)[number - 1], (Flags.RELU | Flags.SCALE, Flags.NONE)[number - 1]


@dataclass
class Step:
    name: str
    scale: float = 1.0


class Both(NamedTuple):
    map: Tensor
    scale: float


class Matching(Foreign):
    """Match statements."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.step, self.option, self.act = Step("scale", 2.0), {"kind": "relu", "slope": 0.1}, Act.RELU

    def shape(self, y: Tensor) -> Tensor:
        match tuple(y.shape):
            case (1, *_):
                return y * 2
            case (_, channels, height, width) if height > width:
                return y * channels
            case _:
                return y.relu()

    def data_class(self, y: Tensor) -> Tensor:
        match self.step:
            case Step("scale", scale):
                return y * scale
            case Step(name="relu" | "tanh" as name):
                return getattr(y, name)()
        return y

    def mapping(self, y: Tensor) -> Tensor:
        match self.option:
            case {"kind": "relu", "slope": float(slope), **rest}:
                return nn.functional.leaky_relu(y, slope) * (1 + len(rest))
            case {"kind": kind}:
                return getattr(torch, kind)(y)
        return y

    def member(self, y: Tensor) -> Tensor:
        match self.act:
            case Act.RELU:
                return y.relu()
            case Act.TANH:
                return y.tanh()

    def sequence(self, y: Tensor) -> Tensor:
        match ["conv", "relu", 2]:
            case [str(), str(name), int(scale)]:
                return getattr(y, name)() * scale
        return y

    def change(self, net: nn.Module, number: int) -> None:
        self.step = (Step("tanh"), Step("scale", 3.0))[number - 1]
        self.option = ({"kind": "tanh"}, {"kind": "relu", "slope": 0.3, "more": 1})[number - 1]
        self.act = (Act.TANH, Act.RELU)[number - 1]


class _Counted:
    """An object whose dunder methods have side effects."""

    def __init__(self) -> None:
        self.asked = 0

    def __bool__(self) -> bool:
        self.asked += 1
        return self.asked % 2 == 1

    def __len__(self) -> int:
        self.asked += 1
        return self.asked

    def __getitem__(self, key: Any) -> float:
        self.asked += 1
        return 0.5 * self.asked

    def __contains__(self, key: Any) -> bool:
        self.asked += 1
        return self.asked > 2

    def __eq__(self, other: object) -> bool:
        self.asked += 1
        return self.asked < 2

    __hash__ = None

    def __iter__(self) -> Iterator[int]:
        self.asked += 1
        return iter(range(self.asked))

    def __float__(self) -> float:
        self.asked += 1
        return 1.0 + self.asked

    def __mul__(self, other: Any) -> Any:
        self.asked += 1
        return other * (1 + self.asked)

    __rmul__ = __mul__


class _Wrapped:
    """An object around a tensor, which answers to PyTorch's functions."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [one.tensor if isinstance(one, _Wrapped) else one for one in args]
        return func(*args, **(kwargs or {})) * 2


class DunderMethods(Foreign):
    """Objects with dunder methods of the author."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.counted = _Counted()

    def truth(self, y: Tensor) -> Tensor:
        return y.relu() if self.counted else y.tanh()

    def length(self, y: Tensor) -> Tensor:
        return y * len(self.counted)

    def subscript(self, y: Tensor) -> Tensor:
        return y * self.counted["scale"]

    def contains(self, y: Tensor) -> Tensor:
        return y.relu() if "relu" in self.counted else y.tanh()

    def equality(self, y: Tensor) -> Tensor:
        return y.relu() if self.counted == 3 else y.tanh()

    def iteration(self, y: Tensor) -> Tensor:
        return y + sum(self.counted)

    def as_float(self, y: Tensor) -> Tensor:
        return y * float(self.counted)

    def product(self, y: Tensor) -> Tensor:
        return self.counted * y

    def torch_function(self, y: Tensor) -> Tensor:
        return torch.tanh(_Wrapped(y))

    def module_that_delegates(self, y: Tensor) -> Tensor:
        return _Delegates(self.conv).weight.mean() * y


class _Delegates:
    def __init__(self, inner: nn.Module):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class CompilerQuestions(Foreign):
    """Code that asks whether it is compiled, and code for compilers; all of it runs as plain Python in stock."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.second = nn.Conv2d(width, width, 3, padding=1)
        if self.how == "scripted_module":
            self.second = torch.jit.script(self.second)

    def is_compiling(self, y: Tensor) -> Tensor:
        return y.tanh() if torch.compiler.is_compiling() else y.relu()

    def is_compiling_alias(self, y: Tensor) -> Tensor:
        ask = getattr(torch.compiler, "is_compiling")
        return y.tanh() if ask() else y.relu()

    def dynamo_is_compiling(self, y: Tensor) -> Tensor:
        return y.tanh() if torch._dynamo.is_compiling() else y.relu()

    def is_exporting(self, y: Tensor) -> Tensor:
        return y.tanh() if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() else y.relu()

    def is_tracing(self, y: Tensor) -> Tensor:
        return y.tanh() if torch.jit.is_tracing() or torch.jit.is_scripting() else y.relu()

    def graph_break(self, y: Tensor) -> Tensor:
        y = y.relu()
        torch._dynamo.graph_break()
        return y * 2

    @torch.compiler.disable
    def _disabled(self, y: Tensor) -> Tensor:
        return y.relu() if not torch.compiler.is_compiling() else y.tanh()

    def disabled(self, y: Tensor) -> Tensor:
        return self._disabled(y)

    def scripted_module(self, y: Tensor) -> Tensor:
        return self.second(y)

    def scripted_function(self, y: Tensor) -> Tensor:
        return _scripted(y)

    def assumed_constant(self, y: Tensor) -> Tensor:
        return y * _constant()


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    return x.relu() * 2


@torch.compiler.assume_constant_result
def _constant() -> float:
    return SCALE


class GeneratedCode(Foreign):
    """Code from text, and code that looks at itself."""

    def setup(self, width: int, dice: random.Random) -> None:
        space: dict[str, Any] = {}
        exec("def scaled(x, by=1.5):\n    return x * by\n", space)
        self.scaled, self.scale = space["scaled"], VALUES[0]

    def executed_before(self, y: Tensor) -> Tensor:
        return self.scaled(y)

    def executed(self, y: Tensor) -> Tensor:
        space = {"y": y, "scale": self.scale}
        exec("z = y * scale", space)
        return space["z"]

    def evaluated(self, y: Tensor) -> Tensor:
        return eval("y * self.scale")

    def compiled_text(self, y: Tensor) -> Tensor:
        return eval(compile("lambda t, s: t.relu() * s", "<text>", "eval"))(y, self.scale)

    def frame(self, y: Tensor) -> Tensor:
        return y.relu() if inspect.currentframe().f_code.co_name == "frame" else y.tanh()

    def frame_of_caller(self, y: Tensor) -> Tensor:
        return y.relu() if sys._getframe(1).f_code.co_name == "forward" else y.tanh()

    def signature(self, y: Tensor) -> Tensor:
        return y * len(inspect.signature(self.conv.forward).parameters)

    def local_names(self, y: Tensor) -> Tensor:
        scale = 2
        return y * len(locals()) * scale

    def formatted_name(self, y: Tensor) -> Tensor:
        return getattr(self, f"_{'rect'}_{y.dim()}d")(y)

    def _rect_4d(self, y: Tensor) -> Tensor:
        return y.relu()

    def defaults_read(self, y: Tensor) -> Tensor:
        return y * self.scaled.__defaults__[0]

    def change(self, net: nn.Module, number: int) -> None:
        self.scale = VALUES[number]
        self.scaled.__defaults__ = (VALUES[number],)


class Copies(Foreign):
    """Copies, serialised values and weak references."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.second, self.option = nn.Conv2d(width, width, 3, padding=1), {"scale": VALUES[0]}
        self.reference, self.notes = weakref.ref(self.conv), weakref.WeakKeyDictionary()

    def json_text(self, y: Tensor) -> Tensor:
        return y * json.loads(json.dumps(self.option))["scale"]

    def pickled(self, y: Tensor) -> Tensor:
        return y * pickle.loads(pickle.dumps(self.option))["scale"]

    def deep_copy_of_options(self, y: Tensor) -> Tensor:
        option = copy.deepcopy(self.option)
        option["scale"] += 1
        return y * option["scale"]

    def deep_copy_of_module(self, y: Tensor) -> Tensor:
        return copy.deepcopy(self.second)(y)

    def state_read(self, y: Tensor) -> Tensor:
        return nn.functional.conv2d(y, self.second.state_dict()["weight"], padding=1)

    def weak_reference(self, y: Tensor) -> Tensor:
        return y * self.reference().weight.mean()

    def weak_key(self, y: Tensor) -> Tensor:
        self.notes[self.conv] = self.notes.get(self.conv, 0) + 1
        return y * (1 + 0.1 * self.notes[self.conv])

    def identity(self, y: Tensor) -> Tensor:
        return y.relu() if id(self.reference()) == id(self.conv) else y.tanh()

    def change(self, net: nn.Module, number: int) -> None:
        self.option["scale"] = VALUES[number]


class RandomPython(Foreign):
    """Random numbers of Python, NumPy and PyTorch that decide what is computed."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))
        self.own, self.array = random.Random(5), np.random.default_rng(7)

    def python(self, y: Tensor) -> Tensor:
        return y * random.random()

    def layer_chosen(self, y: Tensor) -> Tensor:
        return random.choice(self.layers)(y)

    def numpy(self, y: Tensor) -> Tensor:
        return y * float(np.random.rand())

    def own_generator(self, y: Tensor) -> Tensor:
        return y * self.own.random()

    def own_numpy_generator(self, y: Tensor) -> Tensor:
        return y * float(self.array.uniform())

    def torch_number(self, y: Tensor) -> Tensor:
        return y * torch.rand((), dtype=y.dtype)

    def skipped_layer(self, y: Tensor) -> Tensor:
        return y if torch.rand(1).item() < 0.5 else self.layers[0](y)

    def shuffled(self, y: Tensor) -> Tensor:
        order = torch.randperm(y.shape[1])
        return y[:, order]


class Signatures(Foreign):
    """Inner calls with every kind of argument."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.option = {"scale": VALUES[0]}

    @staticmethod
    def _keyword_only(x: Tensor, /, *, scale: float = 2.0, act: str | None = None) -> Tensor:
        return (getattr(x, act)() if act else x) * scale

    @classmethod
    def _of_class(cls, x: Tensor, *rest: float, **options: float) -> Tensor:
        return x * (sum(rest) + sum(options.values())) * len(cls.__name__)

    def keyword_only(self, y: Tensor) -> Tensor:
        return self._keyword_only(y, act="relu", scale=self.option["scale"])

    def class_method(self, y: Tensor) -> Tensor:
        return self._of_class(y, 1.0, 2.0, **self.option)

    def unpacked(self, y: Tensor) -> Tensor:
        first, *rest = y.split(1, 1)
        return torch.cat([*rest, first], 1)

    def walrus(self, y: Tensor) -> Tensor:
        return y * n if (n := y.shape[1]) > 1 else y

    def for_else(self, y: Tensor) -> Tensor:
        for name in self.option:
            if name == "stop":
                break
            y = y * self.option[name]
        else:
            y = y.relu()
        return y

    def early_return(self, y: Tensor) -> Tensor:
        if self.option["scale"] > 2:
            return y
        y = y.relu()
        return y if y.shape[-1] < 4 else y * self.option["scale"]

    def change(self, net: nn.Module, number: int) -> None:
        self.option = {"scale": VALUES[number]} | ({"stop": 1.0} if number == 2 else {})
