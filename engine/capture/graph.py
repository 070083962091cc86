"""`Graph`: a copy of Dynamo's graph of a forward, which yields the program for an image size.

TorchDynamo returns a flat list of torch-level calls: functions, methods, switches of gradient mode and autocast, and a
few higher-order operators. `Graph.of` copies it. `Graph.program` runs it on fake tensors of one size under a recorder
that numbers every tensor in single-assignment form: an in-location call makes a new value. A graph with symbolic sizes
therefore serves every size without another trace.
"""

from __future__ import annotations

import logging
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..errors import UnsupportedError
from ..torch_private import (
    FakeTensorMode,
    HigherOrderOperator,
    enable_python_dispatcher,
    enable_saved_tensors_hooks,
    saved_tensors_hooks,
    why_no_saved_tensors_hooks,
    without_dispatch_modes,
)
from .call_trees import tree_leaves
from .higher_order import CALLED, of_arrays
from .program import Given, Program, Ref, location
from .recorder import Recorder
from .refusals import as_refusal
from .tracebacks import frames, users
from .values import Values

_CACHED_SHAPES = 4_000  # entries of PyTorch's cache of fake results, of some 2 KB each
_OF_THE_PROCESS = re.compile("_?(set_(default|deterministic|float32|warn|flush|num|cudnn)|use_deterministic)")
_IN_PLACE = frozenset(
    "iadd iand ifloordiv ilshift imod imul imatmul ior ipow irshift isub itruediv ixor setitem".split()
)
_STEP = re.compile(r"(?:_modules|_parameters|_buffers)\[\s*['\"]([^'\"]+)['\"]\s*\]|\.(\w+)")


