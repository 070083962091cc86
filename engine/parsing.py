"""Parsers for untrusted text, which raise only `ValueError`."""

from __future__ import annotations

import ast
import json
from typing import Any

_DIGITS = 18
_DEEP = "it is nested too deeply"


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Parse JSON, as `json.loads`.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply for Python.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError(_DEEP) from None


def is_whole(text: str) -> bool:
    """Whether a text is a whole number from 0 that files and data bases hold too; Python makes none of 4300 digits."""
    return text.isdecimal() and len(text) <= _DIGITS


def parse_literal(text: str) -> Any:
    """Parse a Python literal, as `ast.literal_eval`.

    Raises:
        ValueError: the text is not a Python literal, or is nested too deeply for Python.
    """
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError) as error:
        raise ValueError(str(error)) from None
    except (RecursionError, MemoryError):
        raise ValueError(_DEEP) from None
