"""What the commands that run over archives have in common: their options, and what they tell as they go."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from . import options
from .interrupts import Stopped
from .progress import ProgressView

if TYPE_CHECKING:
    from ..engine.datasets.tables import Record
    from ..engine.predict.options import Summary, Watch
    from ..engine.predict.predictor import Opener
    from ..engine.train.progress import Progress

SPLITS = {
    "test": "test",
    "val": "val (chose the epoch)",
    "train": "train (learnt from these, so this measures nothing)",
    "": "split not known (may hold images of the training)",
}
"""What is told of the scores of a split, in this order."""


def _parse_shard(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int]:
    if value is None:
        return 1, 1
    parts = value.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not 1 <= int(parts[0]) <= int(parts[1]):
        raise click.BadParameter(f"{value!r} is no shard; write 1/4, 2/4, 3/4 or 4/4", ctx, param)
    return int(parts[0]), int(parts[1])


def _parse_share(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise click.BadParameter(f"{value!r} is no share; write 2% or 0.02", ctx, param)
    return share


resume: Any = click.option("--resume", is_flag=True, help="Go on in a folder that a run of the same has begun.")
max_failures: Any = click.option(
    "--max-failures",
    metavar="SHARE",
    callback=_parse_share,
    help="Put damaged or missing images in quarantine.csv, but stop when more than this share has failed, as in 2%.",
)
retry_failed: Any = click.option("--retry-failed", is_flag=True, help="Try images in quarantine again; with --resume.")
shard: Any = click.option(
    "--shard",
    metavar="I/N",
    callback=_parse_shard,
    help="Do the I-th of N parts with about as many pixels each; all into one folder, on machines of any number.",
)
_OF_A_MODEL = (
    resume,
    click.option("--overwrite", is_flag=True, help="Begin anew in a folder that a run of this command has filled."),
    click.option("--skip-bad", is_flag=True, help="Put images that are damaged or missing in quarantine.csv."),
    max_failures,
    retry_failed,
    shard,
    click.option(
        "--devices",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="GPUs, or processes on the CPU, to work on.",
    ),
    options.flips("Average over the mirrored image too: its probabilities, or numbers. Repeatable."),
    click.option("--workers", type=click.IntRange(0), help="Processes per device that read and decode ahead."),
    click.option(
        "--engine",
        type=click.Choice(["embedded", "ray"]),
        default="embedded",
        show_default=True,
        help="Work on this machine, or with --devices actors on a Ray cluster (pip install 'gigamorph[ray]').",
    ),
    click.option(
        "--address", help="Of the Ray cluster, as auto or HOST:6379; by default RAY_ADDRESS, or one on this machine."
    ),
    click.option(
        "--store",
        default="",
        metavar="URL",
        help="DICOMweb store to which results go at the end, as dicomweb+https://host/dicom-web; each once.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Tell progress, failures and the end as lines of JSON."),
    options.white,
    options.trust,
    options.memory_budget,
    options.device,
)


@dataclass(frozen=True)
class Run:
    """A run over images with a model, as the command line asks for it.

    Attributes:
        opener: opens the model.
        options: of the run, by the names of `gigamorph.engine.predict.options.RunOptions`.
        as_json: tell it as lines of JSON.
        checkpoint: of the model, or its folder.
        memory_budget: bytes.
    """

    opener: Opener
    options: dict[str, Any]
    as_json: bool
    checkpoint: str
    memory_budget: int | None


def over_images(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a run over images with its argument ``checkpoint``; it takes them as `run`."""

    @functools.wraps(command)
    def gathered(
        checkpoint: str,
        skip_bad: bool,
        max_failures: float | None,
        engine: str,
        address: str | None,
        as_json: bool,
        memory_budget: int | None,
        **given: Any,
    ) -> None:
        from ..engine.models.folder import digest_of
        from ..engine.models.folds import fold_checkpoints
        from ..engine.predict.job import opened_with_white
        from ..engine.published.folds import look_at_folds
        from ..engine.recipes.networks import open_predictor
        from ..engine.train.checkpoint import load_checkpoint

        if address is not None and engine != "ray":
            raise click.UsageError("--address is a Ray cluster's; add --engine ray")
        if not Path(checkpoint).is_dir():
            load_checkpoint(checkpoint)  # before a folder is made or images are looked for
        elif fold_checkpoints(checkpoint):
            told = look_at_folds(checkpoint)
            if not as_json:
                click.echo(told)
        if given["overwrite"] and (given["resume"] or given["shard"][1] > 1):
            raise click.UsageError("--overwrite removes a run and all its shards; leave out --resume and --shard")
        names = (
            "resume",
            "overwrite",
            "retry_failed",
            "shard",
            "devices",
            "device",
            "workers",
            "flips",
            "store",
            "white",
        )
        chosen = {
            "model": digest_of(checkpoint),
            "checkpoint": Path(checkpoint).name,
            "max_failures": 1.0 if skip_bad and max_failures is None else max_failures,
            "engine": engine,
            "address": address,
            **{name: given.pop(name) for name in names},
        }
        opener = functools.partial(open_predictor, checkpoint, memory_budget=memory_budget, flips=chosen["flips"])
        opener = functools.partial(opened_with_white, opener, chosen["white"])
        command(run=Run(opener, chosen, as_json, checkpoint, memory_budget), **given)

    for option in reversed(_OF_A_MODEL):
        gathered = option(gathered)
    return gathered


def warn(text: str) -> None:
    click.echo(f"warning: {text}", err=True)


@contextmanager
def watching(as_json: bool, device: str) -> Iterator[Watch]:
    """Who draws a run, or writes it as lines of JSON; it warns of some images' grey scale."""
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
        click.echo("stopped; what is done is kept, and the same command with --resume goes on", err=True)
        raise Stopped from error


def _warn_of_grey(warn: Callable[[str], object], network: Any, records: Sequence[Record]) -> None:
    """Look at the grey scale of a few images, and warn of an unusual one."""
    from ..engine.datasets.dataset import dataset_in
    from ..engine.datasets.grey import grey_warnings

    data = dataset_in(network.open_images(records))
    for text in () if data is None else grey_warnings(data):
        warn(text)


def tell_end(found: Summary) -> None:
    """The last line of JSON."""
    _say(
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


def tell_stored(found: Summary, store: str) -> None:
    """What went to a DICOMweb store, if anything should."""
    if store and found.complete:
        click.echo(f"{found.stored} instances stored in {store}")


class _Lines:
    """What a run tells, as lines of JSON: `progress` at most every second, `failed`, and `warning`."""

    def __init__(self) -> None:
        self._began, self._told, self._first = time.monotonic(), 0.0, -1
        self._failed = 0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._first < 0:
            self._began, self._first = now, progress.image
        if now - self._told < 1 and progress.image < progress.images:
            return
        self._told = now
        rate = (progress.image - self._first) / max(now - self._began, 1e-9)
        _say(
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
        _say("failed", image=image, reason=reason)

    def warn(self, text: str) -> None:
        _say("warning", text=text)


def _say(event: str, **values: object) -> None:
    click.echo(json.dumps({"event": event, **values}))
