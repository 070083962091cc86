"""Types that rules return for a recorded op, and the table of rules.

A value of the program is a *map* (it has the two image axes) or a *vector* (it has not). An op on maps is one of

- `Local`:     maps and vectors -> map; an output block needs an input window around it, nothing else;
- `Reduction`: map -> vector; a sum (or maximum) over the image, to which tiles contribute one after the other;
- `Whole`:     an op that needs its map input in one piece (a flatten before a classifier, an adaptive pooling grid);
- `VectorOp`:  vectors -> vectors; ordinary PyTorch runs it once per step.

A rule takes one `Op` and returns one of these, or several that replace it (a norm is a reduction, a vector op and a
local op), or raises `Refusal`. There is no default: an op without a rule is refused and never assumed to be pointwise.

A reshape can flatten the image axes of a map into one, (N, C, H*W). Such maps list that axis twice (`Maps.flat`). The
scan stores their blocks with both axes; rules see shapes and blocks as the recorded call does (flat.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...capture.program import Op, Program, Value, bind
from ..geometry import Access, Cells, same
from .names import ASSIGNMENTS, COMPARISONS

Axes = tuple[int, int]  # positions of the image's height and width among a map's dimensions
Span = tuple[int, int]
Rect = tuple[int, int, int, int]  # top, bottom, left, right, half-open


class Refusal(Exception):
    """Why an op cannot be computed exactly tile by tile; `nodes.py` adds the module and raises the public error."""


class SumOf(Protocol):
    """Type of `Block.sum_of`."""

    def __call__(self, value: int, dtype: torch.dtype, summand: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Block:
    """Position of an op's output block, the padding of its input windows, and optional buffers.

    Attributes:
        rows, cols: half-open ranges of the output map.
        pad: (top, bottom, left, right), to be added to the input so that a kernel without padding gives this block.
        sum_of: where gradients are wanted, returns the tensor that accumulates a vector's gradient over the tiles, for
            ops that add to it themselves. If it gets a summand, it takes ownership of it and adds it.
        margin: rows above and columns to the left that an op leaves free in memory around its output, for the halos of
            later windows (`BlockMemory.leaves_room`).
        shares: where moments of outputs are wanted, receives those that an op computed together with its output, by
            value: mean and squared deviations in the format of `Accumulator.share`.
        parts: for an op that gathers, receives in the backward the gradients of parts of the gathered map, with their
            rectangles in the block. Autograd would need one gradient of the whole block for each reader.
        whole: whether the blocks of this tile are the whole maps of all images that statistics are computed over.
        grad_terms: for an op with `Local.adds`, receives terms, (C,), to add to the gradient of its output at each
            pixel: gradients of sums over the image.
    """

    rows: Span
    cols: Span
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    sum_of: SumOf | None = None
    margin: tuple[int, int] = (0, 0)
    shares: dict[int, tuple[Tensor, ...]] | None = None
    parts: list[tuple[Rect, Tensor]] | None = None
    whole: bool = False
    grad_terms: list[Tensor] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the block."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]


Env = Mapping[int, Tensor]
Run = Callable[[Env, Block], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """How the blocks of an op use memory; results do not depend on it.

    Attributes:
        leaves_room: whether the output is written into a buffer with the margin that `Block` asks for.
        unvalued: `Local.run` for the second pass over a stored output: returns a tensor without values that autograd
            can differentiate.
        spares: whether a window may have unread rows and columns at its end, fewer than the stride. A block is then
            passed unsliced: the gradient of a slice would cost a copy.
        fresh_grads: maps whose gradient is new memory that the op shares with nobody.
        reused_grads: maps whose gradient may be the tensor of the output's gradient, which the op no longer needs.
    """

    leaves_room: bool = False
    unvalued: Run | None = None
    spares: bool = False
    fresh_grads: frozenset[int] = frozenset()
    reused_grads: frozenset[int] = frozenset()


@dataclass(slots=True)
class Local:
    """One op computed block by block.

    Attributes:
        reads: for each map input, the accesses along height and width.
        axes: the image axes of each output.
        fill: the padding value if the op pads a window; the scan may then pass a window that is already padded.
        random: whether it draws random numbers for each block.
        skips: inputs that the op may leave unread depending on the image's values; their gradients are zeros then. An
            op that has computed something without a graph of it clears the set.
        gathers: for fused ops: `run` returns the gathered map again after its outputs, and later ops of the tile read
            that.
        adds: for fused ops: whether the backward adds `Block.grad_terms` to the gradient of the output.
        memory: how its blocks use memory.
    """

    op: Op
    reads: Mapping[int, tuple[Access, Access]]
    axes: tuple[Axes, ...]
    run: Run
    fill: float | None = None
    random: bool = False
    skips: Set[int] = frozenset()
    gathers: GradientSum | None = None
    adds: bool = False
    memory: BlockMemory = BlockMemory()


@dataclass(frozen=True, slots=True)
class GradientSum:
    """A map whose first reader collects the gradients of all readers and multiplies their sum by a slope.

    Attributes:
        value: the map.
        slope: returns the slope for a part of the map; None for no slope.
    """

    value: int
    slope: Callable[[Tensor], Tensor] | None


@dataclass(slots=True)
class VectorOp:
    """A computation on vectors that is not a recorded call; it runs once per step.

    Attributes:
        run: takes the tensors of `inputs` by value number and returns those of `outputs`.
        share, merge: set where the results of one image depend on the others of the batch. `share` returns the
            contribution of one image (or of several of one size); `merge` makes the outputs, the same for all images,
            from all contributions. `run` then does both.
        whole: replaces `run` before a stage whose blocks are whole maps; its ops then compute the gradients of
            statistics themselves.
    """

    run: Callable[[Env], tuple[Tensor, ...]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    share: Callable[[Env], tuple[Tensor, ...]] | None = None
    merge: Callable[[Sequence[tuple[Tensor, ...]]], tuple[Tensor, ...]] | None = None
    whole: Callable[[Env], tuple[Tensor, ...]] | None = None


@dataclass(slots=True)
class Reduction:
    """A reduction over the whole image.

    Attributes:
        kind: "sum" or "max", divided by `count`, or "moments": mean and (biased) variance over `dims`, which have size
            one in the result; `count` is then the number of elements.
        dims: the reduced dimensions. One that has several cells in `grid` remains.
        outputs: the values that it makes.
        first_only: of a maximum: the gradient goes to the first of equal elements, not to all in equal parts.
        form: applied to a block instead of the sum over `dims`.
        precise: whether moments are computed in float64.
        per_pixel: of moments: the number of elements of a pixel that go into one result.
        nan_counts: of a maximum: whether NaN are the largest elements. Otherwise they make all gradients NaN.
        grid: cells of rows and columns, each with its own result (grid.py).
    """

    op: Op
    value: int
    kind: str
    count: int
    dims: tuple[int, ...]
    keepdim: bool
    first_only: bool = False
    outputs: tuple[int, ...] = ()
    form: Callable[[Tensor], Tensor] | None = None
    precise: bool = False
    per_pixel: int = 1
    nan_counts: bool = False
    grid: tuple[Cells, Cells] | None = None

    def __post_init__(self) -> None:
        self.outputs = self.outputs or self.op.outputs[:1]
        self.nan_counts = self.nan_counts or self.first_only

    def has(self, x: Tensor, maximum: Tensor) -> Tensor:
        """Mask of the elements, or maxima of parts, that equal the maximum and receive its gradient."""
        same = x == maximum
        return same | (x.isnan() & maximum.isnan()) if self.nan_counts else same

    def keep_dims(self, result: Tensor) -> Tensor:
        """A tensor of the result's shape with the reduced dimensions as dimensions of size one."""
        if not self.keepdim:
            for d in sorted(self.dims):
                result = result.unsqueeze(d)
        return result


