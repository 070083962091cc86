"""The runner of `gigamorph predict` on archives: kills, memory and throughput, and how long a device waits for images.

    python benchmarks/archive.py kills --count 200
    python benchmarks/archive.py kills-train --count 60
    python benchmarks/archive.py rows --count 1000 --count 1000000
    python benchmarks/archive.py idle --count 30

`kills` runs a small real network by tiles; `kills-train` runs `gigamorph train` on phantoms. `rows` has neither images
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
import random
import resource
import signal
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

from gigamorph import accelerate
from gigamorph.cli.main import cli
from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import ImageSource
from gigamorph.engine.images.stored import ArrayPixels
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.predict import parts, runner
from gigamorph.engine.predict.parts import read_parts
from gigamorph.engine.predict.predictor import Classifier
from gigamorph.engine.predict.run import Options, predict
from gigamorph.engine.train.checkpoint import load_checkpoint

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


def tiny(*, device: str) -> Classifier:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = accelerate(nn.Sequential(*layers, nn.Linear(4, 2)), tile=16)
    return Classifier(net, CLASSES, functools.partial(ImageDataset, channels=1))


def kills(count: int, folder: Path) -> dict[str, Any]:
    """Run over 60 images with kills at random moments, until `count` kills; compare all results."""
    parts_of = functools.partial(parts.Parts, rows=7)
    runner.Parts = parts_of  # pyright: ignore[reportAttributeAccessIssue]
    random_pixels = np.random.default_rng(0)
    for number in range(60):
        np.save(folder / f"{number:03d}.npy", random_pixels.random((24 + number % 5, 24), np.float32))
    (folder / "031.npy").write_bytes(b"damaged")
    images = sorted(folder.glob("*.npy"))
    names = ("predictions.csv", "breasts.csv", "quarantine.csv")
    predict(tiny, images, folder / "whole", Options("m", max_failures=0.5, workers=0))
    whole = [(folder / "whole" / name).read_bytes() for name in names]
    drawn = random.Random(0)
    found = {"kills": 0, "runs": 0, "lost": 0, "doubled": 0, "different": 0, "kills_per_run": []}
    while found["kills"] < count:
        out, own = folder / f"run{found['runs']}", 0
        options = Options("m", max_failures=0.5, workers=found["runs"] % 3, resume=True)
        kept: list[str] = []
        while True:
            child = os.fork()
            if not child:
                code = 1
                try:
                    predict(tiny, images, out, options)
                    code = 0
                finally:
                    os._exit(code)
            if found["kills"] + own < count:
                time.sleep(drawn.uniform(0, 1.2))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            own += os.WIFSIGNALED(status)
            keys = [row["key"] for rows in read_parts(out / "parts") for row in rows]
            found["lost"] += len(set(kept) - set(keys))
            found["doubled"] += len(keys) - len(set(keys))
            kept = keys
            if os.WIFEXITED(status):
                if os.WEXITSTATUS(status):
                    raise SystemExit("a run failed")
                break
        found["different"] += [(out / name).read_bytes() for name in names] != whole
        found["kills"] += own
        found["runs"] += 1
        found["kills_per_run"].append(own)
    return found


def train_in_child(words: list[str]) -> int:
    """Start `gigamorph train` in a fork, and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        cli.main(["train", *words], prog_name="gigamorph", standalone_mode=False)
        code = 0
    except BaseException as error:
        print(f"gigamorph train: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def kills_train(count: int, folder: Path) -> dict[str, Any]:
    """Kill trainings at random moments, until `count` kills, and resume each.

    Final weights, and the optimizer's state if a checkpoint has it, are compared bit for bit.
    """
    table = write_phantoms(folder / "phantoms", patients=6, height=128, width=96, seed=1, workers=1)
    settings = ["--model", "lesionnet", "--mean", "0.3", "--std", "0.1", "--epochs", "4", "--quiet", "--device", "cpu"]
    words = [str(table), *settings, "--out"]
    began = time.monotonic()
    _, status = os.waitpid(train_in_child([*words, str(folder / "whole")]), 0)
    if status:
        raise SystemExit("the training failed")
    took = time.monotonic() - began
    names = ("last.ckpt", "best.ckpt")
    whole = [load_checkpoint(folder / "whole" / name) for name in names]
    drawn = random.Random(0)
    found: dict[str, Any] = {
        "kills": 0,
        "runs": 0,
        "different": 0,
        "kills_per_run": [],
        "whole_seconds": round(took, 2),
    }
    while found["kills"] < count:
        out, own = folder / f"run{found['runs']}", 0
        while True:
            child = train_in_child([*words, str(out), "--resume"])
            if found["kills"] + own < count:
                time.sleep(drawn.uniform(0, 0.8 * took))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            own += os.WIFSIGNALED(status)
            if os.WIFEXITED(status):
                if os.WEXITSTATUS(status):
                    raise SystemExit("a training failed")
                break
        ended = [load_checkpoint(out / name) for name in names]
        found["different"] += any(
            not same(mine.get(part), theirs[part])
            for mine, theirs in zip(ended, whole, strict=True)
            for part in ("state_dict", "optimizer_states")
            if part in theirs
        )
        found["kills"] += own
        found["runs"] += 1
        found["kills_per_run"].append(own)
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal, tensors bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


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
    parser.add_argument("what", choices=["kills", "kills-train", "rows", "idle", "one"])
    parser.add_argument("--count", type=int, action="append")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--image", type=Path)
    given = parser.parse_args()
    if given.what == "one":
        print(json.dumps(one_count(given.count[0], given.workers)))
        return
    began, load = time.monotonic(), os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        if given.what == "kills":
            found = kills((given.count or [200])[0], Path(name))
        elif given.what == "kills-train":
            found = kills_train((given.count or [60])[0], Path(name))
        elif given.what == "rows":
            found = rows(given.count or [1000, 1_000_000], given.workers)
        else:
            image = given.image or compressed_phantom(Path(name) / "image.dcm", 1536, 1152)
            found = idle(image, (given.count or [30])[0], Path(name))
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    # Load averages: above the number of CPUs, timings were affected by other work.
    machine |= {"load_before": load, "load_after": os.getloadavg(), "seconds": round(time.monotonic() - began, 1)}
    path = RESULTS / f"archive_{given.what.replace('-', '_')}.json"
    path.write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
