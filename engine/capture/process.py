"""What a recording changes in the process: one at a time, and undone on any exit.

PyTorch shows a function mode no custom autograd functions, `torch.Tensor(...)`, `Variable(...)` or `torch.from_numpy`,
and a SyncBatchNorm's own forward runs on GPUs alone. Those are replaced while a forward is recorded. Each replacement
does what the original does in every other thread, and would still do so if an interrupt came between two lines of the
undoing.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.module_tracker import ModuleTracker

from .unseen import Unseen

LOCK = threading.RLock()


class Replacements:
    """Attributes that have another value for a while."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def put(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
        """Replace `owner.name` by `make(its value)`."""
        original = getattr(owner, name)
        own = vars(owner).get(name, _NONE) if isinstance(owner, type) else original

        def undo() -> None:
            if own is not _NONE:
                setattr(owner, name, own)
            elif name in vars(owner):
                delattr(owner, name)

        self._undo.append(undo)  # before the change, so that no interrupt can come between
        setattr(owner, name, make(original))

    def add(self, space: dict[str, Any], name: str, value: Any) -> None:
        """Add a global that was not there."""
        self._undo.append(lambda: space.pop(name, None))
        space[name] = value

    def undo(self) -> None:
        interrupt: BaseException | None = None
        while self._undo:
            try:
                self._undo[-1]()
                self._undo.pop()
            except KeyboardInterrupt as error:  # a second Ctrl-C waits until all is as it was
                interrupt = error
        if interrupt is not None:
            raise interrupt


_NONE = object()


class _Meta(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            return torch.Tensor if type(args[0]) is FakeTensor else type(args[0])
        return type(*args, **kwargs)

    def __instancecheck__(cls, thing: Any) -> bool:
        return isinstance(thing, type)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, type)


class _Type(type, metaclass=_Meta):
    """Stands for `type` in the globals of a network's own code: a tensor without values is a `Tensor` to it."""


class _Here:
    """Whether the calling thread is the one that records, and still does.

    Attributes:
        unseen: what the calls are handed to. It goes when the recording ends: a file that is imported meanwhile has
            the calls that take the others' place for good (`from torch import manual_seed`), and the network with them.
    """

    def __init__(self, unseen: Unseen) -> None:
        self.thread, self.active, self.unseen = threading.get_ident(), True, unseen

    def __call__(self) -> bool:
        return threading.get_ident() == self.thread and self.active

    def end(self) -> None:
        self.active = False
        del self.unseen


@contextmanager
def recording(unseen: Unseen, asking: Iterable[dict[str, Any]] = ()) -> Iterator[None]:
    """One recording at a time in the process; calls that a function mode does not see are handed to `unseen`.

    Args:
        asking: globals of the network's own code that call `type(x)`, which of a tensor without values is `Tensor`.
    """
    here = _Here(unseen)
    with LOCK:
        changes = Replacements()
        try:
            _replace_calls(changes, here)
            for space in asking:
                changes.add(space, "type", _Type)
            yield
        finally:
            here.end()
            changes.undo()


def unbound(owner: type, name: str) -> Callable[..., Any]:
    """A class method written in C, as `Function.apply` is from PyTorch 2.14 on, with its class as an argument."""
    method = vars(owner)[name]
    return lambda cls, *args, **kwargs: method.__get__(None, cls)(*args, **kwargs)