@dataclass(slots=True)
class Whole:
    """An op that ordinary PyTorch runs on the assembled maps.

    Attributes:
        axes: the image axes of its outputs that are maps.
    """

    op: Op
    axes: Mapping[int, Axes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Flat:
    """Factors of the image axis of a flattened map: ahead * height * width * behind."""

    height: int
    width: int
    ahead: int = 1
    behind: int = 1

    @property
    def merged(self) -> bool:
        """Whether the axis contains dimensions other than the image's."""
        return self.ahead * self.behind > 1

    @property
    def length(self) -> int:
        """Number of indices of the axis."""
        return self.ahead * self.height * self.width * self.behind

    def sizes(self, height: int, width: int) -> tuple[int, ...]:
        """The dimensions that the axis is made of, for a block of this height and width."""
        return (self.ahead, height, width, self.behind) if self.merged else (height, width)


@dataclass
class Maps:
    """The maps known so far while rules are applied in program order.

    Attributes:
        resident: vectors that local ops read by region (promote.py).
        pool_indices: kernel and input size of the max-pooling that made an index map (`max_unpool2d`).
        mirrors: for a mirror image, its map and the mirrored image axis.
        joined: for a map joined to its mirror image, that map and the image axis.
    """

    program: Program
    axes: dict[int, Axes] = field(default_factory=dict)
    flat: dict[int, Flat] = field(default_factory=dict)
    resident: set[int] = field(default_factory=set)
    pool_indices: dict[int, tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=dict)
    mirrors: dict[int, tuple[int, int]] = field(default_factory=dict)
    joined: dict[int, tuple[int, int]] = field(default_factory=dict)

    def new_value(self, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None, *, like: int) -> int:
        """Number of a new value with the device of `like`, and its shape and dtype unless given."""
        values = self.program.values
        pattern = values[like]
        shape = pattern.shape if shape is None else torch.Size(shape)
        values.append(Value(shape, dtype or pattern.dtype, pattern.device))
        return len(values) - 1

    def new_map(
        self,
        axes: Axes,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        *,
        like: int,
        flat: Flat | None = None,
    ) -> int:
        """Number of a new map with these image axes; see `new_value`."""
        made = self.new_value(shape, dtype, like=like)
        self.axes[made] = axes
        if flat is not None:
            self.flat[made] = flat
        return made

    def __contains__(self, value: int) -> bool:
        return value in self.axes

    def shape(self, value: int) -> torch.Size:
        return self.program.values[value].shape

    def size(self, value: int) -> tuple[int, int]:
        """Height and width of a map."""
        if value in self.flat:
            return self.flat[value].height, self.flat[value].width
        h, w = self.axes[value]
        shape = self.shape(value)
        return shape[h], shape[w]

    def extent(self, value: int) -> Flat | tuple[int, int]:
        """Must be equal for two maps to have the same positions."""
        return self.flat.get(value) or self.size(value)

    def merged(self, value: int) -> bool:
        """Whether the image axis of a flattened map contains dimensions other than the image's."""
        return value in self.flat and self.flat[value].merged

    def inputs(self, op: Op) -> list[int]:
        """The map inputs of an op."""
        return [v for v in op.inputs if v in self.axes]

    def pointwise(self, value: int) -> tuple[Access, Access]:
        height, width = self.size(value)
        return same(height), same(width)


Node = Local | Reduction | Whole | VectorOp
Rule = Callable[[Op, Maps], Node | list[Node]]
RULES: dict[str, Rule] = {}


_R = TypeVar("_R", bound=Rule)


def rule(*names: str) -> Callable[[_R], _R]:
    """Register a rule for the ops of these names (in-place forms with a trailing underscore included)."""

    def register(function: _R) -> _R:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for '{name}'")
            RULES[name] = function
        return function

    return register


def nodes_of(op: Op, maps: Maps) -> list[Node]:
    """The nodes of an op by its rule."""
    rule = find_rule(op.name)
    assert rule is not None
    made = rule(op, maps)
    return made if isinstance(made, list) else [made]


def part_of(op: Op, name: str, inputs: Iterable[int], outputs: Iterable[int]) -> Op:
    """The op of a node that computes a part of another op."""
    return Op(op.func, name, (), {}, tuple(dict.fromkeys(inputs)), tuple(outputs), (), op.module, line=op.line)


def find_rule(name: str) -> Rule | None:
    """The rule of an op, found by its name or, for in-place forms, by the name without the underscore."""
    if name in RULES:
        return RULES[name]
    if name.endswith("_") and not name.endswith("__"):
        return RULES.get(name[:-1])
    return RULES["autograd.Function"] if name.startswith("autograd.Function ") else None


def arguments(op: Op, names: str, **defaults: Any) -> dict[str, Any]:
    """The arguments of a call by name, whether they were positional or keywords.

    Args:
        names: positional order, separated by blanks.
        defaults: values of optional arguments.
    """
    order = names.split()
    given = dict(zip(order, op.args, strict=False))
    given.update(op.kwargs)
    return {**{name: defaults.get(name) for name in order}, **defaults, **given}


def integers(op: Op, name: str) -> tuple[int, ...]:
    """The variadic integers of a method call: f(x, 0, 2, 3, 1), f(x, (0, 2, 3, 1)) or f(x, dims=...)."""
    given = op.kwargs[name] if name in op.kwargs else op.args[1:]
    if len(given) == 1 and not isinstance(given[0], int):
        given = given[0]
    return tuple(given)


def batch_norm_arguments(op: Op) -> dict[str, Any]:
    """The arguments of an `F.batch_norm` call."""
    names = "input running_mean running_var weight bias training momentum eps"
    return arguments(op, names, training=False, momentum=0.1, eps=1e-5)


def pair(value: Any) -> tuple[int, int]:
    """An int, or one or two ints in a sequence, as (height, width)."""
    if isinstance(value, int):
        return value, value
    value = tuple(value)
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def need_nchw(op: Op, maps: Maps, value: int) -> None:
    """Refuse maps whose image axes are not the last two of four."""
    if len(maps.shape(value)) != 4 or maps.axes[value] != (2, 3):
        raise Refusal(f"'{op.name}' is applied across the image axes of a permuted map")


def axes_after(axes: Axes, dims: Sequence[int], keepdim: bool) -> Axes:
    """Image axes after the dimensions `dims` were reduced."""
    if keepdim:
        return axes
    return axes[0] - sum(d < axes[0] for d in dims), axes[1] - sum(d < axes[1] for d in dims)


def out_of_place(op: Op) -> Callable[..., Any]:
    """The op's function without its in-place effect; the result has the dtype of the first argument, as in place."""
    if op.kwargs.get("out") is not None:
        raise Refusal(f"'{op.name}' writes to out=; drop that argument")
    name = ASSIGNMENTS.get(op.name)
    if op.name.endswith("_") and not op.name.endswith("__"):
        name = op.name[:-1]
    if name is not None:
        plain = getattr(Tensor, name, None) or getattr(torch, name, None) or getattr(F, name, None)
        if plain is None:
            raise Refusal(f"'{op.name}' has no out-of-place form")

        def call(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if name.startswith("logical_") or name in COMPARISONS:  # only the in-place forms have a gradient
                return op.func(first.clone(), *args, **kwargs)
            return plain(first, *args, **kwargs).to(first.dtype)

        return call
    return op.func


def plain_kwargs(op: Op) -> dict[str, Any]:
    """The keyword arguments with `inplace` switched off."""
    return {k: False if k == "inplace" else v for k, v in op.kwargs.items()}


def replay(op: Op) -> Run:
    """A `run` that applies the recorded call to the block."""
    func, kwargs = out_of_place(op), plain_kwargs(op)

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        result = func(*bind(op.args, env), **bind(kwargs, env))
        return (result,) if isinstance(result, Tensor) else tuple(result)

    return run


def dimensions(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Dimensions counted from the front; None means all of them."""
    if dims is None:
        return tuple(range(rank))
    if isinstance(dims, int):
        dims = (dims,)
    dims = tuple(dims) or tuple(range(rank))
    return tuple(d % rank for d in dims)
