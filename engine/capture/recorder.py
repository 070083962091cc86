"""`Recorder`: the function mode that records every call of a forward and its effect on memory and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedError
from ..torch_private import memory_of, without_dispatch_modes
from .aliases import ViewCall
from .call_trees import bind, refs, tree_leaves, tree_map
from .gradient_fixes import CORRECTED
from .higher_order import checkpointed
from .program import RANDOM, UNSET, Op, Watched, behind, given, known_values, name_of
from .refusals import REFUSED, data_dependent
from .replacements import OF_PARTS, QUANTILES, of_one_step, with_weight
from .synchronized import group_of, shared
from .values import Values

# Functions that return Python values of tensors. The values are right if they depend only on the network's state.
_TAKEN = frozenset(
    "item tolist __bool__ __int__ __float__ __index__ __complex__ numpy is_nonzero equal allclose __array__".split()
)


class Recorder(TorchFunctionMode):
    """Records the calls of one forward.

    Args:
        values: the program, and the values of its tensors.
    """

    def __init__(self, values: Values):
        self.values = values
        self.entry_inference = torch.is_inference_mode_enabled()
        self.entry_dtype = torch.get_default_dtype()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, called = kwargs or {}, self.values.called
        name = getattr(called, "__name__", "")
        if func is getattr(F, name, None) and func is not called and called.__module__ == F.__name__:
            raise UnsupportedError(
                f"{self.values.where()} calls PyTorch's '{name}', but torch.nn.functional has another function of that "
                "name, which would act twice; restore PyTorch's function, and rename the other"
            )
        if func is checkpointed:
            return self._checkpointed(*args)
        if func in OF_PARTS and "out" not in kwargs:
            with self:
                return OF_PARTS[func](*args, **kwargs)
        return self._call(func, args, with_weight(kwargs) if func is F.l1_loss else kwargs)

    def _checkpointed(self, body: Any, *args: Any) -> Any:
        before = dict(self.values.updates())
        with self:
            result = body.run(args)
        if torch.is_grad_enabled() and dict(self.values.updates()) != before:
            raise UnsupportedError(
                f"{self.values.where()} changes state (running statistics) inside torch.utils.checkpoint, which the "
                "backward would change again; remove the checkpoint, the memory budget replaces it"
            )
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        func = QUANTILES.get(func, func)
        name = getattr(func, "__name__", "")
        if func is shared:
            self.values.group = group_of(args[1])
            return args[0]
        if name == "__set__":
            return self._assign(func, args)
        if func is Tensor.new and args[1:] and isinstance(args[1], (int, np.integer, torch.Size)):
            func = Tensor.new_empty
        elif func is Tensor.new and args[1:] and isinstance(args[1], (list, tuple)):
            func = Tensor.new_tensor
        args, kwargs = tree_map(lambda a: self.values.twin(a) if isinstance(a, Tensor) else a, (args, kwargs))
        if func is Tensor.__getitem__ or func is Tensor.__setitem__:
            args = (args[0], self._own_index(func, *args[:2]), *args[2:])
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        self._refuse(name, tensors, args, kwargs)
        if name in _TAKEN and tensors:
            return self._python_value(func, name, args, kwargs)
        if func in _FILLED_AT and tensors:
            args, kwargs = self._with_number(_FILLED_AT[func], args, kwargs)
            tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if any(map(self.values.of_inference, tensors)) and not self.entry_inference:
            args_like, kwargs_like = tree_map(self._stand_in, (args, kwargs))
            func(*args_like, **kwargs_like)  # raises PyTorch's error if it saves or writes the tensor
        before = [(t, t._version) for t in tensors]
        with self._no_inference():
            result = of_one_step(name, func, args, kwargs)
            result = func(*args, **kwargs) if result is None else result
        outputs = [r for r in tree_leaves(result) if isinstance(r, Tensor)]
        if torch.get_default_dtype() != self.entry_dtype:
            kwargs = self._with_dtype(name, tensors, outputs, kwargs)
        if not tensors and outputs and not any(self.values.fake.is_our_fake(r) for r in outputs):
            return result  # a real tensor, which is a constant for its readers
        # PyTorch counts no versions of fake tensors in a list.
        listed = name.startswith("_foreach_") and name.endswith("_")
        changed = list(args[0]) if listed else [t for t, version in before if t._version != version]
        written = self._written(func, args, kwargs, changed, outputs)
        fresh = [r for r in outputs if id(r) not in self.values.numbers or any(r is w for w in written)]
        if func is Tensor.detach_ or name == "detach_":
            self.values.detach(args[0])
            return result
        if fresh or written:  # otherwise a host read (shape, dtype, ...) or an unchanged argument
            self.values.program.reads += [(a.now, a) for a in args if isinstance(a, Watched)]
            self._record(func, args, kwargs, tensors, outputs, written)
        return result

    def _with_dtype(self, name: str, tensors: list[Tensor], outputs: list[Tensor], kwargs: Any) -> Any:
        """The keywords of a call under a changed default dtype, as for NumPy arrays."""
        floating = [t for t in outputs if t.is_floating_point() or t.is_complex()]
        if not floating or "dtype" in kwargs or any(t.is_floating_point() or t.is_complex() for t in tensors):
            return kwargs
        if tensors:
            raise UnsupportedError(
                f"{self.values.where()} computes '{name}' of integers under a changed default dtype; convert them "
                "first (x.to(torch.float64))"
            )
        return {**kwargs, "dtype": floating[0].dtype}

    def _stand_in(self, value: Any) -> Any:
        """A tensor like `value`; one of inference mode if the network made its memory there."""
        if not isinstance(value, Tensor):
            return value
        with torch.inference_mode(made := self.values.of_inference(value)):
            twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        if not made:
            return twin.requires_grad_(value.requires_grad).clone()
        alias = self.values.aliases.of.get(id(value))  # PyTorch lets calls write to `x.data`, not to `x.data[1:]`
        return twin.detach() if alias and alias.chain[-1:] and alias.chain[-1].name in ("data", "detach") else twin

    @contextlib.contextmanager
    def _no_inference(self) -> Iterator[None]:
        """Leave inference mode, whose tensors have no version counters."""
        if not torch.is_inference_mode_enabled():
            yield
            return
        if not self.entry_inference:
            raise UnsupportedError(
                f"{self.values.where()} runs in inference_mode inside the forward; use torch.no_grad()"
            )
        with torch.inference_mode(False), torch.no_grad():
            yield

    def _refuse(self, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> None:
        """Refuse calls that cannot be repeated in later calls."""
        if name == "resize_" and tensors and _ints(args[1:]) == tuple(tensors[0].shape):
            return
        if name == "detach_" and tensors and tensors[0].requires_grad and id(tensors[0]) in self.values.first:
            raise UnsupportedError(f"{self.values.where()} calls detach_() on an argument; use x = x.detach()")
        if any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs))):
            raise UnsupportedError(f"{self.values.where()} draws from a torch.Generator; leave out generator=")
        if name in REFUSED and tensors:
            raise UnsupportedError(f"{self.values.where()} {REFUSED[name]}")
        if name == "requires_grad_" and tensors and tensors[0].requires_grad != (*args[1:], *kwargs.values(), True)[0]:
            raise UnsupportedError(
                f"{self.values.where()} calls requires_grad_() on a tensor; do so outside of the forward"
            )

    def _python_value(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A Python value of tensors that depend only on the network's state."""
        program, call = self.values.program, tree_map(self.values.ref, (args, kwargs))

        def take_of(state: Callable[[int], Tensor]) -> Any:
            env = {n: known_values(program, n, state) for n in refs(call)}
            if any(value is None for value in env.values()):
                return NotImplemented
            own_args, own_kwargs = bind(call, env)
            with torch.no_grad():
                return func(*own_args, **own_kwargs)

        reals = dict(self.values.state())
        with without_dispatch_modes():
            value = take_of(lambda number: reals[number])
        if value is NotImplemented:
            if not given(program, refs(call)):
                if {op.name.rstrip("_") for op in behind(program, refs(call))} & RANDOM <= UNSET:
                    raise UnsupportedError(
                        f"{self.values.where()} takes a Python value of uninitialised memory ('{name}'); use "
                        "torch.zeros instead of torch.empty"
                    )
                raise UnsupportedError(
                    f"{self.values.where()} takes a Python value of a random number ('{name}'), so each call is "
                    "another program; draw it outside of the forward, and pass it as an argument"
                )
            raise data_dependent(self.values.where(), f"'{name}'")
        own = value.copy() if isinstance(value, np.ndarray) else value  # an array shares the tensor's memory
        program.reads.append((take_of, own))
        return value

    def _own_index(self, func: Any, x: Tensor, index: Any) -> Any:
        """An index with Python numbers instead of tensors that depend only on the network's state.

        Masks that index writes to that state stay tensors, because they may change in each call.
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
        fits = not item.dim() or len(item) == size  # otherwise stock raises an error
        if not fits or given(self.values.program, [self.values.present(item)]):
            return item
        return self._python_value(_true_indices if item.dim() else Tensor.item, "an index", (item,), {})

    def _with_number(self, position: int, args: Any, kwargs: Any) -> Any:
        """The arguments of a call with a tensor as fill value, with the tensor's number instead."""
        fill = args[position] if len(args) > position else kwargs.get("fill_value")
        if not isinstance(fill, Tensor):
            return args, kwargs
        number = self._python_value(Tensor.item, "item", (fill,), {})
        if len(args) > position:
            return (*args[:position], number, *args[position + 1 :]), kwargs
        return args, {**kwargs, "fill_value": number}

    def _assign(self, func: Any, args: Any) -> None:
        """Record `tensor.data = value`; refuse other assignments to a tensor's properties."""
        what = _PROPERTIES.get(func, "a property")
        if what != "data":
            raise UnsupportedError(f"{self.values.where()} assigns '{what}' of a tensor; do so outside of the forward")
        tensor, value = (self.values.twin(a) for a in args)
        if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
            raise UnsupportedError(
                f"{self.values.where()} assigns '.data' with another shape or dtype; make a new tensor"
            )
        number = self.values.present(value)
        if value.requires_grad:
            number = self.values.emit(Tensor.detach, "detach", (number,), tensor, False)
        self._refuse_reads(tensor)
        self.values.write(tensor, number, tracked=False)
        if id(tensor) in self.values.first:
            self.values.program.assigned.add(self.values.first[id(tensor)])

    def _refuse_reads(self, tensor: Tensor) -> None:
        """Refuse a write that autograd does not notice if earlier calls saved the tensor for their gradients."""
        root = self.values.aliases.of[id(tensor)].memory.root
        if not root.requires_grad:
            return
        number = self.values.numbers[id(root)]
        if not root.is_leaf or any(number in op.inputs and not _is_view(op) for op in self.values.program.ops):
            raise UnsupportedError(
                f"{self.values.where()} writes through '.data' into a tensor that gradients flow through; write it "
                "under torch.no_grad(), before it is used"
            )

    def _written(self, func: Any, args: Any, kwargs: Any, changed: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        """The arguments that a call wrote to, without others that share their memory."""
        running = self._running(func, args, kwargs)
        if len(changed) < 2:
            return [*changed, *running]
        written = changed
        memory = lambda t: memory_of(t)  # noqa: E731
        first = [t for t in outputs if any(t is w for w in written)]
        out = kwargs.get("out")
        first += [out] if isinstance(out, Tensor) else list(out or ())
        first += [args[0]] if args and isinstance(args[0], Tensor) else []
        found: dict[int, Tensor] = {}
        for tensor in [*(t for t in first if any(t is w for w in written)), *written]:
            found.setdefault(memory(tensor), tensor)
        return [*found.values(), *running]

    def _running(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """The running statistics that a norm changes without a new version for autograd."""
        names = {"batch_norm": ("training", 5), "instance_norm": ("use_input_stats", 5)}
        if getattr(func, "__name__", "") not in names:
            return []
        flag, position = names[func.__name__]
        if isinstance(func, type(torch.batch_norm)):  # weight and bias come before the running statistics
            means = [*args[3:5], *(kwargs.get(n) for n in ("running_mean", "running_var"))]
        else:
            means = [*args[1:3], *(kwargs.get(n) for n in ("running_mean", "running_var"))]
        live = kwargs.get(flag, args[position] if len(args) > position else flag == "use_input_stats")
        found = [t for t in means if isinstance(t, Tensor)] if live else []
        for tensor in found:
            self._refuse_saved(tensor)
        return found

    def _refuse_saved(self, running: Tensor) -> None:
        """Refuse a norm that updates running statistics which an earlier call saved for its gradient.

        The update does not change the version counter, so PyTorch's gradient of the earlier call would use the updated
        statistics.
        """
        values = self.values.program.values
        same = {self.values.present(running)}
        for op in self.values.program.ops:
            if same.isdisjoint(op.inputs) or same & set(op.mutated):
                continue
            if _is_view(op):
                same |= set(op.outputs)
            elif any(values[v].differentiable for v in op.outputs):
                raise UnsupportedError(
                    f"{self.values.where()} updates running statistics that '{op.name}' used before in this forward, "
                    "so PyTorch's gradient would be wrong; use the norm in one mode per forward"
                )

    def _record(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], outputs: list[Tensor], written: list[Tensor]
    ) -> None:
        silent = not torch.is_grad_enabled() and self.values.entry_grad
        # PyTorch allows out= only without gradients, but the program runs with gradients.
        cut = silent and kwargs.get("out") is not None
        ref = partial(self.values.ref_without_gradient, {}) if cut else self.values.ref
        ref_args, ref_kwargs = tree_map(ref, (args, kwargs))
        name = name_of(func)
        if func is Tensor.data.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            func, name = Tensor.detach, "data"
        mutated = tuple(dict.fromkeys(ref(w).value for w in written))
        if torch.is_grad_enabled() and not self.values.entry_grad and any(t.requires_grad for t in outputs):
            raise UnsupportedError(
                f"{self.values.where()} enables gradients inside a forward that runs without them; call the network "
                "with gradients enabled"
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
        # Calls without gradients need no detach if none of their inputs requires a gradient.
        wants = any(self.values.program.values[v].differentiable for v in refs((ref_args, ref_kwargs)))
        self.values.append(plain, "detach" if name == "data" else name, ref_args, ref_kwargs, tuple(numbers), mutated)
        for tensor, number, is_written in after:
            floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
            if is_written:
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
                step = ViewCall(plain, name, args, kwargs, parent, tuple(made), index)
            if silent and wants and floating:
                number = self.values.emit(Tensor.detach, "detach", (number,), tensor, False)
            self.values.know(tensor, number, step)


_PROPERTIES = {
    getattr(Tensor, n).__set__: n
    for n in ("data", "grad", "requires_grad", "names", "real", "imag")
    if hasattr(getattr(Tensor, n, None), "__set__")
}


_FILLED_AT = {torch.full: 1, Tensor.new_full: 2, torch.full_like: 1}


def _axes(item: Any) -> int:
    """The number of axes that an item of an index covers."""
    if item is None or item is ... or isinstance(item, bool):
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _true_indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def _ints(args: Any) -> tuple[int, ...]:
    return tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else tuple(args)


def _is_view(op: Op) -> bool:
    return op.name in ("detach", "data", "view", "reshape", "transpose", "t", "permute", "__getitem__", "shape")
