"""Calls that a function mode does not see; `process.recording` hands them over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from ..errors import UnsupportedError
from ..parallel.processes import world
from .arrays import MEMORY
from .averages import CumulativeAverage
from .lines import line_of
from .module_hooks import RecordedHook
from .program import CustomFunction, place
from .recorder import Recorder
from .walk import scripted_from


class Unseen:
    """What is done in the place of such a call while a forward is recorded."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.values = recorder, recorder.values

    def custom_function(self, plain: Callable[..., Any], cls: type, args: Any, kwargs: dict[str, Any]) -> Any:
        """The call of an `autograd.Function`, whose own way to apply it is `plain`."""
        self.values.line = line_of()
        if cls.__module__ == "torch.utils.checkpoint" and cls.__name__ == "CheckpointFunction":
            run, _preserve, *rest = args
            wants = any(isinstance(a, Tensor) and a.requires_grad for a in rest)
            if not wants:
                with torch.no_grad():
                    return run(*rest)
            with self._run_twice():
                return run(*rest)
        if not _active(self.recorder):
            return plain(cls, *args, **kwargs)
        with _pop_mode_temporarily():
            return self.recorder.call(CustomFunction(cls), args, kwargs)

    def backward_hook(self, original: Callable[..., Any], *args: Any) -> Any:
        """What a module's call hangs its backward hooks on."""
        if not _active(self.recorder):
            return original(*args)

        def record(function: Callable[..., Any], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            self.values.line = line_of()
            with _pop_mode_temporarily():
                return self.recorder.call(function, tuple(tensors), {})

        return RecordedHook(record, *args)

    def scripted(self, original: Callable[..., Any], function: torch.jit.ScriptFunction, args: Any, kwargs: Any) -> Any:
        """A scripted function runs in C++ and shows no calls: the Python function that it was made of does."""
        plain = scripted_from(function)
        return original(function, *args, **kwargs) if plain is None else plain(*args, **kwargs)

    def tensor(self, original: Callable[..., Any], cls: type, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """`torch.Tensor(2, 3)`, of sizes, or `torch.Tensor([0.5, 2])`, of values, by calls that are seen."""
        sizes = args[0] if len(args) == 1 and isinstance(args[0], torch.Size) else args
        if cls is not Tensor or kwargs or not _active(self.recorder):
            return original(cls, *args, **kwargs)
        if all(isinstance(size, int | np.integer) for size in sizes):
            return torch.empty(sizes or (0,), device="cpu")
        if len(args) == 1 and not isinstance(args[0], Tensor):
            return torch.as_tensor(args[0], dtype=torch.get_default_dtype(), device="cpu")
        return original(cls, *args)

    def variable(self, cls: type, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """`Variable(x)`, of before PyTorch 0.4: `x` without its gradient."""
        if len(args) == 1 and isinstance(args[0], Tensor) and not any(kwargs.values()) and _active(self.recorder):
            return args[0].detach()
        return type.__call__(cls, *args, **kwargs)

    def on_memory(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A real tensor on an array's memory; it is a constant where it is used."""
        if not args or not isinstance(args[0], MEMORY):
            return original(*args, **kwargs)
        with unset_fake_temporarily():
            tensor = original(*args, **kwargs)
        with _pop_mode_temporarily() if _active(self.recorder) else contextlib.nullcontext():
            return self.recorder.on_memory(args[0], tensor)

    def batch_norm(self, original: Callable[..., Tensor], module: Any, x: Tensor) -> Tensor:
        """A BatchNorm without momentum would turn its counter into a Python number, once and for all."""
        if module.momentum is not None or module.num_batches_tracked is None:
            return original(module, x)
        mark = CumulativeAverage(1.0)
        mark.module = module
        module.momentum = mark
        try:
            return original(module, x)
        finally:
            module.momentum = None

    def checkpointed(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[None]:
        """The calls inside of a non-reentrant checkpoint."""
        with self._run_twice():
            yield from original(*args, **kwargs)

    def saving(self, original: Callable[..., Any], hooks: Any, *args: Any) -> Any:
        """The begin or the end of hooks on what autograd keeps; tiles keep something else."""
        if type(hooks).__module__ == "torch.utils.checkpoint":
            return original(hooks, *args)
        if not isinstance(hooks, torch.autograd.graph.save_on_cpu):
            raise self._refused(
                f"{place(''.join(self.values.path[-1:]), line_of())} packs what autograd keeps (saved_tensors_hooks), "
                "of which tiles keep little; leave that out, the memory budget does its work"
            )
        return None

    @contextlib.contextmanager
    def _run_twice(self) -> Iterator[None]:
        """Refuse changes of state in what stock computes a second time in its backward, and changes twice."""
        where = self.values.where()
        before = self.values.updates(), self.recorder.snapshot.now()
        yield
        if torch.is_grad_enabled() and (self.values.updates(), self.recorder.snapshot.now()) != before:
            raise self._refused(
                f"{where} checkpoints layers that change their state (running statistics), which stock PyTorch changes "
                "again in the backward; leave checkpointing out, the memory budget does its work"
            )

    def synchronized(self, module: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        """A SyncBatchNorm as the BatchNorm that it is, with its processes."""
        group = (module.process_group or dist.group.WORLD) if module.training and world() > 1 else None
        self.values.group = group if group is not None and dist.get_world_size(group) > 1 else None
        try:
            return nn.modules.batchnorm._BatchNorm.forward(module, x)
        finally:
            self.values.group = None

    def _refused(self, message: str) -> UnsupportedError:
        return self.recorder.refused(UnsupportedError(message))

    def reseeded(self, name: str) -> None:
        raise self._refused(
            f"{place(''.join(self.values.path[-1:]), line_of())} calls '{name}' in the forward, which would give other "
            "random numbers in each tile; draw fixed numbers once, in the constructor, and keep them in a buffer"
        )

    def exchanged(self, name: str) -> Any:
        raise self._refused(
            f"{place(''.join(self.values.path[-1:]), line_of())} exchanges something with other processes ({name}) in "
            "the forward, which a recording would do once and not again; do so with what the network returns"
        )

    def entropy(self, _size: int) -> bytes:
        raise self._refused(
            f"{place(''.join(self.values.path[-1:]), line_of())} draws from the system's entropy, so it is another "
            "program at each call; draw them outside of the forward and give them as arguments"
        )


def _active(mode: TorchFunctionMode) -> bool:
    from torch.overrides import _get_current_function_mode

    return _get_current_function_mode() is mode
