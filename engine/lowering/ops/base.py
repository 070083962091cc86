"""What a rule says about one recorded op, and the table of rules.

A value of the program is a *map* (it has the two image axes) or a *small* (it has not). An op on maps is

- `Local`:     maps and vectors -> map; the output block at any place needs an input window around it, nothing else;
- `Reduction`: map -> small; a sum (or maximum) over the image, so tiles contribute one after the other;
- `Whole`:     needs its map input in one piece (a flatten before a classifier, an adaptive pooling grid);
- `VectorOp`:     vectors -> vectors, run once per step by ordinary PyTorch.

A rule looks at one `Op` and returns one of these, or several that replace it (a norm is a reduction, a vector and a
local op), or raises `Refusal`. There is no default: an op without a rule is refused, never assumed to be pointwise.

A map whose image axes a reshape has flattened into one, (N, C, H*W), is a map with that axis twice (`Maps.flat`). Its
blocks are kept with both axes; rules see shapes and blocks as the recorded call does (flat.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
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
    """Why an op cannot be computed exactly tile by tile; `stage.py` adds the module and raises the public error."""


class SumOf(Protocol):
    """See `Block`."""

    def __call__(self, value: int, dtype: torch.dtype, summand: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Block:
    """Where an op's output block lies in the whole output, and how much padding its input windows still lack.

    `rows` and `cols` are half-open ranges of the output map; `pad` is (top, bottom, left, right) to be added to the
    input before a kernel without padding gives exactly this block. `sum_of` gives, where gradients are wanted, the
    tensor in which a vector's gradient is summed over the tiles, for ops that add to it themselves; given a summand, it
    adds that, which nobody else may have. `margin` is
    the room (rows above, columns to the left) that an op which can (`Local.leaves_room`) leaves in memory beside its
    output for the halos that windows of it will need. `shares`, where moments of outputs are wanted, takes those that
    an op has computed beside its output, by value: mean and squared deviations as `Accumulator.share` gives them.
    `parts`, for an op that gathers, takes gradients of parts of the gathered map in the backward, with their rectangles
    in the block: whoever reads a part gives it there, where autograd would want one of the whole block. `whole` says
    that the blocks of this tile are the whole maps of all images that statistics are taken of. `lacking`, for an op
    that can add it (`Local.adds`), takes what the gradient of its output lacks at each pixel, (C,): that of a sum.
    """

    rows: Span
    cols: Span
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    sum_of: SumOf | None = None
    margin: tuple[int, int] = (0, 0)
    shares: dict[int, tuple[Tensor, ...]] | None = None
    parts: list[tuple[Rect, Tensor]] | None = None
    whole: bool = False
    lacking: list[Tensor] | None = None


Env = Mapping[int, Tensor]
Run = Callable[[Env, Block], tuple[Tensor, ...]]


@dataclass(slots=True)
class Local:
    """One op computed block by block.

    `reads` gives, for each map input, the accesses along height and width; `axes` the image axes of each output.
    `fill` is the padding value where the op pads a window (the scan may then hand it a window padded already).
    `leaves_room` says that the output lies in a buffer with the margin that `Block` asks for. `once` makes a vector
    that is drawn once per step (a channel dropout's mask) and is given to `run` under the number `drawn`. `unvalued` is
    `run` for the second pass over a stored output: a tensor without values that autograd can differentiate as well.
    With `gathers`, `run` gives the map of that once more after its outputs: what later ops of a tile read hangs on it.
    `anew` are the maps whose gradient is new memory, which the op gives to nobody else; `passed` those whose gradient
    may be its output's own, which it has no more use for then.
    `spares` says that a window may have more rows and columns at its end than are read, fewer than the stride: a block
    is then read as it is, where a part of it would cost its gradient a copy.
    `adds` says that the backward adds what `Block.lacking` has to the gradient of the output.
    `skips` are the inputs that the op may leave unread for the image's values, and whose gradients are zeros then; an
    op that has computed something and has no graph of it takes them out.
    """

    op: Op
    reads: Mapping[int, tuple[Access, Access]]
    axes: tuple[Axes, ...]
    run: Run
    fill: float | None = None
    random: bool = False
    leaves_room: bool = False
    once: Callable[[torch.dtype, torch.device], Tensor] | None = None
    drawn: int | None = None
    unvalued: Run | None = None
    gathers: Gather | None = None
    spares: bool = False
    adds: bool = False
    skips: Set[int] = frozenset()
    anew: frozenset[int] = frozenset()
    passed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Gather:
    """A map of which one op, the first that reads it, takes the gradients of all, and applies a slope to their sum.

    `slope` gives it for a part of the map; None where there is none to apply.
    """

    value: int
    slope: Callable[[Tensor], Tensor] | None


@dataclass(slots=True)
class VectorOp:
    """A computation on vectors that is not a recorded call; it runs once per step.

    `run` gets the tensors of `inputs` by value number and returns those of `outputs`. Where the results of one image
    depend on the others of the batch, `share` gives what an image (or several of one size) contributes, and `merge`
    makes the outputs, the same for all images, of the shares of all; `run` is then both. `whole` takes the place of
    `run` before a stage whose blocks are whole: its ops then see to the gradients of statistics themselves.
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

    `kind` is "sum" or "max", divided by `count`, or "moments": mean and (biased) variance over `dims`, which keep size
    one, count being the elements; `precise` ones are taken in float64. `outputs` are the values it gives. With a `grid`
    the image is cut into cells, each of which gives a value (see grid.py); a dimension of `dims` whose axis has several
    cells is kept.
    """

    op: Op
    value: int
    kind: str
    count: int
    dims: tuple[int, ...]
    keepdim: bool
    first_only: bool = False  # maximum: the gradient goes to the first of equal elements, not to all in equal parts
    outputs: tuple[int, ...] = ()
    form: Callable[[Tensor], Tensor] | None = None  # of a block, instead of its sum over `dims`
    precise: bool = False
    per_pixel: int = 1  # moments: how many elements of a pixel go into one of them
    nan_counts: bool = False  # maximum: NaN are the largest elements; without it all gradients are NaN with them
    grid: tuple[Cells, Cells] | None = None  # of rows and columns

    def __post_init__(self) -> None:
        self.outputs = self.outputs or self.op.outputs[:1]
        self.nan_counts = self.nan_counts or self.first_only

    def has(self, x: Tensor, maximum: Tensor) -> Tensor:
        """Where elements, or maxima of parts, are the maximum that the gradient goes to."""
        same = x == maximum
        return same | (x.isnan() & maximum.isnan()) if self.nan_counts else same

    def keep_dims(self, result: Tensor) -> Tensor:
        """A tensor of the result's shape with the reduced dimensions kept, of size one."""
        if not self.keepdim:
            for d in sorted(self.dims):
                result = result.unsqueeze(d)
        return result


@dataclass(slots=True)
class Whole:
    """An op that ordinary PyTorch runs on the assembled maps.

    Attributes:
        axes: of its outputs that are maps again.
    """

    op: Op
    axes: Mapping[int, Axes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Flat:
    """What the image axis of a flattened map is made of: ahead * height * width * after."""

    height: int
    width: int
    ahead: int = 1
    behind: int = 1

    @property
    def merged(self) -> bool:
        """Whether dimensions besides the image's have gone into it."""
        return self.ahead * self.behind > 1

    @property
    def length(self) -> int:
        """How many indices the axis has."""
        return self.ahead * self.height * self.width * self.behind

    def sizes(self, height: int, width: int) -> tuple[int, ...]:
        """The dimensions that the axis is made of, for a block of this height and width."""
        return (self.ahead, height, width, self.behind) if self.merged else (height, width)


@dataclass
class Maps:
    """The maps known so far while rules are applied in program order."""

    program: Program
    axes: dict[int, Axes] = field(default_factory=dict)
    flat: dict[int, Flat] = field(default_factory=dict)
    resident: set[int] = field(default_factory=set)  # vectors that local ops read by region: see promote.py
    places: dict[int, tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=dict)  # see max_unpool2d
    mirrors: dict[int, tuple[int, int]] = field(default_factory=dict)  # of which map, along which image axis
    joined: dict[int, tuple[int, int]] = field(default_factory=dict)  # which map to its mirror image, along which axis

    def new_value(self, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None, *, like: int) -> int:
        """Number of a further value, with the device, and unless given the shape and dtype, of another."""
        values = self.program.values
        pattern = values[like]
        shape = pattern.shape if shape is None else torch.Size(shape)
        values.append(Value(shape, dtype or pattern.dtype, pattern.device))
        return len(values) - 1

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
        """What must be the same for two maps to lie on each other."""
        return self.flat.get(value) or self.size(value)

    def merged(self, value: int) -> bool:
        """Whether the image axis of a flattened map holds more than the image."""
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


def find_rule(name: str) -> Rule | None:
    """The rule of an op, found by its name or, for in-place forms, by the name without the underscore."""
    if name in RULES:
        return RULES[name]
    if name.endswith("_") and not name.endswith("__"):
        return RULES.get(name[:-1])
    return RULES["autograd.Function"] if name.startswith("autograd.Function ") else None


def arguments(op: Op, names: str, **defaults: Any) -> dict[str, Any]:
    """The arguments of a call by name, whichever way they were spelt.

    Args:
        names: positional order, separated by blanks.
        defaults: values of those that may be left out.
    """
    order = names.split()
    given = dict(zip(order, op.args, strict=False))
    given.update(op.kwargs)
    return {**{name: defaults.get(name) for name in order}, **defaults, **given}


def batch_norm_arguments(op: Op) -> dict[str, Any]:
    """Those of `F.batch_norm`."""
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


def each_window(op: Op, maps: Maps, value: int) -> Local | None:
    """An op on images that are windows of a larger one, (N * windows, C, h, w): it does the same to each of them."""
    if len(maps.shape(value)) != 4 or maps.axes[value] != (0, 0) or maps.inputs(op) != [value]:
        return None
    return Local(op, {value: maps.pointwise(value)}, ((0, 0),) * len(op.outputs), replay(op))


def out_of_place(op: Op) -> Callable[..., Any]:
    """The op's function without its in-place effect, with the result's dtype kept as in-place calls keep it."""
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
            if name.startswith("logical_") or name in COMPARISONS:  # in place PyTorch has a gradient, else not
                return op.func(first.clone(), *args, **kwargs)
            return plain(first, *args, **kwargs).to(first.dtype)

        return call
    return op.func


def plain_kwargs(op: Op) -> dict[str, Any]:
    """The keyword arguments with `inplace` switched off."""
    return {k: False if k == "inplace" else v for k, v in op.kwargs.items()}


def replay(op: Op) -> Run:
    """Run the recorded call on the block as it stands."""
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
