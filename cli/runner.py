"""Shared parts of commands that process many images: options, progress and JSON events."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from ..engine.errors import GigamorphError
from . import options
from .interrupts import Stopped
from .messages import counted, warn
from .progress import ProgressView
from .train import scores_line

if TYPE_CHECKING:
    from ..engine.datasets.tables import Record
    from ..engine.predict.options import Summary, Watch
    from ..engine.predict.predictor import Opener
    from ..engine.train.progress import Progress

_LEAST_FOR_RATE = 100
"""Least number of images for which the rate is printed."""
SPLITS = {
    "test": "test",
    "val": "val (chose the epoch)",
    "train": "train (learnt from these, so this measures nothing)",
    "": "split not known (may hold images of the training)",
}
"""How scores of a split are labelled, in the order of printing."""


@options.parsed
def _parse_shard(value: str) -> tuple[int, int]:
    parts = value.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not 1 <= int(parts[0]) <= int(parts[1]):
        raise GigamorphError(f"{value!r} is not a shard; write 1/4, 2/4, 3/4 or 4/4")
    return int(parts[0]), int(parts[1])


@options.parsed
def _parse_share(value: str) -> float:
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise GigamorphError(f"{value!r} is not a share; write 2% or 0.02")
    return share


resume: Any = click.option("--resume", is_flag=True, help="Continue an interrupted run of the same command.")
max_failures: Any = click.option(
    "--max-failures",
    metavar="SHARE",
    callback=_parse_share,
    help="List damaged or missing images in quarantine.csv, but stop when more than this share has failed, as in 2%.",
)
retry_failed: Any = click.option("--retry-failed", is_flag=True, help="With --resume, retry images in quarantine.csv.")
shard: Any = click.option(
    "--shard",
    metavar="I/N",
    default="1/1",
    show_default=False,
    callback=_parse_shard,
    help="Process part I of N, of about equal pixels; all shards write to one folder, on one or more machines.",
)
_MODEL_OPTIONS = (
    resume,
    click.option("--overwrite", is_flag=True, help="Replace an earlier run of this command in the folder."),
    click.option("--skip-bad", is_flag=True, help="List damaged or missing images in quarantine.csv and continue."),
    max_failures,
    retry_failed,
    shard,
    click.option("--devices", type=click.IntRange(1), default=1, help="Number of GPUs, or of CPU processes."),
    options.flips("Also average the outputs over the mirrored image. Repeatable."),
    click.option("--workers", type=click.IntRange(0), help="Processes per device that prefetch and decode images."),
    click.option(
        "--engine",
        type=click.Choice(["embedded", "ray"]),
        default="embedded",
        help="Run on this machine, or with --devices actors on a Ray cluster (pip install 'gigamorph[ray]').",
    ),
    click.option(
        "--address", help="Ray cluster, as in auto or HOST:6379; by default RAY_ADDRESS, or one on this machine."
    ),
    click.option(
        "--store",
        default="",
        show_default=False,
        metavar="URL",
        help="DICOMweb store for the results, sent once at the end, as in dicomweb+https://host/dicom-web.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print progress, failures and the end as JSON lines."),
    options.columns,
    options.white,
    options.trust,
    options.memory_budget,
    options.device,
)


@dataclass(frozen=True)
class ImageRun:
    """Arguments of a run over images with a model.

    Attributes:
        opener: function that opens the model.
        options: fields of `gigamorph.engine.predict.options.RunOptions` by name.
        as_json: whether to print JSON lines.
        checkpoint: file of the model, or its folder.
        memory_budget: memory of a step in bytes.
    """

    opener: Opener
    options: dict[str, Any]
    as_json: bool
    checkpoint: str
    memory_budget: int | None


def over_images(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a run over images to a command with the argument ``checkpoint``; it gets them as `run`."""

    @functools.wraps(command)
    def wrapper(checkpoint: str, skip_bad: bool, as_json: bool, memory_budget: int | None, **given: Any) -> None:
        from ..engine.models.folder import digest_of, fold_checkpoints
        from ..engine.predict.job import opened_with_white
        from ..engine.predict.options import RunOptions
        from ..engine.published.classifier import look_at_folds, open_classifier
        from ..engine.train.checkpoint import load_checkpoint

        chosen = {field.name: given.pop(field.name) for field in fields(RunOptions) if field.name in given}
        if chosen["address"] is not None and chosen["engine"] != "ray":
            raise click.UsageError("--address needs --engine ray")
        if not Path(checkpoint).is_dir():
            load_checkpoint(checkpoint)  # reports errors before a folder is made or images are searched
        elif fold_checkpoints(checkpoint):
            summary = look_at_folds(checkpoint)
            if not as_json:
                click.echo(summary)
        if chosen["overwrite"] and (chosen["resume"] or chosen["shard"][1] > 1):
            raise click.UsageError("--overwrite removes a run and all its shards; omit --resume and --shard")
        if skip_bad and chosen["max_failures"] is None:
            chosen["max_failures"] = 1.0
        chosen |= {"model": digest_of(checkpoint), "checkpoint": Path(checkpoint).name}
        opener = functools.partial(open_classifier, checkpoint, memory_budget=memory_budget, flips=chosen["flips"])
        opener = functools.partial(opened_with_white, opener, chosen["white"])
        command(run=ImageRun(opener, chosen, as_json, checkpoint, memory_budget), **given)

    for option in reversed(_MODEL_OPTIONS):
        wrapper = option(wrapper)
    return wrapper