@dataclass(frozen=True, slots=True)
class Slot:
    """Refers to an input or an earlier result in the arguments of an instruction; inputs are numbered first."""

    number: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """One call.

    Attributes:
        target: the function, or the name of a method of the first argument.
        args, kwargs: arguments, with `Slot`s for tensors and symbolic numbers.
        module: path of the module that makes the call.
        line: file and line of the network's own code.
    """

    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str = ""
    line: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """The origin of an input.

    Attributes:
        name: dotted name of a parameter or buffer; Dynamo's expression for other inputs.
        state: whether the input belongs to the network or is a global, and is not an argument of the call.
    """

    name: str
    state: bool


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph of torch-level calls.

    Attributes:
        sources: origins of the inputs, in order.
        instructions: the calls, in order.
        output: a tree with `Slot`s.
        single: whether the call returns exactly one tensor, as marked by `single`.
        piece: the reason why the graph ends before the call does; empty for a complete graph.
        numbers: slots of Python numbers: symbolic sizes and counters, and numbers computed from them.
        shapes: settings of the fake tensors with which Dynamo has computed the shapes.
    """

    sources: tuple[Source, ...]
    instructions: tuple[Instruction, ...]
    output: Any
    single: bool
    piece: str = ""
    numbers: frozenset[int] = frozenset()
    shapes: Any = None

    @classmethod
    def of(cls, module: fx.GraphModule) -> Graph:
        """A copy of a graph module that is independent of Dynamo."""
        slots: dict[fx.Node, Any] = {}  # a slot, or the constant or graph itself
        sources, instructions = list[Source](), list[Instruction]()
        output, is_single, numbers, free, shapes = None, False, set[int](), set[int](), None
        inputs = sum(node.op == "placeholder" for node in module.graph.nodes)  # PyTorch 2.11 has some between calls
        for node in module.graph.nodes:
            try:
                args, kwargs = _with_slots((tuple(node.args), dict(node.kwargs)), slots)
            except KeyError:
                raise UnsupportedError(
                    f"{location(_module_of(node), _line_of(node))} reads a tensor before a hook is registered on it; "
                    f"PyTorch {torch.__version__} records the wrong order; register it first, or use PyTorch 2.13"
                ) from None
            if node.op == "output":
                output = args[0]
                continue
            if node.target is single:
                slots[node], is_single = args[0], True
                continue
            if node.op == "get_attr":
                held = _attribute(module, str(node.target))
                slots[node] = cls.of(held) if isinstance(held, fx.GraphModule) else held
                continue
            slots[node] = Slot(len(sources) if node.op == "placeholder" else inputs + len(instructions))
            if isinstance(node.meta.get("example_value"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float):
                numbers.add(slots[node].number)
            if node.op == "placeholder":
                sources.append(_source(node))
                continue
            target: Any = node.target
            if node.op == "call_module":
                held = _attribute(module, str(target))
                target = cls.of(held) if isinstance(held, fx.GraphModule) else held
            elif getattr(target, "__name__", "") == "autograd_function_apply":
                outputs, read = args[0].output[0], 1 + max((int(user.args[1]) for user in node.users), default=0)
                ignored = all(source.name.startswith("unused_") for source in args[1].sources[read : len(outputs)])
                kwargs["intermediates"] = len(outputs) - read if ignored else 0
            made = node.meta.get("example_value")
            if isinstance(made, Tensor) and not made.requires_grad:
                free.add(len(instructions))
            shapes = shapes or getattr(getattr(getattr(made, "fake_mode", None), "shape_env", None), "settings", None)
            instructions.append(Instruction(target, args, kwargs, _module_of(node), _line_of(node)))
        reason, counts = _break_of(module), frozenset(numbers)
        made = cls(tuple(sources), tuple(instructions), output, is_single, reason, counts, shapes)
        for at, step in enumerate(instructions):
            made = made._move_hook(at, free) if getattr(step.target, "__name__", "") == "register_hook" else made
        return made

    def _move_hook(self, at: int, free: set[int]) -> Graph:
        """The graph with a tensor's hook moved to the tensor: the hook also gets the gradients of earlier uses.

        Args:
            at: index of the hook among the instructions.
            free: indices of instructions whose results have no gradient.

        Raises:
            UnsupportedError: the hook reads a value computed in between, or the tensor was written to.
        """
        first, step = len(self.sources), self.instructions[at]
        (tensor, *_), held = _slots(step.args[0]), _slots(step.args[1:])
        begin = max(0, tensor + 1 - first)
        readers = {
            n for n in range(begin, at) if tensor in _slots((self.instructions[n].args, self.instructions[n].kwargs))
        }
        early = readers - free
        between = [self.instructions[n] for n in early]
        if not between:
            return self
        if any(map(_may_write, between)) or any(begin + first <= number for number in held):
            raise UnsupportedError(
                f"{location(step.module, step.line)} registers a hook on a tensor after it was used, and the hook or a "
                "write needs a value computed in between; register it right after the tensor is made"
            )
        names = {number: number + 1 for number in range(begin + first, at + first)} | {at + first: begin + first}
        hooked = {**names, tensor: begin + first}  # for readers between tensor and hook
        steps = [*self.instructions[:begin], step]
        for n, one in enumerate(self.instructions[begin:], begin):
            if n != at:
                known = hooked if n in early else names
                steps.append(replace(one, args=_renamed(one.args, known), kwargs=_renamed(one.kwargs, known)))
        numbers = frozenset(names.get(number, number) for number in self.numbers)
        return replace(self, instructions=tuple(steps), output=_renamed(self.output, names), numbers=numbers)

    @cached_property
    def counters(self) -> frozenset[int]:
        """Inputs that are numbers on which no tensor depends: the program is independent of their values."""
        first, needed, mixed = len(self.sources), set[int](), set[int]()
        for slot, step in enumerate(self.instructions, first):  # numbers computed from tensors
            read = _slots((step.args, step.kwargs))
            if slot in self.numbers and any(n not in self.numbers or n in mixed for n in read):
                mixed.add(slot)
        for slot, step in reversed(list(enumerate(self.instructions, first))):
            if slot not in self.numbers or slot in needed or slot in mixed:
                needed.update(_slots((step.args, step.kwargs)))
        return frozenset(n for n in range(first) if n in self.numbers and n not in needed)

    def counted(self, inputs: Sequence[Any]) -> dict[int, Any]:
        """Index -> value of the outputs that depend on counters, for these inputs."""
        if not self.counters:
            return {}
        found: dict[int, Any] = {n: inputs[n] for n in self.numbers if n < len(self.sources)}
        loose = set(self.counters)
        for slot, step in enumerate(self.instructions, len(self.sources)):
            if loose.intersection(_slots((step.args, step.kwargs))):
                loose.add(slot)
            if slot in self.numbers and all(n in found for n in _slots((step.args, step.kwargs))):
                args, kwargs = _bound(step.args, found), _bound(step.kwargs, found)
                call = getattr(args[0], step.target) if isinstance(step.target, str) else step.target
                found[slot] = call(*(args[1:] if isinstance(step.target, str) else args), **kwargs)
        leaves = enumerate(tree_leaves(self.output))
        return {n: found[leaf.number] for n, leaf in leaves if type(leaf) is Slot and leaf.number in loose}

    def run(self, inputs: Sequence[Any], before: Callable[[Instruction], None] | None = None) -> Any:
        """Run the graph in the current modes and return its output.

        Args:
            inputs: one value per source.
            before: called before each instruction.

        Raises:
            UnsupportedError: the graph has a higher-order operator without a rule; the message names it.
        """
        found = list(inputs)
        try:
            for step, last_read in zip(self.instructions, self._last_reads, strict=True):
                if before is not None:
                    before(step)
                args, kwargs = _bound(step.args, found), _bound(step.kwargs, found)
                if isinstance(step.target, str):
                    found.append(getattr(args[0], step.target)(*args[1:], **kwargs))
                else:
                    found.append(_callable(step)(*args, **kwargs))
                del args, kwargs
                for number in last_read:
                    found[number] = None
            return _bound(self.output, found)
        except BaseException:
            for value in reversed(found[len(self.sources) :]):  # exit inference mode and autocast
                if hasattr(type(value), "__exit__"):
                    value.__exit__(None, None, None)
            raise

    @cached_property
    def _last_reads(self) -> Sequence[Sequence[int]]:
        """Per instruction, the slots that are not read after it."""
        first, later = len(self.sources), set(_slots(self.output))
        found = list[list[int]]()
        for slot, step in reversed(list(enumerate(self.instructions, first))):
            ended = {slot, *_slots((step.args, step.kwargs))} - later
            found.append(list(ended))
            later |= ended
        return found[::-1]

    def program(
        self,
        inputs: Sequence[Any],
        image: Given,
        roles: Mapping[int, str],
        device: torch.device,
        moved: torch.device | None = None,
    ) -> Program:
        """The program of a call, in the current gradient mode, inference mode and autocast.

        Nothing is computed: the graph runs on fake tensors. The network and the process are unchanged.

        Args:
            inputs: real tensors and Python values, one per source. Values of tensors are not read, except where the
                forward takes Python values from the network's state.
            image: shape and dtype of the image batch.
            roles: index of an input -> "image", "map" or "vector"; other tensors are state of the network.
            device: device of the image.
            moved: device to use instead of "meta", for plans for a device that is not present.

        Raises:
            UnsupportedError: the call cannot be recorded; the message names module, line and op.
        """
        if len(FakeTensorMode.cache) > _CACHED_SHAPES:  # PyTorch never frees the results of an op and shape
            FakeTensorMode.cache_clear()
        shapes = None if self.shapes is None else _KnownShapes(self.shapes)
        values = Values(FakeTensorMode(shape_env=shapes, static_shapes=True), device)
        recorder, program = Recorder(values), values.program

        def before(step: Instruction) -> None:
            values.module, values.line, values.called = step.module, step.line, step.target

        with (
            _modes_restored(),
            quiet(),
            nothing_saved(),
            without_dispatch_modes(),
            values.fake,
            enable_python_dispatcher(),
        ):
            first = values.given(image)
            program.image = values.numbers[id(first)]
            twins = list[Any]()
            for index, (value, source) in enumerate(zip(inputs, self.sources, strict=True)):
                role = roles.get(index)
                if not isinstance(value, Tensor):
                    twins.append(value)
                elif role == "image":
                    twins.append(first)
                elif role is not None:
                    twins.append(values.given(Given.of(value)))
                else:
                    twins.append(values.twin(value, source.name))
                if isinstance(value, Tensor):
                    program.bound[values.numbers[id(twins[-1])]] = index
            program.inputs = tuple(n for n, at in program.bound.items() if roles.get(at) == "map")
            program.vectors = tuple(n for n, at in program.bound.items() if roles.get(at) == "vector")
            try:
                with recorder:
                    graph = self if moved is None else self.on(moved)
                    output = graph.run(twins, before)
                if torch.is_grad_enabled() != values.entry_grad:
                    text = f"does not restore it (in {values.where()}); use a with block"
                    raise UnsupportedError(f"the forward changes the gradient mode and {text}")
                self._finish(values, program, output, (first, *twins))
            except Exception as error:
                refusal = as_refusal(error, values.where())
                if isinstance(refusal, UnsupportedError):
                    name = getattr(values.called, "__name__", values.called)
                    refusal.module, refusal.op = values.module, None if name is None else str(name)
                raise refusal from (None if refusal is error else error)
            finally:
                values.forget()
        return program

    def _finish(self, values: Values, program: Program, output: Any, given: Sequence[Any]) -> None:
        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            number = values.present(value)
            program.reached[number] = values.reached(value)
            return Ref(number)

        for value in given:
            leaf(value)
        program.output = [leaf(value) for value in tree_leaves(output)]
        program.single = self.single
        program.updates = values.updates()

    def on(self, device: torch.device) -> Graph:
        """The graph with a device instead of "meta"."""

        def on_device(leaf: Any) -> Any:
            if isinstance(leaf, Graph):
                return leaf.on(device)
            is_meta = isinstance(leaf, torch.device) and leaf.type == "meta"
            return device if is_meta or (isinstance(leaf, str) and leaf == "meta") else leaf

        steps = (
            replace(step, args=_map(on_device, step.args), kwargs=_map(on_device, step.kwargs))
            for step in self.instructions
        )
        return replace(self, instructions=tuple(steps))


class _KnownShapes(ShapeEnv):
    """Makes fake tensors without symbolic sizes find what PyTorch has stored of the same calls on Dynamo's."""

    allow_scalar_outputs = False  # pyright: ignore[reportAssignmentType]
    allow_dynamic_output_shape_ops = False  # pyright: ignore[reportAssignmentType]

    def __init__(self, settings: Any):
        super().__init__()
        self.settings = settings


