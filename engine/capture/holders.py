"""What a forward can read and change besides its arguments: attributes, containers, closures, globals.

A *holder* is one place of named contents: a module's or object's attributes, a dict, list, set or deque, a cell of a
closure, those names of a Python file's globals that a function mentions. The walk begins at a network and goes through
attributes, containers, plain objects and the functions (hooks, methods, closures) that the network's own code consists
of. It stops at code of well-known libraries, whose objects count as one thing each.
"""

from __future__ import annotations

import enum
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
_FEW = 20_000  # holders; a network whose attributes lead to more has a whole program hanging on it


@dataclass(eq=False)
class Holder:
    """A place of named contents.

    Attributes:
        owner: the object that has them.
        name: what messages call it.
        read: the contents by key, as they are now.
        write: makes the contents these.
        parent: the holder in which the owner was found, and under which key; None for modules and functions.
        kind: which of a module's own dictionaries it is: "_parameters", "_buffers" or "_modules".
        fast: a dict or mapping whose values are the contents.
    """

    owner: Any
    name: str
    read: Callable[[], dict[Any, Any]]
    write: Callable[[dict[Any, Any]], None]
    parent: tuple[Holder, Any] | None = None
    kind: str = ""
    fast: Any = None


def _attributes(thing: Any, name: str, parent: tuple[Holder, Any] | None) -> Holder:
    own = vars(thing)

    def write(contents: dict[Any, Any]) -> None:
        for key in [key for key in own if key not in contents]:
            del own[key]
        own.update(contents)

    return Holder(own, name, lambda: dict(own), write, parent, fast=own)


def _mapping(thing: dict[Any, Any], name: str, parent: tuple[Holder, Any] | None, kind: str = "") -> Holder:
    def write(contents: dict[Any, Any]) -> None:
        kind: Any = OrderedDict if isinstance(thing, OrderedDict) else dict
        kind.clear(thing)
        for key, value in contents.items():
            kind.__setitem__(thing, key, value)  # not the class's own, which may do more

    return Holder(thing, name, lambda: dict(dict.items(thing)), write, parent, kind, fast=thing)


def _sequence(thing: Any, name: str, parent: tuple[Holder, Any] | None) -> Holder:
    def write(contents: dict[Any, Any]) -> None:
        thing.clear()
        thing.extend(contents.values())

    return Holder(thing, name, lambda: dict(enumerate(thing)), write, parent)


def _set(thing: set[Any], name: str, parent: tuple[Holder, Any] | None) -> Holder:
    def write(contents: dict[Any, Any]) -> None:
        thing.clear()
        thing.update(contents.values())

    return Holder(thing, name, lambda: {id(item): item for item in thing}, write, parent)


def _cell(thing: types.CellType, name: str) -> Holder:
    def read() -> dict[Any, Any]:
        try:
            return {"contents": thing.cell_contents}
        except ValueError:
            return {}

    def write(contents: dict[Any, Any]) -> None:
        if "contents" in contents:
            thing.cell_contents = contents["contents"]
        elif read():
            del thing.cell_contents

    return Holder(thing, name, read, write)


def _globals(names: Sequence[str], space: dict[str, Any], name: str) -> Holder:
    def write(contents: dict[Any, Any]) -> None:
        for key in names:
            if key in contents:
                space[key] = contents[key]
            else:
                space.pop(key, None)

    return Holder(space, name, lambda: {key: space[key] for key in names if key in space}, write)


def mentioned(code: types.CodeType) -> Iterator[str]:
    """The global names that a function and the functions inside it mention."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from mentioned(constant)


def of_library(thing: Any) -> bool:
    """Whether a function or an object's class belongs to Python or a well-known library."""
    home = getattr(thing if isinstance(thing, (types.FunctionType, type)) else type(thing), "__module__", None)
    return home is None or home == "builtins" or home.split(".")[0] in _LIBRARIES


@dataclass
class Found:
    """What a walk has found.

    Attributes:
        holders: in the order in which they were met.
        classes: of the modules met, with their bases.
        codes: of the functions met that are no library's, with what messages call them.
    """

    holders: list[Holder] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    classes: dict[type, None] = field(default_factory=dict)
    functions: dict[types.FunctionType, str] = field(default_factory=dict)
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
    while way.queue and len(way.found.holders) < _FEW:
        way.visit(*way.queue.popleft())
    return way.found


