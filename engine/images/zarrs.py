"""Zarr arrays and OME-Zarr images, read by region: only the chunks that overlap a region are decoded.

The decompressed bytes of a chunk are limited, because zarr's codecs have no limit.
"""

from __future__ import annotations

import asyncio
import bz2
import itertools
import lzma
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import zarr
from numcodecs.abc import Codec
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import ShardingCodec

from ..errors import DataError
from . import codecs
from .rawfile import library_errors
from .stored import channels_first, chosen_plane, full_range, slices_first
from .tiles import TiledPixels, TileGrid


class ZarrPixels(TiledPixels):
    """Stored pixels (`stored.StoredPixels`) of a zarr array, or of the full resolution of an OME-Zarr image.

    An array of two or three axes has a layout of `open_pixels`. In other arrays and OME-Zarr images, the last two axes
    are rows and columns. `frame` is the index into the other axes (time, channel, depth), the last one fastest, and is
    required for several planes. An OME-Zarr channel axis of length 3 is colour and not one of these axes.

    With `volume`, one of these axes has the slices: the only one that is longer than 1.

    Chunks that were never written contain the array's fill value.
    """

    def __init__(self, path: Path, frame: int | None = None, volume: bool = False) -> None:
        self.name, self.path, self.frame, self.volume = str(path), path, frame, volume
        with library_errors(f"{path}: damaged zarr metadata", "fetch it again"):
            # A path and not text, because the name "zip::a" would be a URL.
            found: Any = zarr.open(path if isinstance(path, Path) else str(path), mode="r")
            array, axes = (found, None) if isinstance(found, zarr.Array) else _full_resolution(found, path)

            self._array = bounded(array)
            self._describe(axes)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.frame, self.volume)

    def _describe(self, axes: list[str] | None) -> None:
        array, shape = self._array, tuple(self._array.shape)
        self.dtype = np.dtype(array.dtype)
        if self.dtype.kind not in "buif":
            raise DataError(f"{self.path}: contains {self.dtype}, but pixels must be numbers")
        self.full = full_range(self.dtype)
        if axes is None and len(shape) > 3 and not (self.volume and len(shape) == 4):  # a level of an OME-Zarr image
            axes = ["?"] * (len(shape) - 2) + ["y", "x"]
        index: list[int | slice] = [slice(None)] * len(shape)
        if axes is None and self.volume:
            order = slices_first(shape, self.name)
        elif axes is None:
            order = channels_first(shape, self.name)
            if self.frame not in (None, 0):
                raise DataError(f"{self.path}: frame {self.frame} does not exist; the array is a single image")
        else:
            order, index = self._plane(shape, axes)
        self._index, self._order = index, order
        kept = [axis for axis, at in enumerate(index) if isinstance(at, slice)]
        self._axes = [kept[number] for number in order]
        sides = tuple(shape[axis] for axis in self._axes)
        self.shape = sides if len(sides) == (4 if self.volume else 3) else (1, *sides)
        self._size = array.chunks[self._axes[-2]], array.chunks[self._axes[-1]]
        if math.prod(array.chunks) * self.dtype.itemsize > codecs.LARGEST_BYTES or min(self._size) < 1:
            raise DataError(f"{self.path}: chunks of {tuple(array.chunks)} are not supported; save smaller chunks")
        fixed = [at for at in index if isinstance(at, int)]
        which = f", plane {fixed}" if fixed else ""
        self.steps = (f"zarr, {self.dtype}{which}",)
        self._grid = TileGrid(self._size)

    def _plane(self, shape: tuple[int, ...], axes: list[str]) -> tuple[tuple[int, ...], list[int | slice]]:
        """The order of the axes that are read, and the index along each other axis."""
        if len(axes) != len(shape) or axes[-2:] != ["y", "x"] or not all(shape):
            raise DataError(f"{self.path}: axes {axes} of shape {shape} must end in y, x; convert it")
        colour = [axis for axis, name in enumerate(axes) if name == "c" and shape[axis] == 3]
        others = [axis for axis in range(len(shape) - 2) if axis not in colour]
        if self.volume:
            long = [axis for axis in others if shape[axis] > 1] or others[-1:]
            if len(long) != 1:
                found = ", ".join(f"{axes[axis]} of {shape[axis]}" for axis in long) or "none"
                raise DataError(f"{self.path}: a volume needs one axis of slices, not {found}; save one volume")
            others = [axis for axis in others if axis not in long]
        planes = math.prod(shape[axis] for axis in others)
        left = chosen_plane(self.frame, planes, self.name, "planes")
        index: list[int | slice] = [slice(None)] * len(shape)
        for axis in reversed(others):
            left, index[axis] = divmod(left, shape[axis])
        kept = [axis for axis, at in enumerate(index) if isinstance(at, slice)]
        # Colour comes first; the slices may be before or after it in the file.
        return tuple(sorted(range(len(kept)), key=lambda number: kept[number] not in colour)), index

    def tile(self, row: int, column: int) -> np.ndarray:
        """The pixels of the chunks at a chunk row and column, as in `read`."""
        index = list(self._index)
        for axis, number, step in zip(self._axes[-2:], (row, column), self._size, strict=True):
            index[axis] = slice(number * step, (number + 1) * step)
        self._check_chunks(index)
        with library_errors(f"{self.path}: chunk {row}, {column} is damaged", "fetch it again"):
            values = np.asarray(self._array[tuple(index)])
        values = values.transpose(self._order)
        return values if values.ndim == len(self.shape) else values[None]

    def _check_chunks(self, index: list[int | slice]) -> None:
        """Raise a `DataError` if the file of a chunk is too long, because zarr reads it whole; local files only."""
        array = self._array
        sides = array.shards or array.chunks
        most = codecs.most_encoded(math.prod(sides) * self.dtype.itemsize)
        spans = [at if isinstance(at, slice) else slice(at, at + 1) for at in index]
        chunks = (
            range((at.start or 0) // side, -(-min(length, at.stop or length) // side))
            for at, side, length in zip(spans, sides, array.shape, strict=True)
        )
        for chunk in itertools.product(*chunks) if isinstance(self.path, Path) else ():
            path = self.path / array.path / array.metadata.encode_chunk_key(chunk)
            if path.is_file() and path.stat().st_size > most:
                raise DataError(f"{path}: exceeds the maximum of {most} bytes per chunk; fetch {self.path} again")


def _full_resolution(group: Any, path: Path) -> tuple[Any, list[str]]:
    """The largest array of an OME-Zarr image (0.4 and 0.5), and the names of its axes."""
    attributes = group.attrs.asdict()
    images = attributes.get("ome", attributes).get("multiscales")
    if not images:
        raise DataError(f"{path}: is a zarr group, not an OME-Zarr image; pass one of its arrays ({path}/NAME)")
    axes = [axis["name"] if isinstance(axis, dict) else axis for axis in images[0].get("axes", "tczyx")]
    array = group[images[0]["datasets"][0]["path"]]
    return array, list(axes)


# Additional bytes of a chunk for the checksums of other codecs.
_SPARE = 2**16
_STREAMS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
    "zlib": zlib.decompressobj,
    "bz2": bz2.BZ2Decompressor,
    "lzma": lzma.LZMADecompressor,
}
# The position of the decompressed length in a stream.
_LENGTHS = {"blosc": slice(4, 8), "lz4": slice(0, 4)}
_BOUNDED = {"zstd", *_STREAMS, *_LENGTHS}