def single(result: Tensor) -> Tensor:
    """Marks in a graph that the call returns only this tensor."""
    return result.view_as(result)


torch.compiler.allow_in_graph(single)


def _break_of(module: fx.GraphModule) -> str:
    """The reason and line of a graph break; empty for a complete graph."""
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    own = users([(frame.filename, frame.lineno or 0, frame.name) for frame in reason.user_stack])
    where = f"{os.path.basename(own[0])}:{own[1]}: " if own else ""
    return where + (str(reason.reason).splitlines() or ["graph break"])[0]


def _callable(step: Instruction) -> Callable[..., Any]:
    target, name = step.target, getattr(step.target, "__name__", "")
    own = CALLED.get(name)
    if own is not None:
        return own
    if type(target).__name__ == "numpy_operator_wrapper":
        return of_arrays(target)
    if isinstance(target, HigherOrderOperator):
        raise UnsupportedError(
            f"{location(step.module, step.line)} uses the higher-order operator '{name}', which has no rule; write it "
            "as plain PyTorch ops, or move it out of the forward"
        )
    if _OF_THE_PROCESS.match(name) and isinstance(target, types.FunctionType | types.BuiltinFunctionType):
        raise UnsupportedError(
            f"{location(step.module, step.line)} calls torch.{name}, a setting of the process; call it before the "
            "network, or pass dtype= and similar arguments to the ops"
        )
    if "functorch" in str(getattr(target, "__module__", "")):
        raise UnsupportedError(
            f"{location(step.module, step.line)} runs torch.func (vmap, grad, jvp) inside the forward; use ops with an "
            "explicit batch dimension"
        )
    return target  # pyright: ignore[reportReturnType]


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with `function(leaf)` for every leaf, in plain containers."""
    if isinstance(tree, slice):
        return slice(*(_map(function, part) for part in (tree.start, tree.stop, tree.step)))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map(function, part) for part in tree))
    if isinstance(tree, tuple | list):
        return (list if isinstance(tree, list) else tuple)([_map(function, part) for part in tree])
    if isinstance(tree, dict):
        return {key: _map(function, part) for key, part in tree.items()}
    return function(tree)


def _with_slots(tree: Any, slots: Mapping[fx.Node, Any]) -> Any:
    """Arguments of a node with slots instead of nodes."""
    return _map(lambda leaf: slots[leaf] if isinstance(leaf, fx.Node) else leaf, tree)


def _may_write(step: Instruction) -> bool:
    """Whether a call may write to a tensor."""
    name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE or "out" in step.kwargs


def _renamed(tree: Any, names: Mapping[int, int]) -> Any:
    return _map(lambda leaf: Slot(names.get(leaf.number, leaf.number)) if type(leaf) is Slot else leaf, tree)


def _bound(tree: Any, found: Any) -> Any:
    return _map(lambda leaf: found[leaf.number] if type(leaf) is Slot else leaf, tree)


def _slots(tree: Any) -> list[int]:
    found = list[int]()
    _map(lambda leaf: found.append(leaf.number) if type(leaf) is Slot else None, tree)
    return found


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _source(node: fx.Node) -> Source:
    """The origin of a placeholder; placeholders of nested graphs have no source."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return Source(node.name, False)
    text = source.name if isinstance(source.name, str) else source.name()
    of_module = "NN_MODULE" in source.guard_source.name or "_parameters[" in text or "_buffers[" in text
    return Source(dotted(text), of_module or not text.startswith("L["))


