"""Damaged and hostile files of every format: a clear error that names the file, in bounded memory and time.

Never a crash, a hang, an image that is silently black, or an error that is not ours.
"""

import gzip
import itertools
import json
import os
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_files
import imagecodecs
import numcodecs
import numpy as np
import open_files
import pytest
import tifffile
import zarr
from forked import Forked
from fuzz import DEPTH
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import BIG, DEFLATED, EXPLICIT, JPEG, RLE, corpus, damage, encode, item, picture, write_dicom
from PIL import Image
from pydicom.sequence import Sequence

from gigamorph.engine.errors import DataError
from gigamorph.engine.images.dicom_results import source_header
from gigamorph.engine.images.open import open_pixels

# Damaged headers make pydicom warn before we raise.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
MiB = 2**20
GIB = 2**30


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a sound file of every kind."""
    folder = tmp_path_factory.mktemp("sound")
    return {name: write(folder / str(number)).read_bytes() for number, (name, write) in enumerate(corpus().items())}


def open_all(paths: list[Path], memory: int) -> list[dict[str, Any]]:
    """What comes of opening and reading each file, in one process with `memory` bytes more than it starts with."""
    process = Forked(open_files.read_all, memory, [str(path) for path in paths])
    code = process.wait()
    found = [json.loads(line) for line in process.output.splitlines()]
    killer = paths[len(found)] if len(found) < len(paths) else None
    assert code == 0, f"{killer} kills the process: {code}\n{process.error[-2000:]}"
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_random_damage(sound: dict[str, bytes], tmp_path: Path) -> None:
    paths = []
    for number in range(600 * DEPTH):
        rng = np.random.default_rng([6, number])
        name = list(sound)[number % len(sound)]
        paths.append(tmp_path / f"{number}_{name.replace(' ', '_')}")
        paths[-1].write_bytes(damage(sound[name], rng))
    found = open_all(paths, 1024 * MiB)
    for each in found:
        assert each["error"] in (None, "DataError"), each
        if each["error"]:
            assert each["name"] in each["message"], each
            assert "\n" not in each["message"], each
        assert not each["zero"], each
        assert each["seconds"] < 10, each
        assert each["grown"] < 300 * MiB, each
    assert sum(each["error"] is not None for each in found) > 250 * DEPTH


@settings(deadline=None, max_examples=100 * DEPTH, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_changed_and_cut_off(sound: dict[str, bytes], tmp_path: Path, data: st.DataObject) -> None:
    """As above, but hypothesis looks for the smallest change that does harm."""
    content = bytearray(sound[data.draw(st.sampled_from(sorted(sound)))])
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        content[place : place + len(piece)] = piece
    path = tmp_path / "damaged"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        source = open_pixels(path, frame=0)
        _, height, width = source.shape
        assert source.read(0, min(height, 999), 0, min(width, 999)).shape[1:] == (min(height, 999), min(width, 999))
    except DataError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


# ---------------------------------------------------------------------------------------------- hostile files


def _png(width: int, height: int, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A grey 8-bit PNG whose compressed pixels are `data`, with further chunks before them."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    chunks = [head, *more, (b"IDAT", data), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _patch(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    return path


def _zeros(count: int, bits: int, first: bytes = b"") -> bytes:
    """A deflate stream, zlib's or gzip's (by zlib's wbits) of some bytes and so many zeros; its checksum is wrong."""
    stream = zlib.compressobj(9, zlib.DEFLATED, bits)
    head = stream.compress(first) + stream.flush(zlib.Z_FULL_FLUSH)
    zeros = stream.compress(bytes(MiB)) + stream.flush(zlib.Z_FULL_FLUSH)
    return head + count // MiB * zeros + stream.flush()


def _deflated(path: Path, zeros: int, rows: int, columns: int = 0) -> Path:
    """A deflated file that goes on for `zeros` bytes."""
    write_dicom(path, picture(12), DEFLATED, Rows=rows, Columns=columns or rows)
    data = path.read_bytes()
    start = 144 + struct.unpack("<I", data[140:144])[0]
    path.write_bytes(data[:start] + _zeros(zeros, -15, zlib.decompress(data[start:], -15)))
    return path


def _nested(path: Path, depth: int) -> Path:
    """Sequences in sequences."""
    inside = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth
    write_dicom(path, picture(12))
    return _patch(path, b"\x08\x00\x60\x00CS", inside + b"\x08\x00\x60\x00CS")


def _empty_fragments(path: Path) -> Path:
    write_dicom(path, picture(12), JPEG + "70")
    data = path.read_bytes()
    place = data.index(b"\xfe\xff\x00\xe0")
    path.write_bytes(data[:place] + b"\xfe\xff\x00\xe0\0\0\0\0" * 3_000_000)
    return path


def _tiff_circle(path: Path) -> Path:
    tifffile.imwrite(path, picture(12))
    data = bytearray(path.read_bytes())
    place = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[place : place + 2])[0]
    data[place + 2 + 12 * count : place + 6 + 12 * count] = struct.pack("<I", place)
    path.write_bytes(bytes(data))
    return path


