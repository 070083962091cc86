"""The images of a folder one by one, without files whose names are names of masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath

from .file_names import stem_of, suffix_of
from .folders import SUFFIXES
from .mask_names import in_mask_folder, masked


@dataclass
class LeftOutMasks:
    """The number of masks that were left out, and the first one."""

    count: int = 0
    first: PurePath | None = None

    def __str__(self) -> str:
        masks = "1 mask is" if self.count == 1 else f"{self.count} masks are"
        return f"{masks} left out, recognised by name, the first {self.first}; to read masks, pass their folder"


def images_without_masks(files: Callable[[bool], Iterable[Path]], below: Path, left: LeftOutMasks) -> Iterator[Path]:
    """Iterate over the files without masks, or over all files if all are masks.

    This is `masks_among` in the memory of the names of one folder: a file named after an image is its mask if the image
    is in the same folder.

    Args:
        files: returns an iterator over the files; its argument enables warnings about other files that are left out.
        below: as in `masks_among`.
        left: counts the masks that are left out.
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
