"""Escapes foreign text for Markdown: it shows as it is, without tags, links, headings or columns."""

from __future__ import annotations

import re

# HTML entities for characters that some renderers do not escape with a backslash.
_SPECIAL = {"&": "&amp;", "<": "&lt;"} | {character: f"\\{character}" for character in "\\`*[]|"}
_PATTERN = re.compile("[" + re.escape("".join(_SPECIAL)) + r"]|(?<![^\W_])_|_(?![^\W_])")  # snake_case stays


def markdown(value: object) -> str:
    """Return a value as escaped text in one line."""
    line = " ".join(str(value).splitlines())
    return _PATTERN.sub(lambda found: _SPECIAL.get(found[0], f"\\{found[0]}"), line)
