"""The cost of an archive: constants of this machine, images per second of 1, 8 and 64 GPUs, checked by simulation.

    python benchmarks/scale.py constants --image /data/dicom/mammogram.dcm
    python benchmarks/scale.py predict --compute 0.2
    python benchmarks/scale.py simulate --compute 0.1 --images 40

`constants` measures CPU seconds, which are valid on a busy machine too, and writes benchmarks/results/scale.json for
the others. `simulate` runs the real runner with a network that sleeps for --compute seconds and compares its rate with
the prediction. --image is a mammogram as stored in an archive; by default a phantom compressed as JPEG lossless.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from archive import CLASSES, Sleeper, compressed_phantom, one_count

from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import ImageSource
from gigamorph.engine.predict.decoders import DecodedPixels
from gigamorph.engine.predict.predictor import Classifier
from gigamorph.engine.predict.run import Options, predict

RESULTS = Path(__file__).parent / "results" / "scale.json"
NODE_GPUS, CORES_PER_GPU, NETWORK = 8, 8, 1.25e9  # a node: GPUs, cores per GPU, bytes per second (10 Gbit/s)


def min_cpu_seconds(call: Callable[[], object], rounds: int = 7) -> float:
    """Return the minimal CPU seconds of a call over some rounds."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return min(found)


def constants(image: Path, rows: int, folder: Path) -> dict[str, Any]:
    """Measure the constants of one image and of one row."""

    def decoded() -> ImageSource:
        source = open_pixels(image)
        source.stored = DecodedPixels(source, image.name)
        return source

    held = decoded()
    row = one_count(rows, 0)
    syncs = []
    with (folder / "sync").open("wb") as file:
        for _ in range(30):
            file.write(b"x" * 300)
            file.flush()
            began = time.monotonic()
            os.fsync(file.fileno())
            syncs.append(time.monotonic() - began)
    height, width = held.shape[-2:]
    return {
        "image": f"{height} x {width}",
        "image_bytes": image.stat().st_size,
        "decode_cpu_seconds": round(min_cpu_seconds(decoded), 5),
        "hand_over_cpu_seconds": round(min_cpu_seconds(lambda: pickle.loads(pickle.dumps(held, 5))), 5),
        "row_cpu_seconds": round(1 / row["images_per_cpu_second"], 6),
        "row_rows": rows,
        "sync_seconds": round(statistics.median(syncs), 5),
    }


def rates(found: dict[str, Any], gpus: int, compute: float, cores: int = CORES_PER_GPU) -> dict[str, float]:
    """Return the images per second that each part allows; the run has the minimum.

    A process per GPU computes and receives decoded images; `cores` per GPU decode and transfer; nodes of eight GPUs
    fetch; one process writes the rows of all (with shards, each writes its own).
    """
    nodes = -(-gpus // NODE_GPUS)
    return {
        "compute": gpus / (compute + found["hand_over_cpu_seconds"]),
        "decode": gpus * cores / (found["decode_cpu_seconds"] + found["hand_over_cpu_seconds"]),
        "network": nodes * NETWORK / found["image_bytes"],
        "rows": 1 / found["row_cpu_seconds"],
    }


def table(found: dict[str, Any], compute: float) -> list[dict[str, Any]]:
    lines = []
    for gpus in (1, 8, 64):
        parts = rates(found, gpus, compute)
        slowest = min(parts, key=lambda name: parts[name])
        whole = {name: round(rate, 1) for name, rate in parts.items()}
        days = 40e6 / parts[slowest] / 86400
        lines.append(
            {"gpus": gpus, "compute_seconds": compute, **whole, "bottleneck": slowest, "40M_days": round(days, 2)}
        )
    return lines


def _sleeper(seconds: float, *, device: str) -> Classifier:
    return Classifier(Sleeper(seconds), CLASSES, functools.partial(ImageDataset, channels=1))  # pyright: ignore


def simulate(image: Path, images: int, compute: float, devices: int, workers: int, folder: Path) -> dict[str, Any]:
    """Run the real runner with a network that sleeps; measure decoding of this image first."""
    own = constants(image, 200, folder)
    names = []
    for number in range(images):
        names.append(folder / f"{number:05d}{image.suffix}")
        os.link(image, names[-1])
    opener = functools.partial(_sleeper, compute)
    options = Options("m", devices=devices, device="cpu", workers=workers)
    done = predict(opener, names, folder / "out", options)
    cores = max(1, min(workers * devices, os.cpu_count() or 1)) / devices
    parts = rates(own, devices, compute, cores) | {"network": float("inf")}  # type: ignore[arg-type]
    expected = min(parts.values())
    return {
        "images": images,
        "devices": devices,
        "workers": workers,
        "compute_seconds": compute,
        "decode_cpu_seconds": own["decode_cpu_seconds"],
        "bottleneck": min(parts, key=lambda name: parts[name]),
        "predicted_images_per_second": round(expected, 2),
        "measured_images_per_second": round(images / done.seconds, 2),
        "idle": round(done.idle, 4),
        "load": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["constants", "predict", "simulate"])
    parser.add_argument("--image", type=Path)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--compute", type=float, default=0.2)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(
        dir=given.image.parent if given.what == "simulate" and given.image else None
    ) as name:
        folder = Path(name)
        if given.what == "predict":
            for line in table(json.loads(RESULTS.read_text())["constants"], given.compute):
                print(json.dumps(line))
            return
        small = given.what == "simulate"
        image = given.image or compressed_phantom(folder / "phantom.dcm", *((1024, 768) if small else (3062, 2394)))
        found = constants(image, given.rows, folder) if not small else {}
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if small:
            line = simulate(image, given.images, given.compute, given.devices, given.workers, folder)
            stored["simulated"] = [*stored.get("simulated", []), line]
            print(json.dumps(line))
        else:
            stored["constants"] = found
            print(json.dumps(found))
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
