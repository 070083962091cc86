"""Settings outside of the network, read in many ways and changed between two calls."""
# ruff: noqa: B009

from __future__ import annotations

import contextvars
import dataclasses
import decimal
import importlib
import itertools
import json
import locale
import logging
import operator
import os
import pkgutil
import random
import secrets
import sys
import tempfile
import time
import types
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import VALUES, Foreign
from .harness import watch, watch_call

_HERE = sys.modules[__name__]


class Config:
    """A configuration object."""

    def __init__(self, **values: Any):
        self.__dict__.update(values)


CFG = Config(scale=VALUES[0], inner=Config(scale=VALUES[0]))
SCALE = VALUES[0]
_MODULE = types.ModuleType("gigamorph_foreign_config")
_MODULE.scale, _MODULE.inner = VALUES[0], Config(scale=VALUES[0])
sys.modules[_MODULE.__name__] = _MODULE
for _name, _owner in (("object", CFG), ("inner object", CFG.inner), ("module", _MODULE), ("inner", _MODULE.inner)):
    watch(f"scale of the {_name}", _owner, "scale")
watch("SCALE", _HERE, "SCALE")


class ConfigRead(Foreign):
    """A configuration object, read by every road that leads to an attribute."""

    def attribute(self, y: Tensor) -> Tensor:
        return y * CFG.scale

    def nested(self, y: Tensor) -> Tensor:
        return y * CFG.inner.scale

    def getattr_name(self, y: Tensor) -> Tensor:
        return y * getattr(CFG, "scale")

    def getattr_default(self, y: Tensor) -> Tensor:
        return y * getattr(CFG, "missing", 2.0) * getattr(CFG, "scale", 1.0)

    def vars_of(self, y: Tensor) -> Tensor:
        return y * vars(CFG)["scale"]

    def dictionary_of(self, y: Tensor) -> Tensor:
        return y * CFG.__dict__["scale"]

    def dictionary_get(self, y: Tensor) -> Tensor:
        return y * CFG.inner.__dict__.get("scale", 9.0)

    def imported_by_name(self, y: Tensor) -> Tensor:
        return y * importlib.import_module("gigamorph_foreign_config").scale

    def import_in_forward(self, y: Tensor) -> Tensor:
        from gigamorph_foreign_config import scale

        return y * scale

    def dunder_import(self, y: Tensor) -> Tensor:
        return y * __import__("gigamorph_foreign_config").inner.scale

    def resolved_name(self, y: Tensor) -> Tensor:
        return y * pkgutil.resolve_name("gigamorph_foreign_config:inner.scale")

    def attrgetter(self, y: Tensor) -> Tensor:
        return y * operator.attrgetter("inner.scale")(CFG)

    def itemgetter(self, y: Tensor) -> Tensor:
        return y * operator.itemgetter("scale")(vars(CFG))

    def loaded_modules(self, y: Tensor) -> Tensor:
        return y * sys.modules["gigamorph_foreign_config"].scale

    def globals_call(self, y: Tensor) -> Tensor:
        return y * globals()["SCALE"]

    def evaluated(self, y: Tensor) -> Tensor:
        return y * eval("CFG.scale")

    def object_getattribute(self, y: Tensor) -> Tensor:
        return y * object.__getattribute__(CFG, "scale")

    def all_values(self, y: Tensor) -> Tensor:
        return y * sum(value for value in vars(CFG).values() if isinstance(value, float))

    def change(self, net: nn.Module, number: int) -> None:
        global SCALE
        SCALE = CFG.scale = CFG.inner.scale = _MODULE.scale = _MODULE.inner.scale = VALUES[number]


class _Parent:
    gain = VALUES[0]


class _Meta(type):
    gain = VALUES[0]

    @property
    def twice(cls) -> float:
        return 2 * cls.gain


class _WithMeta(metaclass=_Meta):
    pass


class _Fallback:
    """Attributes come from a dictionary."""

    def __init__(self) -> None:
        self.values = {"scale": VALUES[0]}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


class _Descriptor:
    def __get__(self, owner: Any, kind: Any = None) -> float:
        return owner.values["scale"] + 1


class _Missing(dict):
    def __missing__(self, key: str) -> float:
        return FALLBACK.values["scale"]