class _Walk:
    """What has been found, and what is to be looked at next: a thing, what messages call it, and where it was found."""

    def __init__(self) -> None:
        self.found = Found()
        self.queue: deque[tuple[Any, str, tuple[Holder, Any] | None]] = deque()

    def later(self, thing: Any, name: str, parent: tuple[Holder, Any] | None = None) -> None:
        if id(thing) not in self.found.ids:
            self.queue.append((thing, name, parent))

    def visit(self, thing: Any, name: str, parent: tuple[Holder, Any] | None) -> None:
        """Note what a thing holds, and put off what that leads to."""
        if id(thing) in self.found.ids or isinstance(thing, _LEAVES):
            return
        self.found.ids[id(thing)] = thing
        if isinstance(thing, nn.Module):
            self._module(thing, name)
        elif isinstance(thing, types.FunctionType):
            self._function(thing, name)
        elif isinstance(thing, types.MethodType):
            self.later(thing.__func__, name)
            self.later(thing.__self__, name)
        elif isinstance(thing, partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                self.later(part, name)
        elif isinstance(thing, dict):
            self._contents(_mapping(thing, name, parent))
            if type(thing) is not dict and getattr(thing, "__dict__", None) and not of_library(thing):
                self._contents(_attributes(thing, name, parent))
        elif isinstance(thing, (list, deque)):
            self._contents(_sequence(thing, name, parent))
        elif isinstance(thing, set):
            self._contents(_set(thing, name, parent))
        elif isinstance(thing, (tuple, frozenset)):
            for item in thing:
                self.later(item, name, None)
        elif hasattr(thing, "__wrapped__") and not isinstance(thing, type):
            self.later(thing.__wrapped__, name)
        elif not isinstance(thing, type) and hasattr(thing, "__dict__") and not of_library(thing):
            self._contents(_attributes(thing, name, parent))
            self._methods(type(thing))
        elif isinstance(thing, types.SimpleNamespace):
            self._contents(_attributes(thing, name, parent))

    def _contents(self, holder: Holder, skip: frozenset[str] = frozenset()) -> None:
        self.found.holders.append(holder)
        for key, value in holder.read().items():
            if key not in skip:
                name = f"{holder.name}.{key}" if isinstance(key, str) else f"{holder.name}[...]"
                self.later(value, name, (holder, key))

    def _methods(self, kind: type) -> None:
        for key, value in vars(kind).items():
            self.later(_inner_function(value), f"{kind.__name__}.{key}")

    def _module(self, module: nn.Module, name: str) -> None:
        found = self.found
        found.modules[name] = module
        where = f"'{name}'" if name else "the model"
        holder = _attributes(module, where, None)
        self._contents(holder, _BOOKKEEPING | {"_parameters", "_buffers", "_modules"})
        for kind in ("_parameters", "_buffers", "_modules"):
            own = vars(module).get(kind)
            if own is not None:
                found.ids[id(own)] = own
                found.holders.append(_mapping(own, where, (holder, kind), kind))
        for base in type(module).__mro__:
            if base not in found.classes and base is not object:
                found.classes[base] = None
                if not of_library(base):
                    self._methods(base)

    def _function(self, function: types.FunctionType, name: str) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self.later(wrapped, name)
        if of_library(function) and wrapped is None:
            return
        self.found.functions[function] = name
        for cell in function.__closure__ or ():
            if id(cell) not in self.found.ids:
                self.found.ids[id(cell)] = cell
                self._contents(_cell(cell, f"a variable that '{function.__qualname__}' encloses"))
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.later(default, name)
        space = function.__globals__
        if of_library(function):
            return
        names = [key for key in dict.fromkeys(mentioned(function.__code__)) if key in space]
        names = [key for key in names if not isinstance(space[key], (types.ModuleType, type))]
        if names:
            self._contents(_globals(names, space, f"the globals of {space.get('__name__', 'a file')}"))


_LEAVES = (
    Tensor,
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    enum.Enum,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.device,
    torch.dtype,
    torch.Generator,
    torch.Size,
    range,
    slice,
    type(...),
)


def _inner_function(value: Any) -> Any:
    """The function inside what a class has under a name."""
    if isinstance(value, (classmethod, staticmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    return getattr(value, "__wrapped__", value) if not isinstance(value, types.FunctionType) else value
