"""The function mode that writes down every call of a forward, and what each call does to memory and gradients."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from ..errors import UnsupportedError
from .aliases import Step
from .arrays import MEMORY, ON_MEMORY, Arrays, shares
from .averages import averaging
from .call_trees import bind, refs, tree_leaves, tree_map
from .corrected import CORRECTED
from .lines import line_of
from .parts import OF_PARTS, with_weight
from .program import RANDOM, UNSET, Branch, Op, behind, by_chance, given, known_values, name_of
from .quantiles import QUANTILES
from .recurrent import of_one_step
from .refusals import PLACES, REFUSED, as_refusal, data_dependent
from .state import Snapshot
from .tensor_hooks import Registered
from .values import Values

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


class Recorder(TorchFunctionMode):
    """Records the calls of one forward.

    Args:
        values: the program, and what its tensors hold.
        snapshot: what was there before the recording.
        branches: the first truths of tensors that depend on the image, see `Program.branches`; None refuses to branch.

    Attributes:
        last: module of the latest call, for errors that come to light after its hooks have run.
        refusal: the first one; the network's own code may catch it, and a scripted function wraps it in another.
    """

    def __init__(self, values: Values, snapshot: Snapshot, branches: Sequence[bool] | None = None):
        self.values, self.snapshot, self.branches = values, snapshot, branches
        self.entry_inference, self.entry_dtype = torch.is_inference_mode_enabled(), torch.get_default_dtype()
        self.last = ""
        self.refusal: UnsupportedError | None = None
        self.hooks = Registered(values, snapshot.was_there)
        self.arrays = Arrays(values, snapshot)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.values.line = line_of()
        kwargs = kwargs or {}
        if func in OF_PARTS and "out" not in kwargs:
            with self:
                return OF_PARTS[func](*args, **kwargs)
        return self.call(func, args, with_weight(kwargs) if func is F.l1_loss else kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            return self._call(func, args, kwargs)
        except Exception as error:
            told = as_refusal(error, self.last)
            if not isinstance(told, UnsupportedError):
                raise
            raise self.refused(told) from (None if told is error else error)

    def refused(self, error: UnsupportedError) -> UnsupportedError:
        """The error, kept in case that the network's own code catches it."""
        self.refusal = self.refusal or error
        return error

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.last = self.values.where()
        func = QUANTILES.get(func, func)
        name = getattr(func, "__name__", "")
        if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
            raise UnsupportedError(
                f"{self.values.where()} runs torch.func (vmap, grad, jvp) inside the forward; write the dimension that "
                "it maps over into the ops"
            )
        if name == "__set__":
            return self._assigned(func, args)
        if func is Tensor.__hash__:
            return hash(args[0])  # a dict or set of before has it by its own, not by that of what stands for it
        if func is Tensor.__deepcopy__ and not args[0].requires_grad:
            return self.call(Tensor.clone, args[:1], {})
        if name in PLACES and self._seen_through():
            return func(*args, **kwargs)
        if func == _GRAD and (_reader() is nn.Module._wrapped_call_impl.__code__ or self._seen_through()):
            return func(*args)  # PyTorch's profiler, which notes a module whose call begins
        if func == _GRAD_FN and getattr(_reader(), "co_filename", "") == checkpoint.__file__:
            return func(*args)  # before PyTorch 2.13 checkpointing asks so whether gradients are on
        if any(isinstance(a, Tensor) and a.is_meta for a in args) and self._seen_through():
            return func(*args, **kwargs)
        if func is Tensor.new and args[1:] and isinstance(args[1], (int, np.integer, torch.Size)):
            func = Tensor.new_empty
        elif func is Tensor.new and args[1:] and isinstance(args[1], (list, tuple)):
            func = Tensor.new_tensor
        args, kwargs = tree_map(lambda a: self.values.twin(a) if isinstance(a, Tensor) else a, (args, kwargs))
        if func is Tensor.__getitem__ or func is Tensor.__setitem__:
            args = (args[0], self._own_index(func, *args[:2]), *args[2:])
        if func in ON_MEMORY and args and isinstance(args[0], MEMORY):
            with unset_fake_temporarily():
                real = func(*args, **kwargs)
            if shares(args[0], real):
                return self.on_memory(args[0], real)
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if name in ("register_hook", "retain_grad") and tensors:
            if not tensors[0].requires_grad:
                return func(*args, **kwargs)  # which raises
            if not tensors[0].is_leaf:
                return self.hooks.keep_grad(*tensors) if name == "retain_grad" else self.hooks.register(*args, **kwargs)
            if name == "retain_grad":
                return None  # a leaf does so in any case
        self._refuse(func, name, tensors, args, kwargs)
        for tensor in tensors:
            self.arrays.read(tensor)
        if name in _TAKEN and tensors:
            return self._taken(func, name, args, kwargs)
        if func in _FILLED_AT and tensors:
            args, kwargs = self._with_number(_FILLED_AT[func], args, kwargs)
            tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if not tensors and self._own_generator(args, kwargs):
            with unset_fake_temporarily(), self._no_inference():
                return func(*args, **kwargs)  # a constant where it is used
        before = [(t, t._version) for t in tensors]
        with self._no_inference():
            result = of_one_step(name, func, args, kwargs)
            result = func(*args, **kwargs) if result is None else result
        outputs = [r for r in tree_leaves(result) if isinstance(r, Tensor)]
        if not tensors and outputs and not any(self.values.fake.is_our_fake(r) for r in outputs):
            return result  # a real tensor; it is a constant where it is used
        # Of fake tensors in a list PyTorch counts no versions.
        listed = name.startswith("_foreach_") and name.endswith("_")
        changed = list(args[0]) if listed else [t for t, version in before if t._version != version]
        written = self._written(func, args, kwargs, changed, outputs)
        fresh = [r for r in outputs if id(r) not in self.values.numbers or any(r is w for w in written)]
        if func is Tensor.detach_ or name == "detach_":
            self.values.detach(args[0])
            return result
        if not fresh and not written:
            return result  # a host read (shape, dtype, ...) or the very object that came in
        if self._seen_through():
            return result
        self._record(func, args, kwargs, tensors, outputs, written)
        for tensor in written:
            self.arrays.follow(tensor)
        return result

    @contextlib.contextmanager
    def _no_inference(self) -> Iterator[None]:
        """Tensors of inference mode count no versions: calls are made outside of it."""
        if not torch.is_inference_mode_enabled():
            yield
            return
        if not self.entry_inference:
            raise UnsupportedError(
                f"{self.values.where()} runs in inference_mode inside the forward; use torch.no_grad()"
            )
        with torch.inference_mode(False), torch.no_grad():
            yield

    def _refuse(self, func: Any, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> None:
        """What cannot be done again in later calls."""
        if torch.get_default_dtype() is not self.entry_dtype:
            raise UnsupportedError(
                f"{self.values.where()} changes the default dtype inside the forward; give the calls that make tensors "
                "their dtype"
            )
        if name == "__get__" and func == _GRAD:
            name = "grad"
        if name == "__get__" and func == _VERSION:
            name = "_version"
        if name == "__get__" and func == _GRAD_FN and tensors and tensors[0].grad_fn is not None:
            name = "grad_fn"
        if func is torch.autograd.grad or func is torch.autograd.backward:
            name = "grad"
        if name == "resize_" and tensors and _ints(args[1:]) == tuple(tensors[0].shape):
            return
        if name == "detach_" and tensors and tensors[0].requires_grad and id(tensors[0]) in self.values.first:
            raise UnsupportedError(f"{self.values.where()} calls detach_() on what it is given; use x = x.detach()")
        if name in REFUSED and tensors:
            raise UnsupportedError(f"{self.values.where()} {REFUSED[name]}")
        if name == "requires_grad_" and tensors and tensors[0].requires_grad != (*args[1:], *kwargs.values(), True)[0]:
            raise UnsupportedError(
                f"{self.values.where()} calls requires_grad_() on a tensor; do so outside of the forward"
            )
        if tensors and self._own_generator(args, kwargs):
            raise UnsupportedError(
                f"{self.values.where()} draws from a generator that the forward makes; draw these numbers once, in the "
                "constructor, and keep them in a buffer"
            )

    def _own_generator(self, args: Any, kwargs: Any) -> bool:
        """Whether a call draws from a generator that the forward has made: the same numbers in each call."""
        found = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)]
        return any(not self.snapshot.was_there(generator) for generator in found)

    def _taken(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A Python value of tensors that depend on the network's state alone."""
        program, call = self.values.program, tree_map(self.values.ref, (args, kwargs))

        def take_of(state: Callable[[int], Tensor]) -> tuple[Any, Any]:
            env = {n: known_values(program, n, state) for n in refs(call)}
            if any(value is None for value in env.values()):
                return NotImplemented, None
            own_args, own_kwargs = bind(call, env)
            with torch.no_grad():
                return func(*own_args, **own_kwargs), own_args[0] if own_args else None

        reals = dict(self.values.state())
        with unset_fake_temporarily():
            value, tensor = take_of(lambda number: reals[number])
        if value is NotImplemented:
            if not given(program, refs(call)):
                if {op.name.rstrip("_") for op in behind(program, refs(call))} & RANDOM <= UNSET:
                    raise UnsupportedError(
                        f"{self.values.where()} takes a Python value of memory that has no values yet ('{name}'); use "
                        "torch.zeros in the place of torch.empty"
                    )
                raise UnsupportedError(
                    f"{self.values.where()} takes a Python value of a random number ('{name}'), so it is another "
                    "program at each call; draw it outside of the forward, and give it as an argument"
                )
            if self.branches is not None and _is_truth(name, args):
                return self._supposed(args[0])
            raise data_dependent(self.values.where(), f"'{name}'")
        own = (lambda: value.copy()) if isinstance(value, np.ndarray) else lambda: value  # its memory is the tensor's
        program.reads.append((lambda state: take_of(state)[0], own()))
        taken = own()
        if isinstance(value, np.ndarray) and shares(value, tensor):
            self.arrays.give(taken, args[0], partial(self._now, func, name, args, kwargs))
        return taken

    def _own_index(self, func: Any, x: Tensor, index: Any) -> Any:
        """An index with Python's numbers in the place of tensors that depend on the network's state alone.

        Masks by which that state itself is written to stay: they may be others in each call.
        """
        items = index if isinstance(index, tuple) else (index,)
        some = any(isinstance(item, Tensor) and item.dtype == torch.bool for item in items)
        masks = some and (func is Tensor.__getitem__ or given(self.values.program, [self.values.present(x)]))
        axes = [_axes(item) for item in items]
        axis, found = 0, list[Any]()
        for item, number in zip(items, axes, strict=True):
            axis += x.dim() - sum(axes) if item is ... else 0
            found.append(self._own_item(item, x.shape[axis] if axis < x.dim() and masks else None))
            axis += number
        return tuple(found) if isinstance(index, tuple) else found[0]

    def _own_item(self, item: Any, size: int | None) -> Any:
        if isinstance(item, slice):
            return slice(*(self._own_item(bound, size) for bound in (item.start, item.stop, item.step)))
        if not isinstance(item, Tensor) or item.dim() != (item.dtype == torch.bool) or item.is_floating_point():
            return item
        fits = not item.dim() or len(item) == size  # else it is an error in stock
        if not fits or given(self.values.program, [self.values.present(item)]):
            return item
        return self._taken(_picked if item.dim() else Tensor.item, "an index", (item,), {})

    def on_memory(self, owner: Any, tensor: Tensor) -> Tensor:
        """What stands for a real tensor on an array's memory; it is a constant where it is used."""
        return self.arrays.on_memory(owner, tensor, lambda twin: self._now(Tensor.numpy, "numpy", (twin,), {}))

    def _now(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """`_taken` later on; None of what depends on the image by now."""
        try:
            return self._taken(func, name, args, kwargs)
        except UnsupportedError:
            return None

    def _with_number(self, place: int, args: Any, kwargs: Any) -> Any:
        """The arguments of a call that takes a number out of a tensor to fill another with it."""
        fill = args[place] if len(args) > place else kwargs.get("fill_value")
        if not isinstance(fill, Tensor):
            return args, kwargs
        number = self._taken(Tensor.item, "item", (fill,), {})
        if len(args) > place:
            return (*args[:place], number, *args[place + 1 :]), kwargs
        return args, {**kwargs, "fill_value": number}

    def _supposed(self, tensor: Tensor) -> bool:
        """The truth of a tensor that depends on the image, as far as it is known; unknown ones are supposed not to be.

        Checks are the most common branches, and most of them look for what is wrong.
        """
        program, number = self.values.program, self.values.present(tensor)
        if by_chance(program, [number]):
            raise data_dependent(self.values.where(), "a branch by random numbers")
        known = list(self.branches or ())
        taken = known[len(program.branches)] if len(program.branches) < len(known) else False
        program.branches.append(Branch(number, taken, self.values.where()))
        return taken

    def _assigned(self, func: Any, args: Any) -> None:
        """`tensor.data = value` and other assignments to a tensor's properties."""
        what = _PROPERTIES.get(func, "a property")
        if what != "data":
            raise UnsupportedError(f"{self.values.where()} assigns '{what}' of a tensor; do so outside of the forward")
        tensor, value = (self.values.twin(a) for a in args)
        if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
            raise UnsupportedError(
                f"{self.values.where()} assigns '.data' of another shape or dtype; make a new tensor"
            )
        number = self.values.present(value)
        if value.requires_grad:
            number = self.values.emit(Tensor.detach, "detach", (number,), tensor, False)
        self._refuse_reads(tensor)
        self.values.write(tensor, number, tracked=False)
        if id(tensor) in self.values.first:
            self.values.program.assigned.add(self.values.first[id(tensor)])

    def _refuse_reads(self, tensor: Tensor) -> None:
        """A write that autograd does not notice changes what earlier calls have kept for their gradients."""
        root = self.values.aliases.of[id(tensor)].memory.root
        if not root.requires_grad:
            return
        number = self.values.numbers[id(root)]
        if not root.is_leaf or any(number in op.inputs and not _views(op) for op in self.values.program.ops):
            raise UnsupportedError(
                f"{self.values.where()} writes through '.data' into a tensor that gradients flow through; write it "
                "under torch.no_grad(), before it is used"
            )

    def _seen_through(self) -> bool:
        """Whether the call was made inside of a call, where PyTorch takes a fake tensor's op apart.

        TorchScript runs in C++ and shows only these pieces: a garbage program, no error.
        """
        frame = sys._getframe(4)
        for _ in range(12):
            if frame is None:
                return False
            if frame.f_code.co_filename.endswith(("_subclasses/fake_tensor.py", "_subclasses/fake_impls.py")):
                if _harmless(frame):
                    return True
                raise UnsupportedError(
                    f"{self.values.where()} runs TorchScript, or a constructor of old (torch.FloatTensor), whose calls "
                    "cannot be seen; give the plain eager module, and use torch.empty or torch.tensor"
                )
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
        args, kwargs = tree_map(lambda leaf: averaging(self.values, self.arrays.as_now(leaf)), (args, kwargs))
        silent = not torch.is_grad_enabled() and self.values.entry_grad
        # PyTorch writes to out= only where nothing wants a gradient, and the program runs with gradients.
        cut = silent and kwargs.get("out") is not None
        ref = partial(self.values.ref_without_gradient, {}) if cut else self.values.ref
        ref_args, ref_kwargs = tree_map(ref, (args, kwargs))
        name = name_of(func)
        if func is Tensor.data.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            func, name = Tensor.detach, "data"
        mutated = tuple(dict.fromkeys(ref(w).value for w in written))
        if torch.is_grad_enabled() and not self.values.entry_grad and any(t.requires_grad for t in outputs):
            raise UnsupportedError(
                f"{self.values.where()} switches gradients on inside a forward that runs without them; call the "
                "network with gradients enabled"
            )
        numbers: list[int] = []
        after: list[tuple[Tensor, int, bool]] = []
        for tensor in dict.fromkeys([*outputs, *written]):
            is_written = any(tensor is w for w in written)
            if id(tensor) in self.values.numbers and not is_written:
                numbers.append(self.values.numbers[id(tensor)])
                continue
            number = self.values.number(tensor)
            numbers.append(number)
            after.append((tensor, number, is_written))
        plain: Any = Tensor.detach if name == "data" else CORRECTED.get(func, func)
        # Silent calls without a graph to cut are recorded as they are.
        wants = any(self.values.program.values[v].differentiable for v in refs((ref_args, ref_kwargs)))
        self.values.append(plain, "detach" if name == "data" else name, ref_args, ref_kwargs, tuple(numbers), mutated)
        for tensor, number, is_written in after:
            floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
            if is_written:
                self.arrays.write(tensor)
                if silent and wants and floating:
                    number = self.values.emit(Tensor.detach, "detach", (number,), tensor, False)
                alias = self.values.aliases.of.get(id(tensor))
                if alias is not None and alias.untracked:
                    self._refuse_reads(tensor)
                self.values.write(tensor, number, tracked=not silent and tensor.requires_grad)
                continue
            parent = self.values.aliases.parent(tensor, tensors)
            made = [t for t, _, changed in after if not changed]
            step = None
            if parent is not None:
                index = next(n for n, t in enumerate(made) if t is tensor)
                step = Step(plain, name, args, kwargs, parent, tuple(made), index)
            if silent and wants and floating:
                number = self.values.emit(Tensor.detach, "detach", (number,), tensor, False)
            self.values.know(tensor, number, step)


_PROPERTIES = {
    getattr(Tensor, n).__set__: n
    for n in ("data", "grad", "requires_grad", "names", "real", "imag")
    if hasattr(getattr(Tensor, n, None), "__set__")
}


_FILLED_AT = {torch.full: 1, Tensor.new_full: 2, torch.full_like: 1}
_GRAD_FN, _GRAD, _VERSION = (getattr(Tensor, name).__get__ for name in ("grad_fn", "grad", "_version"))


def _reader() -> types.CodeType | None:
    """The code that reads an attribute of a tensor."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return None if frame is None else frame.f_code


def _axes(item: Any) -> int:
    """How many axes an item of an index is of."""
    if item is None or item is ... or isinstance(item, bool):
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _picked(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def _ints(args: Any) -> tuple[int, ...]:
    return tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else tuple(args)


def _is_truth(name: str, args: Any) -> bool:
    """Whether a call asks whether a tensor of one element is true."""
    truth = name in ("__bool__", "is_nonzero") or (name == "item" and args[0].dtype == torch.bool)
    return truth and args[0].numel() == 1


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
