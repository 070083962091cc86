"""Patient, exam, side and view from file names, for files whose header does not state them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from .tables import values

_VIEWS = "CC|MLO|ML|LMO|LM|XCCL|XCCM|XCC|FB|AT|SIO|ISO"
_FIELDS = {
    "patient": r"[^/]+?",
    "exam": r"[^/]+?",
    "laterality": "L|R|LEFT|RIGHT",
    "view": _VIEWS,
    "any": r"[^/]*?",
}
_FIELD = re.compile(r"\{(\w*)\}")
COMMON = (
    "{patient}_{laterality}-{view}",
    "{patient}_{laterality}_{view}",
    "{patient}_{laterality}{view}",
    "{patient}-{laterality}-{view}",
    "{patient}.{laterality}_{view}",
    "{patient}_{view}_{laterality}",
    "{any}_{patient}_MG_{laterality}_{view}_ANON",
    "{patient}/{laterality}-{view}",
    "{patient}/{laterality}_{view}",
    "{patient}/{laterality}{view}",
    "{patient}/{view}_{laterality}",
    "{patient}_{laterality}-{view}_{any}",
    "{patient}_{laterality}_{view}_{any}",
    "{patient}.{laterality}_{view}{any}",
)
"""Patterns that are tried if none is given; the first that fits every name is used."""


class NamePattern:
    """A pattern of file names, as ``{patient}_{laterality}-{view}``, without the ending of the file.

    Fields are {patient}, {exam}, {laterality}, {view} and {any}, which is ignored; other text is literal and matches in
    upper and lower case. A pattern with slashes also matches the last folders.

    Raises:
        DataError: if a field is unknown or repeated, or {patient} is missing.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        fields = _FIELD.findall(text)
        wrong = [field for field in fields if field not in _FIELDS]
        if wrong or "patient" not in fields or any(fields.count(field) > 1 for field in _FIELDS if field != "any"):
            raise DataError(
                f"pattern {text!r}: use each of {{patient}}, {{exam}}, {{laterality}} and {{view}} at most once, "
                "and {any} for text to ignore; {patient} is required"
            )
        pieces = _FIELD.split(text)
        expression = re.escape(pieces[0])
        for field, literal in zip(pieces[1::2], pieces[2::2], strict=True):
            group = f"(?:{_FIELDS[field]})" if field == "any" else f"(?P<{field}>{_FIELDS[field]})"
            expression += group + re.escape(literal)
        self._expression = re.compile(expression, re.IGNORECASE)
        self._depth = text.count("/") + 1

    def match(self, path: Path) -> dict[str, str | None] | None:
        """The fields in a path, without those that the pattern lacks; None if it does not fit the pattern."""
        parts = [*path.parts[:-1], path.stem][-self._depth :]
        found = self._expression.fullmatch("/".join(parts))
        if found is None:
            return None
        fields: dict[str, str | None] = found.groupdict()
        if side := fields.get("laterality"):
            fields["laterality"] = values.side(side)
        if view := fields.get("view"):
            fields["view"] = view.upper()
        return fields


def find_pattern(paths: Sequence[Path]) -> NamePattern | None:
    """The first common pattern that fits all paths; None if no pattern does, or there are no paths."""
    patterns = (NamePattern(text) for text in COMMON)
    return next((p for p in patterns if paths and all(p.match(path) for path in paths)), None)
