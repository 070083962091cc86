"""A pixel source of any file, told by its first bytes, or of an array."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Literal, cast

import numpy as np
from torch import Tensor, strided

from ..errors import DataError
from .arrays import ArrayPixels, channels_first
from .dicomweb import Instance, remote_file
from .levels import White
from .pixels import ImageSource, Normalize
from .remote import RemoteFile, is_url
from .stored import StoredPixels


def open_pixels(
    image: str | Path | RemoteFile | np.ndarray | Tensor,
    *,
    normalize: Normalize | None = None,
    voi: str = "auto",
    flip: bool | Literal["auto"] = "auto",
    channels: int | None = None,
    frame: int | None = None,
    for_processing: bool = False,
    white: White | None = None,
    laterality: str | None = None,
) -> ImageSource:
    """A `PixelSource` of a file or array.

    Files are told by their first bytes, not their name. `.npy`, zarr and OME-Zarr, TIFF (OME-TIFF, SVS), uncompressed
    DICOM and DICOM slides are read by region and never whole; PNG, JPEG and compressed DICOM have no random access and
    are decoded once, in their own dtype, at the first read. Integers are divided by their largest value (BitsStored for
    DICOM and TIFF), floats kept.

    image: path, URL that fsspec reaches (https://, s3://, memory://; only what is read is fetched), or
        array/tensor/memmap laid out (H, W), (C, H, W) or (H, W, C) with C 1 or 3; (C, H, W) where both fit.
    normalize: what comes after grey values on [0, 1]; default nothing.
    voi: DICOM grey scale: "auto" (first VOI LUT, else first window, else full range), "none" (full range), "minmax"
        (from the image's darkest to its brightest pixel), "window:I" or "lut:I", I a number from 0 or the file's name.
    flip: True mirrors left-right; "auto" mirrors mammograms so that the chest wall is left, and nothing else.
        Mammograms are DICOM files that say so, and other files whose `laterality` is given.
    channels: 3 repeats grey, 1 takes one channel of a colour image whose channels are equal; default as stored.
    frame: which frame of a multi-frame DICOM file, or plane of a slide, TIFF or OME-Zarr image that has several, from
        0; such files are refused without it.
    for_processing: accept DICOM images that are not meant for display (raw detector values).
    white: the value that is white in files other than DICOM, by default the largest of their type (1 for floats);
        4095 for 12 bits in a 16-bit PNG; "auto" takes the least of 255, 1023, 4095, 16383, 65535 that no pixel exceeds
        and is the default of integers of more than 16 bits, whose largest pixel is white if it exceeds all of these.
    laterality: "L" or "R" tells that a file other than DICOM is a mammogram. The chest wall is where the breast is and,
        where that is unclear, where it is as the breast is hung: on the right of a right one.

    Raises `DataError` naming the file: missing, damaged, truncated, of an unknown format, or not what was asked for.
    """
    if isinstance(image, str) and is_url(image):
        found = remote_file(image)
        if found is None:
            raise DataError(f"{image}: no part of it can be read alone where it lies; fetch it")
        image = found
    if isinstance(image, str | Path | RemoteFile):
        # As much of a path as is asked of one.
        path = cast(Path, image) if isinstance(image, RemoteFile) else Path(image)
        stored = _open_file(path, voi=voi, frame=frame, for_processing=for_processing)
    else:
        stored = _open_array(image)
    return ImageSource(stored, normalize=normalize, flip=flip, channels=channels, white=white, laterality=laterality)


def _open_file(path: Path, *, voi: str, frame: int | None, for_processing: bool) -> StoredPixels:
    # Lazily, because the libraries of these modules take time to load.
    if isinstance(path, Instance):
        from .dicom import open_dicom

        return open_dicom(path, voi=voi, frame=frame, for_processing=for_processing)
    try:  # a folder that is closed, or a name that is too long, is an error of each of these
        if path.is_dir():
            from .zarrs import MARKS, ZarrPixels

            if any((path / mark).is_file() for mark in MARKS):
                return ZarrPixels(path, frame)
            os.listdir(path)  # of a folder that is closed this is what it lacks
        if path.exists() and not path.is_file() and not path.is_dir():  # to open a pipe would wait for its writer
            raise DataError(f"{path}: is no regular file; name an image")
        with path.open("rb") as file:
            head = file.read(132)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        from .tiff import TiffPixels

        return TiffPixels(path, frame)
    if head[128:] == b"DICM":
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
    elif head.startswith(b"P5") and head[2:3].isspace():
        from .rawfile import open_pgm

        stored = open_pgm(path)
    else:
        what = "is empty" if not head else "is no DICOM (with its DICM mark), PNG, JPEG, PGM, TIFF, zarr or .npy file"
        raise DataError(f"{path}: {what}; check the path or convert the file")
    if frame not in (None, 0):
        raise DataError(f"{path}: frame {frame} is wanted, the file holds one image")
    return stored


def _open_array(image: np.ndarray | Tensor) -> StoredPixels:
    if not isinstance(image, np.ndarray | Tensor):
        what = type(image).__name__
        raise DataError(f"an image is a path, an array or a tensor, not {what}; np.asarray makes an array")
    sides = "x".join(str(side) for side in image.shape)
    if isinstance(image, Tensor):
        name = f"<tensor {sides}>"
        if image.is_complex() or image.layout != strided:
            raise DataError(f"{name}: is {image.dtype}, {image.layout}; give a dense tensor of real numbers")
        order = channels_first(tuple(image.shape), name)
        image = image.detach()
        return ArrayPixels(image[None] if image.ndim == 2 else image.permute(order), name)
    name = f"<array {sides}>"
    if isinstance(image, np.memmap) and (file := _its_file(image)) is not None:
        # A mapping of a whole file is read from that file: it pickles as a path, and what was read stays out of the
        # process's resident memory.
        from .rawfile import RawPixels

        return RawPixels(file, image.offset, image.shape, image.dtype)
    if image.dtype.kind not in "buif":
        raise DataError(f"{name}: holds {image.dtype}, not numbers that can be pixels")
    order = channels_first(image.shape, name)
    return ArrayPixels(image[None] if image.ndim == 2 else image.transpose(order), name)


def _its_file(image: np.memmap) -> Path | None:
    """The file that holds all of a memory map in order; None where that is a part of it, or is copied on write."""
    whole = isinstance(image.base, mmap.mmap) and image.flags.c_contiguous and image.mode != "c"
    path = Path(image.filename) if whole and image.filename else None
    return path if path is not None and path.is_file() else None
