"""Other inputs for the check of a morph: of a second size, and of each further way that the forward takes by size.

A forward may branch by the size of its images, by the batch or by the precision. Its op sequence is found on the meta
device, where large images cost nothing, with sizes that report what they are compared with (`_Side`): each comparison
says which size goes the other way. The smallest inputs that run ops in another order are returned.
"""

from __future__ import annotations

import logging
import math
import operator
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..errors import MorphError
from .copying import cast, duplicate
from .example import Inputs
from .families import op_name, reads_no_values
from .running import eval_mode
from .tensors import named_tensors, of_kind
from .tracer import module_paths

log = logging.getLogger("gigamorph.morph")

Lengths = tuple[int, ...]
LARGE = (1031, 4111)  # sides beyond thresholds that networks have, primes so that no stride divides them
SMALL = 64  # sides of an image that most networks take
HALVES = (torch.bfloat16, torch.float16)


@dataclass
class Others:
    """On what else a morph is checked.

    Attributes:
        example: the first of the example's batch.
        second: inputs of another size and batch; None if the network takes none.
        ways: inputs on which the forward runs its ops in another order than on the example.
        halves: precisions in which it does.
        alike: whether it runs the very same ops on the second as on the example.
    """

    example: Inputs
    second: Inputs | None = None
    ways: list[Inputs] = field(default_factory=list)
    halves: list[torch.dtype] = field(default_factory=list)
    alike: bool = False

    @property
    def all(self) -> list[Inputs]:
        """Of other sizes, the second one first."""
        return [*([self.second] if self.second else []), *self.ways]

    def __or__(self, more: Others) -> Others:
        """These and those of another network on the same example."""
        known = {x.shapes for x in self.all}
        ways = [*self.ways, *(x for x in more.all if x.shapes not in known)]
        halves = [*dict.fromkeys([*self.halves, *more.halves])]
        same = self.second is not None and more.second is not None and self.second.shapes == more.second.shapes
        return Others(self.example, self.second, ways, halves, same and self.alike and more.alike)


def other_inputs(model: nn.Module, example: Inputs, multiple: int = 1) -> Others:
    """What a check of the network on this example leaves out.

    Args:
        model: any network; it is not changed, and nothing is computed with it.
        example: its inputs.
        multiple: of what the sides of its images must be multiples.

    Raises:
        MorphError: the forward compares a size with a number, and no input was found for which that comes out
            otherwise.
    """
    return _Search(model, example, multiple).run()


