"""The positive class and the order of classes, from their names, independent of the order of columns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..parsing import is_whole

POSITIVE = frozenset(
    "malignant malignancy malign maligne cancer carcinoma positive pos abnormal suspicious disease diseased case "
    "yes true ja oui bösartig".split()
)
NEGATIVE = frozenset("benign benigne normal negative neg healthy control no none false nein non gutartig".split())
_NOT = re.compile(r"(?:not?|non)[ _-]+(.+)")


def positive_of(names: Sequence[str]) -> str | None:
    """The positive one of two classes; None if their names do not determine it.

    Names determine it if they are 0 and 1, or X and "not X" (X not in `NEGATIVE`), or if only one of them is in
    `POSITIVE` or `NEGATIVE`; case is ignored.
    """
    first, second = (name.strip().casefold() for name in names)
    if {first, second} == {"0", "1"}:
        return names[first == "0"]
    for negative, positive in ((0, 1), (1, 0)):
        found = _NOT.fullmatch((first, second)[negative])
        if found and found[1] == (first, second)[positive]:
            return None if found[1] in NEGATIVE else names[positive]
    for known, number in ((POSITIVE, 0), (NEGATIVE, 1)):
        if (first in known) != (second in known):
            return names[number if first in known else 1 - number]
    return None


def positive_number(names: Sequence[str]) -> int:
    """The index of the positive one of a training's two classes: by `positive_of`, else the second."""
    found = positive_of(names)
    return 1 if found is None else list(names).index(found)


def in_order(names: Sequence[str], noted: Sequence[str] = (), *, stated: bool = False) -> tuple[list[str], bool]:
    """The names of classes in an order that is independent of their input order, and whether it is meaningful.

    It is meaningful if the names are numbers, or if the predictions' JSON file has an order that a user stated. Without
    one, `gigamorph.engine.datasets.tables.read_table` sorts the names, so a sorted order is not meaningful.

    Args:
        names: of the classes.
        noted: the order of the training.
        stated: whether the order is known to be stated, as for ordinal classes.
    """
    if sorted(noted) == sorted(names):
        return list(noted), stated or list(noted) != sorted(names) or all(map(is_whole, names))
    if all(map(is_whole, names)):
        return sorted(names, key=int), True
    return sorted(names), False
