"""Everything that a forward may depend on besides its arguments and the process.

The walk begins at a network and goes through attributes, containers, plain objects, classes, imported files and the
functions (hooks, methods, closures) that the network's own code consists of. It stops at code of well-known libraries,
whose objects count as one thing each.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import io
import os
import random
import sys
import types
import weakref
from array import array
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Iterable, Iterator, MappingView, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, cached_property, partial, partialmethod, singledispatchmethod
from importlib.metadata import packages_distributions
from multiprocessing.sharedctypes import SynchronizedBase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit._state import _try_get_jit_cached_function
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from . import holders
from .holders import Holder
from .reach import Reach, imported, loaded, mentioned

_LIBRARIES = frozenset(
    "torch torchvision torchaudio torchmetrics timm triton numpy scipy lightning pytorch_lightning logging threading "
    "multiprocessing weakref ctypes functools inspect types typing collections random re os sys pathlib io abc enum "
    "contextlib warnings gigamorph importlib copy math itertools operator dataclasses asyncio concurrent rich tqdm "
    "PIL cv2 pandas sklearn matplotlib hypothesis pytest _pytest pluggy".split()
)
# Of a module's own attributes those that no forward reads.
_BOOKKEEPING = frozenset(
    "_state_dict_hooks _state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks "
    "_non_persistent_buffers_set _is_full_backward_hook _compiled_call_impl".split()
)
# Objects of Python's own and of libraries whose attributes are what a forward reads of them.
_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
_OPEN = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList, ChainMap, *_WEAK, SynchronizedBase, np.poly1d)
# The same, but that they are other ones after each step of a training: looked into where a forward reads them.
_OF_TRAINING = (Optimizer, LRScheduler)
_NUMBERS = (array, bytearray, ctypes._SimpleCData, ctypes.Array, ctypes.Structure, ctypes.Union)  # pyright: ignore[reportPrivateUsage]
_BOUND = (types.BuiltinMethodType, types.MethodWrapperType)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
# Names by which code gets hold of its own file, or of functions' globals, as an object.
_OWN_FILE = frozenset("__name__ __module__ __globals__ __import__ import_module getmodule".split())
_ENVIRONMENT = frozenset({"environ", "getenv"})
ARRAY_BYTES = 2**20  # of an array whose numbers are compared at each call
_FEW = 20_000  # holders; a network whose attributes lead to more has a whole program hanging on it


def of_library(thing: Any) -> bool:
    """Whether a function or an object's class belongs to Python or a well-known library."""
    home = getattr(thing if isinstance(thing, (types.FunctionType, type)) else type(thing), "__module__", None)
    if not isinstance(home, str):  # compiled; Cython's classes of classes have a descriptor there
        return True
    return home == "builtins" or home.split(".")[0] in _LIBRARIES


@dataclass
class Found:
    """What a walk has found.

    Attributes:
        holders: in the order in which they were met.
        classes: the libraries' among the classes of the modules met and their bases.
        functions: those met that are no library's, with what messages call them.
        generators: of random numbers, other than the process's own.
        iterators: that last from call to call, of Python or a library, with what messages call them.
    """

    holders: list[Holder] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    classes: dict[type, None] = field(default_factory=dict)
    functions: dict[types.FunctionType, str] = field(default_factory=dict)
    generators: list[Any] = field(default_factory=list)
    iterators: dict[str, Any] = field(default_factory=dict)
    ids: dict[int, Any] = field(default_factory=dict)  # everything that was there, kept so that ids stay unique


def walk(network: nn.Module, extra: Sequence[Any] = ()) -> Found:
    """Everything that the forward of a network may depend on, but for its arguments and the process.

    Args:
        extra: further functions or objects that the recorded call consists of.
    """
    way = _Walk()
    names = {id(module): name for name, module in network.named_modules()}
    for module in network.modules():
        way.later(module, names[id(module)])
    for thing in extra:
        way.later(thing, getattr(thing, "__name__", type(thing).__name__))
    while (way.queue or way.of_training()) and len(way.found.holders) < _FEW:
        way.visit(*way.queue.popleft())
    own = {home for module in network.modules() if (home := _package(module))}
    for parent, name, iterator in way.iterators:
        owner, key = (None, None) if parent is None else (parent[0].owner, parent[1])
        mentioned_there = not isinstance(key, str) or way.reach.mentions(key)
        if mentioned_there and (_package(owner) in own or not _installed(_package(owner))):
            way.found.iterators[name] = iterator
    return way.found


