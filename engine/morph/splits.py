"""Splits of outgoing weights over copies of a channel; the stored parts add up to the weight exactly.

c copies of channel j (E) preserve the function if column j of each consumer is split into c parts that add up to it
(S E = I). Parts of 1/c do so only in real numbers: for c = 3, 5, 6, 7 the stored parts usually miss the weight. Two
families add up exactly in binary floating point:

- Kraft: factors 2^-l with sum 1, e.g. 1/2 1/4 1/4. They are the same for every weight, so copies differ little.
- Sterbenz: a = fl(r v) with v/2 <= a <= v; b = v - a is exact by Sterbenz' lemma, and the larger part is split again.
  Each weight has its own random r, so copies differ after the first training step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MorphError
from .lookup import FREE
from .step import Certificate

SPLITS = ("sterbenz", "kraft")
BLOCK = 1 << 16  # number of weights per block
Index = Tensor | slice


def kraft_lengths(copies: int) -> list[int]:
    """Return lengths l with sum 2^-l = 1; the largest part is split until there are `copies` parts."""
    lengths = [0]
    while len(lengths) < copies:
        largest = lengths.pop(lengths.index(min(lengths)))
        lengths += [largest + 1, largest + 1]
    return sorted(lengths)


def split_sterbenz(weight: Tensor, copies: int, generator: torch.Generator) -> list[Tensor]:
    """Split `weight` into `copies` tensors that add up to it exactly, with random shares per element."""
    parts = weight[None]
    for _ in range(1, copies):
        which = parts.abs().argmax(0, keepdim=True) if len(parts) > 1 else None
        whole = weight if which is None else parts.gather(0, which)[0]
        draw = torch.rand(weight.shape, generator=generator, dtype=torch.float32)
        larger = (whole * torch.maximum(draw, 1 - draw).to(weight.dtype)).to(weight.dtype)
        first = torch.where(draw < 0.5, whole - larger, larger)  # the larger part goes to a random side
        others = first[None] if which is None else parts.scatter(0, which, first[None])
        parts = torch.cat([others, (whole - first)[None]])
    return list(parts)


def split_columns(
    weight: Tensor, columns: Tensor, split: str, generator: torch.Generator, noise: float = 0.0
) -> Tensor:
    """Split the columns (axis 1) of `weight` (O, I, ...) over new ones (O, I', ...).

    Args:
        weight: weight of any floating dtype.
        columns: old column of each new one (I'), FREE for a column that reads a new channel and becomes zero.
        split: "sterbenz" or "kraft".
        generator: generator of the random shares.
        noise: null-space noise, relative to the weight's standard deviation. The added values cancel over the copies
            up to rounding, so `S E = I` then holds up to rounding.

    Raises:
        MorphError: the split is unknown.
    """
    if split not in SPLITS:
        raise MorphError(f"unknown split '{split}'; choose from {', '.join(SPLITS)}")
    result = weight.new_empty((weight.shape[0], len(columns), *weight.shape[2:]))
    deviation = float(weight.double().std(unbiased=False)) if noise else 0.0
    groups = by_copies(columns, weight.shape[1])
    several = [(old, indices) for old, indices in groups if len(indices) > 1]
    once = any(len(indices) == 1 for _, indices in groups)
    for rows in _blocks(weight):
        if once:
            torch.index_select(weight[rows], 1, columns.clamp(min=0), out=result[rows])
        for old, indices in several:
            source, copies = _columns(weight[rows], old), len(indices)
            if split == "kraft":
                parts = [source * 2.0**-length for length in kraft_lengths(copies)]
            else:
                parts = split_sterbenz(source, copies, generator)
            if noise:
                parts = _add_noise(parts, noise * deviation, generator)
            for index, part in zip(indices, parts, strict=True):
                if isinstance(index, slice):
                    result[rows, index] = part
                else:
                    result[rows].index_copy_(1, index, part)
    result[:, columns == FREE] = 0
    return result


def by_copies(columns: Tensor, width: int = 0) -> list[tuple[Index, list[Index]]]:
    """Group old columns by number of copies; for each copy, list the new columns in the order of the old ones.

    Args:
        columns: old column of each new one, FREE for none.
        width: number of old columns; by default up to the last one that is copied.
    """
    used = (columns != FREE).nonzero().reshape(-1)
    counts = torch.bincount(columns[used], minlength=width)
    order = used[torch.argsort(columns[used], stable=True)]
    starts = torch.cumsum(counts, 0) - counts  # new columns of old column j: order[starts[j] : starts[j] + counts[j]]
    groups = []
    for copies in torch.unique(counts).tolist():
        old = (counts == copies).nonzero().reshape(-1)
        groups.append((_index(old), [_index(order[starts[old] + k]) for k in range(copies)]))
    return groups


def _index(indices: Tensor) -> Index:
    """Return a slice if the indices are consecutive, because slices avoid an index list."""
    first = int(indices[0])
    return slice(first, first + len(indices)) if bool((indices.diff() == 1).all()) else indices


def _columns(weight: Tensor, indices: Index) -> Tensor:
    """Return columns (axis 1); `index_select` takes a third of the time of indexing."""
    return weight[:, indices] if isinstance(indices, slice) else weight.index_select(1, indices)


def _blocks(weight: Tensor) -> list[slice]:
    """Return blocks of rows; their intermediate results fit into the cache."""
    rows = max(1, BLOCK // max(weight[0].numel(), 1)) if len(weight) else 1
    return [slice(i, i + rows) for i in range(0, len(weight), rows)]


def _add_noise(parts: list[Tensor], scale: float, generator: torch.Generator) -> list[Tensor]:
    noise = torch.randn((len(parts), *parts[0].shape), generator=generator, dtype=torch.float64) * scale
    noise -= noise.mean(0)
    total = torch.stack([p.double() for p in parts]).sum(0)
    moved = [(p.double() + n).to(p.dtype) for p, n in zip(parts, noise, strict=True)]
    rest = total - torch.stack([p.double() for p in moved[1:]]).sum(0)  # the first copy absorbs the rounding
    return [rest.to(parts[0].dtype), *moved[1:]]


def certify(weight: Tensor, grown: Tensor, columns: Tensor) -> Certificate:
    """Check exactly that the stored new columns (axis 1) of each old column add up to it.

    Sums are computed by `exact_sum`, so rounding hides nothing.

    Args:
        weight: (O, I, ...).
        grown: (O, I', ...), with the same rows.
        columns: old column of each new one (I'), FREE for zero columns.
    """
    violations = int((grown[:, columns == FREE] != 0).sum())
    groups = by_copies(columns, weight.shape[1])
    for rows in _blocks(weight):
        for old, indices in groups:
            violations += _violations(_columns(weight[rows], old), [_columns(grown[rows], p) for p in indices])
    return Certificate(weight.numel(), violations)


def _violations(want: Tensor, parts: list[Tensor]) -> int:
    """Count the sums over the parts that do not equal `want` exactly."""
    if not parts:
        return int((want != 0).sum())
    if len(parts) == 1 and torch.equal(parts[0], want):
        return 0
    if len(parts) == 2:
        # For s = fl(a + b), s minus the larger part is exact (Dekker). It equals the other part only if s is exact.
        a, b = parts
        if torch.equal(a + b, want) and torch.equal(want - a, b) and torch.equal(want - b, a):
            return 0
    total, rest = exact_sum([part.double() for part in parts])
    return int((rest | (total != want.double())).sum())


def exact_sum(terms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum of float64 tensors, and where it is rounded.

    Repeated error-free two-sums distil the sum, so a representable sum is exact in any order of its terms.
    """
    terms = [*terms]
    for _ in terms[1:]:
        for k in range(1, len(terms)):
            a, b = terms[k - 1], terms[k]
            after = a + b
            back = after - a
            terms[k - 1], terms[k] = (a - (after - back)) + (b - back), after
    rest = torch.zeros_like(terms[-1], dtype=torch.bool)
    for term in terms[:-1]:
        rest |= term != 0
    return terms[-1], rest