FALLBACK, MISSING = _Fallback(), _Missing()
watch("gain of the parent", _Parent, "gain")
watch("gain of the metaclass", _Meta, "gain")
watch("values of the fallback", FALLBACK, "values")


class ClassRead(_Parent, Foreign):
    """Attributes of classes, descriptors, and objects that answer for missing attributes."""

    described = _Descriptor()

    def setup(self, width: int, dice: random.Random) -> None:
        self.values = {"scale": VALUES[0]}

    def inherited(self, y: Tensor) -> Tensor:
        return y * self.gain

    def by_type(self, y: Tensor) -> Tensor:
        return y * type(self).gain

    def by_super(self, y: Tensor) -> Tensor:
        return y * super().gain

    def class_dictionary(self, y: Tensor) -> Tensor:
        return y * _Parent.__dict__["gain"]

    def method_order(self, y: Tensor) -> Tensor:
        return y * next(vars(kind)["gain"] for kind in type(self).__mro__ if "gain" in vars(kind))

    def metaclass(self, y: Tensor) -> Tensor:
        return y * _WithMeta.twice

    def descriptor(self, y: Tensor) -> Tensor:
        return y * self.described

    def fallback(self, y: Tensor) -> Tensor:
        return y * FALLBACK.scale

    def subscript(self, y: Tensor) -> Tensor:
        return y * FALLBACK["scale"]

    def missing_key(self, y: Tensor) -> Tensor:
        return y * MISSING["scale"]

    def has_attribute(self, y: Tensor) -> Tensor:
        return y.relu() if hasattr(FALLBACK, "rectified") else y.tanh()

    def change(self, net: nn.Module, number: int) -> None:
        _Parent.gain = _Meta.gain = self.values["scale"] = FALLBACK.values["scale"] = VALUES[number]
        FALLBACK.values["rectified"] = True


TABLE: dict[str, Any] = {"scale": VALUES[0], "acts": {"first": "relu"}, "list": [VALUES[0], 1.0]}
REGISTRY: dict[str, Any] = {"act": torch.relu}
COUNTS: dict[str, int] = defaultdict(int)
watch("TABLE", _HERE, "TABLE")
watch("REGISTRY", _HERE, "REGISTRY")
watch("COUNTS", _HERE, "COUNTS")


def _register(name: str) -> Any:
    def decorate(call: Any) -> Any:
        REGISTRY[name] = call
        return call

    return decorate


class ModuleDictionary(Foreign):
    """Dictionaries and lists at the level of the module, read and written."""

    def value(self, y: Tensor) -> Tensor:
        return y * TABLE["scale"]

    def nested(self, y: Tensor) -> Tensor:
        return getattr(torch, TABLE["acts"]["first"])(y)

    def item_of_a_list(self, y: Tensor) -> Tensor:
        return y * TABLE["list"][0] + len(TABLE["list"])

    def function(self, y: Tensor) -> Tensor:
        return REGISTRY["act"](y)

    def registered(self, y: Tensor) -> Tensor:
        return sum(call(y) for call in REGISTRY.values())

    def number_of_keys(self, y: Tensor) -> Tensor:
        return y * len(TABLE)

    def counted(self, y: Tensor) -> Tensor:
        COUNTS[f"size {y.shape[1]}"] += 1
        return y * (1 + 0.1 * COUNTS[f"size {y.shape[1]}"])

    def counted_only(self, y: Tensor) -> Tensor:
        COUNTS["calls"] += 1
        return y

    def mean_stored(self, y: Tensor) -> Tensor:
        TABLE["mean"] = y.mean().detach()
        return y

    def change(self, net: nn.Module, number: int) -> None:
        TABLE["scale"] = TABLE["list"][0] = VALUES[number]
        TABLE["acts"]["first"] = ("tanh", "sigmoid")[number - 1]
        TABLE[f"key {number}"] = None
        _register(("act", "other")[number - 1])(torch.tanh)


COUNT = 0
TICKS: itertools.count[int] | None = None
watch("COUNT", _HERE, "COUNT")
watch("TICKS", _HERE, "TICKS")


def _counted(x: Tensor, calls: list[int] = [0]) -> Tensor:  # noqa: B006
    calls[0] += 1
    return x * (1 + 0.1 * calls[0])