def _replace_calls(changes: Replacements, here: _Here) -> None:
    """Hand the calls that a function mode does not see to `here.unseen`, in the thread that records."""

    def replaced(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[..., Any]:
        def around(original: Callable[..., Any]) -> Callable[..., Any]:
            own = make(original)

            def call(*args: Any, **kwargs: Any) -> Any:
                return (own if here() else original)(*args, **kwargs)

            return call

        return around

    def seeding(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            here.unseen.reseeded(getattr(original, "__name__", "manual_seed"))
            return original(*args, **kwargs)

        return call

    def function_apply(original: Any) -> Any:
        plain = getattr(original, "__func__", None) or unbound(torch.autograd.Function, "apply")

        def call(cls: type, *args: Any, **kwargs: Any) -> Any:
            return here.unseen.custom_function(plain, cls, args, kwargs) if here() else plain(cls, *args, **kwargs)

        return classmethod(call)

    changes.put(torch.autograd.Function, "apply", function_apply)
    # A tensor without values has a `tolist` of its own, which takes it apart and asks for each value.
    changes.put(FakeTensor, "tolist", replaced(lambda _original: torch.Tensor.tolist))
    changes.put(
        random, "_urandom", replaced(lambda _original: lambda size: here.unseen.entropy(size))
    )  # of SystemRandom and of secrets
    made = replaced(lambda original: lambda cls, *args, **kwargs: here.unseen.tensor(original, cls, args, kwargs))
    changes.put(torch.Tensor, "__new__", made)
    variable = replaced(lambda _original: lambda cls, *args, **kwargs: here.unseen.variable(cls, args, kwargs))
    changes.put(type(torch.autograd.Variable), "__call__", variable)
    on_memory = replaced(lambda original: lambda *args, **kwargs: here.unseen.on_memory(original, *args, **kwargs))
    for name in ("from_numpy", "frombuffer", "from_dlpack"):
        changes.put(torch, name, on_memory)
    scripted = replaced(lambda original: lambda f, *args, **kwargs: here.unseen.scripted(original, f, args, kwargs))
    changes.put(torch.jit.ScriptFunction, "__call__", scripted)
    changes.put(nn.SyncBatchNorm, "forward", replaced(lambda _original: lambda m, x: here.unseen.synchronized(m, x)))

    def replaced_hooks(hooks: Any) -> Any:
        silent = replaced(lambda _hook: lambda *_: None)
        return type(hooks)((key, silent(hook) if tracks(hook) else hook) for key, hook in hooks.items())

    hook = replaced(lambda original: lambda *args: here.unseen.backward_hook(original, *args))
    changes.put(nn.modules.module, "BackwardHook", hook)
    norm = nn.modules.batchnorm._BatchNorm
    changes.put(norm, "forward", replaced(lambda original: lambda m, x: here.unseen.batch_norm(original, m, x)))
    checkpointed = replaced(lambda original: lambda *args, **kwargs: here.unseen.checkpointed(original, args, kwargs))
    for name in ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator"):
        if hasattr(torch.utils.checkpoint, name):  # the first is what runs from PyTorch 2.14 on
            changes.put(torch.utils.checkpoint, name, checkpointed)
            break
    for name in ("__enter__", "__exit__"):
        saving = replaced(lambda original: lambda hooks, *args: here.unseen.saving(original, hooks, *args))
        changes.put(torch.autograd.graph.saved_tensors_hooks, name, saving)
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        changes.put(nn.modules.module, name, replaced_hooks)
    for owner, name in _SEEDING:
        changes.put(owner, name, replaced(seeding))
    for name in _EXCHANGES:
        exchange = replaced(lambda _original, name=name: lambda *_args, **_kwargs: here.unseen.exchanged(name))
        changes.put(dist.ProcessGroup, name, exchange)


def tracks(hook: Callable[..., Any]) -> bool:
    """Whether a global hook is of PyTorch's own tracker of modules, with which FlopCounterMode counts by module."""
    return isinstance(getattr(hook, "__self__", None), ModuleTracker)


# What all functions of `torch.distributed` end in that exchange something, but for its functional collectives, which
# are ops. What is no exchange has other names.
_EXCHANGES = tuple(
    name
    for name in vars(getattr(dist, "ProcessGroup", object))
    if name.startswith(("all", "reduce", "broadcast", "gather", "scatter", "send", "recv", "barrier", "monitored"))
)
# `fork_rng` puts a state back by these, too.
_SEEDING = tuple(
    (owner, name)
    for owner in (torch, torch.random, torch.cuda, torch.cuda.random)
    for name in ("manual_seed", "seed", "set_rng_state", "manual_seed_all", "seed_all", "set_rng_state_all")
    if hasattr(owner, name)
)
