"""Small image files of every format that is read, written by libraries that are not ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import zarr
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels.encoders import RLELosslessEncoder
from pydicom.sequence import Sequence
from pydicom.uid import UID

from gigamorph.engine.images.tiles import TileGrid

JPEG = "1.2.840.10008.1.2.4."
IMPLICIT, EXPLICIT, BIG, DEFLATED, RLE = (f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".2", ".1.99", ".5"))
NATIVE = [IMPLICIT, EXPLICIT, BIG, DEFLATED]
LOSSLESS = [*NATIVE, RLE, *(JPEG + end for end in ("57", "70", "80", "81", "90", "91", "201", "202", "203"))]
LOSSY = [JPEG + "50", JPEG + "51"]
MAMMOGRAM = "1.2.840.10008.5.1.4.1.1.1.2"
SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


def picture(bits: int, shape: tuple[int, ...] = (37, 53), seed: int = 0) -> np.ndarray:
    """Smooth and noisy parts, with the least and the largest value."""
    rng = np.random.default_rng(seed)
    pixels = np.linspace(0, 2**bits - 1, int(np.prod(shape))).reshape(shape)
    pixels[..., 10:20, :] = rng.integers(0, 2**bits, pixels[..., 10:20, :].shape)
    return pixels.astype(np.uint8 if bits <= 8 else np.uint16)


def encode(pixels: np.ndarray, syntax: str, bits: int) -> bytes:
    """One frame; pixels are unsigned bit patterns, (H, W) or (H, W, 3)."""
    end = syntax.removeprefix(JPEG)
    if end in ("50", "51"):
        return imagecodecs.jpeg8_encode(pixels, level=98, bitspersample=bits if bits > 8 else None)
    if end == "57":
        return imagecodecs.jpeg8_encode(pixels, lossless=True, predictor=6, bitspersample=bits)
    if end == "70":
        return imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=bits)
    if end in ("80", "81"):
        return imagecodecs.jpegls_encode(pixels, level=0)
    if end in ("90", "91"):
        return imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="J2K", bitspersample=bits, reversible=True)
    if end in ("201", "202", "203"):
        return imagecodecs.htj2k_encode(pixels)
    assert syntax == RLE
    rows, columns = pixels.shape[:2]
    depth, samples = 8 * pixels.itemsize, 1 if pixels.ndim == 2 else 3
    kind = {"rows": rows, "columns": columns, "samples_per_pixel": samples, "number_of_frames": 1}
    bits_of = {"bits_allocated": depth, "bits_stored": depth, "pixel_representation": 0}
    colour = {"photometric_interpretation": "RGB", "planar_configuration": 0}
    grey = {"photometric_interpretation": "MONOCHROME2"}
    return RLELosslessEncoder.encode(
        pixels, transfer_syntax_uid=RLE, **kind, **bits_of, **(grey if samples == 1 else colour)
    )


def write_dicom(
    path: Path,
    pixels: np.ndarray,
    syntax: str = EXPLICIT,
    bits: int = 12,
    *,
    offsets: str = "basic",
    fragments: int = 1,
    **elements: Any,
) -> Path:
    """A For Presentation mammogram of pixels (H, W) or (frames, H, W) or (frames, H, W, 3), stored bit patterns.

    offsets: of compressed frames, a table that is "basic", "extended" or left out ("none"). elements: set or, if None,
    left empty.
    """
    frames = pixels if pixels.ndim >= 3 else pixels[None]
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UID(MAMMOGRAM)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    ds.Modality, ds.PatientID, ds.PatientOrientation = "MG", "P1", ["A", "R"]
    ds.Rows, ds.Columns = frames.shape[1:3]
    if pixels.ndim >= 3:
        ds.NumberOfFrames = len(frames)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 * pixels.itemsize, bits, bits - 1
    if frames.ndim == 4:
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    for key, value in elements.items():
        setattr(ds, key, value)
    if syntax in NATIVE:
        data = frames.astype(frames.dtype.newbyteorder(">" if syntax == BIG else "<")).tobytes()
        ds.add_new("PixelData", "OB" if pixels.itemsize == 1 else "OW", data + b"\0" * (len(data) % 2))
    else:
        streams = [encode(frame, syntax, bits) for frame in frames]
        if offsets == "extended":
            data, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(streams)
        else:
            data = encapsulate(streams, fragments_per_frame=fragments, has_bot=offsets == "basic")
        ds.add_new("PixelData", "OB", data)
        ds["PixelData"].is_undefined_length = True
    ds.save_as(path, enforce_file_format=True)
    return path


def item(**elements: Any) -> Dataset:
    """A sequence item."""
    ds = Dataset()
    for key, value in elements.items():
        setattr(ds, key, value)
    return ds


def sequence(**elements: Any) -> Sequence:
    """A sequence of one item."""
    return Sequence([item(**elements)])


def write_slide(
    path: Path,
    image: np.ndarray,
    tile: tuple[int, int],
    syntax: str = EXPLICIT,
    bits: int | None = None,
    *,
    sparse: bool = False,
    skip: tuple[tuple[int, int], ...] = (),
    **elements: Any,
) -> Path:
    """A whole-slide file of an image (H, W), (H, W, 3) or (planes, H, W[, 3]), cut into tiles; borders are padded.

    sparse: with a position for each tile (last tile first); `skip` are (row, column) of tiles left out.
    """
    colour = image.shape[-1] == 3
    planes = image if image.ndim == 3 + colour else image[None]
    height, width = planes.shape[1:3]
    down, across = -(-height // tile[0]), -(-width // tile[1])
    padding = [(0, 0), (0, down * tile[0] - height), (0, across * tile[1] - width), (0, 0)][: planes.ndim]
    padded = np.pad(planes, padding)
    places = [(p, y, x) for p in range(len(planes)) for y in range(down) for x in range(across) if (y, x) not in skip]
    places = places[::-1] if sparse else places
    frames = np.stack(
        [padded[p, y * tile[0] : (y + 1) * tile[0], x * tile[1] : (x + 1) * tile[1]] for p, y, x in places]
    )
    more: dict[str, Any] = {"DimensionOrganizationType": "TILED_SPARSE" if sparse else "TILED_FULL"}
    if sparse:
        more["PerFrameFunctionalGroupsSequence"] = Sequence(
            item(
                PlanePositionSlideSequence=sequence(
                    RowPositionInTotalImagePixelMatrix=y * tile[0] + 1,
                    ColumnPositionInTotalImagePixelMatrix=x * tile[1] + 1,
                    ZOffsetInSlideCoordinateSystem=float(p),
                )
            )
            for p, y, x in places
        )
    more |= {"SOPClassUID": SLIDE, "Modality": "SM", "PatientOrientation": None, "NumberOfFrames": len(frames)}
    more |= {"TotalPixelMatrixRows": height, "TotalPixelMatrixColumns": width, **elements}
    return write_dicom(path, frames, syntax, bits or 8 * image.itemsize, **more)


def write_zarr(
    path: Path, pixels: np.ndarray, chunks: tuple[int, ...], axes: str = "", version: int = 3, **options: Any
) -> Path:
    """A zarr array or, if axes are named, an OME-Zarr image (0.5 in zarr 3, 0.4 in zarr 2) with a smaller level."""
    if not axes:
        array = zarr.create_array(
            str(path), shape=pixels.shape, chunks=chunks, dtype=pixels.dtype, zarr_format=version, **options
        )
        array[...] = pixels
        return path
    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    for name, level in (("0", pixels), ("1", pixels[..., ::2, ::2])):
        array = group.create_array(name, shape=level.shape, chunks=chunks, dtype=level.dtype, **options)
        array[...] = level
    named = [{"name": axis, "type": "channel" if axis == "c" else "space"} for axis in axes]
    images = [{"axes": named, "datasets": [{"path": "0"}, {"path": "1"}], "version": "0.4"}]
    group.attrs.update({"ome": {"version": "0.5", "multiscales": images}} if version == 3 else {"multiscales": images})
    return path


def write_pgm(path: Path, pixels: np.ndarray) -> Path:
    """A binary PGM file with a comment in its header."""
    white = 255 if pixels.dtype == np.uint8 else 65535
    head = f"P5\n# a comment 1 2\n{pixels.shape[1]} {pixels.shape[0]}\n{white}\n".encode()
    path.write_bytes(head + pixels.astype(pixels.dtype.newbyteorder(">")).tobytes())
    return path


def write_npy(path: Path, pixels: np.ndarray) -> Path:
    """A .npy file, whatever the path is called."""
    with path.open("wb") as file:
        np.save(file, pixels)
    return path


def write_bytes(path: Path, data: bytes) -> Path:
    """The path, written."""
    path.write_bytes(data)
    return path


def write_tiff(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    """A TIFF file."""
    tifffile.imwrite(path, pixels, **options)
    return path


def corpus() -> dict[str, Callable[[Path], Path]]:
    """A writer of a small file of every kind, by name, for tests of damaged files."""
    grey, colour = picture(12), picture(8, (37, 53, 3))
    many = picture(12, (3, 37, 53))
    writers: dict[str, Callable[[Path], Path]] = {}
    for syntax in [*LOSSLESS, *LOSSY]:
        bits = 8 if syntax == JPEG + "50" else 12
        one, window = picture(bits), {"WindowCenter": 2**bits // 2, "WindowWidth": 3 * 2**bits // 4}
        writers[f"dicom {syntax}"] = lambda path, s=syntax, o=one, b=bits, w=window: write_dicom(path, o, s, b, **w)
    for syntax in (EXPLICIT, DEFLATED, RLE, JPEG + "70", JPEG + "90"):
        writers[f"frames {syntax}"] = lambda path, s=syntax: write_dicom(path, many, s)
    for syntax in (EXPLICIT, RLE, JPEG + "50", JPEG + "90"):
        writers[f"slide {syntax}"] = lambda path, s=syntax: write_slide(path, colour, (16, 16), s)
    writers["slide sparse"] = lambda path: write_slide(path, grey, (16, 16), JPEG + "80", 12, sparse=True)
    writers["npy"] = lambda path: write_npy(path, grey)
    writers["pgm"] = lambda path: write_pgm(path, grey)
    writers["png"] = lambda path: write_bytes(path, imagecodecs.png_encode(grey))
    writers["jpeg"] = lambda path: write_bytes(path, imagecodecs.jpeg8_encode(colour))
    rgb = {"photometric": "rgb"}
    for name, pixels, options in (
        ("raw", grey, {}),
        ("pages", many, {"photometric": "minisblack"}),
        ("zlib", grey, {"tile": (16, 32), "compression": "zlib", "predictor": True}),
        ("zstd", grey, {"tile": (16, 32), "compression": "zstd"}),
        ("lzw", grey, {"rowsperstrip": 7, "compression": "lzw"}),
        ("jpeg", colour, {"tile": (16, 16), "compression": "jpeg", **rgb}),
        ("jpeg 2000", grey, {"tile": (32, 32), "compression": "jpeg2000"}),
        ("planes", colour.transpose(2, 0, 1).copy(), {"planarconfig": "separate", "tile": (16, 16), **rgb}),
        ("packbits", colour, {"compression": "packbits", **rgb}),
        ("ome", many, {"ome": True, "photometric": "minisblack", "tile": (16, 16), "metadata": {"axes": "ZYX"}}),
    ):
        writers[f"tiff {name}"] = lambda path, p=pixels, o=options: write_tiff(path, p, **o)
    return writers


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, some bytes changed, a length or size made absurd, a piece left out or doubled."""
    out = bytearray(data)
    kind = rng.integers(6)
    if kind == 0:
        return bytes(out[: rng.integers(0, len(out))])
    where = lambda: int(rng.integers(0, len(out)))  # noqa: E731
    if kind in (1, 2):  # the head matters most
        limit = len(out) if kind == 1 else min(len(out), 1500)
        for _ in range(rng.integers(1, 9)):
            out[int(rng.integers(0, limit))] = int(rng.integers(256))
    elif kind == 3:
        value = [0, 1, 0xFFFF, 0x7FFF, 0xFFFFFFFF, 0x7FFFFFFF, 0x10000, 0xFFFFFFFE][rng.integers(8)]
        width, place = int(rng.choice([2, 4, 8])), int(rng.integers(0, min(len(out), 1500)))
        order = str(rng.choice(["little", "big"]))
        out[place : place + width] = (value % 256**width).to_bytes(width, order)  # pyright: ignore[reportArgumentType]
    elif kind == 4:
        start = where()
        del out[start : start + int(rng.integers(1, 64))]
    else:
        start = where()
        out[start:start] = out[start : start + int(rng.integers(1, 300))]
    return bytes(out)


def zarr_attributes(path: Path) -> dict[str, Any]:
    """The metadata of a zarr 3 array."""
    return json.loads((path / "zarr.json").read_text())


def cached_tiles(grid: TileGrid) -> list[tuple[int, int]]:
    """(row, column) of the cached tiles of an image, the least recently used first."""
    return [index for image, index in grid.cache._tiles if image == grid.owner]
