"""What a viewer's page shows, read as a browser reads it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self._inside:
            given, before = self.scripts[-1]
            self.scripts[-1] = given, before + data

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


def shown(html: str) -> Any:
    """The data of a page, whose other scripts are files."""
    page = _Page()
    page.feed(html)
    (library, data, script) = page.scripts
    assert library == ({"src": "openseadragon.min.js"}, "") and script == ({"src": "view.js"}, "")
    assert data[0] == {"id": "data", "type": "application/json"}
    return json.loads(data[1])
