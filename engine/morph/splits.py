"""Splits of outgoing weights over copies of a channel, such that their stored numbers add up to the weight exactly.

Replicating channel j with c copies (E) leaves the function as it is if each consumer's column j is split into c parts
that add up to it (S E = I). 1/c does so in real numbers only: for c = 3, 5, 6, 7 the stored parts miss
the weight in most cases. Two families add up exactly in binary floating point:

- Kraft: factors 2^-l with sum 1, e.g. 1/2 1/4 1/4. The same for every weight, so copies differ little.
- Sterbenz: a = fl(r v) with v/2 <= a <= v, b = v - a is exact by Sterbenz' lemma; the larger part is split again.
  Every weight draws its own r: the copies part in the first training step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MorphError
from .lookup import FREE
from .report import Certificate

SPLITS = ("sterbenz", "kraft")
BLOCK = 1 << 16  # weights that are worked on at a time
Index = Tensor | slice


def kraft_lengths(copies: int) -> list[int]:
    """Lengths l with sum 2^-l = 1, by splitting the largest part until there are `copies`."""
    lengths = [0]
    while len(lengths) < copies:
        largest = lengths.pop(lengths.index(min(lengths)))
        lengths += [largest + 1, largest + 1]
    return sorted(lengths)


def split_kraft(weight: Tensor, copies: int) -> list[Tensor]:
    """`copies` tensors, powers of two times `weight`."""
    return [weight * 2.0**-length for length in kraft_lengths(copies)]


def split_sterbenz(weight: Tensor, copies: int, generator: torch.Generator) -> list[Tensor]:
    """`copies` tensors that add up to `weight` exactly, in random shares that differ from element to element."""
    parts = weight[None]
    for _ in range(1, copies):
        which = parts.abs().argmax(0, keepdim=True) if len(parts) > 1 else None
        whole = weight if which is None else parts.gather(0, which)[0]
        draw = torch.rand(weight.shape, generator=generator, dtype=torch.float32)
        larger = (whole * torch.maximum(draw, 1 - draw).to(weight.dtype)).to(weight.dtype)
        first = torch.where(draw < 0.5, whole - larger, larger)  # neither place gets the larger part always
        kept = first[None] if which is None else parts.scatter(0, which, first[None])
        parts = torch.cat([kept, (whole - first)[None]])
    return list(parts)


def split_columns(
    weight: Tensor, columns: Tensor, split: str, generator: torch.Generator, noise: float = 0.0
) -> Tensor:
    """`weight` (O, I, ...) with its columns (axis 1) distributed over new ones.

    Args:
        weight: any floating dtype.
        columns: old column of each new one (I'), FREE for one that reads a new channel and becomes zero.
        split: "sterbenz" or "kraft".
        generator: for the random shares.
        noise: null-space noise, relative to the weight's standard deviation: values are added that
            cancel over the copies. Only up to rounding, so `S E = I` then holds to that.

    Raises:
        MorphError: an unknown split.
    """
    if split not in SPLITS:
        raise MorphError(f"split '{split}' is unknown; take one of {', '.join(SPLITS)}")
    result = weight.new_empty((weight.shape[0], len(columns), *weight.shape[2:]))
    deviation = float(weight.double().std(unbiased=False)) if noise else 0.0
    groups = _by_copies(columns, weight.shape[1])
    several = [(old, places) for old, places in groups if len(places) > 1]
    once = any(len(places) == 1 for _, places in groups)
    for rows in _blocks(weight):
        if once:
            torch.index_select(weight[rows], 1, columns.clamp(min=0), out=result[rows])
        for old, places in several:
            source, copies = _columns(weight[rows], old), len(places)
            parts = split_kraft(source, copies) if split == "kraft" else split_sterbenz(source, copies, generator)
            if noise:
                parts = _add_noise(parts, noise * deviation, generator)
            for place, part in zip(places, parts, strict=True):
                if isinstance(place, slice):
                    result[rows, place] = part
                else:
                    result[rows].index_copy_(1, place, part)
    result[:, columns == FREE] = 0
    return result


def _by_copies(columns: Tensor, width: int) -> list[tuple[Index, list[Index]]]:
    """Old columns of the same number of copies, and for each copy the new ones in the order of the old."""
    used = (columns != FREE).nonzero().reshape(-1)
    counts = torch.bincount(columns[used], minlength=width)
    order = used[torch.argsort(columns[used], stable=True)]
    starts = torch.cumsum(counts, 0) - counts  # new columns of old column j: order[starts[j] : starts[j] + counts[j]]
    groups = []
    for copies in torch.unique(counts).tolist():
        old = (counts == copies).nonzero().reshape(-1)
        groups.append((_index(old), [_index(order[starts[old] + k]) for k in range(copies)]))
    return groups


def _index(places: Tensor) -> Index:
    """A slice if the places count up one by one, which reads and writes without a list."""
    first = int(places[0])
    return slice(first, first + len(places)) if bool((places.diff() == 1).all()) else places


def _columns(weight: Tensor, places: Index) -> Tensor:
    """Columns (axis 1); `index_select` reads a list of them in a third of the time that indexing takes."""
    return weight[:, places] if isinstance(places, slice) else weight.index_select(1, places)


def _blocks(weight: Tensor) -> list[slice]:
    """Rows that are worked on at a time: what is made of them stays in the cache."""
    rows = max(1, BLOCK // max(weight[0].numel(), 1)) if len(weight) else 1
    return [slice(i, i + rows) for i in range(0, len(weight), rows)]


def _add_noise(parts: list[Tensor], scale: float, generator: torch.Generator) -> list[Tensor]:
    noise = torch.randn((len(parts), *parts[0].shape), generator=generator, dtype=torch.float64) * scale
    noise -= noise.mean(0)
    total = torch.stack([p.double() for p in parts]).sum(0)
    moved = [(p.double() + n).to(p.dtype) for p, n in zip(parts, noise, strict=True)]
    rest = total - torch.stack([p.double() for p in moved[1:]]).sum(0)  # the first copy takes up the rounding
    return [rest.to(parts[0].dtype), *moved[1:]]


def certify(weight: Tensor, grown: Tensor, columns: Tensor) -> Certificate:
    """Exact check that the new columns (axis 1) of each old one add up to it, in the stored numbers.

    Sums are formed in float64 with an error term (two-sum), so that nothing is hidden by rounding.

    Args:
        weight: (O, I, ...).
        grown: (O, I', ...), the same rows.
        columns: old column of each new one (I'), FREE for zero ones.
    """
    violations = int((grown[:, columns == FREE] != 0).sum())
    groups = _by_copies(columns, weight.shape[1])
    for rows in _blocks(weight):
        for old, places in groups:
            violations += _violations(_columns(weight[rows], old), [_columns(grown[rows], p) for p in places])
    return Certificate(weight.numel(), violations)


def _violations(want: Tensor, parts: list[Tensor]) -> int:
    """How many sums over the parts are not exactly `want`."""
    if not parts:
        return int((want != 0).sum())
    if len(parts) == 1 and torch.equal(parts[0], want):
        return 0
    if len(parts) == 2:
        # If s is a + b rounded, s minus the larger of them is exact (Dekker), and equal to the other only if s is too.
        a, b = parts
        if torch.equal(a + b, want) and torch.equal(want - a, b) and torch.equal(want - b, a):
            return 0
    # A single two-sum is exact in any of these formats; longer sums have room in float64 for their error terms.
    exact = torch.float32 if len(parts) <= 2 and want.dtype != torch.float64 else torch.float64
    total, error = parts[0].to(exact), torch.zeros_like(want, dtype=exact)
    for part in (part.to(exact) for part in parts[1:]):
        after = total + part
        back = after - total
        error += (part - back) + (total - (after - back))
        total = after
    return int(((total - want.to(exact)) + error != 0).sum())
