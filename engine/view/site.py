"""The folder of a viewer: one page, what it shows, and tiles and evidence, written ahead or made when asked for."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import GigamorphError
from ..files import write_atomically
from .evidence import Evidence
from .exams import Exam, View
from .pyramid import TILE, Pyramid, png

PAGE = Path(__file__).parent / "page"
_KEPT = 12
"""Images whose overview stays in memory."""


class Site:
    """A viewer's files, by their names.

    Args:
        evidence: None shows none.
        identifiers: name patients and files; otherwise exams are numbered.
    """

    def __init__(self, exams: Sequence[Exam], evidence: Evidence | None, *, identifiers: bool) -> None:
        self.exams, self._evidence, self._identifiers = list(exams), evidence, identifiers
        self.views: list[View] = [view for exam in self.exams for view in exam.views]
        self._kept: OrderedDict[int, Pyramid] = OrderedDict()
        self._lock = threading.Lock()

    def write_page(self, out: Path) -> Path:
        """Write the page and what it shows, without tiles and evidence; returns the page's path.

        Raises:
            GigamorphError: the folder holds other files than a viewer's. DataError: an image cannot be opened.
        """
        there = [path.name for path in out.iterdir()] if out.is_dir() else []
        if there and "data.js" not in there:
            raise GigamorphError(f"{out}: holds other files; name another --out")
        for name in ("tiles", "evidence"):
            shutil.rmtree(out / name, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        for path in PAGE.iterdir():
            shutil.copyfile(path, out / path.name)
        text = "const DATA = " + json.dumps(self._data()) + ";\n"
        write_atomically(out / "data.js", lambda path: path.write_text(text, encoding="utf-8"), "page")
        return out / "index.html"

    def write_all(self, out: Path, done: Callable[[int], object]) -> None:
        """Write all tiles and maps, so that the page works from its files; ``done`` is told after each image."""
        for number in range(len(self.views)):
            pyramid = self.pyramid(number)
            for level in range(pyramid.levels + 1):
                columns, rows = pyramid.tiles(level)
                folder = out / "tiles" / str(number) / str(level)
                folder.mkdir(parents=True, exist_ok=True)
                for row in range(rows):
                    for column in range(columns):
                        (folder / f"{column}_{row}.png").write_bytes(pyramid.tile(level, column, row))
            if self._evidence is not None:
                (out / "evidence").mkdir(exist_ok=True)
                (out / "evidence" / f"{number}.js").write_text(self.evidence(number))
            done(number)

    def pyramid(self, number: int) -> Pyramid:
        """Of an image; the last ones that were asked for are kept."""
        with self._lock:
            if number not in self._kept:
                self._kept[number] = Pyramid(self.views[number].open())
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(number)
            return self._kept[number]

    def evidence(self, number: int) -> str:
        """A script that hands the page an image's map: from files no other way is open."""
        if self._evidence is None:
            raise IndexError("no evidence was asked for")
        view = self.views[number]
        picture = base64.b64encode(png(self._evidence.of(view, view.open())[None])).decode()
        return f'gotEvidence({number}, "data:image/png;base64,{picture}");\n'

    def _data(self) -> dict[str, Any]:
        numbers = iter(range(len(self.views)))
        exams = [
            {
                "name": exam.name if self._identifiers and exam.name else f"Exam {number + 1}",
                "error": exam.error,
                "views": [self._shown(view, next(numbers)) for view in exam.views],
            }
            for number, exam in enumerate(self.exams)
        ]
        return {"exams": exams, "tile": TILE, "evidence": self._evidence is not None}

    def _shown(self, view: View, number: int) -> dict[str, Any]:
        source, own = view.open(), view.record
        pyramid = Pyramid(source)
        return {
            "number": number,
            "name": own.path.name if self._identifiers else "",
            "side": own.laterality or "",
            "view": own.view or "",
            "split": own.split or "",
            "predicted": {name: round(value, 6) for name, value in view.predicted.items()},
            "truth": dict(view.truth),
            "numbers": view.numbers,
            "error": view.error,
            "height": pyramid.height,
            "width": pyramid.width,
            "levels": pyramid.levels,
            "boxes": view.boxes(source),
        }
