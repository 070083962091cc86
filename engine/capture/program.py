"""`Program`: a recorded forward as data: values, ops, outputs, and the state that each call changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import resolve_name

from ..errors import UnsupportedError
from .call_trees import Ref as Ref
from .call_trees import bind, refs, tree_leaves
from .higher_order import CustomFunction, TensorHook


@dataclass(slots=True)
class Value:
    """A tensor of the program: its shape and dtype at the captured image size."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    name: str | None = None  # name of a parameter or buffer
    constant: Tensor | None = None  # a constant tensor of the graph
    trainable: bool = False  # a parameter or constant that requires a gradient
    differentiable: bool = True  # whether a gradient flows through it, if the forward was recorded with gradients
    order: tuple[int, ...] | None = None  # memory order in stock PyTorch, see `order`

    @property
    def takes_grad(self) -> bool:
        return self.differentiable and (self.dtype.is_floating_point or self.dtype.is_complex)


@dataclass(slots=True)
class Op:
    """One recorded call; `args` and `kwargs` contain `Ref`s instead of tensors."""

    func: Callable[..., Any]
    name: str  # the last part of its public name, e.g. "conv2d", "add_", "__getitem__"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    mutated: tuple[int, ...]  # inputs that the call wrote to; their new values are among the outputs
    module: str  # path of the module that made the call
    autocast: tuple[bool, torch.dtype] | None = None  # if it differs from the state at the start of the forward
    line: str = ""  # file and line of the call in the network's own code
    group: Any = None  # process group of a SyncBatchNorm

    def __str__(self) -> str:
        return f"{self.name} in {self.module or 'the model'}"


@dataclass
class Program:
    """The recorded forward.

    Attributes:
        image: the image batch.
        inputs: further input maps, with the image axes last.
        vectors: further input tensors without image axes.
        ops: the calls, in order.
        values: the tensors, by number.
        grad: whether gradients were enabled; otherwise `Value.differentiable` is meaningless.
        output: outputs of the graph, in order: `Ref`s and Python values.
        single: whether the call returns exactly one tensor, if that was requested.
        bound: value that exists before a call -> index of its input.
        updates: (before, after) values of outside tensors (parameters, buffers, constants, arguments) that a call
            writes to.
        assigned: the updated tensors whose memory a call replaces (`tensor.data = ...`).
        reads: (function, value) of Python values taken from tensors of the network's state.
        stands_in: value -> the value that is returned instead of it, in another form.
        apart: returned values that the rest of the program does not read.
        reached: returned value -> the parameters and constants that its gradient reaches, also with zeros.
    """

    image: int
    inputs: tuple[int, ...] = ()
    vectors: tuple[int, ...] = ()
    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    grad: bool = True
    output: list[Any] = field(default_factory=list)
    single: bool = False
    bound: dict[int, int] = field(default_factory=dict)
    updates: list[tuple[int, int]] = field(default_factory=list)
    assigned: set[int] = field(default_factory=set)
    reads: list[tuple[Callable[[Callable[[int], Tensor]], Any], Any]] = field(default_factory=list)
    stands_in: dict[int, int] = field(default_factory=dict)
    apart: set[int] = field(default_factory=set)
    reached: dict[int, frozenset[int]] = field(default_factory=dict)

    def results(self) -> list[int]:
        """All values that remain after a call: in its result, and in tensors that it changes."""
        return [self.form(v) for v in (*self.given_away(), *(after for _, after in self.updates))]

    def ended(self, ops: Sequence[Op]) -> list[list[int]]:
        """By op, the values that no later one of `ops` reads and that the call does not return, without the state."""
        kept = {*self.results(), *self.given_away(), *self.state()}
        last = {v: n for n, op in enumerate(ops) for v in (*op.outputs, *op.inputs) if v not in kept}
        found: list[list[int]] = [[] for _ in ops]
        for value, number in last.items():
            found[number].append(value)
        return found

    def handed_out(self) -> list[int]:
        """The values that the caller receives."""
        return list(map(self.form, self.given_away()))

    def form(self, value: int) -> int:
        """The value in the form that is returned."""
        return self.stands_in.get(value, value)

    def given_away(self) -> list[int]:
        """The returned values in their recorded form."""
        return refs(self.output)

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Whether the Python values that the recording took from the network's state are unchanged.

        Args:
            inputs: inputs of the call.
        """
        if not self.reads:
            return True

        def now(number: int) -> Tensor:
            constant = self.values[number].constant
            return inputs[self.bound[number]] if constant is None else constant

        return all(same_value(take(now), value) for take, value in self.reads)

    def state(self) -> list[int]:
        """The values that exist before a call: parameters, buffers, constants."""
        return [v for v, value in enumerate(self.values) if value.name is not None or value.constant is not None]


class Watched:
    """An argument of a call that may change from call to call."""

    def now(self, _state: Callable[[int], Tensor]) -> Any:
        """The argument in a call now; the recording is valid while it is equal."""
        raise NotImplementedError


def same_value(one: Any, other: Any) -> bool:
    """Whether two Python values of tensors are equal; 0.0 differs from -0.0, and NaN equals NaN."""
    if isinstance(one, Watched):
        return one == other
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    return type(one) is type(other) and repr(one) == repr(other)


def op_autocast(op: Op, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context with the autocast state of an op, if it is not that of the forward's start."""
    if op.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=op.autocast[1], enabled=op.autocast[0])


