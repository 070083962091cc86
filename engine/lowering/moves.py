"""Reshapes and permutations in a row, of which those in between have no image axes: what they come to is looked at.

    (N, C, H, W) -> (N*C*h, p, w, q) -> (N*C*h, w, p, q) -> (N, C, h*w, p*q)        MobileViT's patches

An axis that a reshape has joined with the batch is no image axis, but the permutation and reshape after it give it
back. So a reshape that no rule takes is put off: with all that moves its result on, it is one reshape into factors, one
permutation of these and one reshape; before them, of a flattened map, one that takes rows and columns apart. As soon as
the rules take those, they stand in for all before; an op of another kind gets the calls as they were recorded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..capture.program import Op, Ref
from .ops.base import Local, Maps, Refusal, arguments, find_rule

_RESHAPES = frozenset({"reshape", "view", "flatten", "unflatten"})
_PERMUTES = frozenset({"permute", "transpose", "swapaxes"})
_COPIES = frozenset({"contiguous", "clone"})


@dataclass(frozen=True)
class _Moved:
    """base.reshape(factors).permute(order).reshape(shape), and the calls that came to it."""

    base: int
    factors: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    calls: tuple[Op, ...]


class Moves:
    """What was put off, while rules are applied in program order."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps
        self.moved: dict[int, _Moved] = {}
        self.done: set[int] = set()  # outputs of recorded calls that were given after all

    def merged(self, op: Op) -> list[Op]:
        """The ops that an op becomes; the op itself where nothing is put off."""
        if len(op.inputs) == 1 == len(op.outputs) and op.autocast is None and self._is_move(op):
            value = op.inputs[0]
            if value in self.moved or self._unplaced(op):
                found = self._after(op)
                if found is not None:
                    return self._placed(found, op) or self._put_off(op, found)
        return [*(one for value in dict.fromkeys(op.inputs) for one in self.recorded(value)), op]

    def recorded(self, value: int) -> list[Op]:
        """The calls that make a value that was put off, once."""
        if value not in self.moved:
            return []
        calls = [one for one in self.moved[value].calls if one.outputs[0] not in self.done]
        self.done.update(one.outputs[0] for one in calls)
        return calls

    def _is_move(self, op: Op) -> bool:
        values = self.maps.program.values
        return (op.name in _RESHAPES | _PERMUTES or (op.name in _COPIES and op.inputs[0] in self.moved)) and values[
            op.inputs[0]
        ].dtype == values[op.outputs[0]].dtype

    def _unplaced(self, op: Op) -> bool:
        """Whether it is a reshape of a map that no rule takes."""
        return op.name in _RESHAPES and op.inputs[0] in self.maps and not self._try([op])

    def _put_off(self, op: Op, found: _Moved) -> list[Op]:
        self.moved[op.outputs[0]] = found
        return []

    def _after(self, op: Op) -> _Moved | None:
        """What an op makes of its input; None if its dimensions do not divide those of the input."""
        value = op.inputs[0]
        shape = tuple(self.maps.shape(value))
        before = self.moved.get(value) or _Moved(value, shape, tuple(range(len(shape))), shape, ())
        after, calls = tuple(self.maps.shape(op.outputs[0])), (*before.calls, op)
        if op.name not in _PERMUTES:
            return replace(before, shape=after, calls=calls)
        split = _refined([before.factors[one] for one in before.order], before.shape)
        if split is None:
            return None
        parts, groups = split  # of each permuted factor; of each dimension, the numbers of its parts
        factors: list[int] = []
        first = {}  # where the parts of a factor begin
        for number in range(len(before.factors)):
            first[number] = len(factors)
            factors += parts[before.order.index(number)]
        numbers = [
            first[own] + i for place, own in enumerate(before.order) for i in range(len(parts[place]))
        ]  # of the parts in the permuted order
        order = [numbers[one] for dim in _order(op, len(before.shape)) for one in groups[dim]]
        return _Moved(before.base, tuple(factors), tuple(order), after, calls)

    def _placed(self, found: _Moved, op: Op) -> list[Op]:
        """One reshape, permutation and reshape that the rules take; nothing if they do not."""
        made: list[Op] = []
        value, shape = found.base, tuple(self.maps.shape(found.base))
        wanted = tuple(found.factors[one] for one in found.order)
        spread = self._spread(value)
        steps = [
            ("reshape", torch.reshape, spread, spread, spread != shape),
            ("reshape", torch.reshape, found.factors, found.factors, found.factors != spread),
            ("permute", torch.permute, found.order, wanted, found.order != tuple(range(len(found.order)))),
            ("reshape", torch.reshape, found.shape, found.shape, True),
        ]
        for number, (name, func, given, after, does) in enumerate(steps):
            if does:
                output = op.outputs[0] if number == 3 else self.maps.new_value(after, like=op.outputs[0])
                made.append(Op(func, name, (Ref(value), given), {}, (value,), (output,), (), op.module, line=op.line))
                value = output
        return made if self._try(made) else []

    def _spread(self, value: int) -> tuple[int, ...]:
        """The shape of a map with rows and columns apart, also where they have become one dimension."""
        shape = tuple(self.maps.shape(value))
        if value not in self.maps.flat:
            return shape
        axis, flat = self.maps.axes[value][0], self.maps.flat[value]
        return (*shape[:axis], *flat.sizes(flat.height, flat.width), *shape[axis + 1 :])

    def _try(self, ops: Sequence[Op]) -> bool:
        """Whether the rules take ops one after the other; nothing is left of the attempt."""
        axes, flat = dict(self.maps.axes), dict(self.maps.flat)
        try:
            for op in ops:
                rule = find_rule(op.name)
                node = None if rule is None else rule(op, self.maps)
                if not isinstance(node, Local):
                    return False
                for value, (h, w) in zip(op.outputs, node.axes, strict=True):
                    self.maps.axes[value] = (h, w)
                    if h == w and value not in self.maps.flat:
                        self.maps.flat[value] = self.maps.flat[next(iter(node.reads))]
        except Refusal:
            return False
        finally:
            self.maps.axes, self.maps.flat = axes, flat
        return True


def _order(op: Op, rank: int) -> list[int]:
    """What a permutation puts where."""
    if op.name == "permute":
        dims = op.kwargs.get("dims", op.args[1:])
        dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
        return [dim % rank for dim in dims]
    names = "input axis0 axis1" if op.name == "swapaxes" else "input dim0 dim1"
    _, one, other = list(arguments(op, names).values())[:3]
    order = list(range(rank))
    order[one % rank], order[other % rank] = other % rank, one % rank
    return order


def _refined(factors: Sequence[int], shape: Sequence[int]) -> tuple[list[list[int]], list[list[int]]] | None:
    """The coarsest factors that both are products of; sides of one have none.

    Returns:
        The parts of each factor, and for each dimension of `shape` the numbers of its parts; None if there are none.
    """
    ends = sorted({math.prod(some[: i + 1]) for some in (factors, shape) for i in range(len(some))} - {1})
    if any(b % a for a, b in itertools.pairwise(ends)):
        return None
    sizes = [b // a for a, b in zip([1, *ends], ends, strict=False)]

    def groups(some: Sequence[int]) -> list[list[int]]:
        return [
            [n for n, end in enumerate(ends) if math.prod(some[:i]) < end <= math.prod(some[: i + 1])]
            for i in range(len(some))
        ]

    return [[sizes[n] for n in own] for own in groups(factors)], groups(shape)
