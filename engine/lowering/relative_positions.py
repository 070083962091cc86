"""Relative to absolute position logits by padding and reshaping: each row of a matrix selects a run of columns.

    (N, H, W, 2W-1) -> (N*H, W, 2W-1) -> pad -> flatten -> pad -> (N*H, W+1, 2W-1) -> [:, :W, W-1:]      BoTNet, HaloNet

Single calls of this chain move values between rows, so no rule accepts them. Together they only move the values of each
matrix. This module applies them to the numbers of the elements. If row i of the result is columns start[i],
start[i] + 1, ... of row i, one per-position op (`column_runs`) replaces the chain.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..capture.program import Op, Program, Ref
from .geometry import Gather, same
from .ops.base import Block, Env, Local, Maps, Refusal, arguments, rule
from .ops.names import RESHAPES


class Relative:
    """Replaces such chains while rules are applied in program order.

    Args:
        ops: the ops of the program, which are then passed one by one.
    """

    def __init__(self, ops: Sequence[Op], maps: Maps) -> None:
        self.maps = maps
        self.readers = Counter(v for op in ops for v in dict.fromkeys(op.inputs))
        self.readers.update(maps.program.results())
        self.reader = {v: op for op in ops for v in op.inputs}
        self.instead: dict[int, list[Op]] = {}  # by the output of a replaced call

    def absolute(self, op: Op) -> list[Op]:
        """The ops that replace an op: those of the whole chain for its last call, none for the calls before it."""
        if op.inputs and is_per_position(self.maps, op.inputs[0]):
            chain = _chain(op, self.reader, self.readers, self.maps.program)
            made = _runs(chain, self.maps)
            if made:
                last = next(i for i, one in enumerate(chain) if one.outputs == made[-1].outputs)
                self.instead.update((one.outputs[0], []) for one in chain[:last])
                self.instead[made[-1].outputs[0]] = made
        return self.instead.get(op.outputs[0], [op]) if op.outputs else [op]


def _chain(first: Op, reader: dict[int, Op], readers: Counter[int], program: Program) -> list[Op]:
    """A reshape to a batch of matrices and the following moves inside each; every intermediate has one reader."""
    if first.name not in RESHAPES or not _is_plain(first, program):
        return []
    before, after = (program.values[v].shape for v in (first.inputs[0], first.outputs[0]))
    if len(after) != 3 or len(before) < 4 or after[1:] != before[-2:]:
        return []
    chain = [first]
    while readers[chain[-1].outputs[0]] == 1:
        following = reader.get(chain[-1].outputs[0])
        if following is None or not _is_plain(following, program) or _moved(following, None, program) is None:
            break
        chain.append(following)
    return chain


def _is_plain(op: Op, program: Program) -> bool:
    """Whether an op has one input and one output of the same dtype, and no side effect."""
    if len(op.inputs) != 1 or len(op.outputs) != 1 or op.mutated or op.autocast is not None:
        return False
    before, after = program.values[op.inputs[0]], program.values[op.outputs[0]]
    return before.dtype == after.dtype and before.takes_grad == after.takes_grad


def _moved(op: Op, numbers: np.ndarray[Any, Any] | None, program: Program) -> np.ndarray[Any, Any] | None:
    """The elements of the first matrix after an op, with -1 for padding; None if the op reads other matrices.

    Args:
        numbers: the element numbers; None only checks that the op is a move within each matrix.
    """
    before, after = (program.values[v].shape for v in (op.inputs[0], op.outputs[0]))
    x = np.broadcast_to(np.int64(0), before[1:]) if numbers is None else numbers
    if after[:1] != before[:1]:
        return None
    if op.name in RESHAPES:
        return x.reshape(after[1:])
    if op.name == "contiguous":
        return x
    if op.name == "pad":
        given = arguments(op, "input pad mode value", mode="constant")
        amounts = [(given["pad"][i], given["pad"][i + 1]) for i in range(0, len(given["pad"]), 2)][::-1]
        if given["mode"] != "constant" or len(amounts) >= len(before) or min(map(min, amounts)) < 0:
            return None
        return np.pad(x, [(0, 0)] * (len(before) - 1 - len(amounts)) + amounts, constant_values=-1)
    if op.name == "__getitem__":
        index = op.args[1] if isinstance(op.args[1], tuple) else (op.args[1],)
        if index[:1] != (slice(None),) or not all(isinstance(one, slice) and one.step in (None, 1) for one in index):
            return None
        return x[index[1:]]
    return None


def _runs(chain: Sequence[Op], maps: Maps) -> list[Op]:
    """The ops that replace the longest prefix of a chain that selects a run of each row; none if there is none."""
    if not any(op.name == "pad" for op in chain):
        return []
    program = maps.program
    source = chain[0].inputs[0]
    shape = program.values[source].shape
    rows, columns = shape[-2:]
    numbers: np.ndarray[Any, Any] = np.arange(rows * columns).reshape(rows, columns)
    found: tuple[Op, tuple[int, ...], int] | None = None
    for op in chain[1:]:
        moved = _moved(op, numbers, program)
        assert moved is not None
        numbers = moved
        starts = _starts(numbers, rows, columns)
        if starts is not None:
            found = op, starts, numbers.shape[1]
    if found is None:
        return []
    end, starts, length = found
    output = end.outputs[0]
    runs = maps.new_value((*shape[:-1], length), like=output)
    program.values[runs].differentiable = program.values[output].differentiable
    take = partial(column_runs, starts=starts, length=length)
    first = replace(end, func=take, name="column_runs", args=(Ref(source),), kwargs={}, inputs=(source,))
    batch = math.prod(shape[:-2])
    second = replace(end, func=torch.reshape, name="reshape", args=(Ref(runs), (batch, rows, length)), kwargs={})
    return [replace(first, outputs=(runs,)), replace(second, inputs=(runs,))]


def _starts(numbers: np.ndarray[Any, Any], rows: int, columns: int) -> tuple[int, ...] | None:
    """The first column of each row's run; None unless each row has a run of its own columns."""
    if numbers.ndim != 2 or len(numbers) != rows or not numbers.shape[1]:
        return None
    starts = numbers[:, 0] - np.arange(rows) * columns
    expected = (np.arange(rows) * columns + starts)[:, None] + np.arange(numbers.shape[1])
    inside = (starts >= 0) & (starts + numbers.shape[1] <= columns)
    return tuple(int(one) for one in starts) if inside.all() and np.array_equal(numbers, expected) else None