def _package(owner: Any) -> str:
    """The package of a file, given by its names, of a class, or of an object's class."""
    if isinstance(owner, dict) and "__name__" in owner:
        home = owner["__name__"]
    else:
        home = getattr(owner if isinstance(owner, type) else type(owner), "__module__", "")
    return home.split(".")[0] if isinstance(home, str) else ""


def _installed(package: str) -> bool:
    """Whether it is installed: most of what is reached there only has the name of something that a forward calls."""
    return package in _distributions()


_distributions = cache(packages_distributions)


class _Walk:
    """What has been found, and what is to be looked at next: a thing, what messages call it, and where it was found."""

    def __init__(self) -> None:
        self.found, self.reach = Found(), Reach()
        self.iterators: list[tuple[tuple[Holder, Any] | None, str, Any]] = []
        self.queue: deque[tuple[Any, str, tuple[Holder, Any] | None]] = deque()
        self.waiting: list[tuple[Any, str, tuple[Holder, Any] | None]] = []  # of `_OF_TRAINING`

    def later(self, thing: Any, name: str, parent: tuple[Holder, Any] | None = None) -> None:
        if not is_leaf(thing) and id(thing) not in self.found.ids:
            self.queue.append((thing, name, parent))

    def _all(self, things: Iterable[tuple[Any, ...]]) -> None:
        for thing in things:
            self.later(*thing)

    def visit(self, thing: Any, name: str, parent: tuple[Holder, Any] | None) -> None:
        """Note what a thing holds, and put off what that leads to."""
        if id(thing) in self.found.ids:
            return
        self.found.ids[id(thing)] = thing
        if isinstance(thing, nn.Module):
            self._module(thing, name)
        elif thing is os.environ:
            self._contents(holders.environment())
        elif thing is os.getenv:  # by whatever name code has it
            self.later(os.environ, name)
        elif isinstance(thing, types.FunctionType):
            self._function(thing, name)
        elif isinstance(thing, types.MethodType):
            self.later(thing.__func__, name)
            self.later(thing.__self__, name)
        elif isinstance(thing, _BOUND):
            if not isinstance(thing.__self__, (type, types.ModuleType)):
                self.later(thing.__self__, name)
        elif isinstance(thing, partial):
            self._contents(holders.partial_parts(thing, name, parent))
        elif isinstance(thing, dict):
            self._contents(holders.mapping(thing, name, parent))
            if type(thing) is not dict and getattr(thing, "__dict__", None) and not of_library(thing):
                self._contents(holders.attributes(thing, name, parent))
        elif isinstance(thing, (list, deque)):
            self._contents(holders.sequence(thing, name, parent))
        elif isinstance(thing, set):
            self._contents(holders.set_items(thing, name, parent))
        elif isinstance(thing, tuple):
            if not all(map(is_leaf, thing)):
                self._contents(holders.items(thing, name, parent))
        elif isinstance(thing, frozenset):
            for item in thing:
                self.later(item, name, None)
        elif isinstance(thing, type):
            self._class(thing)
        elif (wrapped := inspect.getattr_static(thing, "__wrapped__", None)) is not None:  # looking runs no code
            self.later(wrapped, name)
        elif isinstance(thing, np.ndarray):
            if thing.nbytes <= ARRAY_BYTES and thing.dtype == object:
                self._contents(holders.objects(thing, name, parent))
            elif thing.nbytes <= ARRAY_BYTES and not thing.dtype.hasobject and thing.flags.writeable:
                self._contents(holders.numbers(thing, name, parent))
        elif isinstance(thing, _NUMBERS):
            if memoryview(thing).nbytes <= ARRAY_BYTES:
                self._contents(holders.numbers(thing, name, parent))
        elif isinstance(thing, _GENERATORS):
            if not isinstance(thing, random.SystemRandom):  # that has no state: see `process.py`
                self.found.generators.append(thing)
        elif isinstance(thing, Iterator) and of_library(thing) and not isinstance(thing, io.IOBase):
            self.iterators.append((parent, name, thing))
        elif isinstance(thing, Tensor):
            self._contents(holders.attributes(thing, name, None))
        elif isinstance(thing, torch.jit.ScriptFunction):
            self.later(scripted_from(thing), name)
        elif isinstance(thing, weakref.ref):
            self.later(thing(), name)
        elif isinstance(thing, (types.MappingProxyType, MappingView)):
            for inner in gc.get_referents(thing):
                self.later(inner, name)
        elif isinstance(thing, types.ModuleType):
            if not _known(thing):
                own = [key for key in vars(thing) if not key.startswith("__")]
                self._contents(holders.file_names(own, vars(thing), f"the file {thing.__name__}"))
        elif isinstance(thing, ContextVar):
            self._contents(holders.context(thing))
        elif isinstance(thing, _OPEN) or not of_library(thing):
            self._object(thing, name, parent)
        elif isinstance(thing, _OF_TRAINING):
            self.waiting.append((thing, name, parent))

    def of_training(self) -> bool:
        """Look into the optimizers and schedulers that code reads which is reached; whether that leads to more."""
        waiting, self.waiting = self.waiting, []
        for thing, name, parent in waiting:
            if parent is None or parent[0].kind != "attributes" or self.reach.mentions(parent[1]):
                self._object(thing, name, parent)
                self._all(self.reach.names(vars(thing)))  # which a scheduler reads of its optimizer, say
            else:
                self.waiting.append((thing, name, parent))
        return bool(self.queue)

    def _object(self, thing: Any, name: str, parent: tuple[Holder, Any] | None) -> None:
        if hasattr(thing, "__dict__"):
            self._contents(holders.attributes(thing, name, parent))
        slots = holders.slots(thing, name, parent)
        if slots is not None:
            self._contents(slots)
        self.later(type(thing), type(thing).__name__)

    def _contents(self, holder: Holder, skip: frozenset[str] = frozenset()) -> None:
        self.found.holders.append(holder)
        for key, value in holder.read().items():
            if key not in skip:
                name = f"{holder.name}.{key}" if isinstance(key, str) else f"{holder.name}[...]"
                self.later(value, name, (holder, key))

    def _class(self, kind: type) -> None:
        """What a class and its bases hold, and the code of those of their methods that are reached."""
        if not of_library(type(kind)):
            self.later(type(kind), type(kind).__name__)
        own = [base for base in kind.__mro__ if not of_library(base)]
        files = {base.__module__ for base in own}
        for base in kind.__mro__:
            if of_library(base) and base not in (nn.Module, object):  # it may call what it has a method for
                self._all(self.reach.names(vars(base)))
        for base in own:
            self._all(self.reach.inherits(base, files))
            if base is not kind and id(base) in self.found.ids:
                continue
            self.found.ids[id(base)] = base
            holder = holders.class_attributes(base)
            self.found.holders.append(holder)
            for key, value in holder.read().items():
                found = _inner_function(value), f"{base.__name__}.{key}", (holder, key)
                code = isinstance(found[0], types.FunctionType)
                if not code or not self.reach.waits(kind, base, key, found):
                    self.later(*found)

    def _module(self, module: nn.Module, name: str) -> None:
        found = self.found
        found.modules[name] = module
        where = f"'{name}'" if name else "the model"
        holder = holders.attributes(module, where, None)
        self._contents(holder, _BOOKKEEPING | {"_parameters", "_buffers", "_modules"})
        for kind in ("_parameters", "_buffers", "_modules"):
            own = vars(module).get(kind)
            if own is not None:
                found.ids[id(own)] = own
                found.holders.append(holders.mapping(own, where, (holder, kind), kind))
                self._all((tensor, f"{where}.{key}") for key, tensor in own.items() if isinstance(tensor, Tensor))
        self.later(type(module), type(module).__name__)
        found.classes.update((base, None) for base in type(module).__mro__[:-1] if of_library(base))

    def _function(self, function: types.FunctionType, name: str) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self.later(wrapped, name)
        if of_library(function) and wrapped is None and function.__module__ != "functools":  # whose closures hold ours
            return
        self.found.functions[function] = name
        self._all(self.reach.by(function))
        for cell in function.__closure__ or ():
            if id(cell) not in self.found.ids:
                self.found.ids[id(cell)] = cell
                self._contents(holders.cell(cell, f"a variable that '{function.__qualname__}' encloses"))
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.later(default, name)
        if not of_library(function):
            self._contents(holders.attributes(function, name, None))
            code, space = function.__code__, function.__globals__
            names = list(dict.fromkeys(mentioned(code)))
            # A global is none of the forward's because an attribute has its name; `sys.modules[__name__].size` asks so.
            by_file = not _OWN_FILE.isdisjoint(names) or {"sys", "modules"} <= {*names}
            here = names if by_file else list(dict.fromkeys(loaded(code)))
            asked = [*space] if "globals" in names else here
            if not _ENVIRONMENT.isdisjoint(names):
                self.later(os.environ, "the environment")
            self._globals(asked, space)
            files = [value for name in asked if isinstance(value := space.get(name), types.ModuleType)]
            seen = set[int]()
            for file in (*files, *imported(function)):
                self._files(names, file, seen)

    def _files(self, names: Sequence[str], file: types.ModuleType, seen: set[int]) -> None:
        """What code that has got hold of a file may ask it for by these names, and the files that it has imported."""
        space = vars(file)
        if _known(file) or id(space) in seen:
            return
        seen.add(id(space))
        for name in names:
            if isinstance(other := space.get(name), types.ModuleType):
                self._files(names, other, seen)
        self._globals(names, space)

    def _globals(self, names: Sequence[str], space: dict[str, Any]) -> None:
        own = [key for key in names if key in space and not isinstance(space[key], types.ModuleType)]
        if own:
            self._contents(holders.file_names(own, space, f"the globals of {space.get('__name__', 'a file')}"))


