"""The images of a folder one by one, without files that are masks by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath

from .file_names import stem_of, suffix_of
from .folders import SUFFIXES
from .mask_names import in_mask_folder, masked


@dataclass
class LeftOut:
    """Masks that were left out."""

    count: int = 0
    first: PurePath | None = None

    def __str__(self) -> str:
        masks = "1 mask is" if self.count == 1 else f"{self.count} masks are"
        return f"{masks} left out, by their names, the first {self.first}; for masks, name their own folder"


def images_alone(files: Callable[[bool], Iterable[Path]], below: Path, left: LeftOut) -> Iterator[Path]:
    """The files but for masks; all of them where nothing else is there.

    As `masks_among`, in the memory of the names of one folder: a file that is called after an image is its mask if the
    image lies in the same folder.

    Args:
        files: gives them anew with each call, and tells what else it leaves out, or does not tell it.
        below: as of `masks_among`.
        left: counts what is left out.
    """

    @lru_cache(1)
    def stems(folder: Path) -> frozenset[str]:
        return frozenset(stem_of(entry).lower() for entry in folder.iterdir() if suffix_of(entry) in SUFFIXES)

    def is_mask(path: Path) -> bool:
        image = masked(path)
        return in_mask_folder(path, below) or (image is not None and image in stems(path.parent))

    if all(map(is_mask, files(False))):
        yield from files(True)
        return
    for path in files(True):
        if not is_mask(path):
            yield path
            continue
        left.count += 1
        left.first = left.first or path