class _Search:
    """The runs on the meta device, and what is known after them."""

    def __init__(self, model: nn.Module, example: Inputs, multiple: int) -> None:
        self.example, self.multiple = example.first(), multiple
        self.model = _hollow(model)
        self.base = _lengths(self.example)
        self.batch = example.batch
        self.seen: dict[tuple[Lengths, int], _Way] = {}
        self.found = Others(self.example)

    def run(self) -> Others:
        log.info("looking for branches by image size, batch and precision")
        with suppress(_NotFollowed):
            first = self._way(self.base, 1)
            if first.failed:
                raise _NotFollowed
            second = next((k for k in self._seconds() if k != (self.base, 1) and not self._way(*k).failed), None)
            if second is not None:
                self.found.second = resized(self.example, *second)
            whole = self._way(self.base, self.batch)
            if second is not None:
                self.found.alike = self._way(*second).branches == first.branches == whole.branches
            if first.asks:
                self._search()
            known = set(first.pairs)
            for (lengths, batch), way in sorted(self.seen.items(), key=lambda item: math.prod(item[0][0]) * item[0][1]):
                if not way.failed and not way.pairs <= known:
                    known |= way.pairs
                    self.found.ways.append(resized(self.example, lengths, batch))
            if first.asks_dtype:
                self._halves(first)
            return self.found
        # It cannot be run without values: one other size that the check itself tries.
        self.found.second = resized(self.example, *next(self._seconds()))
        return self.found

    def _seconds(self) -> Iterator[tuple[Lengths, int]]:
        """Odd, not square and in another batch; what a network with strides or fixed shapes may want instead."""
        batch = 2 if self.batch == 1 else 1
        halved = self.base  # of a large image a part will do, which costs less
        while max(halved, default=0) >= 2 * SMALL:
            halved = tuple(n // 2 for n in halved)
        reduced, mixed = (
            tuple(n + n // 4 | 1 if i % 2 == 0 else max(n - n // 4, 1) for i, n in enumerate(sides))
            for sides in (halved, self.base)
        )
        for lengths in (reduced, mixed, tuple(n + 32 * (i + 1) for i, n in enumerate(self.base)), self.base):
            yield self._fitting(lengths), batch
            yield self._fitting(lengths), 1

    def _search(self) -> None:
        """More sizes: smaller, those at which comparisons come out otherwise, the least first, and larger ones."""
        if self.base:
            for lengths in (tuple(max(n // 4, 1) for n in self.base), tuple(n + 1 for n in self.base)):
                self._way(self._fitting(lengths), 1)
        self._way(self.base, 7)
        aimed: set[str] = set()
        for comparison in self._one_sided():
            if str(comparison) not in aimed:  # many modules ask the same
                self._aim(comparison)
            aimed.add(str(comparison))
        for side in LARGE if self.base else ():
            self._way(self._fitting((side,) * len(self.base)), 1)
            for axis in range(len(self.base)):
                self._way(self._fitting(tuple(side if i == axis else n for i, n in enumerate(self.base))), 1)
        for comparison in self._one_sided():
            raise MorphError(
                f"the forward compares a size at {comparison.where} ({comparison}), and no image was found for which "
                "that comes out otherwise, so that only one branch was checked; write the branch without it"
            )

    def _aim(self, comparison: _Comparison) -> None:
        for lengths, batch in self._aimed(comparison):
            way = self._way(self._fitting(lengths), batch)
            if any(c.key == comparison.key and c.outcome != comparison.outcome for c in way.compared):
                return

    def _one_sided(self) -> list[_Comparison]:
        """Comparisons of a size with a threshold that came out alike in all runs."""
        every: dict[Any, list[_Comparison]] = {}
        for way in self.seen.values():
            for c in way.compared:
                every.setdefault(c.key, []).append(c)
        return [found[0] for found in every.values() if len({c.outcome for c in found}) == 1 and _threshold(found)]

    def _aimed(self, comparison: _Comparison) -> Iterator[tuple[Lengths, int]]:
        """Sizes at which the two compared numbers are about equal, if one is in proportion to the image."""
        left, right = comparison.left, comparison.right
        for a, b in ((left, right), (right, left)):
            if a < 1 or b < 1:
                continue
            steps = [-(-n // a) for n in self.base]
            axes = [*([i] for i in reversed(range(len(self.base)))), range(len(self.base))]  # narrow images cost less
            for ratio in (b / a, math.sqrt(b / a)):
                for shift in (0, 1, -1):
                    for which in axes:
                        yield (
                            tuple(
                                max(round(n * ratio) + shift * steps[i], 1) if i in which else n
                                for i, n in enumerate(self.base)
                            ),
                            1,
                        )
            for shift in (0, 1, -1):
                yield self.base, max(b + shift, 1)

    def _fitting(self, lengths: Lengths) -> Lengths:
        return tuple(-(-n // self.multiple) * self.multiple for n in lengths)

    def _way(self, lengths: Lengths, batch: int) -> _Way:
        if (lengths, batch) not in self.seen:
            self.seen[lengths, batch] = _run(self.model, resized(self.example, lengths, batch))
        return self.seen[lengths, batch]

    def _halves(self, first: _Way) -> None:
        for dtype in HALVES:
            way = _run(cast(self.model, dtype), self.example, dtype)
            if not way.failed and not way.pairs <= first.pairs:
                self.found.halves.append(dtype)


class _NotFollowed(Exception):
    """The network cannot be run on the meta device."""


# -- one run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Comparison:
    """A comparison of two whole numbers, of which one is computed from sizes."""

    key: tuple[str, str, int, int]  # module path, file, line, how often that line was met before
    op: str
    left: int
    right: int
    outcome: bool

    @property
    def where(self) -> str:
        return f"{self.key[1]}:{self.key[2]}"

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right}"


def _threshold(found: Sequence[_Comparison]) -> bool:
    """Whether one side depends on the size and the other is always the same number, above zero."""
    left, right = {c.left for c in found}, {c.right for c in found}
    return any(len(one) > 1 and len(other) == 1 and max(other) > 0 for one, other in ((left, right), (right, left)))


@dataclass
class _Way:
    """Of one run: its comparisons, each two ops that follow each other, and what it asked."""

    compared: list[_Comparison] = field(default_factory=list)
    pairs: set[tuple[Any, Any]] = field(default_factory=set)
    failed: bool = False
    asks: bool = False  # for sizes
    asks_dtype: bool = False

    @property
    def branches(self) -> tuple[Any, Any]:
        """What tells apart two runs that take other branches."""
        return self.pairs, {(c.key, c.outcome) for c in self.compared}


def _run(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None = None) -> _Way:
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    given = [torch.empty_like(x, device="meta", dtype=dtype if x.is_floating_point() else None) for x in inputs.tensors]
    watch = _Watch()
    with eval_mode(model), torch.no_grad(), module_paths(model, watch.path), torch.device("meta"), watch:
        try:
            inputs.call(model, given)
        except Exception:  # whatever the network's code raises at this size
            watch.way.failed = True
    return watch.way


class _Watch(TorchFunctionMode):
    """Notes the ops, and gives sizes that note what they are compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []
        self.way = _Way()
        self.latest: Any = None
        self.met: dict[Any, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, _ = op_name(func)
        if name in ("shape", "size", "numel", "nelement"):
            self.way.asks = True
            return torch.Size(self._side(n) for n in result) if isinstance(result, tuple) else self._side(result)
        self.way.asks |= name in ("len", "stride")
        self.way.asks_dtype |= name == "dtype" or name in ("is_floating_point", "element_size", "itemsize")
        if not reads_no_values(name):
            now = (self.path[-1] if self.path else "", name)
            self.way.pairs.add((self.latest, now))
            self.latest = now
        return result

    def _side(self, value: int) -> _Side:
        side = _Side(value)
        side.watch = self
        return side

    def compared(self, op: str, left: Any, right: Any, outcome: bool) -> None:
        frame = sys._getframe(2)
        if frame.f_globals.get("__name__", "").startswith("torch._"):  # how PyTorch computes shapes on the meta device
            return
        place = (self.path[-1] if self.path else "", frame.f_code.co_filename, frame.f_lineno)
        self.met[place] = self.met.get(place, -1) + 1
        self.way.compared.append(_Comparison((*place, self.met[place]), op, int(left), int(right), outcome))


class _Side(int):
    """A size, or what is computed from sizes, that reports comparisons."""

    watch: _Watch

    __hash__ = int.__hash__

    def __bool__(self) -> bool:
        self.watch.compared("!=", self, 0, int(self) != 0)
        return int(self) != 0


def _computes(name: str) -> Any:
    plain = getattr(int, name)

    def method(self: _Side, *others: Any) -> Any:
        result = plain(self, *others)
        return tree_map(lambda n: self.watch._side(n) if type(n) is int else n, result)

    return method


def _compares(name: str, op: str) -> Any:
    plain = getattr(operator, name)

    def method(self: _Side, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        outcome = plain(int(self), int(other) if isinstance(other, int) else other)
        self.watch.compared(op, self, other, outcome)
        return outcome

    return method


for _name in "add radd sub rsub mul rmul floordiv rfloordiv mod rmod divmod neg pos abs pow and rshift lshift".split():
    setattr(_Side, f"__{_name}__", _computes(f"__{_name}__"))
for _name, _op in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!=")):
    setattr(_Side, f"__{_name}__", _compares(_name, _op))


# -- inputs ------------------------------------------------------------------------------------------------------


def _hollow(model: nn.Module) -> nn.Module:
    """A copy on the meta device."""
    plain = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    tensors = {id(t): t for t in [*plain, *named_tensors(model).values()]}
    return duplicate(model, {key: of_kind(t, t.detach().to("meta")) for key, t in tensors.items()})


def _lengths(inputs: Inputs) -> Lengths:
    """Sides of the images: all axes after the channels of the floating tensor with most axes; () without images."""
    images = [x for x in inputs.tensors if x.is_floating_point() and x.ndim > 2]
    return tuple(max(images, key=lambda x: x.ndim).shape[2:]) if images else ()


def resized(inputs: Inputs, lengths: Lengths, batch: int) -> Inputs:
    """The inputs with images of other sides, in another batch: each tensor repeated or cut, others in proportion."""
    base, whole = _lengths(inputs), inputs.batch

    def fit(x: Tensor) -> Tensor:
        if inputs.batched(x):
            x = x.index_select(0, torch.arange(batch, device=x.device) % whole)
        if x.ndim > len(base) and (tuple(x.shape[-len(base) :]) == base or x.ndim == len(base) + 2):
            for axis, (old, new) in enumerate(zip(base, lengths, strict=True), x.ndim - len(base)):
                side = max(round(x.shape[axis] * new / old), 1)
                x = x.index_select(axis, torch.arange(side, device=x.device) % x.shape[axis])
        return x

    return replace(inputs, tensors=tuple(fit(x) for x in inputs.tensors))
