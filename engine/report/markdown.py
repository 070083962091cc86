"""Text from outside in Markdown files: it shows as it is, and makes no tags, links, headings or columns."""

from __future__ import annotations

import re

# Entities where renderers know no backslash before the character.
_SPECIAL = {"&": "&amp;", "<": "&lt;"} | {character: f"\\{character}" for character in "\\`*[]|"}
_PATTERN = re.compile("[" + re.escape("".join(_SPECIAL)) + r"]|(?<![^\W_])_|_(?![^\W_])")  # snake_case stays


def markdown(value: object) -> str:
    """A value as text of one line."""
    line = " ".join(str(value).splitlines())
    return _PATTERN.sub(lambda found: _SPECIAL.get(found[0], f"\\{found[0]}"), line)
