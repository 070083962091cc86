"""Self-contained HTML pages: templates with one style, embedded pictures, and escaped foreign text."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..files import write_atomically
from .markdown import markdown

_NUMBER = re.compile(r"[+\-−]?\.?\d(?![\da-f]{11})")  # a commit hash is not a number


@dataclass(frozen=True)
class TextTable:
    """A table of text cells with column names; numeric columns are right-aligned.

    Attributes:
        strong: rows with this cell are emphasised.
        grouped: rows with the same first cell form a group.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    strong: str = ""
    grouped: bool = False

    @property
    def styles(self) -> list[str]:
        """CSS class of each column: text (always for the first), wider if its cells are long, or numbers."""
        styles = []
        for number in range(len(self.head)):
            cells = [str(row[number]) for row in self.rows if str(row[number])]
            longest = max(map(len, cells), default=0)
            words = "words wide" if longest > 40 else "words broad" if longest > 14 else "words"
            numeric = number > 0 and cells and 2 * sum(bool(_NUMBER.match(cell)) for cell in cells) >= len(cells)
            styles.append("number" if numeric else words)
        return styles

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, object]], strong: str = "", grouped: bool = False) -> TextTable:
        """Build a table from rows that map column names to cells; columns that are empty in all rows are omitted."""
        head = [name for name in (rows[0] if rows else ()) if any(str(row[name]) for row in rows)]
        return cls(head, [[row[name] for name in head] for row in rows], strong, grouped)


def render(template: str, **content: Any) -> str:
    """Render a template; ``.html`` escapes everything, ``.md`` what passes through ``markdown``."""
    return _ENVIRONMENT.get_template(template).render(**content)


def write_page(path: Path, template: str, pictures: Mapping[str, bytes], **content: Any) -> Path:
    """Write a page with embedded pictures, also write the pictures next to it, and return the page's path.

    Args:
        template: name of a file in `templates/`.
        pictures: PNG files by name without ``.png``.
        content: the template's variables.

    Raises:
        GigamorphError: a file cannot be written.
    """
    for name, data in pictures.items():
        write_atomically(path.parent / f"{name}.png", lambda p, data=data: p.write_bytes(data), "picture")
    text = render(template, pictures=pictures, **content)
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"), "report")
    return path


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is None or name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["base64"] = lambda data: base64.b64encode(data).decode()
    made.filters["markdown"] = markdown
    made.filters["anchor"] = lambda title: re.sub(r"\W+", "-", title.lower()).strip("-")
    return made


_ENVIRONMENT = _environment()
