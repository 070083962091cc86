"""Other inputs for the check of a morph: a second size, and inputs that take other branches of the forward.

A forward may branch by the size of its images, by the batch or by the precision. Runs on the meta device, where large
images cost nothing, record its op sequence. Their sizes record comparisons (`_Side`), and each comparison shows which
size takes the other branch. The search returns the smallest inputs that run ops in another order.
"""

from __future__ import annotations

import logging
import math
import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import MorphError
from ..torch_private import tree_map
from .copying import cast, duplicate, named_tensors, of_kind
from .example import Inputs
from .families import op_name, reads_no_values
from .running import eval_mode
from .tracer import module_paths

log = logging.getLogger("gigamorph.morph")

Lengths = tuple[int, ...]
LARGE = (1031, 4111)  # sides above usual thresholds; primes, so that no stride divides them
SMALL = 64  # side of an image that most networks accept
HALVES = (torch.bfloat16, torch.float16)


@dataclass
class Others:
    """Further inputs on which a morph is checked.

    Attributes:
        example: the first example of the batch.
        second: inputs of another size and batch; None if the network does not accept any.
        branching: inputs on which the forward runs its ops in another order than on the example.
        halves: precisions in which it runs its ops in another order.
        alike: whether it runs the same ops on the second input as on the example.
    """

    example: Inputs
    second: Inputs | None = None
    branching: list[Inputs] = field(default_factory=list)
    halves: list[torch.dtype] = field(default_factory=list)
    alike: bool = False

    @property
    def all(self) -> list[Inputs]:
        """All inputs of other sizes, the second one first."""
        return [*([self.second] if self.second else []), *self.branching]

    def __or__(self, more: Others) -> Others:
        """Combine these inputs with those of another network on the same example."""
        known = {x.shapes for x in self.all}
        branching = [*self.branching, *(x for x in more.all if x.shapes not in known)]
        halves = [*dict.fromkeys([*self.halves, *more.halves])]
        same = self.second is not None and more.second is not None and self.second.shapes == more.second.shapes
        return Others(self.example, self.second, branching, halves, same and self.alike and more.alike)


def other_inputs(model: nn.Module, example: Inputs, multiple: int = 1) -> Others:
    """Find inputs that cover the sizes and branches that the example does not cover.

    Args:
        model: any network; it is not changed, and computes nothing.
        example: its inputs.
        multiple: the sides of its images must be multiples of this number.

    Raises:
        MorphError: the forward compares a size with a number, and no input was found for the other result.
    """
    return _Search(model, example, multiple).run()


