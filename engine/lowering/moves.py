"""Merges successive reshapes and permutations whose intermediate results have no image axes.

    (N, C, H, W) -> (N*C*h, p, w, q) -> (N*C*h, w, p, q) -> (N, C, h*w, p*q)        MobileViT's patches

A reshape can join an image axis with the batch, and later ones separate it again. A reshape that no rule accepts is
therefore deferred. Together with the moves of its result it equals one reshape into factors, one permutation of them
and one reshape; for a flattened map, a reshape that separates rows and columns comes first. Once the rules accept this
sequence, it replaces the deferred calls. If an op of another kind reads the value first, the recorded calls are used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..capture.program import Op, Ref
from .ops.base import Local, Maps, Refusal, find_rule
from .ops.movement import moved_dimensions
from .ops.names import RESHAPES

_PERMUTES = frozenset({"permute", "transpose", "swapaxes"})
_COPIES = frozenset({"contiguous", "clone"})


@dataclass(frozen=True)
class _Moved:
    """base.reshape(factors).permute(order).reshape(shape), and the recorded calls that it equals."""

    base: int
    factors: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    calls: tuple[Op, ...]


class Moves:
    """The deferred calls while rules are applied in program order."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps
        self.deferred: dict[int, _Moved] = {}
        self.done: set[int] = set()  # outputs of deferred calls that were emitted as recorded

    def merged(self, op: Op) -> list[Op]:
        """The ops that replace an op; the op itself if nothing is deferred."""
        if len(op.inputs) == 1 == len(op.outputs) and op.autocast is None and self._is_move(op):
            value = op.inputs[0]
            if value in self.deferred or self._is_refused(op):
                found = self._merge(op)
                if found is not None:
                    made = self._merged_ops(found, op)
                    if not made:
                        self.deferred[op.outputs[0]] = found
                    return made
        return [*(one for value in dict.fromkeys(op.inputs) for one in self.recorded(value)), op]

    def recorded(self, value: int) -> list[Op]:
        """The recorded calls that make a deferred value, once."""
        if value not in self.deferred:
            return []
        calls = [one for one in self.deferred[value].calls if one.outputs[0] not in self.done]
        self.done.update(one.outputs[0] for one in calls)
        return calls

    def _is_move(self, op: Op) -> bool:
        values = self.maps.program.values
        return (op.name in RESHAPES | _PERMUTES or (op.name in _COPIES and op.inputs[0] in self.deferred)) and values[
            op.inputs[0]
        ].dtype == values[op.outputs[0]].dtype

    def _is_refused(self, op: Op) -> bool:
        """Whether an op is a reshape of a map that no rule accepts."""
        return op.name in RESHAPES and op.inputs[0] in self.maps and not self._accepts([op])

    def _merge(self, op: Op) -> _Moved | None:
        """The merged form of an op and the calls before it; None if its dimensions do not divide those of the input."""
        value = op.inputs[0]
        shape = tuple(self.maps.shape(value))
        before = self.deferred.get(value) or _Moved(value, shape, tuple(range(len(shape))), shape, ())
        after, calls = tuple(self.maps.shape(op.outputs[0])), (*before.calls, op)
        if op.name not in _PERMUTES:
            return replace(before, shape=after, calls=calls)
        split = _refined([before.factors[one] for one in before.order], before.shape)
        if split is None:
            return None
        parts, groups = split  # sizes of the parts of each permuted factor; part numbers of each dimension
        factors: list[int] = []
        first = {}  # position of the first part of each factor
        for number in range(len(before.factors)):
            first[number] = len(factors)
            factors += parts[before.order.index(number)]
        numbers = [
            first[own] + i for position, own in enumerate(before.order) for i in range(len(parts[position]))
        ]  # part numbers in the permuted order
        order = [numbers[one] for dim in moved_dimensions(op, len(before.shape)) for one in groups[dim or 0]]
        return _Moved(before.base, tuple(factors), tuple(order), after, calls)

    def _merged_ops(self, found: _Moved, op: Op) -> list[Op]:
        """The reshape, permutation and reshape if the rules accept them; an empty list if not."""
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
        return made if self._accepts(made) else []

    def _spread(self, value: int) -> tuple[int, ...]:
        """The shape of a map with separate rows and columns, also if it is flattened."""
        shape = tuple(self.maps.shape(value))
        if value not in self.maps.flat:
            return shape
        axis, flat = self.maps.axes[value][0], self.maps.flat[value]
        return (*shape[:axis], *flat.sizes(flat.height, flat.width), *shape[axis + 1 :])

    def _accepts(self, ops: Sequence[Op]) -> bool:
        """Whether the rules accept ops one after the other; the attempt has no side effect."""
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


def _refined(factors: Sequence[int], shape: Sequence[int]) -> tuple[list[list[int]], list[list[int]]] | None:
    """The coarsest common refinement of two factorizations; factors of one have no parts.

    Returns:
        The parts of each factor, and for each dimension of `shape` the numbers of its parts; None if none exists.
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
