"""Which class is the positive one, and in which order classes are: by their names, never by the order of columns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..parsing import is_whole

POSITIVE = frozenset(
    "malignant malignancy cancer carcinoma positive pos abnormal suspicious disease diseased case yes true".split()
)
NEGATIVE = frozenset("benign normal negative neg healthy control no none false".split())
_NOT = re.compile(r"(?:not?|non)[ _-]+(.+)")


def positive_of(names: Sequence[str]) -> str | None:
    """The positive one of two classes; None where their names do not tell.

    Names tell it that are 0 and 1, that are X and "not X" (of which X is not in `NEGATIVE`), or of which one alone is
    in `POSITIVE`, or one alone in `NEGATIVE`; upper and lower case are the same.
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
    """Which of two classes of a training is the positive one: by `positive_of`, else the second."""
    found = positive_of(names)
    return 1 if found is None else list(names).index(found)


def in_order(names: Sequence[str], noted: Sequence[str] = (), *, stated: bool = False) -> tuple[list[str], bool]:
    """Names of classes in an order that does not depend on theirs, and whether that order means anything.

    It does where the names are numbers, or a note beside the predictions has an order that somebody stated. Without
    one, `gigamorph.engine.datasets.tables.read_table` sorts the names, so a sorted note says nothing.

    Args:
        noted: the order of the training.
        stated: it is known to be stated, as that of ordinal classes.
    """
    if sorted(noted) == sorted(names):
        return list(noted), stated or list(noted) != sorted(names) or all(map(is_whole, names))
    if all(map(is_whole, names)):
        return sorted(names, key=int), True
    return sorted(names), False
