"""The values of a recording: the current value of each tensor, tensors that share memory, and the recorded calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..torch_private import FakeTensorMode, memory_of
from .aliases import Alias, Aliases, ViewCall, inverse, is_same
from .call_trees import Ref, refs, tree_map
from .program import Given, Op, Program, Value, location, order
from .refusals import SPARSE


class Values:
    """The program so far, and the value number of each fake tensor.

    Args:
        fake: the mode that makes fake tensors.
        device: device of the image.

    Attributes:
        module: path of the module whose forward is running.
        line: line of the network's code that makes the current call.
        called: the function or method name that the graph calls.
        group: process group of the next BatchNorm, if it shares its statistics.
    """

    def __init__(self, fake: FakeTensorMode, device: torch.device):
        self.fake, self.device = fake, device
        self.entry_grad, self.entry_autocast = torch.is_grad_enabled(), self.autocast()
        self.program = Program(image=0, grad=self.entry_grad)
        self.numbers: dict[int, int] = {}  # id of a tensor -> number of its current value
        self.twins: dict[int, Tensor] = {}  # id of a real tensor -> fake twin
        self.reals: dict[int, Tensor] = {}  # id of a fake twin -> real tensor
        self.sharing: dict[int, list[Tensor]] = {}  # storage -> real tensors on it
        self.written: set[int] = set()  # storages of real tensors that were written to
        self.first: dict[int, int] = {}  # id of an outside tensor -> number of its initial value
        self.alive: list[Any] = []  # ids stay unique only while their objects live
        self.aliases = Aliases()
        self.module, self.line, self.group = "", "", None
        self.called: Any = None

    def autocast(self) -> tuple[bool, torch.dtype]:
        kind = self.device.type
        return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def where(self) -> str:
        return location(self.module, self.line)

    def given(self, what: Given) -> Tensor:
        """A fake tensor for an input of the call."""
        with torch.inference_mode(False), torch.enable_grad():
            if what.strides is None:
                made = torch.empty(what.shape, dtype=what.dtype, device=self.device)
            else:
                made = torch.empty_strided(what.shape, what.strides, dtype=what.dtype, device=self.device)
            made = made.requires_grad_(bool(what.grad))
            made = made.clone() if what.grad == "made" else made
        self.first[id(made)] = self.new_value(made)
        return made

    def new_value(self, tensor: Tensor, name: str | None = None, constant: Tensor | None = None) -> int:
        """Number a tensor's current value."""
        number = self.number(tensor)
        value = self.program.values[number]
        value.name, value.constant = name, constant
        self.know(tensor, number, None)
        return number

    def know(self, tensor: Tensor, number: int, step: ViewCall | None) -> None:
        """Register the value number of a fake tensor; `step` made it, if it is a view."""
        self.numbers[id(tensor)] = number
        self.alive.append(tensor)
        self.aliases.add(tensor, step)

    def number(self, like: Tensor, differentiable: bool | None = None) -> int:
        if like.layout != torch.strided:
            raise UnsupportedError(f"{self.where()} {SPARSE}")
        wants = like.requires_grad if differentiable is None else differentiable
        wants = wants or not self.entry_grad
        layout = order(like)
        self.program.values.append(Value(like.shape, like.dtype, like.device, differentiable=wants, order=layout))
        return len(self.program.values) - 1

    def twin(self, tensor: Tensor, name: str | None = None) -> Tensor:
        """The fake tensor for `tensor`; `tensor` itself if the recording made it.

        Args:
            tensor: a real or fake tensor.
            name: name of a parameter or buffer; None for a constant of the graph.
        """
        if id(tensor) in self.numbers:
            return tensor
        if id(tensor) in self.twins:
            return self.twins[id(tensor)]
        if self.fake.is_our_fake(tensor):
            return self._unrecorded(tensor)
        if tensor.layout != torch.strided:
            raise UnsupportedError(f"{self.where()} reads a sparse tensor; make it dense")
        memory = memory_of(tensor)
        if memory in self.written:
            raise UnsupportedError(
                f"{self.where()} reads a tensor whose memory was written to through another tensor of the network; "
                "store only one of them, and make the other from it in the forward"
            )
        with torch.inference_mode(False):
            device = self.device if tensor.is_meta else tensor.device  # plans accept networks on the meta device
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            twin.requires_grad_(tensor.requires_grad)
        self.twins[id(tensor)], self.reals[id(twin)] = twin, tensor
        self.sharing.setdefault(memory, []).append(tensor)
        number = self.first[id(twin)] = self.new_value(twin, name, None if name else tensor)
        self.program.values[number].trainable = tensor.requires_grad
        return twin

    def of_inference(self, tensor: Tensor) -> bool:
        """Whether the tensor is, or views, a tensor of the network that was made in inference mode."""
        alias = self.aliases.of.get(id(tensor))
        root = tensor if alias is None else alias.memory.root
        real, replaced = self.reals.get(id(root)), self.first.get(id(root)) in self.program.assigned  # .data = ...
        return real is not None and real.is_inference() and not replaced

    def _unrecorded(self, tensor: Tensor) -> Tensor:
        """Register a tensor that no recorded call made, as `Variable(x)`, which shares the memory of x."""
        known = self.aliases.twin(tensor)
        if known is None:
            raise UnsupportedError(
                f"{self.where()} uses a tensor that no recorded call made (by a scripted or compiled part?); use the "
                "eager module"
            )
        number = self.present(known)
        if known.requires_grad and not tensor.requires_grad:
            number = self.emit(Tensor.detach, "detach", (number,), tensor, False)
        self.know(tensor, number, ViewCall(Tensor.detach, "detach", (known,), {}, known, (tensor,), 0))
        return tensor

    def present(self, tensor: Tensor) -> int:
        """The number of a tensor's current value; a view is made again if its memory was written to."""
        alias = self.aliases.of.get(id(tensor))
        if alias is not None and alias.version != alias.memory.version:
            root = alias.memory.root
            self.numbers[id(tensor)] = self.rebuild(alias, self.numbers[id(root)])[-1]
            alias.version = alias.memory.version
        if id(tensor) not in self.numbers:
            raise UnsupportedError(
                f"{self.where()} makes tensors that cannot be recorded (are torch functions disabled around the "
                "call?); call the network outside of torch._C.DisableTorchFunction"
            )
        return self.numbers[id(tensor)]

    def rebuild(self, alias: Alias, value: int) -> list[int]:
        """Record the calls from a root's value to a view again; returns the values after each step."""
        found = [value]
        for step in alias.chain:
            parent = step.parent
            if is_same(step) and step.name != "detach":
                found.append(found[-1])
                continue
            as_ref = lambda a, p=parent: Ref(found[-1]) if a is p else self.ref(a)  # noqa: E731
            args, kwargs = tree_map(as_ref, (step.args, step.kwargs))
            numbers = tuple(self.number(t) for t in step.outputs)
            self.append(step.func, step.name, args, kwargs, numbers, ())
            found.append(numbers[step.index])
        return found

    def ref(self, leaf: Any) -> Any:
        return Ref(self.present(leaf)) if isinstance(leaf, Tensor) else leaf

    def ref_without_gradient(self, made: dict[int, Ref], leaf: Any) -> Any:
        """`ref` of a detached tensor; tensors are detached once for all calls with the same `made`."""
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            return self.ref(leaf)
        if id(leaf) not in made:
            made[id(leaf)] = Ref(self.emit(Tensor.detach, "detach", (self.present(leaf),), leaf, False))
        return made[id(leaf)]

    def write(self, tensor: Tensor, number: int, tracked: bool) -> None:
        """Set a new value of a tensor, and of its root."""
        alias = self.aliases.of[id(tensor)]
        memory = alias.memory
        root = memory.root
        old, own = self.numbers[id(root)], number
        if alias.chain:
            values = self.rebuild(alias, old)
            for step, parent in zip(reversed(alias.chain), reversed(values[:-1]), strict=True):
                if is_same(step):
                    continue
                func, name, arguments = inverse(step, self.where())
                number = self.emit(func, name, arguments(parent, number), step.parent, None)
        joins = tracked and not alias.cut
        if not joins and root.requires_grad and self.program.values[old].differentiable:
            number = self.emit(straight_through, "straight_through", (old, number), root, True)
        elif self.entry_grad and not joins and self.program.values[number].differentiable and not root.requires_grad:
            number = self.emit(Tensor.detach, "detach", (number,), root, False)
        memory.version += 1
        root_alias = self.aliases.of[id(root)]
        self.numbers[id(root)], root_alias.version = number, memory.version
        if tensor is not root:
            self.numbers[id(tensor)] = own
            alias.version = memory.version if tracked else -1  # else made again from the root when it is read
        self._mates(root)

    def _mates(self, root: Tensor) -> None:
        """Refuse writes to real tensors whose memory other tensors of the network look at."""
        real = self.reals.get(id(root))
        if real is None:
            return
        memory = memory_of(real)
        self.written.add(memory)
        if any(other is not real for other in self.sharing[memory]):
            raise UnsupportedError(
                f"{self.where()} writes to a tensor whose memory another tensor of the network shares; keep one of "
                "them, and make the other from it in the forward"
            )

    def detach(self, tensor: Tensor) -> None:
        """`detach_`: the same tensor without its graph."""
        number = self.emit(Tensor.detach, "detach", (self.present(tensor),), tensor, False)
        self.numbers[id(tensor)] = number

    def emit(self, func: Any, name: str, args: tuple[Any, ...], like: Tensor, differentiable: bool | None) -> int:
        """Append a call that the forward does not make itself; integers in `args` are value numbers."""
        numbers = [a for a in args if type(a) is int]
        if name in ("reshape", "transpose", "permute"):
            own, rest = (Ref(args[0]),), args[1:]
        elif name == "diagonal_scatter":
            own, rest = (Ref(args[0]), Ref(args[1])), args[2:]
        elif name == "__setitem__":
            own, rest = (Ref(args[0]), tree_map(self.ref, args[1]), Ref(args[2])), ()
        else:
            own, rest = tuple(Ref(a) for a in numbers), ()
        if differentiable is None:
            differentiable = any(self.program.values[v].differentiable for v in refs(own))
        number = self.number(like, differentiable)
        mutated = (args[0],) if name == "__setitem__" else ()
        self.append(func, name, (*own, *rest), {}, (number,), mutated)
        return number

    def append(
        self, func: Any, name: str, args: Any, kwargs: Any, outputs: tuple[int, ...], mutated: tuple[int, ...]
    ) -> None:
        state, group = self.autocast(), None
        if name == "batch_norm":
            group, self.group = self.group, None
        self.program.ops.append(
            Op(
                func=func,
                name=name,
                args=args,
                kwargs=kwargs,
                inputs=tuple(dict.fromkeys(refs((args, kwargs)))),
                outputs=outputs,
                mutated=mutated,
                module=self.module,
                line=self.line,
                autocast=None if state == self.entry_autocast else state,
                group=group,
            )
        )

    def reached(self, tensor: Tensor) -> frozenset[int]:
        """The parameters and constants that PyTorch's autograd graph of a tensor reaches."""
        left, seen, found = [tensor.grad_fn], set[Any]([None]), set[int]()
        while left:
            node = left.pop()
            if node not in seen:
                seen.add(node)
                found.add(self.first.get(id(getattr(node, "variable", None)), -1))
                left += [following for following, _ in node.next_functions]  # pyright: ignore[reportOptionalMemberAccess]
        return frozenset(v for v in found if v >= 0 and self.program.values[v].trainable)

    def state(self) -> Iterator[tuple[int, Tensor]]:
        """(number, tensor) of each value of a real tensor."""
        for twin_id, number in self.first.items():
            if twin_id in self.reals:
                yield number, self.reals[twin_id]

    def updates(self) -> list[tuple[int, int]]:
        """(initial value, last value) of each outside tensor that was written to."""
        found = []
        for key, number in self.first.items():
            alias = self.aliases.of.get(key)
            if alias is not None and self.numbers[key] != number:
                found.append((number, self.numbers[key]))
        return found

    def forget(self) -> None:
        """Free all tensors of the recording."""
        self.alive.clear()
        self.reals.clear()
        self.sharing.clear()
        self.aliases = Aliases()
        self.twins.clear()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, old: Tensor, new: Tensor):
        ctx.set_materialize_grads(False)
        return new.expand_as(old).clone()

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor):
        return grads[0], None


def straight_through(old: Tensor, new: Tensor) -> Tensor:
    """The values of `new` with the gradient of `old`."""
    return _StraightThrough.apply(old, new.detach())  # pyright: ignore[reportReturnType]