def _tiff_tag(path: Path, code: int, value: int, kind: int = 4, **options: Any) -> Path:
    """A TIFF file with one tag changed; kind 4 is a 32-bit integer, 11 a float."""
    tifffile.imwrite(path, picture(12), **options)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tag = tif.pages.first.tags[code]
    data = bytearray(path.read_bytes())
    data[tag.offset + 2 : tag.offset + 12] = struct.pack("<HII", kind, 1, value)
    path.write_bytes(bytes(data))
    return path


def _jpeg_2000(path: Path, side: int, in_dicom: bool = True) -> Path:
    """A code stream and a header that agree on a size that is not there."""
    if in_dicom:
        write_dicom(path, picture(12), JPEG + "90", Rows=side, Columns=side)
    else:
        image_files.write_bytes(path, imagecodecs.jpeg2k_encode(picture(12)))
    data = bytearray(path.read_bytes())
    place = data.index(b"\xff\x4f\xff\x51") + 8
    data[place : place + 8] = struct.pack(">II", side, side)
    data[place + 16 : place + 24] = struct.pack(">II", side, side)
    path.write_bytes(bytes(data))
    return path


def _jpeg(path: Path, rows: int, declared: int, syntax: str = JPEG + "70") -> Path:
    write_dicom(path, picture(12), syntax, Rows=declared, Columns=declared)
    data = bytearray(path.read_bytes())
    mark = {"70": b"\xff\xc3", "51": b"\xff\xc1", "80": b"\xff\xf7"}[syntax[-2:]]
    place = data.index(mark, data.index(b"\xff\xd8")) + 5
    data[place : place + 4] = struct.pack(">HH", rows, rows)
    path.write_bytes(bytes(data))
    return path


def _rle(path: Path, header: list[int]) -> Path:
    write_dicom(path, picture(12), RLE)
    old = encode(picture(12), RLE, 12)[:64]
    return _patch(path, old, struct.pack("<16I", *header + [0] * (16 - len(header))))


def _lut(path: Path, count: int, entries: int) -> Path:
    lut = item(LUTDescriptor=[count, 0, 12], LUTData=np.arange(entries, dtype="<u2").tobytes())
    return write_dicom(path, picture(12), VOILUTSequence=Sequence([lut]))