def dotted(expression: str) -> str:
    """`L['network']._modules['stem']._parameters['weight']` as `stem.weight`; other expressions unchanged."""
    head = re.match(r"L\['\w+'\]", expression)
    if head is None:
        return expression
    rest, found = expression[head.end() :], list[str]()
    while rest:
        step = re.match(r"\.?" + _STEP.pattern, rest)
        if step is None:
            return expression
        found.append(step[1] or step[2])
        rest = rest[step.end() :]
    return ".".join(found) or expression


def _module_of(node: fx.Node) -> str:
    """The path of the innermost module whose forward makes the call."""
    stack = node.meta.get("nn_module_stack")
    path = next(reversed(stack.values()))[0] if stack else ""
    found = dotted(path)
    return "" if found.startswith("L[") else found


def _line_of(node: fx.Node) -> str:
    """The innermost line of code outside of PyTorch and Python."""
    own = users(frames(node.meta.get("stack_trace") or ""))
    return f"{os.path.basename(own[0])}:{own[1]}" if own else ""


@contextmanager
def _modes_restored() -> Iterator[None]:
    """Restore gradient mode and autocast afterwards, also if a graph ends inside them."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    before = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    caching = torch.is_autocast_cache_enabled()
    switched_off = why_no_saved_tensors_hooks()
    torch.set_autocast_cache_enabled(False)  # the cache would store fake weights
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        torch.set_autocast_cache_enabled(caching)
        if switched_off is None:
            enable_saved_tensors_hooks()
        for kind, enabled, dtype in before:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


@contextmanager
def nothing_saved() -> Iterator[None]:
    """Disable the caller's saved-tensor hooks, because a recording has no backward."""
    if saved_tensors_hooks() is None:
        yield  # further hooks would conflict with `torch.func` and `disable_saved_tensors_hooks`
        return
    with torch.autograd.graph.saved_tensors_hooks(_save_nothing, _save_nothing):
        yield


def _save_nothing(_saved: Any) -> Any:
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Disable PyTorch's log of errors on fake tensors: it prints tracebacks of the network's own errors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