def column_runs(x: Tensor, starts: Sequence[int], length: int) -> Tensor:
    """(..., rows, columns) -> (..., rows, length): columns starts[i] .. starts[i] + length - 1 of row i."""
    first = torch.tensor(starts, device=x.device)
    indices = first[:, None] + torch.arange(length, device=x.device)
    return x.gather(-1, indices.expand(*x.shape[:-1], length))


def is_per_position(maps: Maps, value: int) -> bool:
    """Whether the last two dimensions of a map are a row of columns for each position, or a matrix for each."""
    if value not in maps:
        return False
    rank, axes = len(maps.shape(value)), maps.axes[value]
    return rank - 1 not in axes and not (rank - 2 in axes and value in maps.flat)


@rule("column_runs")
def runs(op: Op, maps: Maps) -> Local:
    """Per position; if rows are positions, a block uses the starts of its own rows."""
    value = op.inputs[0]
    rank, axes = len(maps.shape(value)), maps.axes[value]
    if not is_per_position(maps, value):
        raise Refusal("cannot select columns of a matrix that are positions of the image")
    given = op.func.keywords  # pyright: ignore[reportFunctionMemberAccess]
    starts, length = given["starts"], given["length"]
    # A gather along rows with their own starts: blocks at other positions differ.
    reads = [
        Gather(n, n, tuple(range(n))) if axis == rank - 2 else same(n)
        for n, axis in zip(maps.size(value), axes, strict=True)
    ]

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        own = starts
        for axis, (low, high) in zip(axes, (block.rows, block.cols), strict=True):
            if axis == rank - 2:
                own = starts[low:high]
        return (column_runs(env[value], own, length),)

    return Local(op, {value: (reads[0], reads[1])}, (axes,), run)
