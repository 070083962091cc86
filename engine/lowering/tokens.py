"""Separates tokens, such as a class token, from the image positions that they are joined to.

`cat([tokens, positions], 1)` has no image axes to cut into tiles. Its parts are independent until an op mixes
positions: an op on the joined value is one op on the few tokens, a vector, and the same op on the positions, a map.

    per position     linear, norm over channels, activations, sums, `reshape` to heads: applied to both
    x[:, 0], x[:, 1:]                       selects one of the two
    attention, q @ k                        queries in two parts, all keys: keys are joined again, as a vector

Position embeddings and masks with a row for each query are also cut in two. For an op of another kind, the recorded
`cat` joins the parts again, and the joined value is a vector from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..capture.program import Op, Ref, bind
from ..torch_private import tree_leaves
from .ops.attention import of_another_query
from .ops.base import Maps, arguments
from .ops.contract import labels
from .ops.indices import spelt_out
from .ops.names import ELEMENTWISE, RESHAPES
from .ops.promote import renamed
from .ops.reshape import position_of

_PER_POSITION = frozenset(
    [*ELEMENTWISE, "linear", "layer_norm", "rms_norm", "softmax", "log_softmax", "normalize", "dropout"]
)
_MOVES = frozenset(
    "permute transpose swapaxes swapdims movedim moveaxis mT mH unbind chunk split select unsqueeze squeeze".split()
)
_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm"})
_LIKE = frozenset({"new_empty", "new_zeros", "new_ones", "new_full"})


class NotApart(Exception):
    """Raised if an op on the positions turns out not to be per position."""


@dataclass(frozen=True)
class _Joined:
    """The few tokens and the positions of a value, along one of its axes."""

    tokens: int
    positions: int
    axis: int
    count: int  # of the tokens


class Tokens:
    """The joined values of a program, while rules are applied in its order."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps
        self.joined: dict[int, _Joined] = {}
        self.whole: set[int] = set()  # values whose parts were joined again
        self.wanted: dict[int, int] = {}  # positions -> the axis on which a rule must leave them

    def apart(self, op: Op) -> list[Op]:
        """The ops that replace an op; the op itself if none of its inputs is joined."""
        begun = self._begin(op)
        if begun is not None:
            return begun
        values = [v for v in dict.fromkeys(op.inputs) if v in self.joined]
        if not values:
            return [op]
        if op.name in _LIKE:  # read for its dtype and device
            return [renamed(op, {v: self.joined[v].tokens for v in values})]
        made = self._split(op, values)
        return made if made is not None else [*(one for v in values for one in self.together(v)), op]

    def together(self, value: int) -> list[Op]:
        """The op that joins the parts of a value again, once."""
        if value in self.whole or value not in self.joined:
            return []
        self.whole.add(value)
        own = self.joined[value]
        args = ([Ref(own.tokens), Ref(own.positions)], own.axis)
        return [Op(torch.cat, "cat", args, {}, (own.tokens, own.positions), (value,), (), "")]

    def check(self, op: Op) -> None:
        """Raise `NotApart` unless the rule of an op has left positions on the expected axis."""
        for value in op.outputs:
            axis = self.wanted.pop(value, None)
            if axis is not None and (self.maps.axes.get(value) != (axis, axis) or value not in self.maps.flat):
                raise NotApart

    def _begin(self, op: Op) -> list[Op] | None:
        """A `cat` of vectors in front of one flattened map, along its positions."""
        if op.name not in ("cat", "concat", "concatenate"):
            return None
        given = arguments(op, "tensors dim", dim=0)
        values = [ref.value for ref in given["tensors"]]
        *few, last = values
        if not few or any(v in self.maps or v in self.joined for v in few) or op.autocast is not None:
            return None
        rank = len(self.maps.shape(op.outputs[0]))
        axis = given["dim"] % rank
        if last not in self.maps.flat or self.maps.merged(last) or self.maps.axes[last] != (axis, axis):
            return None
        kinds = {self.maps.program.values[v].dtype for v in values}
        if len(kinds) > 1 or any(len(self.maps.shape(v)) != rank for v in few):
            return None
        count = sum(self.maps.shape(v)[axis] for v in few)
        tokens, made = few[0], []
        if len(few) > 1:
            shape = [*self.maps.shape(last)]
            shape[axis] = count
            tokens = self._new(op.outputs[0], shape)
            args = ([Ref(v) for v in few], axis)
            made = [Op(torch.cat, "cat", args, {}, tuple(few), (tokens,), (), op.module, line=op.line)]
        self.joined[op.outputs[0]] = _Joined(tokens, last, axis, count)
        return made

    def _split(self, op: Op, values: Sequence[int]) -> list[Op] | None:
        """The ops on the parts; None if the op needs them together."""
        if op.name == "__getitem__":
            found = self._select(op)
            if found is not None:
                return found
        if op.name == "scaled_dot_product_attention":
            return self._attention(op)
        if op.name in _PRODUCTS:
            left, right = (ref.value for ref in op.args[:2])
            if left not in self.joined or self.joined[left].axis == len(self.maps.shape(left)) - 1:
                return None
            rows = self.joined[left].axis - len(self.maps.shape(left))
            if rows < -2 and right not in self.joined and rows >= -len(self.maps.shape(right)):
                return None  # a different matrix for each position
            if right in self.joined and rows < -2:
                return None
            made = self._both(op, (left,))
            return None if made is None else [*self.together(right), *made]
        if op.name == "einsum":
            return self._einsum(op)
        if op.name in RESHAPES:
            return self._reshaped(op, values[0])
        if op.name in _MOVES or op.name == "__getitem__":
            return self._both(op, values)
        if op.name.removesuffix("_") in _PER_POSITION or op.name in _PER_POSITION:
            return self._per_position(op, values)
        return None

    def _per_position(self, op: Op, values: Sequence[int]) -> list[Op] | None:
        rank = len(self.maps.shape(op.outputs[0]))
        behind = {self.joined[v].axis - len(self.maps.shape(v)) for v in values}
        counts = {self.joined[v].count for v in values}
        if len(behind) > 1 or len(counts) > 1:
            return None
        (axis_from_end,), (count,) = behind, counts
        name = op.name.removesuffix("_")
        if name in ("softmax", "log_softmax", "normalize"):
            dim = arguments(op, "input p dim" if name == "normalize" else "input dim", dim=1)["dim"]
            if dim is None or dim % rank == axis_from_end % rank:
                return None
        normalized = arguments(op, "input normalized_shape")["normalized_shape"] if name.endswith("_norm") else ()
        if len(normalized) >= -axis_from_end:
            return None
        if name == "linear":
            return self._both(op, values) if axis_from_end < -1 else None
        cut: dict[int, int] = {}
        before: list[Op] = []
        size = self.maps.shape(values[0])[axis_from_end]
        for value in dict.fromkeys(op.inputs):
            shape = self.maps.shape(value)
            if value in self.joined or len(shape) < -axis_from_end or shape[axis_from_end] == 1:
                continue
            if value in self.maps or shape[axis_from_end] != size:
                return None
            cut[value] = len(shape) + axis_from_end
        rows, before = self._cut(cut, count)
        made = self._both(op, values, rows)
        return None if made is None else [*before, *made]

    def _attention(self, op: Op) -> list[Op] | None:
        given = arguments(op, "query key value attn_mask dropout_p is_causal", is_causal=False)
        query, key, value = (given[name].value for name in ("query", "key", "value"))
        if query not in self.joined or self.joined[query].axis != len(self.maps.shape(query)) - 2 or given["is_causal"]:
            return None
        joined = [one for v in dict.fromkeys((key, value)) if v in self.joined for one in self.together(v)]
        if query in (key, value):  # one tensor is both
            op, number = of_another_query(op, self.maps)
            self.joined[number], query = self.joined[query], number
        cut: dict[int, int] = {}
        mask = given["attn_mask"]
        if mask is not None:
            shape = self.maps.shape(mask.value)
            if mask.value in self.joined or mask.value in self.maps:
                return None
            if len(shape) > 1 and shape[-2] != 1:
                cut[mask.value] = len(shape) - 2
        rows, before = self._cut(cut, self.joined[query].count)
        made = self._both(op, (query,), rows, {key, value} - {query})
        return None if made is None else [*joined, *before, *made]

    def _einsum(self, op: Op) -> list[Op] | None:
        """Queries times keys, weights times values: one operand in parts, the other joined."""
        operands = op.args[1] if isinstance(op.args[1], (list, tuple)) else op.args[1:]
        values = [ref.value for ref in operands]
        terms, output = labels(op.args[0], [len(self.maps.shape(v)) for v in values])
        if len(values) != 2 or values[0] == values[1]:
            return None
        places = {
            output.index(label): side
            for side, value in enumerate(values)
            if value in self.joined and (label := terms[side][self.joined[value].axis]) in output
            if label not in terms[1 - side]
        }
        if not places:
            return None
        side = places[min(places)]  # a softmax runs along the positions of the other operand, which come last
        made = self._both(op, (values[side],))
        return None if made is None else [*self.together(values[1 - side]), *made]

    def _cut(self, cut: dict[int, int], count: int) -> tuple[dict[int, tuple[int, int]], list[Op]]:
        """Vectors with an index for each token and position, cut in two along an axis."""
        rows: dict[int, tuple[int, int]] = {}
        made: list[Op] = []
        for value, axis in cut.items():
            shape = [*self.maps.shape(value)]
            parts = []
            for first, size in ((0, count), (count, shape[axis] - count)):
                own = self._new(value, [*shape[:axis], size, *shape[axis + 1 :]])
                made.append(Op(torch.narrow, "narrow", (Ref(value), axis, first, size), {}, (value,), (own,), (), ""))
                parts.append(own)
            rows[value] = parts[0], parts[1]
        return rows, made

    def _reshaped(self, op: Op, value: int) -> list[Op] | None:
        own, before, after = self.joined[value], self.maps.shape(value), self.maps.shape(op.outputs[0])
        if self.maps.program.values[value].dtype != self.maps.program.values[op.outputs[0]].dtype:
            return None
        axis_from_end = position_of(before, after, own.axis, 1, [before[own.axis]])
        if axis_from_end is None:
            return None
        made = []
        for part, size in ((own.tokens, own.count), (own.positions, before[own.axis] - own.count)):
            shape = [*after]
            shape[axis_from_end] = size
            output = self._new(op.outputs[0], shape)
            args = (Ref(part), tuple(shape))
            made.append(
                replace(op, func=torch.reshape, name="reshape", args=args, kwargs={}, inputs=(part,), outputs=(output,))
            )
        self._record(op.outputs[0], made[0].outputs[0], made[1].outputs[0], axis_from_end, own.count)
        return made

    def _select(self, op: Op) -> list[Op] | None:
        """x[:, 0], x[:, 1:]: one of the parts; None if the index keeps all positions."""
        value, index = op.args[0].value, op.args[1]
        own, shape = self.joined[value], self.maps.shape(value)
        items = index if isinstance(index, tuple) else (index,)
        if any(isinstance(one, (Ref, Tensor, list, bool)) for one in items) or len(op.inputs) > 1:
            raise NotApart
        index = list(spelt_out(items, len(shape)))
        at = [i for i, one in enumerate(index) if one is not None][own.axis]
        wanted = index[at]
        if isinstance(wanted, int):
            wanted %= shape[own.axis]
            if wanted >= own.count:
                return [*self.together(value), op]
            part = own.tokens
        else:
            first, last, step = wanted.indices(shape[own.axis])
            if (first, last, step) == (0, shape[own.axis], 1):
                return None
            if step == 1 and last <= own.count:
                part, wanted = own.tokens, slice(first, last)
            elif step == 1 and (first, last) == (own.count, shape[own.axis]):
                part, wanted = own.positions, slice(None)
            else:
                return [*self.together(value), op]
        index[at] = wanted
        return [replace(op, args=(Ref(part), tuple(index)), inputs=(part,))]

    def _both(
        self,
        op: Op,
        values: Sequence[int],
        rows: dict[int, tuple[int, int]] | None = None,
        together: set[int] | frozenset[int] = frozenset(),
    ) -> list[Op] | None:
        """The op on the tokens and the op on the positions of its joined inputs.

        Args:
            rows: other inputs that are cut in two parts.
            together: joined inputs that both ops read in full.
        """
        names: tuple[dict[int, int], dict[int, int]] = {}, {}
        for value in values:
            if value not in together:
                names[0][value], names[1][value] = self.joined[value].tokens, self.joined[value].positions
        for value, parts in (rows or {}).items():
            names[0][value], names[1][value] = parts
        first, second = (renamed(op, own) for own in names)
        shapes = [self._shapes(one) for one in (first, second)]
        if shapes[0] is None or shapes[1] is None:
            return None
        count = self.joined[values[0]].count
        outputs: tuple[list[int], list[int]] = [], []
        axes = []
        for output, few, many in zip(op.outputs, shapes[0], shapes[1], strict=True):
            full = self.maps.shape(output)
            other = [d for d, size in enumerate(full) if len(few) == len(full) and few[d] != size]
            expected = [*full]
            if len(other) != 1 or len(many) != len(full):
                return None
            expected[other[0]] -= count
            if list(many) != expected or few[other[0]] != count:
                return None
            axes.append(other[0])
            outputs[0].append(self._new(output, few))
            outputs[1].append(self._new(output, many))
        for output, few, many, axis in zip(op.outputs, *outputs, axes, strict=True):
            self._record(output, few, many, axis, count)
        return [replace(first, outputs=tuple(outputs[0])), replace(second, outputs=tuple(outputs[1]))]

    def _shapes(self, op: Op) -> list[torch.Size] | None:
        """Shapes of the outputs, from a run on meta tensors; None if the call does not accept its inputs."""
        values = self.maps.program.values
        env = {v: torch.empty(values[v].shape, dtype=values[v].dtype, device="meta") for v in op.inputs}
        try:
            result = op.func(*bind(op.args, env), **bind(op.kwargs, env))
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
        found = [leaf.shape for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return found if len(found) == len(op.outputs) else None

    def _record(self, value: int, tokens: int, positions: int, axis: int, count: int) -> None:
        self.joined[value] = _Joined(tokens, positions, axis, count)
        self.wanted[positions] = axis

    def _new(self, like: int, shape: Sequence[int]) -> int:
        number = self.maps.new_value(shape, like=like)
        self.maps.program.values[number].differentiable = self.maps.program.values[like].differentiable
        return number
