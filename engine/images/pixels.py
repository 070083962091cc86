"""Pixel sources: images that are read region by region, converted and normalised on the fly.

The scan reads one tile at a time, so an image is never in memory as a whole in the compute dtype. Stored values of a
file and a network's input are separate: a reader of a format returns stored values of a region, and `ImageSource`
applies grey scale, mirroring, channels and normalisation, in the same way for all formats.

Grey values before normalisation are fractions of the image's full grey range (0 black, 1 white) for all bit depths, so
one `Normalize` fits 8-, 12- and 16-bit files of the same data set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .affine import Affine, CoordinateMap
from .levels import White, brighter_half, find_white, highest, require_side, require_white, sample_rows
from .stored import StoredPixels, integer_dtype, is_wide


@runtime_checkable
class PixelSource(Protocol):
    """An image that is read by region; implementations are thread-safe and picklable."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width); of a volume, (channels, slices, height, width)."""
        ...

    @property
    def name(self) -> str:
        """The name in messages: the file, or the kind of array."""
        ...

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Read a region (ends excluded) as a new tensor, float32 (channels, bottom - top, right - left).

        Of a volume all slices are read: (channels, slices, bottom - top, right - left).

        Raises:
            DataError: if the file is damaged.
            ValueError: if the region exceeds the image.
        """
        ...


@dataclass(frozen=True)
class Normalize:
    """The normalisation (grey - mean) / std per channel; grey is the fraction of the full range, 0 black to 1 white.

    The default keeps grey values on [0, 1]. A single value applies to all channels. Divide statistics in grey levels by
    the full range first: mean 7048 of 16-bit images is 7048 / 65535.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(m) for m in self.mean))
        object.__setattr__(self, "std", tuple(float(s) for s in self.std))
        if len(self.mean) != len(self.std) or not self.mean:
            raise DataError(f"normalisation needs as many means as stds, not {len(self.mean)} and {len(self.std)}")
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(s) and s > 0 for s in self.std):
            raise DataError(f"mean {list(self.mean)} and std {list(self.std)} must be finite numbers, std above 0")

    def to_dict(self) -> dict[str, list[float]]:
        """Plain lists for JSON and checkpoints; `from_dict` is the inverse."""
        return {key: list(values) for key, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Normalize:
        """The inverse of `to_dict`."""
        return cls(tuple(values["mean"]), tuple(values["std"]))

    @property
    def steps(self) -> tuple[str, ...]:
        """The step for display and records; empty for the default."""
        return () if self == Normalize() else (f"minus {list(self.mean)}, over {list(self.std)}",)

    def per_channel(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of each of `channels` channels."""
        if len(self.mean) == channels:
            return self.mean, self.std
        if len(self.mean) == 1:
            return self.mean * channels, self.std * channels
        raise DataError(f"normalisation has {len(self.mean)} values for {channels} channels; pass 1 or {channels}")


class ImageSource:
    """A `PixelSource` of stored pixels, with grey scale, mirroring, channels and normalisation.

    Args:
        stored: the stored pixels.
        normalize, flip, channels: as in `open_pixels`.
        white, laterality: as in `open_pixels`; ignored for files that define them.
    """

    def __init__(
        self,
        stored: StoredPixels,
        *,
        normalize: Normalize | None = None,
        flip: bool | Literal["auto"] = "auto",
        channels: int | None = None,
        white: White | None = None,
        laterality: str | None = None,
    ) -> None:
        require_white(white)
        require_side(laterality)
        own = stored.shape[0]
        channels = own if channels is None else channels
        if channels != own and {channels, own} != {1, 3}:
            raise DataError(f"{stored.name}: cannot convert {own} to {channels} channels; channels must be 1 or 3")
        self.stored = stored
        self.normalize = normalize or Normalize()
        self.flip = flip
        self.white: White | None = None if stored.self_describing else white
        if self.white is None and is_wide(stored.dtype) and not stored.self_describing:
            self.white = "auto"
        self.laterality = None if stored.self_describing else laterality
        self.shape = (channels, *stored.shape[1:])
        self._mean, self._std = self.normalize.per_channel(channels)
        self._tables: list[np.ndarray] | None = None
        self._full: float | None = None
        self._chest_wall_right: bool | None = None
        self._uploaded: dict[tuple[int, torch.device], Tensor] = {}  # tables by channel and device

    @property
    def name(self) -> str:
        return self.stored.name

    def __repr__(self) -> str:
        return f"ImageSource({self.name!r}, shape={self.shape})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": None, "_uploaded": {}}

    @property
    def to_original(self) -> Affine:
        """The map from this image's coordinates to those of the file, for boxes and heat maps."""
        left_right, up_down = self._mirrored()
        height, width = self.shape[-2:]
        return self.stored.to_original @ Affine.mirror(height, width, left_right=left_right, up_down=up_down)

    @property
    def as_stored(self) -> ImageSource:
        """The same image in the file's orientation: not mirrored."""
        return ImageSource(self.stored, normalize=self.normalize, flip=False, channels=self.shape[0], white=self.white)

    @property
    def full(self) -> float:
        """The grey value of white: that of the file or of the option `white`."""
        if self._full is None:
            own = find_white(self.stored) if self.white == "auto" else self.white
            self._full = float(self.stored.full if own is None else own)
        return self._full

    @property
    def steps(self) -> tuple[str, ...]:
        """All steps that were applied to the file's pixels, in order, for display and records.

        They do not identify a patient, and do not include the file's name.
        """
        own, channels = self.stored.shape[0], self.shape[0]
        mirrored = [side for side, is_so in zip(("left-right", "up-down"), self._mirrored(), strict=True) if is_so]
        steps = [*self.stored.steps, f"grey 0 to {self.full:g} as 0 to 1"]
        if mirrored:
            why = "chest wall left, feet down" if self.flip == "auto" else "as asked for"
            steps.append(f"mirrored {' and '.join(mirrored)} ({why})")
        if own != channels:
            steps.append(f"{own} to {channels} channels")
        return (*steps, *self.normalize.steps)

    def _mirrored(self) -> tuple[bool, bool]:
        """(left-right, up-down)."""
        if self.flip != "auto":
            return bool(self.flip), False
        return self.stored.flips() if self.laterality is None else (self._is_right(), False)

    def _is_right(self) -> bool:
        """Whether the chest wall is on the right: by the pixels or, if they are unclear, by the laterality.

        Pixels take precedence, because a file does not record earlier mirroring.
        """
        if self._chest_wall_right is None:
            height, width = self.stored.shape[-2:]
            columns = np.zeros(width)
            for top, bottom in sample_rows(height):
                values = np.asarray(self.stored.read(top, bottom, 0, width), np.float64)
                columns += np.nansum(values.reshape(-1, width), 0)
            if self.stored.table is not None:  # white is zero
                columns = -columns
            side = brighter_half(columns)
            self._chest_wall_right = self.laterality == "R" if side is None else side == "right"
        return self._chest_wall_right

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        values = self._read(top, bottom, left, right)
        if self.stored.table is not None and isinstance(values, np.ndarray):
            return self._look_up(values)
        return self._scale(values)

    @property
    def can_develop(self) -> bool:
        """Whether `read_stored` and `develop` equal `read`: stored values must be integers of 8 or 16 bits."""
        own, wanted = self.stored.shape[0], self.shape[0]
        # A colour image must be read to know whether it is grey.
        return integer_dtype(self.stored.dtype) is not None and (own == wanted or own == 1)

    def read_stored(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """The mirrored stored values of a region, uint8 or uint16, for `develop` on any device."""
        values = self._read(top, bottom, left, right)
        dtype = integer_dtype(self.stored.dtype)
        if isinstance(values, np.ndarray):
            values = torch.from_numpy(np.array(values, dtype=dtype, order="C"))  # no negative strides
        return values

    def develop(self, stored: Tensor) -> Tensor:
        """Convert the result of `read_stored` to that of `read`, bit for bit, on its device."""
        if self.stored.table is None:
            return self._scale(stored)
        planes = []
        for channel, table in enumerate(self._own_tables(self.stored.table)):
            plane = stored[channel if len(stored) > 1 else 0].to(torch.int32).clamp_(max=len(table) - 1)
            key = channel, stored.device
            if key not in self._uploaded:
                self._uploaded[key] = torch.from_numpy(table).to(stored.device)
            planes.append(self._uploaded[key].index_select(0, plane.flatten()).view(plane.shape))
        return torch.stack(planes)

    def _read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray | Tensor:
        check_region(self.shape, top, bottom, left, right, self.name)
        mirror_x, mirror_y = self._mirrored()
        height, width = self.shape[-2:]
        rows = (height - bottom, height - top) if mirror_y else (top, bottom)
        columns = (width - right, width - left) if mirror_x else (left, right)
        values = self.stored.read(*rows, *columns)
        self._refuse_above_white(values)
        axes = tuple(axis for axis, mirrored in ((-2, mirror_y), (-1, mirror_x)) if mirrored)
        if axes:
            values = np.flip(values, axes) if isinstance(values, np.ndarray) else _flipped(values, axes)
        return values

    def _refuse_above_white(self, values: np.ndarray | Tensor) -> None:
        if self.white not in (None, "auto") and self.full < self.stored.full:
            most = highest(values) if 0 not in values.shape else 0.0
            if most > self.full:
                raise DataError(f"{self.name}: contains {most:g}, above white {self.full:g}; use a larger white level")

    def _own_tables(self, table: np.ndarray) -> list[np.ndarray]:
        """A table per channel that includes grey scale and normalisation."""
        if self._tables is None:
            grey = (table - (self.stored.full - self.full)) / self.full
            pairs = zip(self._mean, self._std, strict=True)
            self._tables = [((grey - mean) / std).astype(np.float32) for mean, std in pairs]
        return self._tables

    def _look_up(self, values: np.ndarray) -> Tensor:
        """One gather per output channel."""
        assert self.stored.table is not None
        tables = self._own_tables(self.stored.table)
        out = np.empty((len(tables), *values.shape[1:]), np.float32)
        for channel, own in enumerate(tables):
            plane = values[channel if len(values) > 1 else 0].reshape(-1, values.shape[-1])
            # numpy converts the indices to 64 bits; for a few rows at a time they stay in the cache.
            found = out[channel].reshape(plane.shape)
            for row in range(0, len(plane), 64):
                np.take(own, plane[row : row + 64], out=found[row : row + 64], mode="clip")
        return torch.from_numpy(out)

    def _scale(self, values: np.ndarray | Tensor) -> Tensor:
        if isinstance(values, np.ndarray):
            # Copy also a single mirrored line: numpy calls it contiguous, but PyTorch rejects its negative stride.
            grey = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
        else:
            grey = values.to(torch.float32, copy=True)
        if self.full != 1:
            grey.div_(self.full)
        if self.shape[0] == 1 and len(grey) == 3:
            if not (torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])):
                raise DataError(
                    f"{self.name}: is a colour image, but the model needs grey; convert it, or use three channels"
                )
            grey = grey[:1]
        if self.shape[0] == 3 and len(grey) == 1:
            grey = grey.repeat(3, *(1 for _ in grey.shape[1:]))
        for channel, (mean, std) in enumerate(zip(self._mean, self._std, strict=True)):
            if (mean, std) != (0.0, 1.0):
                grey[channel].sub_(mean).div_(std)
        return grey.contiguous()


def _flipped(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The mirrored tensor; uint16 is mirrored as int16, because PyTorch does not support uint16."""
    if values.dtype == torch.uint16:
        return values.view(torch.int16).flip(axes).view(torch.uint16)
    return values.flip(axes)


def to_original(source: PixelSource) -> CoordinateMap:
    """The map from a source's coordinates to those of its file; the identity for sources without one."""
    return getattr(source, "to_original", Affine())


def as_stored(source: PixelSource) -> PixelSource:
    """The same image in the geometry of its file; itself for sources without one."""
    return getattr(source, "as_stored", source)


def steps_of(source: PixelSource) -> tuple[str, ...]:
    """The steps that were applied to a source's pixels, in order; empty for sources without steps."""
    return getattr(source, "steps", ())


def check_region(shape: tuple[int, ...], top: int, bottom: int, left: int, right: int, name: str) -> None:
    """Raise a `ValueError` unless the region, which may be empty, is inside an image of this shape."""
    height, width = shape[-2:]
    if not (0 <= top <= bottom <= height and 0 <= left <= right <= width):
        raise ValueError(f"{name}: rows {top}..{bottom}, columns {left}..{right} are not in {height} x {width}")


class DerivedSource:
    """A `PixelSource` that wraps another one; subclasses implement ``read``.

    Attributes:
        back: from this image's coordinates to those of its source; None if they are equal.
        added: the steps that are applied to the source, in order, for display and records.
    """

    back: CoordinateMap | None = None
    added: tuple[str, ...] = ()

    def __init__(self, source: PixelSource, height: int | None = None, width: int | None = None) -> None:
        """Wrap a source; height and width default to those of the source."""
        *outer, own_height, own_width = source.shape
        self.source, self.name = source, source.name
        self.shape = (*outer, height or own_height, width or own_width)

    @property
    def to_original(self) -> CoordinateMap:
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
