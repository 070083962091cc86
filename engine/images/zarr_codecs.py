"""Zarr arrays with a limit of decompressed bytes per chunk, because zarr's codecs have none."""

from __future__ import annotations

import asyncio
import bz2
import lzma
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import imagecodecs
import zarr
from numcodecs.abc import Codec
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import ShardingCodec

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

    @property
    def is_fixed_size(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.codec.is_fixed_size

    def to_dict(self) -> dict[str, Any]:
        return self.codec.to_dict()

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

    def get_config(self) -> dict[str, Any]:
        return self.codec.get_config()

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
