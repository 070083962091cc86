"""The function mode that writes down every call of a forward, and what each call does to memory and gradients."""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import UnsupportedError
from ..parallel.processes import world
from .aliases import Alias, Aliases, Step, inverse, is_same
from .corrected import CORRECTED
from .modes import straight_through
from .program import CustomFunction, Op, Program, Ref, Value, bind, known_values, name_of, place, refs
from .state import Snapshot

_TORCH = os.path.dirname(torch.__file__)
_ENGINE = os.path.dirname(os.path.dirname(__file__))
# Python values of tensors. They are right where they come from the network's own state alone.
_TAKEN = frozenset(
    {
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__complex__",
        "numpy",
        "is_nonzero",
        "equal",
        "allclose",
        "__array__",
    }
)
_REFUSED = {
    "register_hook": "registers a hook on a tensor, which would see the gradients of tiles; use gigamorph explain, or "
    "a hook on a parameter outside of the forward",
    "register_post_accumulate_grad_hook": "registers a hook on a tensor; do so outside of the forward",
    "retain_grad": "keeps the gradient of a tensor; return the tensor and differentiate with respect to it outside",
    "backward": "differentiates inside the forward; do so outside of it",
    "grad": "reads or takes a gradient inside the forward; do so outside of it",
    "set_": "puts another memory under a tensor; write values with copy_",
    "resize_": "changes the size of a tensor in place; make a new one",
    "resize_as_": "changes the size of a tensor in place; make a new one",
    "native_group_norm": "calls native_group_norm with the image's size as numbers; use F.group_norm",
    "share_memory_": "moves a tensor to shared memory; do so outside of the forward",
}


class CumulativeAverage(float):
    """Stands for the momentum of a BatchNorm that averages all batches: one over what its counter says.

    Attributes:
        module: the BatchNorm.
    """

    module: nn.modules.batchnorm._BatchNorm


