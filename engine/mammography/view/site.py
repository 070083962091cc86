"""The viewer's page, tiles and evidence, written into a folder or generated on demand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError, GigamorphError
from ...files import write_atomically
from ...report.figure import class_colour
from ...versions import OWN
from .evidence import MapServer
from .exams import Exam, ExamImage
from .pyramid import TILE, MaskTiles, Pyramid, PyramidTiles, png


def note_of(settings: object, files: Iterable[Path]) -> str | None:
    """The hash of a part's sources: settings with a complete `repr`, and files by path, size and time.

    It is a hash because pages must not contain names. None if a file is not local, because its state is unknown.
    """
    texts = [OWN, repr(settings)]
    try:
        for path in files:
            inside = sorted(path.rglob("*")) if path.is_dir() else []
            texts += [repr((one.absolute(), one.stat().st_size, one.stat().st_mtime_ns)) for one in (path, *inside)]
    except OSError:
        return None
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


PAGE = Path(__file__).parent / "page"
_CACHED = 36
"""Maximum number of images and masks with cached overviews."""


@dataclass(frozen=True)
class _Part:
    """A part of the folder: its path, the hash of its sources (`note_of`), and a function that writes it.

    The hash is written into a file next to a complete part.
    """

    path: Path
    note: str | None
    make: Callable[[], object]

    @property
    def is_current(self) -> bool:
        """Whether the part is complete and was made from the same sources."""
        note = _note_path(self.path)
        return self.note is not None and self.path.exists() and note.is_file() and note.read_text() == self.note

    def write(self) -> None:
        """Replace the part, its note last."""
        _remove(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.make()
        if self.note is not None:
            note = self.note
            write_atomically(_note_path(self.path), lambda path: path.write_text(note), "page")


def _remove(part: Path) -> None:
    """Remove a part if it exists, its note first."""
    _note_path(part).unlink(missing_ok=True)
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


def _note_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.made")


class ViewerFiles:
    """The viewer's files, by name.

    Args:
        exams: the exams.
        evidence: computes evidence maps; None shows none.
        identifiers: show names of patients and files; otherwise exams are numbered.
    """

    def __init__(self, exams: Sequence[Exam], evidence: MapServer | None, *, identifiers: bool) -> None:
        self.exams, self._evidence, self._identifiers = list(exams), evidence, identifiers
        self.views: list[ExamImage] = [view for exam in self.exams for view in exam.views]
        self._cache: OrderedDict[tuple[int, str], PyramidTiles] = OrderedDict()
        self._lock = threading.Lock()

    def write_page(self, out: Path) -> Path:
        """Write the page without tiles and evidence; returns its path.

        Existing tiles and evidence of other images or of changed files are removed.

        Raises:
            GigamorphError: if the folder has files of other programs, or cannot be written.
            DataError: if an image cannot be opened.
        """
        there = [path.name for path in out.iterdir()] if out.is_dir() else []
        ours = {path.name for path in PAGE.iterdir()}
        if there and "view.js" not in there and not ours.issuperset(there):
            raise GigamorphError(f"{out}: has other files; name another --out")
        text = self.page("js")  # opens all images, so that nothing is written if one fails
        parts = [part for number in range(len(self.views)) for part in self._parts(out, number)]
        current = {part.path for part in parts if part.is_current}
        with _write_errors(out):
            for pattern in ("tiles/*", "masks/*/*", "evidence/*.js"):
                for path in sorted(out.glob(pattern)):
                    if path.suffix != ".made" and path not in current:
                        _remove(path)
            (out / "data.js").unlink(missing_ok=True)  # earlier versions wrote data there, maybe with names
            out.mkdir(parents=True, exist_ok=True)
            for name in ours - {"index.html"}:
                # Atomically, to avoid writing through a link that another user has created.
                write_atomically(out / name, lambda path, name=name: shutil.copyfile(PAGE / name, path), "page")
        page = out / "index.html"  # last, so that the page never refers to missing files
        write_atomically(page, lambda path: path.write_text(text, encoding="utf-8"), "page")
        return page

    def page(self, maps: str) -> str:
        """The text of index.html, with its data as JSON.

        Args:
            maps: suffix of the files in evidence/: "png", or "js" for a page that is opened from files, where scripts
                cannot read the pixels of pictures.

        Raises:
            DataError: if an image cannot be opened, or one of its numbers is not finite, which JSON does not allow.
        """
        # Names may contain any characters, including the end tag of the element.
        text = json.dumps(self._data(maps)).replace("<", "\\u003c")
        return (PAGE / "index.html").read_text(encoding="utf-8").replace("DATA", text)

    def write_all(self, out: Path, done: Callable[[int], object]) -> int:
        """Write all tiles and maps, so that the page works without a server; ``done`` is called after each image.

        Existing parts of unchanged files remain. Returns the number of images that were already complete.
        """
        there = 0
        for number in range(len(self.views)):
            missing = [part for part in self._parts(out, number) if not part.is_current]
            there += not missing
            with _write_errors(out):
                for part in missing:
                    part.write()
            done(number)
        return there

    def _parts(self, out: Path, number: int) -> Iterator[_Part]:
        """The tiles of an image and its masks, and its map."""
        view = self.views[number]
        own = view.record
        shown = (own.frame, own.white, own.laterality, own.chest_wall, sorted(view.grey.items()), TILE)

        def tiles(path: Path, which: str = "", classes: object = None, files: Sequence[Path] = ()) -> _Part:
            note = note_of((shown, which, classes), (own.path, *files))
            return _Part(path, note, lambda: _write_tiles(path, self.tiles_of(number, which)))

        yield tiles(out / "tiles" / str(number))
        if view.masks is not None:
            for which, files in view.masks.files.items():
                yield tiles(out / "masks" / str(number) / which, which, view.masks.classes, files)
        if self._evidence is not None:
            path = out / "evidence" / f"{number}.js"
            note = note_of((shown, self._evidence.made_by), (own.path,))
            yield _Part(path, note, lambda: path.write_text(_script(number, self.evidence(number))))

    def tiles_of(self, number: int, which: str = "") -> PyramidTiles:
        """The tiles of an image, or of its "predicted" mask or "reference"; the most recently used ones are cached.

        Raises:
            IndexError: if there is no such mask.
        """
        view = self.views[number]
        if which and (view.masks is None or which not in view.masks.files):
            raise IndexError(f"image {number} has no mask {which}")
        with self._lock:
            if (number, which) not in self._cache:
                source = view.open()
                outlined = which == "reference"
                found = MaskTiles(view.mask(which, source), outlined=outlined) if which else Pyramid(source)
                self._cache[number, which] = found
                while len(self._cache) > _CACHED:
                    self._cache.popitem(last=False)
            self._cache.move_to_end((number, which))
            return self._cache[number, which]

    def evidence(self, number: int) -> bytes:
        """The map of an image as a grey PNG.

        Raises:
            IndexError: if there are no maps.
        """
        if self._evidence is None:
            raise IndexError("no evidence was requested")
        view = self.views[number]
        return png(self._evidence.of(view, view.open())[None])

    def _data(self, maps: str) -> dict[str, Any]:
        numbers = iter(range(len(self.views)))
        exams = [
            {
                "name": exam.name if self._identifiers and exam.name else f"Exam {number + 1}",
                "error": exam.error,
                "views": [self._shown(view, next(numbers)) for view in exam.views],
            }
            for number, exam in enumerate(self.exams)
        ]
        evidence = None if self._evidence is None else maps
        return {"exams": exams, "tile": TILE, "evidence": evidence, "classes": self._classes()}

    def _classes(self) -> dict[str, str]:
        """Colours of the classes of masks by name; empty without masks."""
        masks = next((view.masks for view in self.views if view.masks is not None), None)
        names = () if masks is None else masks.classes.names[1:]
        return {name: class_colour(number) for number, name in enumerate(names, 1)}

    def _shown(self, view: ExamImage, number: int) -> dict[str, Any]:
        source, own = view.open(), view.record
        pyramid = Pyramid(source)
        found = {
            "number": number,
            "name": own.path.name + ("" if own.frame is None else f", frame {own.frame}") if self._identifiers else "",
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
            "mm": view.millimetres(source),
            "dice": {} if view.masks is None else dict(view.masks.dice),
            "masks": [] if view.masks is None else list(view.masks.files),
        }
        try:
            json.dumps(found, allow_nan=False)
        except ValueError as error:
            raise DataError(f"{own.path}: a prediction, label or outline is not finite; correct the table") from error
        return found


def _script(number: int, picture: bytes) -> str:
    return f'gotEvidence({number}, "data:image/png;base64,{base64.b64encode(picture).decode()}");\n'


def _write_tiles(folder: Path, tiles: PyramidTiles) -> None:
    for level in range(tiles.levels + 1):
        columns, rows = tiles.tiles(level)
        (folder / str(level)).mkdir(parents=True, exist_ok=True)
        for row in range(rows):
            for column in range(columns):
                (folder / str(level) / f"{column}_{row}.png").write_bytes(tiles.tile(level, column, row))


@contextlib.contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    """Context that converts errors of writing into a folder to a `GigamorphError`."""
    try:
        yield
    except OSError as error:
        text = f"{out}: cannot be written ({error.strerror or error}); name another --out, or free some space"
        raise GigamorphError(text) from error
