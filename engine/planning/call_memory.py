"""Temporary memory of calls on whole maps, such as quantiles, sorts and FFTs, in addition to inputs and outputs.

A call is run forward and backward on tensors without values, as tiles are. This does not show allocations inside its
kernels; known ones are listed in `_INSIDE`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..capture.call_trees import Ref
from ..capture.higher_order import CustomFunction, TensorHook
from ..capture.program import Op, Value, call
from ..lowering.stages import StagedProgram
from ..tiling.scan import Autocast
from ..torch_private import FakeTensorMode, memory_of, tree_flatten, tree_leaves
from .interstage import value_bytes
from .simulate import StorageMeter, on_devices

LEAST_BYTES = 1 << 20  # calls with smaller inputs are ignored
_REMEMBERED = 4096
_PLAIN = (bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.memory_format)

# Bytes per input element that CPU kernels allocate internally: copies of the values with their indices.
_INSIDE = {"kthvalue": 8, "median": 8, "nanmedian": 8, "topk": 16}
_OF_ONE_ROW = frozenset({"topk"})  # these allocate for one row at a time


@dataclass(frozen=True)
class CallMemory:
    """Bytes of one call in addition to its inputs and outputs.

    Attributes:
        forward: peak during its forward.
        kept: bytes saved between its forward and its backward.
        backward: peak during its backward, without its gradients and `kept`.
        allocated: peak of the bytes that its backward allocates, including its gradients.
    """

    forward: int = 0
    kept: int = 0
    backward: int = 0
    allocated: int = 0


_found: dict[Hashable, CallMemory] = {}


def call_memory(op: Op, values: Sequence[Value], training: bool, wanted: Container[int]) -> CallMemory:
    """The memory of a call; zero for small calls, and for calls that cannot run without values.

    Args:
        op: the call.
        values: the values of the program.
        training: whether there is a backward.
        wanted: the values that require a gradient.
    """
    read = max((value_bytes(values[v]) for v in op.inputs), default=0)
    if read < LEAST_BYTES or isinstance(op.func, (CustomFunction, TensorHook)) or not _of_torch(op):
        return CallMemory()
    key = _key(op, values, training, wanted)
    if key is None:
        return _computed(op, values, training, wanted)
    if key not in _found:
        if len(_found) >= _REMEMBERED:
            _found.clear()
        _found[key] = _computed(op, values, training, wanted)
    return _found[key]


def backward_bytes(staged: StagedProgram, wanted: Container[int]) -> int:
    """Peak of the bytes that autograd allocates for a call between the stages: gradients and temporary memory."""
    values, most = staged.program.values, 0
    for step in staged.steps:
        if isinstance(step, Op) and (found := call_memory(step, values, True, wanted)) != CallMemory():
            given = sum(value_bytes(values[v]) for v in step.outputs if v in wanted and values[v].takes_grad)
            most = max(most, given + found.allocated)
    return most


def _of_torch(op: Op) -> bool:
    return (getattr(op.func, "__module__", None) or "torch").split(".")[0] in ("torch", "_VariableFunctions")


def _key(op: Op, values: Sequence[Value], training: bool, wanted: Container[int]) -> Hashable:
    """A cache key for a call; None if an argument cannot be compared."""
    leaves, form = tree_flatten((op.args, op.kwargs))
    told: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Ref):
            value = values[leaf.value]
            told.append((value.shape, value.dtype, value.device, leaf.value in wanted))
        elif isinstance(leaf, slice):  # not hashable in Python 3.11
            told.append((slice, leaf.start, leaf.stop, leaf.step))
        elif isinstance(leaf, _PLAIN):
            told.append((type(leaf), leaf))
        else:
            return None
    autocast = Autocast.current(values[op.inputs[0]].device)
    return op.func, tuple(told), str(form), op.mutated != (), autocast, training


def _computed(op: Op, values: Sequence[Value], training: bool, wanted: Container[int]) -> CallMemory:
    try:
        with (
            torch.autograd.set_detect_anomaly(False),
            on_devices(None, values),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            return _run(op, values, training, wanted)
    except Exception:  # it depends on values, or its shapes are unknown; PyTorch raises many types of errors for this
        return CallMemory()


def _run(op: Op, values: Sequence[Value], training: bool, wanted: Container[int]) -> CallMemory:
    inputs = {v: torch.empty(values[v].shape, dtype=values[v].dtype, device=values[v].device) for v in op.inputs}
    for v, tensor in inputs.items():
        tensor.requires_grad_(training and v in wanted and values[v].takes_grad)
    inside = _inside(op, values)
    with StorageMeter() as meter, torch.set_grad_enabled(training):
        meter.ignore(inputs)
        made = call(op, inputs)
        own = {memory_of(t): t.untyped_storage().nbytes() for t in made}
        read = {memory_of(t) for t in inputs.values()}
        results = sum(size for key, size in own.items() if key not in read)
        kept, forward = max(0, meter.alive - results), max(0, meter.peak - meter.alive)
        roots = [t for t in made if t.requires_grad]
        leaves = [t for t in inputs.values() if t.requires_grad]
        if not roots or not leaves:
            return CallMemory(max(forward, inside), kept)
        grads = [torch.empty_like(t) for t in roots]
        before = meter.peak = meter.alive
        torch.autograd.grad(roots, leaves, grads, retain_graph=True, allow_unused=True)  # frees nothing
        allocated, meter.peak = meter.peak - before, meter.alive
        found = torch.autograd.grad(roots, leaves, grads, allow_unused=True)
        gradients = sum(t.untyped_storage().nbytes() for t in tree_leaves(found) if isinstance(t, Tensor))
        return CallMemory(max(forward, inside), kept, max(0, meter.peak - before - gradients), allocated)


def _inside(op: Op, values: Sequence[Value]) -> int:
    each = _INSIDE.get(op.name, 0)
    value = values[op.inputs[0]]
    if not each or value.device.type != "cpu":
        return 0
    if op.name in _OF_ONE_ROW:
        dim = op.kwargs.get("dim", op.args[2] if len(op.args) > 2 else -1)
        return each * value.shape[dim]
    return (each + value.dtype.itemsize) * math.prod(value.shape)
