"""Grey pictures in a terminal: two pixels per character with colour, else characters of ten densities."""

from __future__ import annotations

import numpy as np
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

_RAMP = " .:-=+*#%@"


def show_picture(picture: np.ndarray, console: Console) -> None:
    """Print a uint8 picture (height, width), 0 black; a character is one pixel wide and two pixels high."""
    if console.color_system is None:
        # Every other row: characters are twice as high as wide.
        for row in picture[::2]:
            console.print(
                "".join(_RAMP[int(value) * len(_RAMP) // 256] for value in row), highlight=False, markup=False
            )
        return
    if len(picture) % 2:
        picture = np.vstack([picture, np.zeros_like(picture[:1])])
    for upper, lower in zip(picture[::2], picture[1::2], strict=True):
        line = Text()
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            line.append("▀", Style(color=_grey(above), bgcolor=_grey(below)))
        console.print(line)


def _grey(value: int) -> Color:
    return Color.from_rgb(value, value, value)
