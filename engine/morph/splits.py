"""Splits of outgoing weights over copies of a channel, such that their stored numbers add up to the weight exactly.

Replicating channel j with c copies (E) leaves the function as it is if each consumer's column j is split into c parts
that add up to it (S E = I, section 3.1). 1/c does so in real numbers only: for c = 3, 5, 6, 7 the stored parts miss
the weight in most cases. Two families add up exactly in binary floating point:

- Kraft: factors 2^-l with sum 1, e.g. 1/2 1/4 1/4. The same for every weight, so copies differ little.
- Sterbenz: a = fl(r v) with v/2 <= a <= v, b = v - a is exact by Sterbenz' lemma; the larger part is split again.
  Every weight draws its own r: the copies part in the first training step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import MorphError
from .lookup import FREE
from .verify import Certificate

SPLITS = ("sterbenz", "kraft")
BLOCK = 1 << 16  # weights that are certified at a time: they stay in the cache


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
    parts = torch.empty((copies, *weight.shape), dtype=weight.dtype)
    parts[0] = weight
    for made in range(1, copies):
        if made == 1:
            largest = weight
        else:
            which = parts[:made].abs().max(0, keepdim=True).indices
            largest = parts[:made].gather(0, which)[0]
        share = torch.rand(weight.shape, generator=generator, dtype=torch.float32).mul_(0.5).add_(0.5)
        share = (largest * share.to(weight.dtype)).to(weight.dtype)
        rest = largest - share
        swap = torch.rand(weight.shape, generator=generator) < 0.5  # neither place gets the larger part always
        share, rest = torch.where(swap, rest, share), torch.where(swap, share, rest)
        if made == 1:
            parts[0] = share
        else:
            parts[:made].scatter_(0, which, share[None])
        parts[made] = rest
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
        noise: null-space noise (section 6), relative to the weight's standard deviation: values are added that
            cancel over the copies. Only up to rounding, so `S E = I` then holds to that.

    Raises:
        MorphError: an unknown split.
    """
    if split not in SPLITS:
        raise MorphError(f"split '{split}' is unknown; take one of {', '.join(SPLITS)}")
    result = weight.new_zeros((weight.shape[0], len(columns), *weight.shape[2:]))
    used = columns[columns >= 0]
    counts = torch.bincount(used, minlength=weight.shape[1])
    order = torch.argsort(torch.where(columns == FREE, weight.shape[1], columns), stable=True)
    starts = torch.cumsum(counts, 0) - counts  # new columns of old column j: order[starts[j] : starts[j] + counts[j]]
    for copies in torch.unique(counts).tolist():
        if copies == 0:
            continue
        old = (counts == copies).nonzero().reshape(-1)
        source = weight if len(old) == weight.shape[1] else weight[:, old]
        if copies == 1:
            parts = [source]
        elif split == "kraft":
            parts = split_kraft(source, copies)
        else:
            parts = split_sterbenz(source, copies, generator)
        if noise and copies > 1:
            parts = _add_noise(parts, noise * float(weight.double().std(unbiased=False)), generator)
        for k, part in enumerate(parts):
            result[:, order[starts[old] + k]] = part
    return result


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
    new = (columns == FREE).nonzero().reshape(-1)
    violations = int((grown[:, new] != 0).sum()) if len(new) else 0
    used = (columns >= 0).nonzero().reshape(-1)
    counts = torch.bincount(columns[used], minlength=weight.shape[1])
    order = used[torch.argsort(columns[used], stable=True)]
    starts = torch.cumsum(counts, 0) - counts
    rows = max(1, BLOCK // max(weight[0].numel(), 1)) if len(weight) else 1
    for copies in torch.unique(counts).tolist():
        old = (counts == copies).nonzero().reshape(-1)
        # A single two-sum is exact in any of these formats; longer sums have room in float64 for their error terms.
        exact = torch.float32 if copies <= 2 and weight.dtype != torch.float64 else torch.float64
        for i in range(0, len(weight), rows):
            want = weight[i : i + rows]
            want = (want if len(old) == weight.shape[1] else want[:, old]).to(exact)
            parts = (grown[i : i + rows, order[starts[old] + k]].to(exact) for k in range(copies))
            violations += _violations(want, parts)
    return Certificate(weight.numel(), violations)


def _violations(want: Tensor, parts: Iterator[Tensor]) -> int:
    """How many sums over the parts are not exactly `want`."""
    total = next(parts, None)
    if total is None:  # no copy at all
        return int((want != 0).sum())
    error = None
    for part in parts:
        after = total + part
        back = after - total
        part -= back
        total -= after - back
        error = part.add_(total) if error is None else error.add_(part).add_(total)
        total = after
    return int((total != want if error is None else (total - want).add_(error) != 0).sum())