@contextmanager
def watching(as_json: bool, device: str) -> Iterator[Watch]:
    """Yield a watch that draws the progress of a run or prints JSON lines, and warns of unusual grey scales."""
    from ..engine.parallel.launch import terminated_as_interrupted
    from ..engine.predict.options import Watch
    from ..engine.train.progress import Meter

    if as_json:
        lines = _Lines()
        with terminated_as_interrupted():
            yield Watch(Meter(lines), lines.warn, lines.failed, functools.partial(_warn_of_grey, lines.warn))
        return
    try:
        with terminated_as_interrupted(), ProgressView(device=device) as view:
            meter = Meter(view)
            look = functools.partial(_warn_of_grey, warn)
            yield Watch(meter, warn, lambda image, reason: meter.failed(f"skipped: {reason}"), look)
    except KeyboardInterrupt as error:
        click.echo("stopped; finished work is stored, and the same command with --resume continues", err=True)
        raise Stopped from error


def _warn_of_grey(warn: Callable[[str], object], network: Any, records: Sequence[Record]) -> None:
    """Check the grey scale of a few images, and warn if it is unusual."""
    from ..engine.datasets.dataset import ImageDataset
    from ..engine.datasets.grey import grey_warnings

    images = network.open_images(records)
    for text in grey_warnings(images) if isinstance(images, ImageDataset) else ():
        warn(text)


def print_end(run: ImageRun, out: Path, found: Summary, done: str, files: str) -> None:
    """Print the result of a run: lines of text, or the event ``end``, the last JSON line.

    Args:
        done: what was done with each image.
        files: the files in `out`; those of an unfinished run are its parts.

    Raises:
        GigamorphError: no image could be computed.
    """
    _print_summary(run, out, found, done, files)
    if found.failed and not found.done:
        reasons = out / "quarantine.csv"
        raise GigamorphError(f"none of {counted(found.failed, 'image')} could be {done}; {reasons} lists the reasons")


def _print_summary(run: ImageRun, out: Path, found: Summary, done: str, files: str) -> None:
    if run.as_json:
        _print_event(
            "end",
            images=found.images,
            done=found.done,
            failed=found.failed,
            computed=found.computed,
            complete=found.complete,
            seconds=round(found.seconds, 3),
            images_per_second=round(found.computed / max(found.seconds, 1e-9), 4),
            idle=round(found.idle, 4),
            stored=found.stored,
            scores=found.scores,
        )
        return
    shard = ""
    if not found.complete:
        number, shards = run.options["shard"]
        shard = f"shard {number}/{shards}: " if shards > 1 else ""
        files = f"{out / 'parts'}; the tables are written when the other shards are done"
    click.echo(f"{shard}{counted(found.done, 'image')} {done}, {found.failed} skipped; {files}")
    if run.options["store"] and found.complete:
        click.echo(f"{found.stored} instances stored in {run.options['store']}")
    if found.failed:
        click.echo(f"{out / 'quarantine.csv'} lists the reasons; --resume --retry-failed tries them again")
    if found.computed >= _LEAST_FOR_RATE:
        rate = found.computed / max(found.seconds, 1e-9)
        click.echo(f"{rate:.3g} images/s; the device waited for images {found.idle:.1%} of the time")
    for split, note in SPLITS.items():
        measured = found.scores.get(split, {})
        if "dice" in measured or any(measured.get(name) is not None for name in ("auc_image", "mae_image")):
            click.echo(f"{note}: {scores_line(measured)}")


class _Lines:
    """Prints the events of a run as JSON lines: `progress` at most once per second, `failed`, and `warning`."""

    def __init__(self) -> None:
        self._began, self._printed, self._first = time.monotonic(), 0.0, -1
        self._failed = 0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._first < 0:
            self._began, self._first = now, progress.image
        if now - self._printed < 1 and progress.image < progress.images:
            return
        self._printed = now
        rate = (progress.image - self._first) / max(now - self._began, 1e-9)
        _print_event(
            "progress",
            done=progress.image,
            images=progress.images,
            failed=self._failed,
            images_per_second=round(rate, 4),
            megapixels_per_second=round(progress.pixels / 1e6 / max(now - self._began, 1e-9), 4),
            seconds_left=round((progress.images - progress.image) / rate, 1) if rate else None,
        )

    def failed(self, image: str, reason: str) -> None:
        self._failed += 1
        _print_event("failed", image=image, reason=reason)

    def warn(self, text: str) -> None:
        _print_event("warning", text=text)


def _print_event(event: str, **values: object) -> None:
    click.echo(json.dumps({"event": event, **values}))
