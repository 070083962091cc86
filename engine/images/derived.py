"""Images derived from other images: their common properties, and access to the file."""

from __future__ import annotations

from typing import Any

from .affine import Map
from .pixels import ImageSource, PixelSource, as_stored, steps_of, to_original


class DerivedSource:
    """A `PixelSource` that wraps another one; subclasses implement ``read``.

    Attributes:
        back: from this image's coordinates to those of its source; None if they are equal.
        added: the steps that are applied to the source, in order, for display and records.
    """

    back: Map | None = None
    added: tuple[str, ...] = ()

    def __init__(self, source: PixelSource, height: int | None = None, width: int | None = None) -> None:
        """Wrap a source; height and width default to those of the source."""
        channels, *size = source.shape
        self.source, self.name = source, source.name
        self.shape = (channels, height or size[0], width or size[1])

    @property
    def to_original(self) -> Map:
        """The map from this image's coordinates to those of the file."""
        found = to_original(self.source)
        return found if self.back is None else found @ self.back

    @property
    def as_stored(self) -> PixelSource:
        """The same image in the geometry of its file."""
        return as_stored(self.source)

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps that were applied to the file's pixels, in order."""
        return (*steps_of(self.source), *self.added)


def stored_source(source: Any) -> ImageSource | None:
    """The image of the file from which a source is derived; None if there is none."""
    while source is not None and not isinstance(source, ImageSource):
        source = getattr(source, "source", None)
    return source


def header_of(source: Any) -> Any:
    """The header data of the file from which a source is derived; None without one."""
    found = stored_source(source)
    return None if found is None else getattr(found.stored, "info", None)
