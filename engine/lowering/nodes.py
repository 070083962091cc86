"""Turns recorded calls into nodes by the rules of their ops, in program order; refusals name the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from ..capture.program import Op, Program, Ref, ancestors, given, location
from ..errors import UnsupportedError
from ..torch_private import HigherOrderOperator
from .moves import Moves
from .ops import Block, Env, Local, Maps, Node, Reduction, Refusal, VectorOp, Whole, find_rule
from .ops.base import arguments
from .ops.flat import unflatten
from .ops.norms import norm_of_vector
from .ops.pointwise import with_zeros
from .ops.promote import rise, vector
from .relative_positions import Relative
from .tokens import NotApart, Tokens

# Calls that read a map only for its dtype and device.
_LIKE_MAP = frozenset({"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"})


def apply_rule(op: Op, maps: Maps) -> Node | list[Node]:
    """The nodes of an op by its rule; a refusal becomes an error that names the module."""
    rule = find_rule(op.name)
    if rule is None:
        exported = op.name.startswith("aten.")
        remedy = "pass the network that was exported, not its graph" if exported else "replace it or report it"
        raise _refuse(op, f"no exact tile-by-tile rule for '{op.name}' on the image; {remedy}")
    try:
        return rule(op, maps)
    except Refusal as reason:
        raise _refuse(op, str(reason)) from None


def live_ops(program: Program) -> list[Op]:
    """Ops that the output or a change of state depends on, without unused branches (auxiliary heads)."""
    wanted = set(program.results())
    live: list[Op] = []
    for op in reversed(program.ops):
        if wanted & set(op.outputs):
            live.append(_without_empty(op, program))
            wanted.update(live[-1].inputs)
    return live[::-1]


def _without_empty(op: Op, program: Program) -> Op:
    """A `cat` without empty parts such as `x[:, :0]`, which networks without a class token join to their positions.

    A `cat` of one remaining part becomes a copy. Empty parts remain if they determine the dtype, or if parameters get
    zero gradients through them.
    """
    if op.name not in ("cat", "concat", "concatenate"):
        return op
    called = arguments(op, "tensors dim", dim=0)
    tensors = called["tensors"]
    parts = [ref.value for ref in tensors if program.values[ref.value].shape.numel()]
    if not parts or len(parts) == len(tensors) > 1:
        return op
    gets_zeros = {v for v in ancestors(program, op.inputs) - ancestors(program, parts) if program.values[v].trainable}
    remaining = [ref for ref in tensors if ref.value in parts or gets_zeros & ancestors(program, [ref.value])]
    inputs = tuple(dict.fromkeys(ref.value for ref in remaining))
    if reduce(torch.promote_types, (program.values[v].dtype for v in inputs)) != program.values[op.outputs[0]].dtype:
        return op
    if len(remaining) == 1:  # no rule would see that its positions do not move
        return replace(op, func=torch.clone, name="clone", args=(remaining[0],), kwargs={}, inputs=inputs)
    return replace(op, args=(remaining, called["dim"]), kwargs={}, inputs=inputs)


def _refuse(op: Op, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{location(op.module, op.line)}: {reason}", op.module, op.name)


def sort(program: Program, fallback: str | None = None) -> tuple[Maps, list[Node | Op]]:
    """The nodes of the recorded ops, in program order; ops on vectors are unchanged.

    Args:
        fallback: "untiled" runs ops without an exact rule in ordinary PyTorch on whole maps.

    Raises:
        UnsupportedError: naming the module and the remedy, for every op that cannot be computed exactly.
    """
    refusal: UnsupportedError | None = None
    for apart in (True, False):
        for broadcasts in (True, False):
            try:
                maps, nodes = _sort(program, fallback, broadcasts, apart)
                unread = _unread(program, nodes)
                if unread:
                    maps, nodes = _sort(program, fallback, broadcasts, apart, unread)
                return maps, _without_copies(program, _live_nodes(maps, unflatten(maps, nodes)))
            except NotApart:
                break
            except UnsupportedError as error:
                refusal = refusal or error
    assert refusal is not None
    raise refusal


def _sort(
    program: Program,
    fallback: str | None,
    broadcasts: bool,
    apart: bool,
    unread: Mapping[int, Sequence[int]] | None = None,
) -> tuple[Maps, list[Node | Op]]:
    """`sort`.

    Args:
        broadcasts: whether vectors that are broadcast over the image become maps, made block by block.
        apart: whether tokens that are joined to positions are computed separately.
        unread: see `_unread`.
    """
    program.stands_in, program.apart = {}, set()
    maps = Maps(program, {program.image: (2, 3)})
    maps.axes.update((v, (len(maps.shape(v)) - 2, len(maps.shape(v)) - 1)) for v in program.inputs)
    tokens, moves, sorting = Tokens(maps), Moves(maps), _NodeList(maps, fallback == "untiled", broadcasts)
    ops = [own for op in live_ops(program) for own in _with_zeros(op, maps, unread or {})]
    relative = Relative(ops, maps)
    watched = {v for v in program.handed_out() if program.grad and program.values[v].takes_grad}
    for op in ops:
        before = len(sorting.nodes)
        for part in tokens.apart(op) if apart else [op]:
            for one in (own for call in relative.absolute(part) for own in moves.merged(call)):
                sorting.add(one)
            tokens.check(part)
        read = {v for node in sorting.nodes[before:] for v in reads(node)}
        program.apart |= (watched & set(op.inputs)) - read
    for value in dict.fromkeys(program.results()):
        for part in (*tokens.together(value), *moves.recorded(value)):
            sorting.add(part)
    program.apart |= _of_no_pass(maps, sorting.nodes, watched & {v for op in ops for v in op.inputs})
    return maps, sorting.nodes


def _unread(program: Program, nodes: Sequence[Node | Op]) -> dict[int, list[int]]:
    """By returned value, the parameters that its gradient reaches in PyTorch, but not through these nodes.

    A rule that does not read a value drops everything that the value is made of.
    """
    makers = {v: node for node in nodes for v in makes(node)}
    found: dict[int, list[int]] = {}
    for value, wanted in program.reached.items():
        left, seen = [value] if wanted else [], set[int]()
        while left:
            number = left.pop()
            if number not in seen and program.values[number].takes_grad:
                seen.add(number)
                left += reads(makers[number]) if number in makers else ()
        if not wanted <= seen:
            found[value] = sorted(wanted - seen)
    return found


def _with_zeros(op: Op, maps: Maps, unread: Mapping[int, Sequence[int]]) -> list[Op]:
    """An op, and `with_zeros` ops for its outputs whose gradients reach parameters that no node reads.

    The `with_zeros` op then makes the value of the output.
    """
    names = {v: maps.new_value(like=v) for v in op.outputs if v in unread}
    made = [replace(op, outputs=tuple(names.get(v, v) for v in op.outputs))] if names else [op]
    for value, own in names.items():
        inputs = (own, *unread[value])
        given = tuple(map(Ref, inputs))
        made.append(Op(with_zeros, "with_zeros", given, {}, inputs, (value,), (), op.module, line=op.line))
    return made


def _without_copies(program: Program, nodes: list[Node | Op]) -> list[Node | Op]:
    """The nodes without `contiguous` of values that depend only on parameters and buffers and that rules read.

    Rules accept any memory order, and a bias for each pair of positions would be stored twice: CoAtNet's is as large as
    everything else. Copies of values that depend on the image remain: every tile reads keys.
    """
    results = set(program.results())

    def is_copy(node: Node | Op) -> bool:
        if not isinstance(node, Op) or node.name != "contiguous" or node.kwargs or len(node.args) != 1:
            return False
        if results & set(node.outputs) or given(program, node.inputs):
            return False
        readers = [other for other in nodes if set(node.outputs) & set(reads(other))]
        return not any(isinstance(reader, Op) for reader in readers)

    return [
        vector(node.inputs, node.outputs[0], lambda x: x.view_as(x)) if isinstance(node, Op) and is_copy(node) else node
        for node in nodes
    ]


def _of_no_pass(maps: Maps, nodes: Sequence[Node | Op], read: set[int]) -> set[int]:
    """The values among `read` that are maps but never stored as read: flattened, or broadcast by each reader."""
    stored = {maps.program.image, *maps.program.inputs}
    stored.update(v for node in nodes if isinstance(node, (Local, Whole)) for v in makes(node))
    return {v for v in read if v in maps and (v in maps.flat or v not in stored)}


class _NodeList:
    """Collects the nodes of the ops so far."""

    def __init__(self, maps: Maps, whole: bool, broadcasts: bool) -> None:
        self.maps, self.whole, self.broadcasts = maps, whole, broadcasts
        self.nodes: list[Node | Op] = []
        self.taken = _WholeMaps(maps, whole)
        self.derived = set(maps.axes)  # values that depend on the image

    def add(self, op: Op) -> None:
        """Append the nodes of one op."""
        maps, ours = self.maps, not self.derived.isdisjoint(op.inputs)
        self.derived.update(op.outputs if ours else ())
        risen = None
        if op.name in _LIKE_MAP or not maps.inputs(op):
            risen = (self.broadcasts and rise(op, maps)) or norm_of_vector(op, maps) if ours else None
            if risen is None:
                self.nodes.append(op)
                self.taken.follow(op)
                return
        try:
            made = risen or apply_rule(op, maps)
            if op.autocast is not None:
                kind = maps.program.values[maps.program.image].device.type
                made = [in_region(node, op, kind) for node in (made if isinstance(made, list) else [made])]
        except UnsupportedError as refusal:
            if isinstance(op.func, HigherOrderOperator):  # its functions would not see the whole map either
                raise _refuse(
                    op, f"'{op.name}' cannot run functions of maps by tile; write their ops in Python"
                ) from None
            if not self.whole:
                message = f'{refusal}; or run it untiled: accelerate(..., fallback="untiled")'
                raise UnsupportedError(message, op.module, op.name) from None
            made = Whole(op)
        for node in made if isinstance(made, list) else [made]:
            self._append(op, node)

    def _append(self, op: Op, node: Node) -> None:
        maps = self.maps
        if isinstance(node, Local):
            maps.axes.update(zip(node.op.outputs, node.axes, strict=True))
            for value, (h, w) in zip(node.op.outputs, node.axes, strict=True):
                if h == w and value not in maps.flat:
                    maps.flat[value] = maps.flat[next(iter(node.reads))]
        elif isinstance(node, VectorOp):
            self.taken.check(op, node)
        elif isinstance(node, Whole) and node.axes:
            maps.axes.update(node.axes)
        elif isinstance(node, Whole):
            self.taken.begin(node.op, recorded=not set(op.outputs).isdisjoint(node.op.outputs))
        self.nodes.append(node)


def in_region(node: Node, op: Op, kind: str) -> Node:
    """A node that computes in the autocast region in which its op was recorded.

    Args:
        kind: the device type.
    """
    assert op.autocast is not None
    enabled, dtype = op.autocast
    if not isinstance(node, Local):
        return node  # other nodes use the recorded dtypes
    run = node.run

    def in_its_own(env: Env, block: Block) -> tuple[Tensor, ...]:
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            return run(env, block)

    # With another name, no rewrite mistakes it for the op outside of the region.
    op = replace(node.op, name=f"{node.op.name} in autocast")
    return replace(node, op=op, run=in_its_own, memory=replace(node.memory, unvalued=None))


def _live_nodes(maps: Maps, nodes: Sequence[Node | Op]) -> list[Node | Op]:
    """Nodes that the output or a change of state depends on; rules may have bypassed some ops."""
    wanted = set(maps.program.results())
    live: list[Node | Op] = []
    for node in reversed(nodes):
        if wanted & set(makes(node)):
            wanted.update(reads(node))
            live.append(node)
    return live[::-1]


class _WholeMaps:
    """Vectors that come from whole maps; vectors of their size become maps again, if the user allows it."""

    def __init__(self, maps: Maps, allowed: bool):
        self.maps, self.allowed = maps, allowed
        self.origin: dict[int, Op] = {}  # value -> the op that read a whole map
        self.sizes: set[tuple[int, int]] = set()

    def begin(self, op: Op, recorded: bool) -> None:
        """Register an op that reads a whole map; outputs of ops that are not `recorded` remain vectors."""
        self.origin.update(dict.fromkeys(op.outputs, op))
        if recorded:
            self.sizes.update(self.maps.size(v) for v in self.maps.inputs(op))
            self._return(op)

    def follow(self, op: Op) -> None:
        """Register an op on vectors."""
        found = next((self.origin[v] for v in op.inputs if v in self.origin), None)
        if found is not None:
            self.origin.update(dict.fromkeys(op.outputs, found))
            self._return(op)

    def _return(self, op: Op) -> None:
        for value in op.outputs if self.allowed else ():
            shape = tuple(self.maps.shape(value))
            if len(shape) == 4 and shape[2:] in self.sizes:
                self.maps.axes[value] = (2, 3)
            elif len(shape) == 4 and shape[1:3] in self.sizes:
                self.maps.axes[value] = (1, 2)

    def check(self, op: Op, node: VectorOp) -> None:
        """Refuse a whole map between other maps, unless the user allows it."""
        first = next((self.origin[v] for v in node.inputs if v in self.origin), None)
        if first is not None and any(v in self.maps for v in node.outputs) and not self.allowed:
            raise _refuse(
                first,
                f"'{first.name}' needs the whole map, and {op} needs one value for each position of its result; "
                'accelerate(..., fallback="untiled") stores the whole map, if it fits in memory',
            )


def reads(node: Node | Op) -> list[int]:
    """All values that a node reads."""
    if isinstance(node, Reduction):
        return [node.value]
    if isinstance(node, Local):
        return [*node.reads, *node.op.inputs]
    return list(node.op.inputs if isinstance(node, Whole) else node.inputs)


def makes(node: Node | Op) -> Sequence[int]:
    return node.op.outputs if isinstance(node, (Local, Whole)) else node.outputs
