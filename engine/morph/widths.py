"""Numbers of copies and new channels per class of each space, from the user's widths, factors and patterns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from ..errors import MorphError
from .spaces import Space, Spaces

Counts = Mapping[int | str, int | Sequence[int]]


def choose_counts(
    spaces: Spaces,
    counts: Counts,
    factor: float | Mapping[str, float] | None,
    free: Mapping[int | str, int],
    seed: int,
    *,
    ignore: Sequence[str] = (),
    round_to: int = 1,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return copies and new channels per class, by key of the space; the arguments are those of `widen`."""
    if not isinstance(round_to, int) or round_to < 1:
        raise MorphError(f"round_to must be a number of channels of at least 1, not {round_to!r}")
    wanted: dict[str, int | Sequence[int]] = {}
    for s, by in _factors(spaces, factor, ignore):
        unit = s.width // len(s.order)
        wanted[s.key] = _rounded(s.width * by, unit, s.width, round_to) if _even(s) else max(1, round(by))
    for key, value in counts.items():
        wanted[spaces[key].key] = value
    rng = np.random.default_rng(seed)
    chosen = {}
    for key, value in wanted.items():
        space = spaces[key]
        drawn = rng.integers(0, 1 << 62)
        copies = _copies(space, value, np.random.default_rng(drawn), factor is not None and key not in counts)
        if copies != [1] * len(copies):
            _require_growable(space)
            chosen[space.key] = tuple(copies)
    new = {}
    for key, number in free.items():
        space = spaces[key]
        _require_growable(space)
        unit = space.width // len(space.order)
        if number % unit or number < 0 or not _even(space):
            raise MorphError(f"new channels of space {space.key} must be a multiple of {unit}, not {number}")
        new[space.key] = (*[0] * (len(space.order) - 1), number // unit)
    return chosen, new


def _factors(
    spaces: Spaces, factor: float | Mapping[str, float] | None, ignore: Sequence[str]
) -> list[tuple[Space, float]]:
    """Return the spaces that a factor widens, each with its factor.

    Raises:
        MorphError: a factor is not a finite number of at least 1, or a pattern matches no space that can grow.
    """
    if factor is None:
        return []
    by = dict(factor) if isinstance(factor, Mapping) else {"*": factor}
    for value in by.values():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise MorphError(f"factor {value!r} is not a finite number; give 1 or more")
        if not value >= 1:
            raise MorphError(f"factor {value} would make the network narrower; give 1 or more")
    growable = spaces.growable()
    for pattern in [*ignore, *(by if isinstance(factor, Mapping) else [])]:
        if not any(_fits(pattern, s) for s in growable):
            raise MorphError(
                f"'{pattern}' matches no module with channels that can grow; see find_spaces, or gigamorph morph spaces"
            )
    not_ignored = [s for s in growable if not any(_fits(pattern, s) for pattern in ignore)]
    pairs = [(s, next((v for pattern, v in by.items() if _fits(pattern, s)), None)) for s in not_ignored]
    return [(s, value) for s, value in pairs if value is not None]


def _fits(pattern: str, space: Space) -> bool:
    """Return whether a pattern is the space's key, or matches a module that produces its channels, or a parent."""
    if pattern in ("*", space.key):
        return True
    paths = [name.rpartition(".")[0] for name, axis in space.members if axis == 0]
    parents = {".".join(path.split(".")[:n]) for path in paths for n in range(1, path.count(".") + 2)}
    return any(fnmatchcase(path, pattern) for path in parents)


def _rounded(width: float, unit: int, least: int, round_to: int) -> int:
    """Return the nearest common multiple of the unit and `round_to` that is at least `least`."""
    step = math.lcm(unit, round_to)
    near = round(width / step) * step
    return max(near if near >= least else math.ceil(least / step) * step, least)


def _even(space: Space) -> bool:
    """Return whether all classes have the same number of channels."""
    return len({space.classes.count(c) for c in space.order}) <= 1 if len(space.order) < space.width else True


def _require_growable(space: Space) -> None:
    if space.frozen:
        raise MorphError(f"space {space.id} ({space.key}) cannot be widened: {space.frozen}")


def _copies(space: Space, value: int | Sequence[int], rng: np.random.Generator, is_factor: bool) -> list[int]:
    classes = len(space.order)
    if not isinstance(value, int | np.integer):
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise MorphError(f"space {space.key}: {value!r} is not a width; give an integer, or one integer per class")
        copies = [int(v) for v in value]
        if len(copies) != classes or min(copies) < 1:
            raise MorphError(f"space {space.key} needs {classes} counts of at least 1, not {copies[:8]}")
        return copies
    if not _even(space):
        if is_factor:
            return [int(value)] * classes
        if value % space.width or value < space.width:
            raise MorphError(f"space {space.key} has width {space.width}; it can only be widened to a multiple of that")
        return [int(value) // space.width] * classes
    unit = space.width // classes
    if value < space.width:
        raise MorphError(f"space {space.key} already has width {space.width}; {value} would make it narrower")
    if value % unit:
        raise MorphError(f"space {space.key} grows in steps of {unit} channels; {value} is not a multiple of that")
    total = int(value) // unit
    copies = np.full(classes, total // classes)
    copies[rng.permutation(classes)[: total % classes]] += 1
    return copies.tolist()


def width_after(space: Space, copies: Sequence[int] | None, free: Sequence[int] | None) -> int:
    """Return the width of a space with these numbers of copies and new channels per class."""
    size = dict.fromkeys(space.order, 0)
    for c in space.classes:
        size[c] += 1
    copies, free = copies or [1] * len(size), free or [0] * len(size)
    return sum(n * (c + f) for n, c, f in zip(size.values(), copies, free, strict=True))
