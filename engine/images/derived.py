"""Images made of images: what all of them say of themselves, and the file below them."""

from __future__ import annotations

from typing import Any

from .affine import Map
from .pixels import ImageSource, PixelSource, as_stored, steps_of, to_original


class DerivedSource:
    """A `PixelSource` on top of another; derived classes have ``read``.

    Attributes:
        back: from this image's coordinates to those of its source; None where they are the same.
        added: what was applied to the source, in order, to be shown and recorded.
    """

    back: Map | None = None
    added: tuple[str, ...] = ()

    def __init__(self, source: PixelSource, height: int | None = None, width: int | None = None) -> None:
        """Of another size than the source's where height and width are given."""
        channels, *size = source.shape
        self.source, self.name = source, source.name
        self.shape = (channels, height or size[0], width or size[1])

    @property
    def to_original(self) -> Map:
        """From this image's coordinates to those of the file."""
        found = to_original(self.source)
        return found if self.back is None else found @ self.back

    @property
    def as_stored(self) -> PixelSource:
        """The same image in the geometry of its file."""
        return as_stored(self.source)

    @property
    def steps(self) -> tuple[str, ...]:
        """What was applied to the file's pixels, in order."""
        return (*steps_of(self.source), *self.added)


def stored_source(source: Any) -> ImageSource | None:
    """The image as its file stores it that lies below all that was made of it; None if there is none."""
    while source is not None and not isinstance(source, ImageSource):
        source = getattr(source, "source", None)
    return source


def header_of(source: Any) -> Any:
    """What the header of that file says of patient, side and view; None without one."""
    found = stored_source(source)
    return None if found is None else getattr(found.stored, "info", None)