def call(op: Op, env: Any, copied: Container[int] | None = None) -> list[Tensor]:
    """The op's outputs.

    Args:
        op: the op.
        env: its inputs.
        copied: which of the tensors that it writes to are copied before; None for all, so that `env` is unchanged.
    """
    copied = op.mutated if copied is None else copied
    scope = {v: env[v].clone() if v in copied else env[v] for v in op.inputs}
    result = op.func(*bind(op.args, scope), **bind(op.kwargs, scope))
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    made = {id(t): t for t in (*tensors, *(scope[v] for v in op.mutated))}
    return list(made.values())


def in_stock_order(op: Op, values: Sequence[Value], given: dict[int, Tensor]) -> dict[int, Tensor]:
    """The inputs of an op, in the memory order of stock PyTorch if the result depends on it.

    Raises:
        UnsupportedError: the op reads memory, and an input is in stock PyTorch a part of larger memory.
    """
    reads_memory = op.name.rstrip("_") in _READS_MEMORY
    if not (reads_memory or draws(op)):
        return given
    found = dict(given)
    for number, tensor in given.items():
        if values[number].order is None and reads_memory:
            raise UnsupportedError(f"{op} reads the memory of a part of a map; give it a clone")
        found[number] = in_order(tensor, values[number].order or ())
    return found