def line_of() -> str:
    """File and line of the innermost running code that is neither PyTorch's nor the engine's; empty if none is."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if frame.f_code.co_name == "capture" and _is_engine(name):
            break
        if not name.startswith(_TORCH) and name != contextlib.__file__ and not _is_engine(name):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _is_engine(name: str) -> bool:
    home = os.path.dirname(name)
    return home == _ENGINE or (os.path.dirname(home) == _ENGINE and os.path.basename(home) in ("capture", "ops"))


class Recorder(TorchFunctionMode):
    """Records the calls of one forward.

    Args:
        model: the network.
        fake: makes tensors without values.
        device: of the image.
        snapshot: what was there before the recording.
    """

    def __init__(self, model: nn.Module, fake: FakeTensorMode, device: torch.device, snapshot: Snapshot):
        self.fake, self.device, self.snapshot = fake, device, snapshot
        self.entry_grad, self.entry_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.program = Program(image=0, grad=self.entry_grad)
        self.names: dict[int, str] = {}
        for name, tensor in [
            *model.named_buffers(remove_duplicate=False),
            *model.named_parameters(remove_duplicate=False),
        ]:
            self.names[id(tensor)] = name
        self.numbers: dict[int, int] = {}  # id of a tensor -> its present value
        self.twins: dict[int, Tensor] = {}  # id of a real tensor -> fake twin
        self.written: set[int] = set()  # memory of real tensors that has been written to
        self.first: dict[int, int] = {}  # id of a tensor from outside -> the value that it came with
        self.alive: list[Any] = []  # ids stay unique only while their objects live
        self.weak: list[weakref.ref[Tensor]] = []
        self.aliases = Aliases()
        self.path: list[str] = []
        self.line = ""  # of the call that is being recorded
        self.last = ""  # module of the latest call, for errors that come to light after its hooks have run
        self.leak: UnsupportedError | None = None
        self.entry_autocast = self._autocast()
        self.group: Any = None  # of the SyncBatchNorm whose forward is running

    def _autocast(self) -> tuple[bool, torch.dtype]:
        kind = self.device.type
        return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    # -- values -------------------------------------------------------------------------------------------------

    def given(self, shape: Any, dtype: torch.dtype, grad: bool | str = False) -> Tensor:
        """A tensor that comes from outside, without values; see `program.wants`."""
        with torch.inference_mode(False), torch.enable_grad():
            made = torch.empty(tuple(shape), dtype=dtype, device=self.device).requires_grad_(bool(grad))
            made = made.clone() if grad == "made" else made
        self.first[id(made)] = self.new_value(made)
        self.aliases.add(made, None)
        return made

    def new_value(self, tensor: Tensor, name: str | None = None, constant: Tensor | None = None) -> int:
        """A number for a tensor's present value."""
        number = self._number(tensor)
        value = self.program.values[number]
        value.name, value.constant = name, constant
        self.numbers[id(tensor)] = number
        self.alive.append(tensor)
        self.weak.append(weakref.ref(tensor))
        return number

    def _number(self, like: Tensor, differentiable: bool | None = None) -> int:
        wants = like.requires_grad if differentiable is None else differentiable
        wants = wants or not self.entry_grad
        self.program.values.append(Value(like.shape, like.dtype, like.device, differentiable=wants))
        return len(self.program.values) - 1

    def twin(self, tensor: Tensor) -> Tensor:
        """The fake tensor that stands for `tensor`; itself if it was made during the recording."""
        if id(tensor) in self.numbers:
            return tensor
        if id(tensor) in self.twins:
            return self.twins[id(tensor)]
        if self.fake.is_our_fake(tensor):
            return self._unseen(tensor)
        if tensor.layout != torch.strided:
            raise UnsupportedError(f"{self.where()} reads a sparse tensor; make it dense")
        if tensor.untyped_storage()._cdata in self.written:
            raise UnsupportedError(
                f"{self.where()} reads a tensor whose memory was written to through another tensor of the network; "
                "keep one of them, and make the other from it in the forward"
            )
        with torch.inference_mode(False):
            device = self.device if tensor.is_meta else tensor.device  # plans take networks without values
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            twin.requires_grad_(tensor.requires_grad)
        self.alive.append(tensor)
        self.twins[id(tensor)] = twin
        name = self.names.get(id(tensor))
        number = self.first[id(twin)] = self.new_value(twin, name, None if name else tensor)
        self.aliases.add(twin, None)
        self.program.values[number].trainable = tensor.requires_grad
        return twin

    def _unseen(self, tensor: Tensor) -> Tensor:
        """A tensor that no recorded call made: `Variable(x)` is one on the memory of x."""
        known = self.aliases.twin(tensor)
        if known is None:
            raise UnsupportedError(
                f"{self.where()} uses a tensor that was made outside of any recorded call (a scripted or compiled "
                "part?); give the plain eager module"
            )
        number = self.present(known)
        if known.requires_grad and not tensor.requires_grad:
            number = self._emit(Tensor.detach, "detach", (number,), tensor, False)
        self.numbers[id(tensor)] = number
        self.alive.append(tensor)
        self.weak.append(weakref.ref(tensor))
        self.aliases.add(tensor, Step(Tensor.detach, "detach", (known,), {}, known, (tensor,), 0))
        return tensor

    def present(self, tensor: Tensor) -> int:
        """The number of a tensor's present value; a view whose memory was written to is made again."""
        alias = self.aliases.of.get(id(tensor))
        if alias is not None and alias.version != alias.memory.version:
            root = alias.memory.root
            self.numbers[id(tensor)] = self._again(alias, self.numbers[id(root)])[-1]
            alias.version = alias.memory.version
        return self.numbers[id(tensor)]

    def _again(self, alias: Alias, value: int) -> list[int]:
        """The values along the way from a root's value to a view."""
        found = [value]
        for step in alias.chain:
            parent = step.parent
            if is_same(step) and step.name != "detach":
                found.append(found[-1])
                continue
            as_ref = lambda a, p=parent: Ref(found[-1]) if a is p else self._ref(a)  # noqa: E731
            args, kwargs = tree_map(as_ref, (step.args, step.kwargs))
            numbers = tuple(self._number(t) for t in step.outputs)
            self._append(step.func, step.name, args, kwargs, numbers, ())
            found.append(numbers[step.index])
        return found

    def _ref(self, leaf: Any) -> Any:
        return Ref(self.present(leaf)) if isinstance(leaf, Tensor) else leaf

    # -- calls --------------------------------------------------------------------------------------------------

    def where(self) -> str:
        return place(self.path[-1] if self.path else "", self.line)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.line = line_of()
        return self._call(func, args, kwargs or {})

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.last = self.where()
        name = getattr(func, "__name__", "")
        if name == "__set__":
            return self._assigned(func, args)
        if any(isinstance(a, Tensor) and a.is_meta for a in args) and self._seen_through():
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda a: self.twin(a) if isinstance(a, Tensor) else a, (args, kwargs))
        if func is Tensor.new and args[1:] and not isinstance(args[1], (list, Tensor)):
            func = Tensor.new_empty
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        self._refuse(func, name, tensors, args, kwargs)
        if name in _TAKEN and tensors:
            return self._taken(func, name, args, kwargs)
        if not tensors and self._own_generator(args, kwargs):
            with unset_fake_temporarily(), self._no_inference():
                return func(*args, **kwargs)  # a constant where it is used
        before = [(t, t._version) for t in tensors]
        with self._no_inference():
            result = func(*args, **kwargs)
        outputs = [r for r in tree_flatten(result)[0] if isinstance(r, Tensor)]
        if not tensors and outputs and not any(self.fake.is_our_fake(r) for r in outputs):
            return result  # a real tensor; it is a constant where it is used
        changed = [t for t, version in before if t._version != version]
        written = self._written(func, args, kwargs, changed, outputs)
        fresh = [r for r in outputs if id(r) not in self.numbers or any(r is w for w in written)]
        if func is Tensor.detach_ or name == "detach_":
            self._detached(args[0])
            return result
        if not fresh and not written:
            return result  # a host read (shape, dtype, ...) or the very object that came in
        if self._seen_through():
            return result
        self._record(func, args, kwargs, tensors, outputs, written)
        return result

    @contextlib.contextmanager
    def _no_inference(self) -> Iterator[None]:
        """Tensors of inference mode count no versions: calls are made outside of it."""
        if not torch.is_inference_mode_enabled():
            yield
            return
        if not self.entry_inference:
            raise UnsupportedError(f"{self.where()} runs in inference_mode inside the forward; use torch.no_grad()")
        with torch.inference_mode(False), torch.no_grad():
            yield

    def _refuse(self, func: Any, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> None:
        """What cannot be done again in later calls."""
        if name == "__get__" and func in (Tensor.grad.__get__,):  # pyright: ignore
            name = "grad"
        if func is torch.autograd.grad or func is torch.autograd.backward:
            name = "grad"
        if name == "resize_" and tensors and _ints(args[1:]) == tuple(tensors[0].shape):
            return
        if name in _REFUSED and tensors:
            raise UnsupportedError(f"{self.where()} {_REFUSED[name]}")
        if name == "requires_grad_" and tensors and tensors[0].requires_grad != (*args[1:], *kwargs.values(), True)[0]:
            raise UnsupportedError(f"{self.where()} calls requires_grad_() on a tensor; do so outside of the forward")
        if tensors and self._own_generator(args, kwargs):
            raise UnsupportedError(
                f"{self.where()} draws from a generator that the forward makes; draw these numbers once, in the "
                "constructor, and keep them in a buffer"
            )

    def _own_generator(self, args: Any, kwargs: Any) -> bool:
        """Whether a call draws from a generator that the forward has made: the same numbers in each call."""
        found = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)]
        return any(not self.snapshot.was_there(generator) for generator in found)

    def _taken(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A Python value of tensors that depend on the network's state alone."""
        program, call = self.program, tree_map(self._ref, (args, kwargs))

        def take(state: Callable[[int], Tensor]) -> Any:
            env = {n: known_values(program, n, state) for n in refs(call)}
            if any(value is None for value in env.values()):
                return NotImplemented
            own_args, own_kwargs = bind(call, env)
            with torch.no_grad():
                return func(*own_args, **own_kwargs)

        reals = dict(self.state())
        with unset_fake_temporarily():
            value = take(lambda number: reals[number])
        if value is NotImplemented:
            raise UnsupportedError(
                f"{self.where()} takes a Python value or a shape from the image ('{name}'); such data-dependent "
                "control flow cannot be recorded"
            )
        program.reads.append((take, value))
        return value

    def state(self) -> Iterator[tuple[int, Tensor]]:
        """The values that stand for real tensors."""
        reals = {id(twin): key for key, twin in self.twins.items()}
        objects = {id(t): t for t in self.alive}
        for twin_id, number in self.first.items():
            if twin_id in reals:
                yield number, objects[reals[twin_id]]

    def _assigned(self, func: Any, args: Any) -> None:
        """`tensor.data = value` and other assignments to a tensor's properties."""
        what = _PROPERTIES.get(func, "a property")
        if what != "data":
            raise UnsupportedError(f"{self.where()} assigns '{what}' of a tensor; do so outside of the forward")
        tensor, value = (self.twin(a) for a in args)
        if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
            raise UnsupportedError(f"{self.where()} assigns '.data' of another shape or dtype; make a new tensor")
        number = self.present(value)
        if value.requires_grad:
            number = self._emit(Tensor.detach, "detach", (number,), tensor, False)
        self._refuse_reads(tensor)
        self._write(tensor, number, tracked=False)
        if id(tensor) in self.first:
            self.program.assigned.add(self.first[id(tensor)])

    def _refuse_reads(self, tensor: Tensor) -> None:
        """A write that autograd does not notice changes what earlier calls have kept for their gradients."""
        root = self.aliases.of[id(tensor)].memory.root
        if not root.requires_grad:
            return
        number = self.numbers[id(root)]
        if not root.is_leaf or any(number in op.inputs and not _views(op) for op in self.program.ops):
            raise UnsupportedError(
                f"{self.where()} writes through '.data' into a tensor that gradients flow through; write it under "
                "torch.no_grad(), before it is used"
            )

    def _seen_through(self) -> bool:
        """Whether the call was made inside of a call, where PyTorch takes a fake tensor's op apart.

        TorchScript runs in C++ and shows only these pieces: a garbage program, no error.
        """
        frame = sys._getframe(3)
        for _ in range(12):
            if frame is None:
                return False
            if frame.f_code.co_filename.endswith(("_subclasses/fake_tensor.py", "_subclasses/fake_impls.py")):
                if _harmless(frame):
                    return True
                self.leak = UnsupportedError(
                    f"{self.where()} runs TorchScript, whose calls cannot be seen; give the plain eager module"
                )
                raise self.leak
            frame = frame.f_back
        return False

    def _written(self, func: Any, args: Any, kwargs: Any, changed: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        """The arguments that a call wrote to; not those that share their memory."""
        running = self._running(func, args, kwargs)
        if len(changed) < 2:
            return [*changed, *running]
        written = changed
        memory = lambda t: t.untyped_storage()._cdata  # noqa: E731
        first = [t for t in outputs if any(t is w for w in written)]
        out = kwargs.get("out")
        first += [out] if isinstance(out, Tensor) else list(out or ())
        first += [args[0]] if args and isinstance(args[0], Tensor) else []
        found: dict[int, Tensor] = {}
        for tensor in [*(t for t in first if any(t is w for w in written)), *written]:
            found.setdefault(memory(tensor), tensor)
        return [*found.values(), *running]

    def _running(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """The running statistics that a norm changes without telling autograd."""
        names = {"batch_norm": ("training", 5), "instance_norm": ("use_input_stats", 5)}
        if getattr(func, "__name__", "") not in names:
            return []
        flag, place = names[func.__name__]
        if isinstance(func, type(torch.batch_norm)):  # weight and bias come before the running statistics
            means = [*args[3:5], *(kwargs.get(n) for n in ("running_mean", "running_var"))]
        else:
            means = [*args[1:3], *(kwargs.get(n) for n in ("running_mean", "running_var"))]
        live = kwargs.get(flag, args[place] if len(args) > place else flag == "use_input_stats")
        return [t for t in means if isinstance(t, Tensor)] if live else []

    def _record(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], outputs: list[Tensor], written: list[Tensor]
    ) -> None:
        args, kwargs = tree_map(self._averaging, (args, kwargs))
        ref_args, ref_kwargs = tree_map(self._ref, (args, kwargs))
        name = name_of(func)
        if func is Tensor.data.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            func, name = Tensor.detach, "data"
        mutated = tuple(dict.fromkeys(self.numbers[id(w)] for w in written))
        silent = not torch.is_grad_enabled() and self.entry_grad
        if torch.is_grad_enabled() and not self.entry_grad and any(t.requires_grad for t in outputs):
            raise UnsupportedError(
                f"{self.where()} switches gradients on inside a forward that runs without them; call the network with "
                "gradients enabled"
            )
        numbers: list[int] = []
        after: list[tuple[Tensor, int, bool]] = []
        for tensor in dict.fromkeys([*outputs, *written]):
            is_written = any(tensor is w for w in written)
            if id(tensor) in self.numbers and not is_written:
                numbers.append(self.numbers[id(tensor)])
                continue
            number = self._number(tensor)
            numbers.append(number)
            after.append((tensor, number, is_written))
        plain: Any = Tensor.detach if name == "data" else CORRECTED.get(func, func)
        # Silent calls without a graph to cut are recorded as they are.
        wants = any(self.program.values[v].differentiable for v in refs((ref_args, ref_kwargs)))
        self._append(plain, "detach" if name == "data" else name, ref_args, ref_kwargs, tuple(numbers), mutated)
        for tensor, number, is_written in after:
            floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
            if is_written:
                if silent and wants and floating:
                    number = self._emit(Tensor.detach, "detach", (number,), tensor, False)
                alias = self.aliases.of.get(id(tensor))
                if alias is not None and alias.untracked:
                    self._refuse_reads(tensor)
                self._write(tensor, number, tracked=not silent and tensor.requires_grad)
                continue
            parent = self.aliases.parent(tensor, tensors)
            made = [t for t, _, changed in after if not changed]
            step = None
            if parent is not None:
                index = next(n for n, t in enumerate(made) if t is tensor)
                step = Step(plain, name, args, kwargs, parent, tuple(made), index)
            if silent and wants and floating:
                number = self._emit(Tensor.detach, "detach", (number,), tensor, False)
            self.numbers[id(tensor)] = number
            self.alive.append(tensor)
            self.weak.append(weakref.ref(tensor))
            self.aliases.add(tensor, step)

    def _write(self, tensor: Tensor, number: int, tracked: bool) -> None:
        """A tensor has a new value, and with it its root."""
        alias = self.aliases.of[id(tensor)]
        memory = alias.memory
        root = memory.root
        old, own = self.numbers[id(root)], number
        if alias.chain:
            values = self._again(alias, old)
            for step, parent in zip(reversed(alias.chain), reversed(values[:-1]), strict=True):
                if is_same(step):
                    continue
                func, name, arguments = inverse(step, self.where())
                number = self._emit(func, name, arguments(parent, number), step.parent, None)
        if not tracked and root.requires_grad and self.program.values[old].differentiable:
            number = self._emit(straight_through, "straight_through", (old, number), root, True)
        elif not tracked and self.program.values[number].differentiable and not root.requires_grad:
            number = self._emit(Tensor.detach, "detach", (number,), root, False)
        memory.version += 1
        root_alias = self.aliases.of[id(root)]
        self.numbers[id(root)], root_alias.version = number, memory.version
        if tensor is not root:
            self.numbers[id(tensor)] = own
            alias.version = memory.version if tracked else -1  # else made again from the root when it is read
        self._mates(root)

    def _mates(self, root: Tensor) -> None:
        """Refuse writes to real tensors whose memory other tensors of the network look at."""
        real = {id(twin): key for key, twin in self.twins.items()}.get(id(root))
        if real is None:
            return
        objects = {id(t): t for t in self.alive}
        memory = objects[real].untyped_storage()._cdata
        self.written.add(memory)
        for key in self.twins:
            if key != real and objects[key].untyped_storage()._cdata == memory:
                raise UnsupportedError(
                    f"{self.where()} writes to a tensor whose memory another tensor of the network shares; keep one of "
                    "them, and make the other from it in the forward"
                )

    def _detached(self, tensor: Tensor) -> None:
        """`detach_`: the same tensor, from here on without its graph."""
        number = self._emit(Tensor.detach, "detach", (self.present(tensor),), tensor, False)
        self.numbers[id(tensor)] = number

    def _emit(self, func: Any, name: str, args: tuple[Any, ...], like: Tensor, differentiable: bool | None) -> int:
        """A call of our own; numbers stand for values."""
        numbers = [a for a in args if type(a) is int]
        if name in ("reshape", "transpose", "permute"):
            own, rest = (Ref(args[0]),), args[1:]
        elif name == "__setitem__":
            own, rest = (Ref(args[0]), tree_map(self._ref, args[1]), Ref(args[2])), ()
        else:
            own, rest = tuple(Ref(a) for a in numbers), ()
        if differentiable is None:
            differentiable = any(self.program.values[v].differentiable for v in refs(own))
        number = self._number(like, differentiable)
        mutated = (args[0],) if name == "__setitem__" else ()
        self._append(func, name, (*own, *rest), {}, (number,), mutated)
        return number

    def _append(
        self, func: Any, name: str, args: Any, kwargs: Any, outputs: tuple[int, ...], mutated: tuple[int, ...]
    ) -> None:
        state = self._autocast()
        self.program.ops.append(
            Op(
                func=func,
                name=name,
                args=args,
                kwargs=kwargs,
                inputs=tuple(dict.fromkeys(refs((args, kwargs)))),
                outputs=outputs,
                mutated=mutated,
                module=self.path[-1] if self.path else "",
                line=self.line,
                autocast=None if state == self.entry_autocast else state,
                group=self.group,
            )
        )

    def _averaging(self, leaf: Any) -> Any:
        """The momentum of a cumulative average: one over the counter as it is now, a tensor."""
        if not isinstance(leaf, CumulativeAverage):
            return leaf
        counter = leaf.module.num_batches_tracked
        assert counter is not None
        twin = self.twin(counter)
        with self._no_inference():
            share = torch.empty((), dtype=torch.float64, device=twin.device)
        number = self.new_value(share)
        self._append(_reciprocal, "reciprocal", (Ref(self.present(twin)),), {}, (number,), ())
        self.aliases.add(share, None)
        return share

    # -- calls that a function mode does not see ----------------------------------------------------------------

    def custom_function(self, plain: Callable[..., Any], cls: type, args: Any, kwargs: dict[str, Any]) -> Any:
        """The call of an `autograd.Function`, whose own way to apply it is `plain`."""
        self.line = line_of()
        if cls.__module__ == "torch.utils.checkpoint" and cls.__name__ == "CheckpointFunction":
            run, _preserve, *rest = args
            wants = any(isinstance(a, Tensor) and a.requires_grad for a in rest)
            if not wants:
                with torch.no_grad():
                    return run(*rest)
            with self._run_twice():
                return run(*rest)
        if not _active(self):
            return plain(cls, *args, **kwargs)
        with _pop_mode_temporarily():
            return self._call(CustomFunction(cls), args, kwargs)

    def from_numpy(self, original: Callable[..., Any], array: Any) -> Tensor:
        """A real tensor on an array's memory; it is a constant where it is used."""
        with unset_fake_temporarily():
            return original(array)

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

    @contextlib.contextmanager
    def _run_twice(self) -> Iterator[None]:
        """Refuse changes of state in what stock computes a second time in its backward, and changes twice."""
        where = self.where()
        before = self.updates(), self.snapshot.now()
        yield
        if torch.is_grad_enabled() and (self.updates(), self.snapshot.now()) != before:
            raise UnsupportedError(
                f"{where} checkpoints layers that change their state (running statistics), which stock PyTorch changes "
                "again in the backward; leave checkpointing out, the memory budget does its work"
            )

    def synchronized(self, module: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        """A SyncBatchNorm as the BatchNorm that it is, with its processes."""
        group = (module.process_group or dist.group.WORLD) if module.training and world() > 1 else None
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        try:
            return nn.modules.batchnorm._BatchNorm.forward(module, x)
        finally:
            self.group = None

    def reseeded(self, name: str) -> None:
        raise UnsupportedError(
            f"{place(''.join(self.path[-1:]), line_of())} calls '{name}' in the forward, which would give other random "
            "numbers in each tile; draw fixed numbers once, in the constructor, and keep them in a buffer"
        )

    # -- the end ------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Let all tensors of the recording go."""
        self.alive.clear()
        self.aliases = Aliases()
        self.twins.clear()

    def updates(self) -> list[tuple[int, int]]:
        """The tensors from outside that were written to: the value that each came with, and its last."""
        found = []
        for key, number in self.first.items():
            alias = self.aliases.of.get(key)
            if alias is not None and self.numbers[key] != number:
                found.append((number, self.numbers[key]))
        return found


_PROPERTIES = {
    getattr(Tensor, n).__set__: n
    for n in ("data", "grad", "requires_grad", "names", "real", "imag")
    if hasattr(getattr(Tensor, n, None), "__set__")
}


def _ints(args: Any) -> tuple[int, ...]:
    return tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else tuple(args)


def _reciprocal(counter: Tensor) -> Tensor:
    return counter.to(torch.float32 if counter.device.type == "mps" else torch.float64).reciprocal()


def _active(mode: TorchFunctionMode) -> bool:
    from torch.overrides import _get_current_function_mode

    return _get_current_function_mode() is mode


def _views(op: Op) -> bool:
    return op.name in ("detach", "data", "view", "reshape", "transpose", "t", "permute", "__getitem__", "shape")


def _harmless(frame: Any) -> bool:
    """Whether PyTorch takes a call apart that only gives a tensor another Python object."""
    while frame is not None:
        op = frame.f_locals.get("func")
        name = str(op) if op is not None else ""
        if name.startswith("aten."):
            return name.split(".")[1] in ("detach", "lift_fresh", "alias", "lift")
        frame = frame.f_back if frame.f_code.co_filename.endswith("fake_tensor.py") else None
    return False