class _Search:
    """Search for inputs by runs on the meta device."""

    def __init__(self, model: nn.Module, example: Inputs, multiple: int) -> None:
        self.example, self.multiple, self.batch = example.first(), multiple, example.batch
        self.hollow = replace(self.example, tensors=tuple(x.to("meta") for x in self.example.tensors))
        self.model = _hollow(model)
        self.base = _lengths(self.example)
        self.seen: dict[tuple[Lengths, int], _Trace] = {}
        self.found = Others(self.example)

    def run(self) -> Others:
        log.info("looking for branches by image size, batch and precision")
        first = self._trace(self.base, 1)
        if first.failed:  # the network cannot run without values, so the check itself tries one other size
            self.found.second = resized(self.example, *next(self._seconds()))
            return self.found
        second = next((k for k in self._seconds() if k != (self.base, 1) and not self._trace(*k).failed), None)
        if second is not None:
            self.found.second = resized(self.example, *second)
        whole = self._trace(self.base, self.batch)
        if second is not None:
            self.found.alike = self._trace(*second).branches == first.branches == whole.branches
        if first.asks:
            self._search()
        known = set(first.pairs)
        for (lengths, batch), trace in sorted(self.seen.items(), key=lambda item: math.prod(item[0][0]) * item[0][1]):
            if not trace.failed and not trace.pairs <= known:
                known |= trace.pairs
                self.found.branching.append(resized(self.example, lengths, batch))
        for dtype in HALVES if first.asks_dtype else ():
            trace = _run(cast(self.model, dtype), self.example, dtype)
            if not trace.failed and not trace.pairs <= first.pairs:
                self.found.halves.append(dtype)
        return self.found

    def _seconds(self) -> Iterator[tuple[Lengths, int]]:
        """Yield odd, non-square sizes in another batch, then sizes for networks with strides or fixed shapes."""
        batch = 2 if self.batch == 1 else 1
        halved = self.base  # a part of a large image is enough and costs less
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
        """Try more sizes: smaller ones, sizes that change the result of a comparison, and larger ones."""
        if self.base:
            for lengths in (tuple(max(n // 4, 1) for n in self.base), tuple(n + 1 for n in self.base)):
                self._trace(self._fitting(lengths), 1)
        self._trace(self.base, 7)
        tried: set[str] = set()
        for comparison in self._one_sided():
            if str(comparison) not in tried:  # many modules make the same comparison
                self._try_other_outcome(comparison)
            tried.add(str(comparison))
        for side in LARGE if self.base else ():
            self._trace(self._fitting((side,) * len(self.base)), 1)
            for axis in range(len(self.base)):
                self._trace(self._fitting(tuple(side if i == axis else n for i, n in enumerate(self.base))), 1)
        for comparison in self._one_sided():
            raise MorphError(
                f"the forward compares a size at {comparison.where} ({comparison}), but no image was found for the "
                "other result, so only one branch could be checked; remove the comparison"
            )

    def _try_other_outcome(self, comparison: _Comparison) -> None:
        for lengths, batch in self._aimed(comparison):
            trace = self._trace(self._fitting(lengths), batch)
            if any(c.key == comparison.key and c.outcome != comparison.outcome for c in trace.compared):
                return

    def _one_sided(self) -> list[_Comparison]:
        """Return the comparisons of a size with a threshold that had the same result in all runs."""
        every: dict[Any, list[_Comparison]] = {}
        for trace in self.seen.values():
            for c in trace.compared:
                every.setdefault(c.key, []).append(c)
        return [found[0] for found in every.values() if len({c.outcome for c in found}) == 1 and _threshold(found)]

    def _aimed(self, comparison: _Comparison) -> Iterator[tuple[Lengths, int]]:
        """Yield sizes that make the two compared numbers about equal, if one is proportional to the image size."""
        left, right = comparison.left, comparison.right
        for a, b in ((left, right), (right, left)):
            if a < 1 or b < 1:
                continue
            steps = [-(-n // a) for n in self.base]
            axes = [*([i] for i in reversed(range(len(self.base)))), range(len(self.base))]  # narrow images are cheaper
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

    def _trace(self, lengths: Lengths, batch: int) -> _Trace:
        if (lengths, batch) not in self.seen:
            self.seen[lengths, batch] = _run(self.model, resized(self.hollow, lengths, batch))
        return self.seen[lengths, batch]


# -- one run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Comparison:
    """A comparison of two integers; one of them is computed from sizes."""

    key: tuple[str, str, int, int]  # module path, file, line, number of earlier visits of that line
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
    """Return whether one side depends on the size, and the other is a constant above zero."""
    left, right = {c.left for c in found}, {c.right for c in found}
    return any(len(one) > 1 and len(other) == 1 and max(other) > 0 for one, other in ((left, right), (right, left)))


def _run(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None = None) -> _Trace:
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    given = [torch.empty_like(x, device="meta", dtype=dtype if x.is_floating_point() else None) for x in inputs.tensors]
    watch = _Trace()
    with eval_mode(model), torch.no_grad(), module_paths(model, watch.path), torch.device("meta"), watch:
        try:
            inputs.call(model, given)
        except Exception:  # the network's code may raise anything at this size
            watch.failed = True
    return watch


class _Trace(TorchFunctionMode):
    """Function mode that records ops, and returns sizes that record comparisons.

    Attributes:
        compared: the comparisons of one run.
        pairs: its pairs of consecutive ops.
        failed: whether the network failed on the inputs.
        asks: whether it reads sizes.
        asks_dtype: whether it reads a dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []
        self.compared: list[_Comparison] = []
        self.pairs: set[tuple[Any, Any]] = set()
        self.failed = self.asks = self.asks_dtype = False
        self.latest: Any = None
        self.met: dict[Any, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, _ = op_name(func)
        if name in ("shape", "size", "numel", "nelement"):
            self.asks = True
            return torch.Size(self._side(n) for n in result) if isinstance(result, tuple) else self._side(result)
        self.asks |= name in ("len", "stride")
        self.asks_dtype |= name == "dtype" or name in ("is_floating_point", "element_size", "itemsize")
        if not reads_no_values(name):
            now = (self.path[-1] if self.path else "", name)
            self.pairs.add((self.latest, now))
            self.latest = now
        return result

    def _side(self, value: int) -> _Side:
        side = _Side(value)
        side.watch = self
        return side

    @property
    def branches(self) -> tuple[Any, Any]:
        """Key that differs between two runs that take different branches."""
        return self.pairs, {(c.key, c.outcome) for c in self.compared}

    def compare(self, op: str, left: Any, right: Any, outcome: bool) -> None:
        frame = sys._getframe(2)
        if frame.f_globals.get("__name__", "").startswith("torch._"):  # PyTorch's shape computation on the meta device
            return
        location = (self.path[-1] if self.path else "", frame.f_code.co_filename, frame.f_lineno)
        self.met[location] = self.met.get(location, -1) + 1
        self.compared.append(_Comparison((*location, self.met[location]), op, int(left), int(right), outcome))


class _Side(int):
    """A size, or a number computed from sizes, that records comparisons."""

    watch: _Trace

    __hash__ = int.__hash__

    def __bool__(self) -> bool:
        self.watch.compare("!=", self, 0, int(self) != 0)
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
        self.watch.compare(op, self, other, outcome)
        return outcome

    return method


for _name in "add radd sub rsub mul rmul floordiv rfloordiv mod rmod divmod neg pos abs pow and rshift lshift".split():
    setattr(_Side, f"__{_name}__", _computes(f"__{_name}__"))
for _name, _op in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!=")):
    setattr(_Side, f"__{_name}__", _compares(_name, _op))


# -- inputs ------------------------------------------------------------------------------------------------------


def _hollow(model: nn.Module) -> nn.Module:
    """Return a copy on the meta device."""
    plain = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    tensors = {id(t): t for t in [*plain, *named_tensors(model).values()]}
    return duplicate(model, {key: of_kind(t, t.detach().to("meta")) for key, t in tensors.items()})


def _lengths(inputs: Inputs) -> Lengths:
    """Return the image sides: all axes after the channels of the floating tensor with most axes; () without images."""
    images = [x for x in inputs.tensors if x.is_floating_point() and x.ndim > 2]
    return tuple(max(images, key=lambda x: x.ndim).shape[2:]) if images else ()


def resized(inputs: Inputs, lengths: Lengths, batch: int) -> Inputs:
    """Return inputs with other image sides and another batch; tensors are repeated or cut, others in proportion."""
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