def in_order(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """A tensor in a memory order: its dimensions, slowest first; unchanged if it has another number of them."""
    if len(dims) != tensor.dim() or tensor.permute(tuple(dims)).is_contiguous():
        return tensor
    return tensor.permute(tuple(dims)).contiguous().permute(tuple(dims.index(d) for d in range(tensor.dim())))


def makes_new_memory(op: Op) -> bool:
    """Whether the outputs of an op share memory with no other tensor, if it overwrites only such tensors itself."""
    return op.name in _NEW_MEMORY


_NEW_MEMORY = frozenset(
    "conv1d conv2d conv3d conv_transpose2d linear batch_norm instance_norm group_norm layer_norm add add_ iadd sub mul "
    "mul_ imul div cat matmul relu relu_ relu6 hardtanh hardtanh_ silu hardswish hardsigmoid leaky_relu leaky_relu_ "
    "elu elu_ celu selu mish gelu sigmoid tanh max_pool2d avg_pool2d".split()
)
_READS_MEMORY = frozenset(
    "as_strided as_strided_copy as_strided_scatter set resize resize_as untyped_storage storage".split()
)

# Functions of these names in `torch` take their arguments in another order than those of torch.nn.functional.
_OTHER_ORDER = frozenset(
    "batch_norm instance_norm dropout alpha_dropout feature_dropout kl_div embedding max_unpool2d".split()
)


def name_of(func: Callable[..., Any]) -> str:
    """The name by which rules find a call: the last part of its public name, or the whole name if it is ambiguous."""
    if isinstance(func, (CustomFunction, TensorHook)):
        return func.__name__
    whole = str(resolve_name(func) or getattr(func, "__name__", func)).removesuffix(".__get__")
    last, home = whole.rsplit(".", 1)[-1], getattr(func, "__module__", None) or "torch"
    if home.startswith("torch._ops"):
        return whole
    plain = last.removesuffix("_")
    other_order = plain in _OTHER_ORDER or plain.endswith(("_loss", "_logits", "_entropy"))
    ambiguous = not home.startswith(("torch", "gigamorph")) or (other_order and isinstance(func, BuiltinFunctionType))
    return f"{home}.{last}" if ambiguous else last


def location(module: str, line: str) -> str:
    """A location in the network, for messages."""
    where = f"module '{module}'" if module else "the model"
    return f"{where} ({line})" if line else where


def known_values(program: Program, wanted: int, state: Callable[[int], Tensor]) -> Tensor | None:
    """Compute a value that depends only on the network's state; None if it depends on anything else."""
    makers = _makers(program)
    env: dict[int, Tensor] = {}

    def find(number: int) -> bool:
        if number in env:
            return True
        value = program.values[number]
        if (value.name is not None or value.constant is not None) and number not in makers:
            env[number] = state(number)
            return True
        op = makers.get(number)
        if op is None or op.name.rstrip("_") in RANDOM or not all(find(v) for v in op.inputs):
            return False
        with torch.no_grad():
            env.update(zip(op.outputs, call(op, env), strict=True))
        return True

    return env[wanted] if find(wanted) else None


def _makers(program: Program) -> dict[int, Op]:
    """The op that made each value; values that an op only passes on, as in `broadcast_tensors`, do not count."""
    return {v: op for op in program.ops for v in op.outputs if v not in op.inputs}


def takes_single_images(program: Program) -> bool:
    """Whether a forward iterates over the batch, unpacks it or indexes single images, like a list."""
    readers = [op for op in program.ops if op.args and refs(op.args[:1]) == [program.image]]
    by_number = [op.args[1] for op in readers if op.name == "__getitem__"]
    first = [index[0] if isinstance(index, tuple) and index else index for index in by_number]
    return any(op.name == "unbind" for op in readers) or any(type(index) is int for index in first)


def given(program: Program, wanted: Iterable[int]) -> bool:
    """Whether any of these values depends on the inputs of a call: the image, further maps, vectors."""
    return not ancestors(program, wanted).isdisjoint((program.image, *program.inputs, *program.vectors))


def behind(program: Program, wanted: Iterable[int]) -> Iterator[Op]:
    """The ops that these values depend on."""
    found = ancestors(program, wanted)
    return (op for op in program.ops if not found.isdisjoint(op.outputs))


def ancestors(program: Program, wanted: Iterable[int]) -> set[int]:
    """The values that these depend on, including themselves."""
    makers = _makers(program)
    left, seen = list(wanted), set[int]()
    while left:
        number = left.pop()
        if number in seen:
            continue
        seen.add(number)
        left += makers[number].inputs if number in makers else ()
    return seen


UNSET = frozenset("empty empty_like new_empty empty_strided".split())  # ops that return uninitialised memory
RANDOM = UNSET | frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout rand randn randint "
    "randperm rand_like randn_like randint_like bernoulli normal uniform exponential cauchy geometric log_normal "
    "random multinomial poisson rrelu gumbel_softmax".split()
)


def draws(op: Op) -> bool:
    """Whether an op draws random numbers; a dropout with p=0 or training=False does not."""
    name = op.name.rstrip("_")
    if not name.endswith("dropout"):
        return name in RANDOM
    share = op.kwargs.get("p", op.args[1] if len(op.args) > 1 else 0.5)
    return share != 0 and op.kwargs.get("training", op.args[2] if len(op.args) > 2 else True) is not False


def wants(tensor: Any) -> bool | str:
    """Whether a tensor requires a gradient: "made" if it is not a leaf of the graph, so it may be written to."""
    if not torch.is_grad_enabled() or not getattr(tensor, "requires_grad", False):
        return False
    return True if tensor.is_leaf else "made"


class Given(NamedTuple):
    """The properties of an input tensor on which a recording depends.

    Attributes:
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        grad: whether it requires a gradient; "made" if it is not a leaf of the graph.
        strides: strides in elements; None for a contiguous tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool | str = False
    strides: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Given:
        return cls(tuple(tensor.shape), tensor.dtype, wants(tensor), strides(tensor))


def order(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a tensor in memory order, slowest first; None if the memory has gaps or values repeat."""
    if tensor.layout != torch.strided:
        return None
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    found = sorted(range(tensor.dim()), key=lambda d: (tensor.shape[d] > 1, -tensor.stride(d)))
    return tuple(found) if tensor.permute(found).is_contiguous() else None


def strides(tensor: Any) -> tuple[int, ...] | None:
    """The strides of a tensor that is not contiguous; None for other values."""
    return tensor.stride() if isinstance(tensor, Tensor) and not tensor.is_contiguous() else None