def bounded(array: zarr.Array) -> zarr.Array:
    """The same array; reading a chunk that decompresses to more than its shape and type raises a `ValueError`."""
    limit = math.prod(array.chunks) * array.dtype.itemsize + _SPARE
    metadata: Any = array.metadata
    if metadata.zarr_format == 2:
        filters = metadata.filters and tuple(_Limited(codec, limit) for codec in metadata.filters)
        compressor = metadata.compressor and _Limited(metadata.compressor, limit)
        metadata = replace(metadata, filters=filters, compressor=compressor)
    else:
        metadata = replace(metadata, codecs=tuple(_limited(codec, limit) for codec in metadata.codecs))
    return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=array.store_path))


def _limited(codec: Any, limit: int) -> Any:
    if isinstance(codec, ShardingCodec):
        return ShardingCodec(
            chunk_shape=codec.chunk_shape,
            codecs=[_limited(inner, limit) for inner in codec.codecs],
            index_codecs=codec.index_codecs,
            index_location=codec.index_location,
        )
    return _LimitedBytes(codec, limit) if isinstance(codec, BytesBytesCodec) else codec


@dataclass(frozen=True)
class _LimitedBytes(BytesBytesCodec):
    """A codec of zarr 3 that returns at most `limit` bytes."""

    codec: Any
    limit: int

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        return self.codec.compute_encoded_size(input_byte_length, chunk_spec)

    async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        name = self.codec.to_dict()["name"].removeprefix("numcodecs.")
        found = await asyncio.to_thread(_decoded, name, chunk_data.to_bytes(), self.limit)
        if found is None:
            return await self.codec._decode_single(chunk_data, chunk_spec)
        return chunk_spec.prototype.buffer.from_bytes(found)


class _Limited(Codec):
    """A codec of zarr 2 that returns at most `limit` bytes."""

    codec_id = "limited"  # zarr reads it from the class

    def __init__(self, codec: Any, limit: int) -> None:
        self.codec, self.limit, self.codec_id = codec, limit, codec.codec_id

    def encode(self, buf: Any) -> Any:
        return self.codec.encode(buf)

    def decode(self, buf: Any, out: Any = None) -> Any:
        # Filters get arrays and do not change lengths.
        found = _decoded(self.codec_id, bytes(buf), self.limit) if self.codec_id in _BOUNDED else None
        return self.codec.decode(buf, out) if found is None else found


def _decoded(name: str, data: bytes, limit: int) -> bytes | None:
    """The decompressed stream; None if the codec itself can decode it safely; `ValueError` beyond `limit` bytes."""
    if name == "zstd":
        return bytes(imagecodecs.zstd_decode(data, out=limit))
    if name in _STREAMS:
        found = bytearray()
        while data:  # several streams may be concatenated
            stream = _STREAMS[name]()
            found += stream.decompress(data, limit + 1 - len(found))
            if len(found) > limit or not stream.eof:
                raise ValueError(f"{name} of more than {limit} bytes, or truncated")
            data = stream.unused_data
        return bytes(found)
    if name in _LENGTHS and int.from_bytes(data[_LENGTHS[name]], "little") > limit:
        raise ValueError(f"{name} of more than {limit} bytes")
    return None