def _write(content: bytes) -> Callable[[Path], Path]:
    return lambda path: image_files.write_bytes(path, content)


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "png of a size that is not there": _write(_png(60000, 60000, zlib.compress(bytes(999)))),
    "png of 2^31 rows": _write(_png(9, 2**31 - 1, zlib.compress(bytes(999)))),
    "png that ends early": _write(_png(100, 100, zlib.compress(bytes(50 * 101))[:-4])),
    "deflated header of 64 KiB squared": lambda path: _deflated(path, MiB, 65535),
    "deflated pixels that end early": lambda path: _deflated(path, MiB, 2000),
    "jpeg 2000 file of 60000 squared": lambda path: _jpeg_2000(path, 60000, in_dicom=False),
    "jpeg 2000 of 60000 squared": lambda path: _jpeg_2000(path, 60000),
    "jpeg 2000 of 20000 squared": lambda path: _jpeg_2000(path, 20000),
    "jpeg of another size": lambda path: _jpeg(path, 65500, 53),
    "jpeg of a size that is not there": lambda path: _jpeg(path, 65500, 65500),
    "12-bit jpeg of a size that is not there": lambda path: _jpeg(path, 30000, 30000, JPEG + "51"),
    "jpeg-ls of another size": lambda path: _jpeg(path, 65535, 53, JPEG + "80"),
    "jpeg-ls of a size that is not there": lambda path: _jpeg(path, 30000, 30000, JPEG + "80"),
    "rle with a segment outside": lambda path: _rle(path, [2, 64, 2**31 - 1]),
    "rle with segments in disorder": lambda path: _rle(path, [2, 900, 64]),
    "rle with a segment in its header": lambda path: _rle(path, [2, 8, 900]),
    "rle with 2^32 - 1 segments": lambda path: _rle(path, [2**32 - 1] * 16),
    "rle with too few segments": lambda path: _rle(path, [1, 64]),
    "2^31 - 1 frames": lambda path: write_dicom(path, picture(12, (2, 37, 53)), NumberOfFrames=2**31 - 1),
    "2^31 - 1 compressed frames": lambda path: write_dicom(path, picture(12), JPEG + "70", NumberOfFrames=2**31 - 1),
    "65535 squared": lambda path: write_dicom(path, picture(12), Rows=65535, Columns=65535),
    "no rows": lambda path: write_dicom(path, picture(12), Rows=0),
    "65535 rows in big endian": lambda path: write_dicom(path, picture(12), BIG, Rows=65535),
    "sequences in sequences": lambda path: _nested(path, 20_000),
    "three million empty fragments": _empty_fragments,
    "length of an element beyond the file": lambda path: _patch(
        write_dicom(path, picture(12), ImageComments="x" * 64), b"LT\x40\0", b"UT\0\0\xf0\xff\xff\xff"
    ),
    "lut shorter than it says": lambda path: _lut(path, 65535, 100),
    "window of no width": lambda path: write_dicom(path, picture(12), WindowCenter=9, WindowWidth=0),
    "window that is no number": lambda path: _patch(
        write_dicom(path, picture(12), WindowCenter="1234", WindowWidth="900"), b"1234", b"nan "
    ),
    "slope without end": lambda path: write_dicom(path, picture(12), RescaleSlope="9e999", RescaleIntercept=0),
    "tiff with 2^31 rows": lambda path: _tiff_tag(path, 257, 2**31, compression="zlib"),
    "tiff with strips of 2^31 rows": lambda path: _tiff_tag(path, 257, 2**32 - 1, compression="zlib", rowsperstrip=9),
    "tiff with tiles of 2^30 columns": lambda path: _tiff_tag(path, 322, 2**30, compression="zlib", tile=(16, 16)),
    "tiff with 2^31 columns": lambda path: _tiff_tag(path, 256, 2**31, compression="zstd", tile=(16, 16)),
    "tiff without bytes": lambda path: _tiff_tag(path, 279, 0, compression="zlib"),
    "tiff with a strip of a gigabyte": lambda path: _tiff_tag(path, 279, 2**30, compression="zlib"),
    "tiff with an offset that is a float": lambda path: _tiff_tag(path, 273, 0x43000000, kind=11, compression="zlib"),
    "tiff with a length that is a float": lambda path: _tiff_tag(path, 279, 0x43000000, kind=11, compression="zlib"),
    "npy of 2^40 rows": _write(
        b"\x93NUMPY\1\0\x76\0"
        + b"{'descr': '<u2', 'fortran_order': False, 'shape': (1099511627776, 3), }".ljust(117)
        + b"\n"
    ),
    "npy with a header of 4 GiB": _write(b"\x93NUMPY\2\0\xff\xff\xff\xff{'descr': '<u2'"),
    "pgm of 10^9 squared": _write(b"P5 999999999 999999999 65535\n" + bytes(99)),
    "jpeg file of a size that is not there": _write(
        imagecodecs.jpeg8_encode(picture(8)).replace(struct.pack(">HH", 37, 53), struct.pack(">HH", 65500, 65500), 1)
    ),
    "explicit without pixels": lambda path: _write(write_dicom(path, picture(12), EXPLICIT).read_bytes()[:-3922])(path),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_hostile_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / name.replace(" ", "_")) for name, write in HOSTILE.items()]
    bad = [
        each
        for each in open_all(paths, 768 * MiB)
        if each["error"] != "DataError"
        or each["name"] not in each["message"]
        or "\n" in each["message"]
        or each["seconds"] > 10
        or each["grown"] > 200 * MiB
    ]
    assert not bad