def scripted_from(function: torch.jit.ScriptFunction) -> Any:
    """The Python function that a scripted one was made of; None for a traced one, which took its branches before."""
    plain = getattr(function, "_torchdynamo_inline", None)
    cached = _try_get_jit_cached_function(plain) if plain is not None else None
    return plain if cached is not None and cached.qualified_name == function.qualified_name else None


def imports_of_others(before: set[str]) -> bool:
    """Whether files other than Python's and well-known libraries' have been imported since."""
    new = [sys.modules.get(name) for name in sys.modules.keys() - before]
    return any(isinstance(file, types.ModuleType) and not _known(file) for file in new)


def _known(file: types.ModuleType) -> bool:
    """Whether a module belongs to Python or a well-known library."""
    home = file.__name__.split(".")[0]
    return home in _LIBRARIES or home in sys.stdlib_module_names


_LEAVES = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    torch.device,
    torch.dtype,
    torch.Size,
    range,
    slice,
    type(...),
)


def is_leaf(thing: Any) -> bool:
    """Whether a value leads to nothing else; a member of an enum, or a number of one's own class, has attributes."""
    return isinstance(thing, _LEAVES) and not hasattr(thing, "__dict__")


def _inner_function(value: Any) -> Any:
    """The function inside what a class has under a name."""
    if isinstance(value, (classmethod, staticmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    if isinstance(value, (cached_property, partialmethod)):
        return value.func
    if isinstance(value, singledispatchmethod):
        return value.dispatcher
    if isinstance(value, types.FunctionType):
        return value
    return inspect.getattr_static(value, "__wrapped__", value)
