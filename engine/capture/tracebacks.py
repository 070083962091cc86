"""Finds the user's line and module in tracebacks, for error messages."""

from __future__ import annotations

import inspect
import os
import re

import torch
from torch import nn

TORCH = os.path.join(os.path.dirname(torch.__file__), "")
ENGINE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_OURS = tuple(os.path.join(ENGINE, name) for name in ("accelerate.py", "dense.py", "tilewise.py", "capture"))
_PYTHON = os.path.join(os.path.dirname(os.__file__), "")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)(?:, in (\S+))?')

Frame = tuple[str, int, str]
"""File, line and function."""


def frames(text: str) -> list[Frame]:
    """The frames of a traceback, the innermost last."""
    return [(file, int(line), function or "") for file, line, function in _FRAME.findall(text)]


def is_users(file: str) -> bool:
    """Whether a file belongs neither to PyTorch, nor to Python, nor to gigamorph's own callers of a network."""
    if file.startswith((TORCH, "<frozen", "<eval_with_key", *_OURS)):
        return False
    return not file.startswith(_PYTHON) or "-packages" in file


def users(found: list[Frame]) -> Frame | None:
    """The innermost frame of the user's code, or of a library that is not PyTorch."""
    own = [frame for frame in found if is_users(frame[0])]
    own = [frame for frame in own if frame[0] != "<string>"] or own  # libraries generate code by exec
    return own[-1] if own else None


def module_of(found: list[Frame], network: nn.Module | None) -> str:
    """The path of the module whose forward contains the innermost frame; the first one of several of a class."""
    modules = [] if network is None else list(network.named_modules())
    for file, line, _ in reversed(found):
        for path, module in modules:
            code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
            if code is None or code.co_filename != file:
                continue
            if code.co_firstlineno <= line <= max(number or 0 for *_, number in code.co_lines()):
                return path
    return ""
