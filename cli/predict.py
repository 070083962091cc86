"""``gigamorph predict``: predictions of any number of images, per image and per breast, and heat maps."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from . import options

if TYPE_CHECKING:
    from ..engine.datasets.tables import Record
    from ..engine.predict.predictor import Classifier
    from ..engine.train.progress import Progress

_MANY = 100
"""Images whose rate is told."""
_SPLITS = {
    "test": "test",
    "val": "val (chose the epoch)",
    "train": "train (learnt from these, so this measures nothing)",
    "": "split not known (may hold images of the training)",
}


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


@click.command()
@click.argument("checkpoint", type=click.Path())
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for the predictions.")
@click.option("--heatmaps", is_flag=True, help="Draw what explain draws, on every pixel of each image as stored.")
@click.option(
    "--calibration",
    "calibrated_by",
    type=click.Path(dir_okay=False),
    help="calibration.json that gigamorph eval wrote of this checkpoint: calibrated probabilities, and who is called.",
)
@click.option("--resume", is_flag=True, help="Go on in a folder that holds predictions of this checkpoint.")
@click.option("--skip-bad", is_flag=True, help="Put damaged or missing images in quarantine.csv and go on.")
@click.option(
    "--max-failures",
    metavar="SHARE",
    callback=_parse_share,
    help="The same, but stop when more than this share of the images has failed, as in 2%.",
)
@click.option("--retry-failed", is_flag=True, help="Try images in quarantine again; with --resume.")
@click.option(
    "--shard",
    metavar="I/N",
    callback=_parse_shard,
    help="Predict the I-th of N parts with about as many pixels each; all into one folder, on machines of any number.",
)
@click.option(
    "--devices",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="GPUs, or processes on the CPU, to predict with.",
)
@click.option("--workers", type=click.IntRange(0), help="Processes per device that read and decode ahead.")
@click.option("--identifiers", is_flag=True, help="Name patients by the PatientID of DICOM files, not by numbers.")
@click.option("--json", "as_json", is_flag=True, help="Tell progress, failures and the end as lines of JSON.")
@options.memory_budget
@options.device
def predict(
    checkpoint: str,
    images: tuple[str, ...],
    out: str,
    heatmaps: bool,
    calibrated_by: str | None,
    resume: bool,
    skip_bad: bool,
    max_failures: float | None,
    retry_failed: bool,
    shard: tuple[int, int],
    devices: int,
    workers: int | None,
    identifiers: bool,
    as_json: bool,
    memory_budget: int | None,
    device: str,
) -> None:
    """Predict with a checkpoint of gigamorph train, which knows model, classes and preprocessing.

    Or with a folder of gigamorph import, an ensemble among them.

    A recipe's checkpoints serve as well where they hold a classifier of whole images: those of
    morphhr and end2end, and the fine-tuned networks of dvme.

    IMAGES are image files, folders, or tables (csv or Parquet) with a column image_path; they may lie where fsspec
    reaches them, as in https://host/a.dcm or zip://a.dcm::exams.zip. Memory does not grow with their number.

    Each result is kept in OUT/parts as soon as it is known, whatever ends the command: --resume computes the rest.
    predictions.csv, breasts.csv (the mean of the views of each breast) and exams.csv (the highest of the breasts of
    each exam) are written at the end; predictions.json names the model. A damaged image ends the command with an error
    that names it, unless --skip-bad or --max-failures put it in quarantine.csv.

    The column split says what an image was in the training: of the training's own table, else as the table says. Areas
    under the ROC curve are given of each split alone.

    With --calibration, probabilities and log-odds are calibrated as gigamorph eval measured it on other images (of the
    split val, say), and the column called is 1 where the threshold of its middle specificity is reached.

    Example: gigamorph predict run/best.ckpt archive.parquet --max-failures 1% --devices 4 --out predictions --resume
    """
    from ..engine.evaluate.recalibration import read_calibration
    from ..engine.models.folder import digest_of
    from ..engine.predict.run import Options, Watch
    from ..engine.predict.run import predict as run
    from ..engine.recipes.networks import open_predictor
    from ..engine.train.checkpoint import load_checkpoint
    from ..engine.train.progress import Meter
    from .progress import ProgressView

    opener = functools.partial(open_predictor, checkpoint, memory_budget=memory_budget)
    if not Path(checkpoint).is_dir():
        load_checkpoint(checkpoint)
    digest = digest_of(checkpoint)
    calibration = None
    if calibrated_by is not None:
        calibration = read_calibration(calibrated_by, opener(device="cpu").classes, digest)
    chosen = Options(
        model=digest,
        checkpoint=Path(checkpoint).name,
        heatmaps=heatmaps,
        identifiers=identifiers,
        calibration=calibration,
        resume=resume,
        retry_failed=retry_failed,
        max_failures=1.0 if skip_bad and max_failures is None else max_failures,
        shard=shard,
        devices=devices,
        device=device,
        workers=workers,
    )
    if as_json:
        lines = _Lines()
        watch = Watch(Meter(lines), lines.warn, lines.failed, _grey(lines.warn))
        lines.end(run(opener, images, out, chosen, watch))
        return

    def warn(text: str) -> None:
        click.echo(f"warning: {text}", err=True)

    with ProgressView(device=device) as view:
        meter = Meter(view)
        watch = Watch(meter, warn, lambda image, reason: meter.failed(f"skipped: {reason}"), _grey(warn))
        found = run(opener, images, out, chosen, watch)
    if not found.complete:
        of = f"shard {shard[0]}/{shard[1]}: " if shard[1] > 1 else ""
        click.echo(
            f"{of}{found.done} images predicted, {found.failed} skipped; {Path(out) / 'parts'}; predictions.csv is "
            "written when the other shards are done"
        )
        return
    click.echo(f"{found.done} images predicted, {found.failed} skipped; {Path(out) / 'predictions.csv'}, breasts.csv")
    if found.failed:
        click.echo(f"{Path(out) / 'quarantine.csv'} says why; --resume --retry-failed tries them again")
    if found.computed >= _MANY:
        rate = found.computed / max(found.seconds, 1e-9)
        click.echo(f"{rate:.3g} images/s; the device waited for images {found.idle:.1%} of the time")
    for split, note in _SPLITS.items():
        labelled = found.scores.get(split, {})
        if labelled.get("auc_image") is not None:
            area = f"AUC per image {labelled['auc_image']:.4f} ({labelled['images']} images)"
            breast = "undefined" if labelled["auc_breast"] is None else f"{labelled['auc_breast']:.4f}"
            click.echo(f"{note}: {area}, per breast {breast} ({labelled['breasts']} breasts)")


def _grey(warn: Callable[[str], object]) -> Callable[[Classifier, Sequence[Record]], None]:
    """A look at the grey scale of a few images."""

    def look(classifier: Classifier, records: Sequence[Record]) -> None:
        from ..engine.datasets.dataset import ImageDataset
        from ..engine.datasets.grey import grey_warnings

        data = classifier.open_images(records)
        if isinstance(data, ImageDataset):
            for text in grey_warnings(data):
                warn(text)

    return look


class _Lines:
    """What a run tells, as lines of JSON: `progress` at most every second, `failed`, `warning`, and `end`."""

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
        self._say(
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
        self._say("failed", image=image, reason=reason)

    def warn(self, text: str) -> None:
        self._say("warning", text=text)

    def end(self, found: Any) -> None:
        self._say(
            "end",
            images=found.images,
            done=found.done,
            failed=found.failed,
            computed=found.computed,
            complete=found.complete,
            seconds=round(found.seconds, 3),
            images_per_second=round(found.computed / max(found.seconds, 1e-9), 4),
            idle=round(found.idle, 4),
            scores=found.scores,
        )

    @staticmethod
    def _say(event: str, **values: object) -> None:
        click.echo(json.dumps({"event": event, **values}))
