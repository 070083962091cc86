"""Which line of the network's code is running."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback

import torch

_TORCH = os.path.dirname(torch.__file__)
_ENGINE = os.path.dirname(os.path.dirname(__file__))


def line_of() -> str:
    """File and line of the innermost running code that is neither PyTorch's nor the engine's; empty if none is."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if frame.f_code.co_name == "capture" and _is_engine(name):
            break
        if not name.startswith(_TORCH) and name != contextlib.__file__ and not _is_engine(name):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def raised_at(error: BaseException) -> str:
    """File and line that an error was raised in; empty if that is PyTorch's or the engine's."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    name = frame.f_code.co_filename
    return "" if name.startswith(_TORCH) or _is_engine(name) else f"{os.path.basename(name)}:{line}"


def _is_engine(name: str) -> bool:
    home = os.path.dirname(name)
    return home == _ENGINE or (os.path.dirname(home) == _ENGINE and os.path.basename(home) in ("capture", "ops"))