def _bomb(path: Path) -> Path:
    """A sound image with four gigabytes of zeros behind it."""
    return _deflated(path, 4 * GIB, 37, 53)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_sound_files_with_traps_are_read(tmp_path: Path) -> None:
    """A directory that is its own successor ends, and what follows the pixels is not inflated."""
    traps = [_bomb(tmp_path / "bomb.dcm"), _tiff_circle(tmp_path / "circle.tif")]
    text = b"Comment\0\0" + _zeros(GIB, zlib.MAX_WBITS)
    traps.append(image_files.write_bytes(tmp_path / "text.png", _png(9, 9, zlib.compress(bytes(90)), (b"zTXt", text))))
    for name, content in (
        ("tail.png", imagecodecs.png_encode(picture(16))),
        ("tail.jpg", imagecodecs.jpeg8_encode(picture(8))),
    ):
        traps.append(image_files.write_bytes(tmp_path / name, content))
        os.truncate(traps[-1], 3 * GIB)
    for found in open_all(traps, 512 * MiB):
        assert found["error"] is None, found
        assert found["grown"] < 100 * MiB, found
        assert found["seconds"] < 5, found


def _chunk(path: Path, content: bytes | bytearray | None, **options: Any) -> Path:
    """A zarr array whose only chunk is replaced; None makes a sparse file of it."""
    image_files.write_zarr(path, picture(16), (37, 53), **options)
    chunk = next(file for file in path.rglob("*") if file.is_file() and not file.name.endswith((".json", ".zarray")))
    chunk.write_bytes(content or chunk.read_bytes())
    if content is None:
        os.truncate(chunk, 3 * GIB)
    return path


def _deflated_late(path: Path) -> Path:
    """The transfer syntax is behind a long element, where it is easily overlooked."""
    data = _deflated(path, GIB, 37).read_bytes()
    version = data.index(b"\2\0\1\0OB")
    size = struct.unpack("<I", data[140:144])[0] + 9000
    long = b"\2\0\1\0OB\0\0" + struct.pack("<I", 9002) + bytes(9000)
    path.write_bytes(data[:140] + struct.pack("<I", size) + data[144:version] + long + data[version + 12 :])
    return path


def _large_segment(path: Path) -> Path:
    """A strip of 3 GiB; what there is of it is the file's end, and zeros that take no space."""
    _tiff_tag(path, 279, 3 * GIB, compression="zlib")
    os.truncate(path, 4 * GIB)
    return path


def _long_frame(path: Path) -> Path:
    """A compressed frame in a fragment of 3 GiB."""
    write_dicom(path, picture(12), JPEG + "70", offsets="none")
    data = bytearray(path.read_bytes())
    place = data.index(b"\xff\xd8") - 4
    data[place : place + 4] = struct.pack("<I", 3 * GIB)
    path.write_bytes(data)
    os.truncate(path, place + 4 + 3 * GIB)
    with path.open("ab") as file:
        file.write(b"\xfe\xff\xdd\xe0\0\0\0\0")
    return path


