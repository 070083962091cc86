"""Opens pixel sources of files, whose format is detected by the first bytes, and of arrays."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor, strided

from ..errors import DataError
from .dicomweb import Instance, remote_file
from .levels import White
from .pixels import ImageSource, Normalize
from .rawfile import reading
from .remote import RemoteFile, is_url
from .stored import ArrayPixels, StoredPixels, channels_first, slices_first

# Files that are not read: first bytes, their position, what the file is and what to do.
_UNREAD = (
    (b"\x1f\x8b", 0, "a gzip file; unpack it first"),
    (b"BZh", 0, "a bzip2 file; unpack it first"),
    (b"\xfd7zXZ", 0, "an xz file; unpack it first"),
    (b"\x28\xb5\x2f\xfd", 0, "a zstd file; unpack it first"),
    (b"PK\3\4", 0, "a zip archive (.npz files are, too); unpack it first"),
    (b"\x89HDF\r\n", 0, "an HDF5 file; save each image with numpy.save, or as PNG or TIFF"),
    (b"n+1\0", 344, "a NIfTI volume; open it with frame='all'"),
    (b"n+2\0", 4, "a NIfTI volume; open it with frame='all'"),
    (b"ni1\0", 344, "the header of a NIfTI volume; save its slices with numpy.save, or as PNG or TIFF"),
    (b"NRRD", 0, "an NRRD file; save it with numpy.save, or as PNG or TIFF"),
    (b"ObjectType", 0, "a MetaImage file (.mha, .mhd); save it with numpy.save, or as PNG or TIFF"),
    (b"WEBP", 8, "a WebP file; save it as PNG"),
    (b"ftyp", 4, "a HEIC, AVIF or video file; save it as PNG"),
    (b"GIF8", 0, "a GIF file; save it as PNG"),
    (b"BM", 0, "a BMP file; save it as PNG"),
    (b"%PDF", 0, "a PDF file; save its image as PNG"),
    (b"<", 0, "a web page or XML file, perhaps the error of a download; fetch the image again"),
)
# Files that mark a folder as a zarr array or group, of version 3 and 2.
_ZARR = ("zarr.json", ".zarray", ".zgroup")


def open_pixels(
    image: str | Path | RemoteFile | np.ndarray | Tensor | Sequence[str | Path],
    *,
    normalize: Normalize | None = None,
    voi: str = "auto",
    flip: bool | Literal["auto"] = "auto",
    channels: int | None = None,
    frame: int | Literal["all"] | None = None,
    for_processing: bool = False,
    white: White | None = None,
    laterality: str | None = None,
) -> ImageSource:
    """Open a file or array as a `PixelSource`, an image or, with `frame="all"`, a volume.

    The format of a file is detected by its first bytes, not its name. `.npy`, zarr and OME-Zarr, TIFF (OME-TIFF, SVS),
    uncompressed DICOM and DICOM slides are read by region and never whole. PNG, JPEG, JPEG 2000 and compressed DICOM
    lack random access and are decoded once, in their own dtype, at the first read. Integers are divided by their
    largest value (BitsStored for DICOM and TIFF); floats are unchanged.

    Args:
        image: path, URL that fsspec supports (https://, s3://, memory://; only required bytes are fetched), or array,
            tensor or memmap of shape (H, W), (C, H, W) or (H, W, C) with C 1 or 3; (C, H, W) if both fit. A volume
            may also be a folder or list with the DICOM files of a series, a list of files with a slice each, a NIfTI
            file (.nii, .nii.gz; needs nibabel), or an array (D, H, W), (C, D, H, W) or (D, H, W, C).
        normalize: the normalisation of grey values on [0, 1]; none by default.
        voi: the DICOM grey scale: "auto" (first VOI LUT, else first window, else full range), "none" (full range),
            "minmax" (from the darkest to the brightest pixel), "window:I" or "lut:I", I a number from 0 or the name in
            the file.
        flip: True mirrors left-right; "auto" mirrors mammograms so that the chest wall is on the left. Mammograms are
            DICOM files with such a header, and other files with a `laterality`.
        channels: 3 repeats grey, 1 takes a channel of a colour image with equal channels; by default as stored.
        frame: the frame of a multi-frame DICOM file, or the plane of a slide, TIFF or OME-Zarr image, from 0; required
            if there are several. "all" opens a volume (C, D, H, W) whose slices are the frames or planes. DICOM slices
            are ordered by their positions; other slices are in the order of the file or list. Compressed slices are
            decoded once into a temporary file.
        for_processing: accepts DICOM images that are not for display (raw detector values).
        white: the value of white in files other than DICOM, such as 4095 for 12 bits in a 16-bit PNG; by default the
            largest value of the type (1 for floats). "auto" uses the smallest of 255, 1023, 4095, 16383, 65535 that no
            pixel exceeds, and is the default for integers of more than 16 bits; their white is the largest pixel if it
            exceeds all of these.
        laterality: "L" or "R" declares a file other than DICOM a mammogram. The chest wall is on the side of the
            breast or, if that is unclear, as in the standard display: on the right for a right breast.

    Raises:
        DataError: if the file is missing, damaged, truncated, of an unknown format, or does not fit the options; for
            volumes also if slices have different sizes, are missing or coincide.
    """
    if isinstance(frame, str) and frame != "all":
        raise DataError(f"frame={frame!r} must be a number from 0, or 'all' for a volume")
    if isinstance(image, str) and is_url(image):
        found = remote_file(image)
        if found is None:
            raise DataError(f"{image}: its server does not support byte ranges; download it")
        image = found
    if isinstance(image, str | Path | RemoteFile):
        # A remote file has the methods of a path that are used.
        path = cast(Path, image) if isinstance(image, RemoteFile) else Path(image)
        if isinstance(frame, str):
            stored = _open_volume(path, voi=voi, for_processing=for_processing)
        else:
            stored = _open_file(path, voi=voi, frame=frame, for_processing=for_processing)
    elif isinstance(image, list | tuple) and all(isinstance(one, str | Path) for one in image):
        if frame != "all":
            raise DataError("a list of files is a volume; open it with frame='all'")
        stored = _open_slices([Path(one) for one in image], "", voi=voi, for_processing=for_processing)
    else:
        stored = _open_array(image, frame == "all")
    return ImageSource(stored, normalize=normalize, flip=flip, channels=channels, white=white, laterality=laterality)


def _open_file(path: Path, *, voi: str, frame: int | None, for_processing: bool) -> StoredPixels:
    # Imports are lazy, because the libraries of these modules take time to load.
    if isinstance(path, Instance):
        from .dicom import open_dicom

        return open_dicom(path, voi=voi, frame=frame, for_processing=for_processing)
    with reading(path):  # each call fails for a folder without permission, or for a name that is too long
        if path.is_dir():
            if any((path / mark).is_file() for mark in _ZARR):
                from .zarrs import ZarrPixels

                return ZarrPixels(path, frame)
            os.listdir(path)  # raises the error of a folder without permission
        if path.exists() and not path.is_file() and not path.is_dir():  # opening a pipe would wait for its writer
            raise DataError(f"{path}: is not a regular file; pass an image")
        with path.open("rb") as file:
            head = file.read(348)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        from .tiff import TiffPixels

        return TiffPixels(path, frame)
    if begins_as_dicom(head):
        from .dicom import open_dicom

        return open_dicom(path, voi=voi, frame=frame, for_processing=for_processing)
    if head.startswith(b"\x93NUMPY"):
        from .rawfile import open_npy

        stored: StoredPixels = open_npy(path)
    elif head.startswith(b"\x89PNG"):
        from .whole import PngPixels

        stored = PngPixels(path)
    elif head.startswith(b"\xff\xd8\xff"):
        from .whole import JpegPixels

        stored = JpegPixels(path)
    elif head.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")):
        from .whole import Jpeg2000Pixels

        stored = Jpeg2000Pixels(path)
    elif head.startswith(b"P5") and head[2:3].isspace():
        from .rawfile import open_pgm

        stored = open_pgm(path)
    else:
        unread = (f"is {what}" for mark, at, what in _UNREAD if head[at:].startswith(mark))
        formats = "DICOM, PNG, JPEG, JPEG 2000, PGM, TIFF, zarr or .npy file"
        unknown = f"{'is not a' if head else 'is empty, not a'} {formats}; check the path or convert the file"
        raise DataError(f"{path}: {next(unread, unknown)}")
    if frame not in (None, 0):
        raise DataError(f"{path}: frame {frame} does not exist; the file has a single image")
    return stored


def _open_volume(path: Path, *, voi: str, for_processing: bool) -> StoredPixels:
    with reading(path):
        folder = path.is_dir()
        if folder and any((path / mark).is_file() for mark in _ZARR):
            from .zarrs import ZarrPixels

            return ZarrPixels(path, volume=True)
        if folder:
            files = sorted(
                one for one in path.iterdir() if one.is_file() and one.name != "DICOMDIR" and _first_bytes(one)[1]
            )
            if not files:
                raise DataError(f"{path}: has no DICOM files; pass a list of its files in the order of the slices")
            return _open_slices(files, str(path), voi=voi, for_processing=for_processing)
        head = _first_bytes(path)[0] if path.is_file() else b""
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        from .tiff import TiffPixels
        from .volumes import VolumePixels

        first = TiffPixels(path, 0)
        return VolumePixels([first, *(TiffPixels(path, number) for number in range(1, first.planes))], str(path))
    if head.startswith(b"\x93NUMPY"):
        from .rawfile import open_npy

        return open_npy(path, volume=True)
    from .nifti import NiftiPixels, is_nifti

    if is_nifti(path, head):
        return NiftiPixels(path, head)
    return _open_slices([path], str(path), voi=voi, for_processing=for_processing)


def _open_slices(paths: Sequence[Path], name: str, *, voi: str, for_processing: bool) -> StoredPixels:
    """A volume of files, in the order of their positions if all are DICOM, otherwise in the given order."""
    from .volumes import VolumePixels, in_order

    if not paths:
        raise DataError("a volume needs at least one file, but the list is empty")
    slices: list[StoredPixels] = []
    for path in paths:
        if isinstance(path, Instance) or (path.is_file() and _first_bytes(path)[1]):
            from .dicom import open_frames

            slices += open_frames(path, voi=voi, for_processing=for_processing)
        else:
            slices.append(_open_file(path, voi=voi, frame=None, for_processing=for_processing))
    of_folder, name = bool(name) and len(paths) > 1, name or f"{paths[0]} and {len(paths) - 1} more"
    order, spacing = list(range(len(slices))), None
    places = [place for one in slices if (place := getattr(one, "place", None)) is not None]
    if len(places) == len(slices):
        if of_folder and not all(place.known for place in places):
            raise DataError(f"{name}: its files have no positions; pass a list of them in the order of the slices")
        order, spacing = in_order(places, name, len(paths) == 1)
    return VolumePixels([slices[number] for number in order], name, spacing)


def _first_bytes(path: Path) -> tuple[bytes, bool]:
    """The first bytes of a file, and whether it begins as DICOM."""
    with reading(path), path.open("rb") as file:
        head = file.read(348)
    return head, begins_as_dicom(head)


def begins_as_dicom(head: bytes) -> bool:
    """Whether these first bytes of a file are DICOM's: its prefix or, without one, an early element of a data set."""
    if head[128:132] == b"DICM":
        return True
    group, element, length = struct.unpack_from("<HHI", head.ljust(8, b"\0"))
    explicit = head[4:6] in (b"UL", b"OB", b"UI", b"CS", b"DA", b"SH", b"LO")
    return group in (2, 8) and element <= 0x18 and (explicit or (group == 8 and length in range(2, 65, 2)))


def _open_array(image: Any, volume: bool = False) -> StoredPixels:
    if not isinstance(image, np.ndarray | Tensor):
        what = type(image).__name__
        raise DataError(f"an image must be a path, an array or a tensor, not {what}; convert it with np.asarray")
    sides = "x".join(str(side) for side in image.shape)
    order_of, least = (slices_first, 3) if volume else (channels_first, 2)
    if isinstance(image, Tensor):
        name = f"<tensor {sides}>"
        if image.is_complex() or image.layout != strided:
            raise DataError(f"{name}: is {image.dtype}, {image.layout}; pass a dense tensor of real numbers")
        order = order_of(tuple(image.shape), name)
        image = image.detach().permute(order)
        return ArrayPixels(image[None] if image.ndim == least else image, name)
    name = f"<array {sides}>"
    if isinstance(image, np.memmap) and not volume and (file := _backing_file(image)) is not None:
        # A map of a whole file is read from the file: it is pickled as a path, and its pages do not become resident
        # memory.
        from .rawfile import RawPixels

        return RawPixels(file, image.offset, image.shape, image.dtype)
    if image.dtype.kind not in "buif":
        raise DataError(f"{name}: contains {image.dtype}, but pixels must be numbers")
    image = image.transpose(order_of(image.shape, name))
    return ArrayPixels(image[None] if image.ndim == least else image, name)


def _backing_file(image: np.memmap) -> Path | None:
    """The file of a contiguous memory map; None for a view of another array, or a copy-on-write map."""
    whole = isinstance(image.base, mmap.mmap) and image.flags.c_contiguous and image.mode != "c"
    path = Path(image.filename) if whole and image.filename else None
    return path if path is not None and path.is_file() else None
