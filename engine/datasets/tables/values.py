"""The many spellings of laterality, view, density and BI-RADS, each as one."""

from __future__ import annotations

import math
import re

from .schema import Box

_SIDES = {"L": "L", "LEFT": "L", "R": "R", "RIGHT": "R"}
_DENSITY = {"1": "A", "2": "B", "3": "C", "4": "D", "A": "A", "B": "B", "C": "C", "D": "D"}
_BIRADS = re.compile(r"(?:BI-?RADS\s*)?(0|1|2|3|4[ABC]?|5|6)", re.IGNORECASE)


def side(text: str) -> str | None:
    """L or R of "left", "R", ...; None of anything else."""
    return _SIDES.get(text.strip().upper())


def density(text: str) -> str | None:
    """A to D of "3", "DENSITY C", "c"; None of anything else."""
    return _DENSITY.get(text.strip().upper().removeprefix("DENSITY").strip())


def birads(text: str) -> str | None:
    """0, 1, 2, 3, 4, 4A, 4B, 4C, 5 or 6 of "BI-RADS 4", "4a", ...; None of anything else."""
    match = _BIRADS.fullmatch(text.strip())
    return match[1].upper() if match else None


def suspicious(value: str | None) -> float | None:
    """1 for BI-RADS 4 to 6, 0 for 1 to 3; None for 0 (incomplete) and where there is none."""
    return None if value in (None, "0") else float(value[0] >= "4")


def box_around(top: float, bottom: float, left: float, right: float) -> Box:
    """The whole pixels that points between these rows and columns, ends included, lie in.

    `ValueError` if none of them does, because the points are above or left of the image, or no numbers.
    """
    if not all(map(math.isfinite, (top, bottom, left, right))):
        raise ValueError(f"rows {top:g} to {bottom:g}, columns {left:g} to {right:g} are not in an image")
    box = max(math.floor(top), 0), math.floor(bottom) + 1, max(math.floor(left), 0), math.floor(right) + 1
    if box[0] >= box[1] or box[2] >= box[3]:
        raise ValueError(f"rows {top:g} to {bottom:g}, columns {left:g} to {right:g} are not in an image")
    return box


def number(text: str) -> float | None:
    """The number that the text is; None if it is none, or not finite."""
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def truth(text: str) -> float | None:
    """1 or 0 of "1", "0.0", "True", ...; None where it is empty or nan. `ValueError` of anything else."""
    value = number({"true": "1", "false": "0"}.get(text.lower(), text))
    if value not in (0, 1, None) or (value is None and text and text.lower() != "nan"):
        raise ValueError(f"{text!r} is neither 0 nor 1")
    return value
