"""What a forward finds outside of its network's attributes: classes, imported files, arrays, generators, iterators.

What changes there between calls is noticed, and what a forward changes there is changed by each call; or it is refused
with the line, and exact in pieces (`fallback="untiled"`).
"""

import argparse
import array
import collections
import contextvars
import copy
import ctypes
import dataclasses
import enum
import functools
import itertools
import multiprocessing
import os
import random
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from gigamorph import accelerate
from gigamorph.engine.errors import UnsupportedError

settings = types.ModuleType("settings_of_a_project")
exec(
    """
TEMPERATURE, CALLS, LOSSES = 1.0, 0, []

class Group:
    temperature = 1.0

def scaled(x):
    return x * TEMPERATURE

class Helper:
    @staticmethod
    def scaled(x):
        return x * TEMPERATURE
""",
    vars(settings),
)
sys.modules[settings.__name__] = settings


class Settings:
    temperature, calls, losses = 1.0, 0, []


class Slots:
    __slots__ = ("temperature",)

    def __init__(self) -> None:
        self.temperature = 1.0


@dataclasses.dataclass(slots=True)
class SlottedData:
    temperature: float = 1.0


class Meta(type):
    temperature = 1.0


class OfMeta(metaclass=Meta):
    pass


class Trainer:
    def __init__(self) -> None:
        self.epoch = 1.0


class Phase(enum.Enum):
    WARM = 1


class Gain(float):
    pass


def scaled(x: Tensor, by: float = 1.0) -> Tensor:
    return x * by


TRAINER = Trainer()
COUNTS, COUNTER = np.zeros(2), collections.Counter()
SHARED = multiprocessing.Value("d", 1.0)
PYTHONS_OWN, BYTES = array.array("d", [1.0]), bytearray()


class Network(nn.Module):
    """A convolution, pooling and `last`, which reads or changes something besides."""

    calls = 0

    def __init__(self, last: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 2, 3, stride=2), last
        self.kind, self.slots, self.data, self.array = Settings, Slots(), SlottedData(), np.ones(2)
        self.options, self.user = argparse.Namespace(temperature=1.0), collections.UserDict(temperature=1.0)
        self.trainer = weakref.ref(TRAINER)
        self.scaled, self.option, self.phase = functools.partial(scaled, by=1.0), OPTIONS.get, Phase.WARM
        self.gain, self.objects, self.polynomial = Gain(1.0), np.array([1.0, None], dtype=object), np.poly1d([1.0])
        self.number = ctypes.c_double(1.0)
        self.phase.temperature = self.gain.temperature = 1.0  # pyright: ignore[reportAttributeAccessIssue]
        self.register_buffer("steps", torch.ones(2))
        self.double()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self, self.conv(x).mean((2, 3)))


def outputs(net: Any, change: Callable[[], None] | None = None) -> list[Tensor]:
    image, found = torch.linspace(0, 1, 21 * 17, dtype=torch.float64).reshape(1, 1, 21, 17), []
    for number in range(3):
        if number == 1 and change is not None:
            change()
        found.append(net(image).detach())
    return found


def refused(net: Network, match: str = r"test_outside.py:\d+ \(in .*\) cannot be recorded by TorchDynamo") -> None:
    with pytest.raises(UnsupportedError, match=match) as caught:
        outputs(accelerate(net, tile=8))
    assert "\n" not in str(caught.value)


def agree(wanted: list[Tensor], got: list[Tensor]) -> None:
    assert not torch.allclose(wanted[0], wanted[1])  # the case is one
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)


Last = Callable[[Any, Tensor], Tensor]
OPTIONS = {"temperature": 1.0}
BEFORE_2_14 = torch.__version__ < "2.14"  # versions are compared as such
CONTEXT = contextvars.ContextVar("temperature", default=1.0)
WEAK = weakref.WeakKeyDictionary({TRAINER: 1.0})
PROXY = types.MappingProxyType(OPTIONS)
SURROUNDINGS, asked_for = os.environ, os.getenv