def _two_streams(path: Path) -> Path:
    """A JP2 file whose code stream is larger than what looks like one before it."""
    small = encode(picture(12), JPEG + "90", 12)
    data = imagecodecs.jpeg2k_encode(picture(12), level=0, codecformat="JP2", bitspersample=12, reversible=True)
    size, large = struct.pack(">II", 53, 37), struct.pack(">II", 12000, 12000)
    data, place = data.replace(size, large), data.index(b"jp2h") - 4
    stream = data[:place] + struct.pack(">I4s", 8 + len(small), b"uuid") + small + data[place:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("image_files.encode", lambda *_: stream)
        return write_dicom(path, picture(12), JPEG + "90")


PACKED: dict[str, Callable[[Path], Path]] = {
    "png": lambda path: image_files.write_bytes(path, _png(9, 9, _zeros(GIB, zlib.MAX_WBITS, bytes(90)))),
    "deflated": _deflated_late,
    "frame": _long_frame,
    "stream": _two_streams,
    "segment": _large_segment,
    "gzip": lambda path: _chunk(path, _zeros(GIB, 31, picture(16).tobytes()), compressors=[zarr.codecs.GzipCodec()]),
    "gzips": lambda path: _chunk(
        path,
        gzip.compress(picture(16).tobytes()) + _zeros(GIB, 31),
        compressors=[zarr.codecs.GzipCodec()],
    ),
    "zstd": lambda path: _chunk(path, imagecodecs.zstd_encode(bytes(GIB // 2))),
    "zlib": lambda path: _chunk(path, _zeros(GIB, zlib.MAX_WBITS), version=2, compressors=[numcodecs.Zlib()]),
    "blosc": lambda path: _chunk(
        path, imagecodecs.blosc_encode(bytes(GIB // 2), compressor="zlib"), version=2, compressors=[numcodecs.Blosc()]
    ),
    "shard": lambda path: _chunk(path, None, shards=(37, 53)),
    "chunk": lambda path: _chunk(path, None),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_what_is_packed_takes_no_more_memory_than_the_header_says(tmp_path: Path) -> None:
    paths = [write(tmp_path / name) for name, write in PACKED.items()]
    for found in open_all(paths, 1024 * MiB):
        assert found["error"] == "DataError", found
        assert found["name"] in found["message"], found
        assert "\n" not in found["message"], found
        assert found["grown"] < 100 * MiB, found
        assert found["seconds"] < 5, found


def test_a_result_of_a_deflated_image_reads_its_header_alone(tmp_path: Path) -> None:
    path = _bomb(tmp_path / "bomb.dcm")
    tracemalloc.start()
    assert source_header(path, "").Rows == 37
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * MiB


def test_png_files_of_all_kinds_are_as_libpng_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, (mode, shape) in enumerate(itertools.product(("1", "L", "I;16", "RGB", "RGBA", "P"), ((1, 1), (9, 2)))):
        path = tmp_path / f"{number}.png"
        values = rng.integers(0, 256, (*shape, 4), np.uint8)
        if mode == "I;16":
            picture_of = Image.fromarray(values[..., :2].copy().view(np.uint16)[..., 0])
        else:
            picture_of = Image.fromarray(values).convert("RGB" if mode == "P" else mode)
        picture_of = picture_of.quantize(7) if mode == "P" else picture_of
        picture_of.save(path, "PNG", **({"transparency": 1} if mode == "P" else {}))
        expected = imagecodecs.png_decode(path.read_bytes()).reshape(*shape, -1)
        stored = open_pixels(path).stored
        found = stored.read(0, shape[0], 0, shape[1])
        np.testing.assert_array_equal(found, expected.transpose(2, 0, 1)[: len(found)])


def test_a_jpeg_of_four_colours_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "cmyk.jpg"
    path.write_bytes(imagecodecs.jpeg8_encode(np.zeros((8, 8, 4), np.uint8), colorspace="CMYK", outcolorspace="CMYK"))
    with pytest.raises(DataError, match=r"cmyk.jpg: is a CMYK JPEG; save it as grey or RGB"):
        open_pixels(path)