def _marked(x: Tensor) -> Tensor:
    _marked.calls += 1
    return x * (1 + 0.1 * _marked.calls)


_marked.calls = 0
watch("calls of a function", _marked, "calls")
watch("default of a function", _counted, "__defaults__")


class GlobalCounter(Foreign):
    """Counters outside of the instance."""

    calls_of_class: ClassVar[int] = 0
    all_calls: ClassVar[list[int]] = []

    def global_name(self, y: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return y * (1 + 0.1 * COUNT)

    def global_unused(self, y: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return y.relu()

    def global_every_other(self, y: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return y.relu() if COUNT % 2 else y.tanh()

    def iterator(self, y: Tensor) -> Tensor:
        global TICKS
        if TICKS is None:
            TICKS = itertools.count(1)
        return y * next(TICKS)

    def class_attribute(self, y: Tensor) -> Tensor:
        type(self).calls_of_class += 1
        return y * self.calls_of_class

    def class_list(self, y: Tensor) -> Tensor:
        self.all_calls.append(y.shape[1])
        return y * len(self.all_calls)

    def default_argument(self, y: Tensor) -> Tensor:
        return _counted(y)

    def function_attribute(self, y: Tensor) -> Tensor:
        return _marked(y)


watch("calls_of_class", GlobalCounter, "calls_of_class")
watch("all_calls", GlobalCounter, "all_calls")

GAIN = contextvars.ContextVar("foreign gain", default=VALUES[0])
watch_call("GAIN", GAIN.get, GAIN.set)


class ContextVariable(Foreign):
    """Context variables."""

    def read(self, y: Tensor) -> Tensor:
        return y * GAIN.get()

    def set_and_reset(self, y: Tensor) -> Tensor:
        token = GAIN.set(GAIN.get() + 1)
        try:
            return y * GAIN.get()
        finally:
            GAIN.reset(token)

    def left_set(self, y: Tensor) -> Tensor:
        GAIN.set(GAIN.get() + 0.25)
        return y * GAIN.get()

    def in_a_copy(self, y: Tensor) -> Tensor:
        def inside() -> float:
            GAIN.set(GAIN.get() * 2)
            return GAIN.get()

        return y * contextvars.copy_context().run(inside)

    def change(self, net: nn.Module, number: int) -> None:
        GAIN.set(VALUES[number])


_LOGGER = logging.getLogger("gigamorph.foreign")
_LOGGER.setLevel(logging.WARNING)
_FOLDER = tempfile.TemporaryDirectory()
_FILE = Path(_FOLDER.name) / "config.json"
_FILE.write_text(json.dumps({"scale": VALUES[0]}))
watch_call("precision", lambda: decimal.getcontext().prec, lambda value: setattr(decimal.getcontext(), "prec", value))
watch_call("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit)
watch_call("logging level", lambda: _LOGGER.level, _LOGGER.setLevel)
watch_call("file", _FILE.read_text, _FILE.write_text)
watch_call(
    "environment",
    lambda: os.environ.get("GIGAMORPH_FOREIGN", str(VALUES[0])),
    lambda value: os.environ.update(GIGAMORPH_FOREIGN=value),
)
watch_call("switch interval", sys.getswitchinterval, sys.setswitchinterval)


class ProcessRead(Foreign):
    """Settings of the process."""

    def initial_seed(self, y: Tensor) -> Tensor:
        return y * (1 + 0.1 * (torch.initial_seed() % 7))

    def recursion_limit(self, y: Tensor) -> Tensor:
        return y * (sys.getrecursionlimit() / 1000)

    def decimal_precision(self, y: Tensor) -> Tensor:
        return y * decimal.getcontext().prec * 0.1

    def decimal_division(self, y: Tensor) -> Tensor:
        return y * float(decimal.Decimal(1) / decimal.Decimal(7))

    def logging_level(self, y: Tensor) -> Tensor:
        return y.relu() if _LOGGER.isEnabledFor(logging.INFO) else y.tanh()

    def environment(self, y: Tensor) -> Tensor:
        return y * float(os.environ.get("GIGAMORPH_FOREIGN", "1.5"))

    def getenv(self, y: Tensor) -> Tensor:
        return y * float(os.getenv("GIGAMORPH_FOREIGN", default="1.5"))

    def file(self, y: Tensor) -> Tensor:
        return y * json.loads(_FILE.read_text())["scale"]

    def opened_file(self, y: Tensor) -> Tensor:
        with open(_FILE) as file:
            return y * json.load(file)["scale"]

    def switch_interval(self, y: Tensor) -> Tensor:
        return y * (1 + sys.getswitchinterval())

    def decimal_point(self, y: Tensor) -> Tensor:
        return y * len(locale.localeconv()["decimal_point"])

    def generator_state(self, y: Tensor) -> Tensor:
        return y + torch.get_rng_state()[:8].sum().to(y.dtype) * 1e-3

    def change(self, net: nn.Module, number: int) -> None:
        decimal.getcontext().prec = (5, 9)[number - 1]
        sys.setrecursionlimit((1500, 2000)[number - 1])
        sys.setswitchinterval((0.25, 0.5)[number - 1])
        _LOGGER.setLevel((logging.DEBUG, logging.ERROR)[number - 1])
        os.environ["GIGAMORPH_FOREIGN"] = str(VALUES[number])
        _FILE.write_text(json.dumps({"scale": VALUES[number]}))


TOKENS: set[Any] = set()
watch_call("number of tokens", lambda: len(TOKENS), lambda count: (TOKENS.clear(), TOKENS.update(range(count))))


class UniqueValues(Foreign):
    """Values that differ in each call. Only their number decides what is computed, so that stock agrees with itself."""

    def _scaled(self, y: Tensor, token: Any) -> Tensor:
        TOKENS.add(token)
        return y * (1 + 0.1 * len(TOKENS))

    def uuid(self, y: Tensor) -> Tensor:
        return self._scaled(y, uuid.uuid4())

    def uuid_text(self, y: Tensor) -> Tensor:
        return self._scaled(y, str(uuid.uuid1()))

    def urandom(self, y: Tensor) -> Tensor:
        return self._scaled(y, os.urandom(8))

    def token(self, y: Tensor) -> Tensor:
        return self._scaled(y, secrets.token_hex(8))

    def secret_number(self, y: Tensor) -> Tensor:
        return self._scaled(y, secrets.randbelow(2**62))

    def system_random(self, y: Tensor) -> Tensor:
        return self._scaled(y, random.SystemRandom().random())

    def time(self, y: Tensor) -> Tensor:
        return self._scaled(y, time.time())

    def performance_counter(self, y: Tensor) -> Tensor:
        return self._scaled(y, time.perf_counter_ns())

    def elapsed(self, y: Tensor) -> Tensor:
        start = time.monotonic()
        return y.relu() if time.monotonic() >= start else y.tanh()


@dataclasses.dataclass
class Options:
    scale: float = VALUES[0]
    act: str = "relu"
    sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2])


@dataclasses.dataclass(frozen=True)
class FrozenOptions:
    scale: float = VALUES[0]
    act: str = "relu"


class DataclassConfig(Foreign):
    """Data classes with options, on the instance."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.options, self.frozen = Options(), FrozenOptions()

    def attribute(self, y: Tensor) -> Tensor:
        return getattr(torch, self.options.act)(y) * self.options.scale

    def as_dictionary(self, y: Tensor) -> Tensor:
        return y * dataclasses.asdict(self.options)["scale"]

    def fields(self, y: Tensor) -> Tensor:
        return y * sum(getattr(self.frozen, f.name) for f in dataclasses.fields(self.frozen) if f.type == "float")

    def replaced(self, y: Tensor) -> Tensor:
        return y * dataclasses.replace(self.frozen, act="tanh").scale

    def equal(self, y: Tensor) -> Tensor:
        return y.relu() if self.frozen == FrozenOptions() else y.tanh()

    def appended(self, y: Tensor) -> Tensor:
        self.options.sizes.append(y.shape[1])
        return y * len(self.options.sizes)

    def as_tuple(self, y: Tensor) -> Tensor:
        scale, act = dataclasses.astuple(self.frozen)
        return getattr(torch, act)(y * scale)

    def change(self, net: nn.Module, number: int) -> None:
        self.options.scale, self.options.act = VALUES[number], ("tanh", "sigmoid")[number - 1]
        self.frozen = dataclasses.replace(self.frozen, scale=VALUES[number])
