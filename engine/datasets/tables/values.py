"""Normalisation of the spellings of laterality, view, density and BI-RADS."""

from __future__ import annotations

import math
import re

from .schema import Box

SIDES = {"L": "L", "LEFT": "L", "LINKS": "L", "GAUCHE": "L", "R": "R", "RIGHT": "R", "RECHTS": "R", "DROITE": "R"}
"""Words for L and R, in English, German and French."""
_TRUTH = {"true": "1", "yes": "1", "ja": "1", "oui": "1", "false": "0", "no": "0", "nein": "0", "non": "0"}
_DENSITY = {"1": "A", "2": "B", "3": "C", "4": "D", "A": "A", "B": "B", "C": "C", "D": "D"}
_BIRADS = re.compile(r"(?:BI-?RADS\s*)?(0|1|2|3|4[ABC]?|5|6)", re.IGNORECASE)


def side(text: str) -> str | None:
    """L or R for "left", "R", "links", ...; None for other text."""
    return SIDES.get(text.strip().upper())


def density(text: str) -> str | None:
    """A to D for "3", "DENSITY C", "c"; None for other text."""
    return _DENSITY.get(text.strip().upper().removeprefix("DENSITY").strip())


def birads(text: str) -> str | None:
    """0, 1, 2, 3, 4, 4A, 4B, 4C, 5 or 6 for "BI-RADS 4", "4a", ...; None for other text."""
    match = _BIRADS.fullmatch(text.strip())
    return match[1].upper() if match else None


def suspicious(value: str | None) -> float | None:
    """1 for BI-RADS 4 to 6, 0 for 1 to 3; None for 0 (incomplete) and None."""
    return None if value in (None, "0") else float(value[0] >= "4")


def box_around(top: float, bottom: float, left: float, right: float) -> Box:
    """The box of whole pixels that contain the points between these rows and columns, ends included.

    Raises:
        ValueError: if all points are above or left of the image, or a number is not finite.
    """
    if not all(map(math.isfinite, (top, bottom, left, right))):
        raise ValueError(f"rows {top:g} to {bottom:g}, columns {left:g} to {right:g} are not in an image")
    box = max(math.floor(top), 0), math.floor(bottom) + 1, max(math.floor(left), 0), math.floor(right) + 1
    if box[0] >= box[1] or box[2] >= box[3]:
        raise ValueError(f"rows {top:g} to {bottom:g}, columns {left:g} to {right:g} are not in an image")
    return box


def number(text: str) -> float | None:
    """The text as a finite number; None if it is not one."""
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def label(text: str) -> float | None:
    """A number, or 1 and 0 for "yes", "False", "nein", "oui", ...; None for other text."""
    return number(_TRUTH.get(text.lower(), text))
