"""How long it takes to open and read images: against the bare codec, by region, and headers alone.

    GIGAMORPH_REAL_DATA=folder python benchmarks/reading.py --json benchmarks/results/reading_cpu.json

- A JPEG-lossless mammogram of 3062 x 2394 pixels (`dicom/mg_ge_jpeg_lossless.dcm` of the real data), from the closed
  file to normalised float32, against imagecodecs on its code stream, in turns.
- 1024 x 1024 pixels of a 16384 x 16384 TIFF of 12-bit noise in zstd tiles of 512, at a place not read before.
- Opening an uncompressed DICOM file of 600 MB, and 512 x 512 pixels of it.
- The header of the mammogram, and the index of 10,000 of them by two processes (hard links to one file).
- 1024 x 1024 pixels of that TIFF, of which the tiles are decoded already, as they are and augmented.

Medians; files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.uid import UID, ExplicitVRLittleEndian

from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.bench.meter import measure, time_call
from gigamorph.engine.datasets.augment import Augment, augmented
from gigamorph.engine.datasets.index import index_folder
from gigamorph.engine.images.header import MG_FOR_PRESENTATION, read_info
from gigamorph.engine.images.open import open_pixels

SIDE, TILE, REGION = 16384, 512, 1024
HEADERS = 10_000
AUGMENT = (
    "flip",
    "gamma=0.2,contrast=0.1,noise=0.02",
    "rotate=10,scale=0.1",
    "elastic=20",
    "flip,rotate=10,scale=0.1,elastic=20,gamma=0.2,contrast=0.1,noise=0.02",
)


def milliseconds(task: Callable[[], Any]) -> float:
    """How long one call takes."""
    return 1e3 * time_call(task)[0]


def compressed_mammogram(path: Path, repeats: int) -> dict[str, float]:
    """The whole of a compressed mammogram, ours and the bare codec in turns."""
    stream = get_frame(dcmread(path).PixelData, 0, number_of_frames=1)

    def whole() -> None:
        source = open_pixels(path)
        source.read(0, source.shape[1], 0, source.shape[2])

    times = [(milliseconds(lambda: imagecodecs.jpeg8_decode(stream)), milliseconds(whole)) for _ in range(repeats)]
    codec, ours = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(mine / theirs for theirs, mine in times)
    return {"codec_ms": codec, "full_read_ms": ours, "ratio": ratio}


def zstd_regions(folder: Path, repeats: int) -> dict[str, float]:
    """Regions of a large compressed TIFF, each from a file opened anew, so that nothing is cached."""
    rng = np.random.default_rng(0)

    def tiles() -> Iterator[np.ndarray]:
        for _ in range((SIDE // TILE) ** 2):
            yield rng.normal(2000, 200, (TILE, TILE)).clip(0, 4095).astype(np.uint16)

    path = folder / "large.tif"
    tifffile.imwrite(path, tiles(), shape=(SIDE, SIDE), dtype=np.uint16, tile=(TILE, TILE), compression="zstd")
    opened, read = [], []
    for _ in range(repeats):
        top, left = (int(place) for place in rng.integers(0, SIDE - REGION, 2))
        sources = []
        opened.append(milliseconds(lambda found=sources: found.append(open_pixels(path))))
        read.append(milliseconds(lambda s=sources[0], y=top, x=left: s.read(y, y + REGION, x, x + REGION)))
    return {"open_ms": statistics.median(opened), "region_ms": statistics.median(read), "region_ms_worst": max(read)}


def augmented_regions(folder: Path, repeats: int) -> dict[str, float]:
    """A region as it is, and as each of some augmentations shows it."""
    plain = open_pixels(folder / "large.tif")
    sources = {"plain": plain}
    for text in AUGMENT:
        sources[text] = augmented(plain, Augment.parse(text), seed=0, epoch=0, index=1)
    region = (5000, 5000 + REGION, 7000, 7000 + REGION)
    found = {}
    for name, source in sources.items():
        source.read(*region)
        times = [milliseconds(lambda s=source: s.read(*region)) for _ in range(repeats)]
        found[f"{name} ms"] = statistics.median(times)
    return found


def index_seconds(mammogram: Path, folder: Path) -> float:
    """An index of many headers by two processes."""
    (folder / "many").mkdir()
    first = folder / "many" / "0.dcm"
    shutil.copy(mammogram, first)
    for number in range(1, HEADERS):
        os.link(first, folder / "many" / f"{number}.dcm")
    found = []
    seconds, _ = time_call(lambda: found.append(index_folder(folder / "many", workers=2)))
    assert len(found[0].records) == HEADERS
    return seconds


def uncompressed(folder: Path, repeats: int) -> dict[str, float]:
    """A large uncompressed DICOM file, sparse on disk."""
    rows, columns = 20000, 15000
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UID(MG_FOR_PRESENTATION)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    ds.Modality, ds.PatientOrientation = "MG", ["A", "R"]
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = rows, columns, 16, 12, 11
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.add_new("PixelData", "OW", b"\0\0")
    path = folder / "large.dcm"
    ds.save_as(path, enforce_file_format=True)
    size = path.stat().st_size - 2 + rows * columns * 2
    with path.open("r+b") as file:
        file.seek(-6, 2)
        file.write((rows * columns * 2).to_bytes(4, "little"))
        file.truncate(size)
    open_pixels(path)
    opened = measure(lambda: open_pixels(path), times=repeats)
    read = [milliseconds(lambda: open_pixels(path).read(5000, 5512, 700, 1212)) for _ in range(repeats)]
    return {
        "file_bytes": size,
        "open_ms": 1e3 * statistics.median(opened.seconds),
        "open_peak_bytes": opened.added_bytes,
        "open_and_region_ms": statistics.median(read),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--real", type=Path, default=os.environ.get("GIGAMORPH_REAL_DATA"), help="folder of real data")
    args = parser.parse_args()
    if args.real is None:
        parser.error("name the folder of real data: --real or GIGAMORPH_REAL_DATA")
    mammogram = args.real / "dicom" / "mg_ge_jpeg_lossless.dcm"
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "jpeg_lossless_3062x2394": compressed_mammogram(mammogram, args.repeats),
            "zstd_tiff_16384_region_1024": zstd_regions(Path(folder), args.repeats),
            "augmented_region_1024": augmented_regions(Path(folder), args.repeats),
            "uncompressed_dicom_600_MB": uncompressed(Path(folder), args.repeats),
            "header_ms": statistics.median(milliseconds(lambda: read_info(mammogram)) for _ in range(200)),
            "index_of_10000_headers_two_processes_s": index_seconds(mammogram, Path(folder)),
        }
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "repeats": args.repeats, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
