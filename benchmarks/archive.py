"""The runner of `gigamorph predict` on archives: memory and throughput, and how long a device waits for images.

    python benchmarks/archive.py rows --count 1000 --count 1000000
    python benchmarks/archive.py idle --count 30

`rows` has neither images
nor a network, so it measures the runner alone; each row is a separate process. In `idle` the network sleeps for as long
as an image takes to decode (--image, by default a phantom of 1536 x 1152 in JPEG lossless). Each writes
benchmarks/results/archive_NAME.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import torch
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLosslessSV1
from torch import nn

from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.images.arrays import ArrayPixels
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import ImageSource
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.predict.predictor import Classifier
from gigamorph.engine.predict.run import Options, predict

RESULTS = Path(__file__).parent / "results"
CLASSES = ["0", "1"]


class Sleeper(nn.Module):
    """A network that takes a given time and reads at most one pixel."""

    on_tile = None

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, source: Any) -> torch.Tensor:
        if self.seconds:
            source.read(0, 1, 0, 1)  # decode if it was not prefetched
            time.sleep(self.seconds)
        return torch.tensor([[0.0, 1.0]])


class NoImages:
    """Items without image files."""

    def __init__(self, records: Any) -> None:
        self.records = list(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = ImageSource(ArrayPixels(np.zeros((1, 8, 8), np.uint8), "nothing"))
        return {"image": image, "label": -1, "index": 0, "record": self.records[index]}


def sleeper(seconds: float, images: Any) -> Any:
    return lambda device: Classifier(Sleeper(seconds), CLASSES, images)  # pyright: ignore[reportArgumentType]


def one_count(count: int, workers: int) -> dict[str, Any]:
    """Measure the runner on a table of `count` rows; it must be the only work of its process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "table.csv").open("w") as file:
            file.write("image_path,patient_id,laterality,view\n")
            for number in range(count):
                exam, side, view = number // 4, "LR"[number % 2], ("CC", "MLO")[number // 2 % 2]
                file.write(f"images/exam{exam:07d}/{side}_{view}.dcm,P{exam:07d},{side},{view}\n")
        before = resource.getrusage(resource.RUSAGE_SELF)
        began = time.monotonic()
        options = Options("m", max_failures=1.0, workers=workers)
        done = predict(sleeper(0.0, NoImages), [folder / "table.csv"], folder / "out", options)
        seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {
            "rows": count,
            "workers": workers,
            "done": done.done,
            "loop_images_per_second": round(count / done.seconds, 1),
            "all_seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "images_per_cpu_second": round(count / cpu, 1),
            "peak_before_mib": round(before.ru_maxrss / 1024, 1),
            "peak_mib": round(after.ru_maxrss / 1024, 1),
            "parts": len(list((folder / "out" / "parts").rglob("*.parquet"))),
        }


def rows(counts: list[int], workers: int) -> dict[str, Any]:
    found = []
    for count in counts:
        command = [sys.executable, __file__, "one", "--count", str(count), "--workers", str(workers)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(said.splitlines()[-1]))
        print(found[-1], flush=True)
    return {"rows": found}


def compressed_phantom(path: Path, height: int, width: int) -> Path:
    """Write a phantom mammogram as in archives: DICOM with JPEG lossless."""
    write_phantoms(path.parent / "phantoms", patients=1, height=height, width=width, seed=1, workers=1)
    ds = dcmread(sorted((path.parent / "phantoms" / "images").iterdir())[0])
    pixels = ds.pixel_array
    ds.PixelData = encapsulate([imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=ds.BitsStored)])
    ds["PixelData"].VR = "OB"
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    ds.save_as(path)
    return path


def idle(image: Path, images: int, folder: Path) -> dict[str, Any]:
    """Simulate a device that computes for as long as an image takes to decode, with and without reader processes."""
    took = []
    for _ in range(5):
        began = time.monotonic()
        open_pixels(image, flip=False).read(0, 1, 0, 1)
        took.append(time.monotonic() - began)
    seconds = sorted(took)[2]
    for number in range(images):
        os.link(image, folder / f"copy{number:03d}{image.suffix}")
    found = []
    for factor in (1.0, 2.0):
        for workers in (0, 1, 2):
            out = folder / f"{factor}-{workers}"
            opener = sleeper(factor * seconds, functools.partial(ImageDataset, channels=1))
            names = sorted(folder.glob(f"copy*{image.suffix}"))
            done = predict(opener, names, out, Options("m", workers=workers))
            # Time that is neither sleep nor bookkeeping is spent on waiting for pixels.
            share = 1 - images * factor * seconds / done.seconds
            row = {"sleep_over_decoding": factor, "workers": workers, "seconds": round(done.seconds, 3)}
            found.append(row | {"waited_share": round(done.idle, 4), "not_computing_share": round(share, 4)})
            print(found[-1], flush=True)
    return {"image": image.name, "decoding_seconds": round(seconds, 4), "images": images, "idle": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rows", "idle", "one"])
    parser.add_argument("--count", type=int, action="append")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--image", type=Path)
    given = parser.parse_args()
    if given.what == "one":
        print(json.dumps(one_count(given.count[0], given.workers)))
        return
    began, load = time.monotonic(), os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        if given.what == "rows":
            found = rows(given.count or [1000, 1_000_000], given.workers)
        else:
            image = given.image or compressed_phantom(Path(name) / "image.dcm", 1536, 1152)
            found = idle(image, (given.count or [30])[0], Path(name))
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    # Load averages: above the number of CPUs, timings were affected by other work.
    machine |= {"load_before": load, "load_after": os.getloadavg(), "seconds": round(time.monotonic() - began, 1)}
    path = RESULTS / f"archive_{given.what}.json"
    path.write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