# What is read, and what a user sets between two calls.
READ: dict[str, tuple[Last, Callable[[Any, float], Any]]] = {
    "a class": (lambda net, x: x * Settings.temperature, lambda net, v: setattr(Settings, "temperature", v)),
    "a class in an attribute": (
        lambda net, x: x * net.kind.temperature,
        lambda net, v: setattr(Settings, "temperature", v),
    ),
    "an imported file": (lambda net, x: x * settings.TEMPERATURE, lambda net, v: setattr(settings, "TEMPERATURE", v)),
    "a class of an imported file": (
        lambda net, x: x * settings.Group.temperature,
        lambda net, v: setattr(settings.Group, "temperature", v),
    ),
    "a function of an imported file": (
        lambda net, x: settings.scaled(x),
        lambda net, v: setattr(settings, "TEMPERATURE", v),
    ),
    "a method of an imported class": (
        lambda net, x: settings.Helper.scaled(x),
        lambda net, v: setattr(settings, "TEMPERATURE", v),
    ),
    "slots": (lambda net, x: x * net.slots.temperature, lambda net, v: setattr(net.slots, "temperature", v)),
    "a dataclass with slots": (
        lambda net, x: x * net.data.temperature,
        lambda net, v: setattr(net.data, "temperature", v),
    ),
    "an array": (lambda net, x: x * float(net.array[0]), lambda net, v: net.array.fill(v)),
    "an array of Python's": (
        lambda net, x: x * PYTHONS_OWN[0],
        lambda net, v: PYTHONS_OWN.__setitem__(0, v),
    ),
    "the array of a tensor": (
        lambda net, x: x * float(net.steps.numpy()[0]) + float(np.asarray(net.steps)[1]),
        lambda net, v: net.steps.fill_(v),
    ),
    "options of a command": (
        lambda net, x: x * net.options.temperature,
        lambda net, v: setattr(net.options, "temperature", v),
    ),
    "a UserDict": (lambda net, x: x * net.user["temperature"], lambda net, v: net.user.update(temperature=v)),
    "a weak reference": (
        lambda net, x: x * net.trainer().epoch,
        lambda net, v: setattr(TRAINER, "epoch", v),
    ),
    "a context variable": (lambda net, x: x * CONTEXT.get(), lambda net, v: CONTEXT.set(v)),
    "a weak dictionary": (lambda net, x: x * WEAK[TRAINER], lambda net, v: WEAK.update({TRAINER: v})),
    "a class's class": (lambda net, x: x * OfMeta.temperature, lambda net, v: setattr(Meta, "temperature", v)),
    "an attribute of a parameter": (
        lambda net, x: x * getattr(net.conv.weight, "temperature", 1.0),
        lambda net, v: setattr(net.conv.weight, "temperature", v),
    ),
    "an attribute of a buffer": (
        lambda net, x: x * getattr(net.steps, "temperature", 1.0),
        lambda net, v: setattr(net.steps, "temperature", v),
    ),
    "the environment": (
        lambda net, x: (
            x * float(os.environ.get("TEMPERATURE_OF_A_TEST", "1")) * float(os.getenv("TEMPERATURE_OF_A_TEST", "1"))
        ),
        lambda net, v: os.environ.update(TEMPERATURE_OF_A_TEST=str(v)),
    ),
    "the environment by another name": (
        lambda net, x: x * float(SURROUNDINGS.get("TEMPERATURE_OF_A_TEST", "1")),
        lambda net, v: os.environ.update(TEMPERATURE_OF_A_TEST=str(v)),
    ),
    "the environment by a function of another name": (
        lambda net, x: x * float(asked_for("TEMPERATURE_OF_A_TEST", "1")),
        lambda net, v: os.environ.update(TEMPERATURE_OF_A_TEST=str(v)),
    ),
    "a proxy": (lambda net, x: x * PROXY["temperature"], lambda net, v: OPTIONS.update(temperature=v)),
    "a partial": (lambda net, x: net.scaled(x), lambda net, v: net.scaled.keywords.update(by=v)),
    "a method of a dict": (lambda net, x: x * net.option("temperature"), lambda net, v: OPTIONS.update(temperature=v)),
    "a member of an enum": (
        lambda net, x: x * net.phase.temperature,
        lambda net, v: setattr(net.phase, "temperature", v),
    ),
    "a number of an own class": (
        lambda net, x: x * net.gain.temperature,
        lambda net, v: setattr(net.gain, "temperature", v),
    ),
    "an array of objects": (lambda net, x: x * net.objects[0], lambda net, v: net.objects.__setitem__(0, v)),
    "a polynomial": (
        lambda net, x: x * float(net.polynomial(0.0)),
        lambda net, v: net.polynomial.coeffs.__setitem__(0, v),
    ),
    "the environment by a function": (
        lambda net, x: x * float(os.getenv("TEMPERATURE_OF_A_TEST", "1")),
        lambda net, v: os.environ.update(TEMPERATURE_OF_A_TEST=str(v)),
    ),
    "a number of ctypes": (lambda net, x: x * net.number.value, lambda net, v: setattr(net.number, "value", v)),
    "a number of all processes": (lambda net, x: x * SHARED.value, lambda net, v: setattr(SHARED, "value", v)),
    "an optimizer": (
        lambda net, x: x * net.optimizer.param_groups[0]["lr"],
        lambda net, v: net.optimizer.param_groups[0].update(lr=v),
    ),
    "a scheduler": (
        lambda net, x: x * net.scheduler.get_last_lr()[0],
        lambda net, v: vars(net.scheduler).update(_last_lr=[v]),
    ),
}
IN_PIECES = {
    *("an array of Python's", "an array of objects", "a polynomial", "a scheduler", "a number of all processes"),
    *(("a context variable",) if BEFORE_2_14 else ()),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_changed_between_calls_is_noticed(name):
    last, change = READ[name]
    torch.manual_seed(0)
    stock = Network(last)
    options = {"fallback": "untiled"} if name in IN_PIECES else {}
    try:
        if options:
            refused(stock)
        wanted = outputs(stock, lambda: change(stock, 3.0))
        change(stock, 1.0)
        agree(wanted, outputs(accelerate(stock, tile=8, **options), lambda: change(stock, 3.0)))
    finally:
        change(stock, 1.0)


def by_default(owner: Any) -> Last:
    return lambda net, x: x * getattr(owner, "factor_of_a_test", 1.0)


@pytest.mark.parametrize(
    "owner", [Settings, TRAINER, settings, scaled], ids=["a class", "an object", "an imported file", "a function"]
)
def test_an_attribute_that_was_not_there_at_first(owner):
    stock = Network(by_default(owner))
    try:
        wanted = outputs(stock, lambda: setattr(owner, "factor_of_a_test", 3.0))
        del owner.factor_of_a_test
        agree(wanted, outputs(accelerate(stock, tile=8), lambda: setattr(owner, "factor_of_a_test", 3.0)))
    finally:
        del owner.factor_of_a_test


def counted(owner: Any, name: str) -> Last:
    def last(net: Any, x: Tensor) -> Tensor:
        setattr(owner, name, getattr(owner, name) + 1)
        return x * getattr(owner, name)

    return last


def of_its_class(net: Any, x: Tensor) -> Tensor:
    type(net).calls += 1
    return x * type(net).calls


def of_slots(net: Any, x: Tensor) -> Tensor:
    net.slots.temperature += 1
    return x * net.slots.temperature


def of_an_array(net: Any, x: Tensor) -> Tensor:
    COUNTS[0] += 1
    return x * float(COUNTS[0])


def of_a_counter(net: Any, x: Tensor) -> Tensor:
    COUNTER["calls"] += 1
    return x * COUNTER["calls"]


def of_bytes(net: Any, x: Tensor) -> Tensor:
    BYTES.append(2 + len(BYTES))
    return x * BYTES[-1]


def of_objects(net: Any, x: Tensor) -> Tensor:
    net.objects[0] += 1
    return x * net.objects[0]


def of_a_number_of_ctypes(net: Any, x: Tensor) -> Tensor:
    net.number.value += 1
    return x * net.number.value


def of_a_scheduler(net: Any, x: Tensor) -> Tensor:
    net.scheduler.step()
    return x * net.scheduler.get_last_lr()[0]


def of_a_function(net: Any, x: Tensor) -> Tensor:
    of_a_function.calls = getattr(of_a_function, "calls", 0) + 1
    return x * of_a_function.calls


CHANGED: dict[str, tuple[Last, Callable[[], Any]]] = {
    "a class": (counted(Settings, "calls"), lambda: setattr(Settings, "calls", 0)),
    "its own class": (of_its_class, lambda: setattr(Network, "calls", 0)),
    "an imported file": (counted(settings, "CALLS"), lambda: setattr(settings, "CALLS", 0)),
    "slots": (of_slots, lambda: None),
    "an array": (of_an_array, lambda: COUNTS.fill(0)),
    "bytes": (of_bytes, BYTES.clear),
    "a Counter": (of_a_counter, COUNTER.clear),
    "an array of objects": (of_objects, lambda: None),
    "a number of ctypes": (of_a_number_of_ctypes, lambda: None),
    "a scheduler": (of_a_scheduler, lambda: None),
    "an attribute of a function": (of_a_function, lambda: vars(of_a_function).clear()),
}


@pytest.mark.parametrize(("owner", "name"), [(torch.nn.functional, "relu"), (Tensor, "sin")], ids=["relu", "sin"])
def test_a_call_of_pytorchs_that_is_replaced(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network(lambda net, x: torch.nn.functional.relu(x) + x.sin())
    stock, x = copy.deepcopy(net), torch.randn(1, 1, 21, 17, dtype=torch.float64)
    ours = accelerate(net, tile=8)
    torch.testing.assert_close(ours(x), stock(x))
    monkeypatch.setattr(owner, name, lambda x, *_: torch.tanh(x))
    torch.testing.assert_close(ours(x), stock(x))


CHANGED_IN_PIECES = {
    *("bytes", "an array of objects", "a scheduler"),
    *(("an attribute of a function",) if BEFORE_2_14 else ()),
}


@pytest.mark.filterwarnings("ignore:.*optimizer.step")
@pytest.mark.parametrize("name", CHANGED)
def test_what_a_forward_changes_is_changed_by_each_call(name):
    last, reset = CHANGED[name]
    torch.manual_seed(0)
    stock = Network(last)
    twin = copy.deepcopy(stock)
    options = {"fallback": "untiled"} if name in CHANGED_IN_PIECES else {}
    try:
        if options:
            refused(twin)
        wanted = outputs(stock)
        reset()
        agree(wanted, outputs(accelerate(twin, tile=8, **options)))
    finally:
        reset()


def test_an_optimizer_that_is_only_kept_is_no_business_of_the_forward(graphs):
    """A schedule would have each step recorded."""
    net = Network(lambda net, x: x)
    fast = accelerate(net, tile=8)
    for _ in range(3):
        outputs(fast)
        net.optimizer.step()
        net.scheduler.step()
    assert len(graphs) == 1


@pytest.mark.parametrize("where", [Settings, settings])
def test_losses_kept_in_a_list_outside(where):
    """Each call appends its own, with its gradients."""
    losses = vars(where)["losses" if where is Settings else "LOSSES"]

    def last(net: Any, x: Tensor) -> Tensor:
        (Settings.losses if where is Settings else settings.LOSSES).append(x.square().sum())
        return x

    stock = Network(last)
    twin = copy.deepcopy(stock)
    for net in (stock, accelerate(twin, tile=8)):
        outputs(net)
        assert len(losses) == 3
        sum(losses).backward()
        losses.clear()
    torch.testing.assert_close(twin.conv.weight.grad, stock.conv.weight.grad, rtol=1e-11, atol=1e-11)


def test_an_argument_of_a_class_of_ones_own():
    """What was changed in an object that every call gets is noticed."""

    class Aged(Network):
        def forward(self, x: Tensor, patient: Any) -> Tensor:
            return self.conv(x).mean((2, 3)) * patient.age + patient.offset

    stock = Aged(lambda net, x: x)
    tiled, image = accelerate(copy.deepcopy(stock), tile=8), torch.rand(1, 1, 21, 17, dtype=torch.float64)
    patient = types.SimpleNamespace(age=torch.tensor(2.0), offset=1.0)
    for change in (
        lambda: None,
        lambda: setattr(patient, "age", torch.tensor(5.0)),
        lambda: setattr(patient, "offset", 7.0),
        lambda: patient.age.add_(1),
    ):
        change()
        torch.testing.assert_close(tiled(image, patient), stock(image, patient), rtol=1e-11, atol=1e-11)


DRAWS: dict[str, tuple[Callable[[], Any], Last]] = {
    "Python's": (lambda: random.Random(0), lambda net, x: x * net.source.random()),
    "numpy's": (lambda: np.random.default_rng(0), lambda net, x: x * float(net.source.random())),
    "numpy's older": (lambda: np.random.RandomState(0), lambda net, x: x * float(net.source.uniform())),
    "a cycle": (lambda: itertools.cycle([1.0, 2.0]), lambda net, x: x * next(net.source)),
    "a count": (lambda: itertools.count(1), lambda net, x: x * next(net.source)),
    "a generator": (lambda: (float(n) for n in range(9)), lambda net, x: x * next(net.source)),
    "a count in a loop": (
        lambda: itertools.count(1),
        lambda net, x: x * sum(n for n, _ in zip(net.source, "a", strict=False)),
    ),
    "a cycle, by its method": (lambda: itertools.cycle([1.0, 2.0]), lambda net, x: x * net.source.__next__()),
    "an iterator of a list": (
        lambda: iter([1.0, 2.0, 3.0, 4.0]),
        lambda net, x: x * sum(itertools.islice(net.source, 1)),
    ),
}


DRAWN_IN_PIECES = {
    *("numpy's", "numpy's older", "a cycle", "a generator", "a cycle, by its method", "an iterator of a list"),
}


@pytest.mark.parametrize("name", [name for name in DRAWS if name != "Python's"])
def test_what_gives_another_number_in_each_call(name):
    source, last = DRAWS[name]
    torch.manual_seed(0)
    stock = Network(last)
    twin = Network(last)
    twin.load_state_dict(stock.state_dict())
    stock.source, twin.source = source(), source()
    options = {"fallback": "untiled"} if name in DRAWN_IN_PIECES else {}
    if options:
        refused(twin)
    agree(outputs(stock), outputs(accelerate(twin, tile=8, **options)))


@pytest.mark.parametrize("fallback", [None, "untiled"])
def test_a_generator_of_pythons_that_lasts_is_refused(fallback):
    """TorchDynamo would give its first number in each call."""
    source, last = DRAWS["Python's"]
    net = Network(last)
    net.source = source()
    if torch.__version__ >= "2.15":  # it draws in each call there
        twin = copy.deepcopy(net)
        agree(outputs(twin), outputs(accelerate(net, tile=8, fallback=fallback)))
        return
    with pytest.raises(
        UnsupportedError, match=r"random.Random \('source'\) that exists across calls.* another program"
    ) as caught:
        outputs(accelerate(net, tile=8, fallback=fallback))
    assert "\n" not in str(caught.value) and net.source.random() == source().random()


def test_iterators_that_a_forward_makes_and_its_own_next():
    def last(net: Any, x: Tensor) -> Tensor:
        return x * next(net.parameters()).sum() + next(iter([2.0]), None)

    stock = Network(last)
    for one, other in zip(outputs(stock), outputs(accelerate(stock, tile=8)), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("by", ["attribute", "argument"])
def test_a_generator_of_torch_that_lasts_is_drawn_from_in_each_call(by):
    class Noisy(Network):
        def forward(self, x: Tensor, generator: Any = None) -> Tensor:
            x = self.conv(x).mean((2, 3))
            return x + torch.randn(x.shape, generator=generator or self.source, dtype=x.dtype)

    stock = Noisy(lambda net, x: x)
    stock.source = torch.Generator()
    refused(stock)
    found = []
    for net in (stock, accelerate(Noisy(lambda net, x: x), tile=8, fallback="untiled")):
        net.load_state_dict(stock.state_dict())
        source = torch.Generator().manual_seed(3)
        net.source = source
        found.append(outputs(net if by == "attribute" else lambda x, net=net, own=source: net(x, generator=own)))
    agree(*found)


@pytest.mark.parametrize("by", ["attribute", "argument"])
def test_a_generator_that_the_forward_seeds_is_refused(by):
    class Seeding(Network):
        def forward(self, x: Tensor, generator: Any = None) -> Tensor:
            x = self.conv(x).mean((2, 3))
            return x + torch.randn(x.shape[1:], generator=(generator or self.source).manual_seed(3), dtype=x.dtype)

    net = Seeding(lambda net, x: x)
    net.source = own = torch.Generator().manual_seed(1)
    before = own.get_state()
    fast = accelerate(net, tile=8)
    with pytest.raises(UnsupportedError, match=r"test_outside.py:\d+ \(in forward\)"):
        outputs(fast if by == "attribute" else lambda x: fast(x, generator=own))
    assert torch.equal(own.get_state(), before)


def test_a_map_drawn_from_a_generator_of_its_own_is_refused():
    class Noisy(Network):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return (y * torch.bernoulli(y.sigmoid(), generator=self.source)).mean((2, 3))

    net = Noisy(lambda net, x: x)
    net.source = torch.Generator()
    refused(net)


def test_a_plain_tensor_that_wants_a_gradient_now_and_then():
    """A perturbation of the image, for one, that is learned in every other step."""

    class Perturbed(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.delta)

    torch.manual_seed(0)
    stock = Perturbed(lambda net, x: x)
    twin, image = copy.deepcopy(stock), torch.randn(1, 1, 21, 17, dtype=torch.float64)
    tiled = accelerate(twin, tile=8)
    for wanted in (False, True, False, True):
        grads = []
        for net, own in ((stock, stock), (tiled, twin)):
            own.delta = own.__dict__.get("delta", torch.zeros(1, 1, 1, dtype=torch.float64))
            own.delta.requires_grad_(wanted).grad = None
            net(image).square().sum().backward()
            grads.append(own.delta.grad)
        assert (grads[0] is None) == (grads[1] is None) == (not wanted)
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11) if wanted else None


def all_gathered(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x)]
    dist.all_gather(parts, x.detach())
    return x + parts[0]


def counted_by_all(x: Tensor) -> Tensor:
    count = torch.ones(1, dtype=x.dtype)
    dist.all_reduce(count)
    return x * count


def waited_for(x: Tensor) -> Tensor:
    dist.barrier()
    return x


@pytest.mark.parametrize("odd", (all_gathered, counted_by_all))
def test_exchanges_with_other_processes_are_made_in_each_call(alone, odd):
    """As functional collectives, in which TorchDynamo writes them."""
    stock = Network(lambda net, x: odd(x))
    for one, other in zip(outputs(stock), outputs(accelerate(stock, tile=8)), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)


def test_waiting_for_other_processes_is_refused(alone):
    refused(Network(lambda net, x: waited_for(x)))
