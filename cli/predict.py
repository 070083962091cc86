"""``gigamorph predict``: predictions of any number of images, per image and per breast, and heat maps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from . import options, runner
from .numerals import counted
from .predict_masks import predict_masks
from .train import scores_line

if TYPE_CHECKING:
    from ..engine.predict.options import Summary
    from ..engine.predict.run import Options

_MANY = 100
"""Images whose rate is told."""


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
@click.option(
    "--identifiers",
    is_flag=True,
    help="Name patients and exams as DICOM files do (PatientID, StudyInstanceUID), not by numbers.",
)
@options.precision
@runner.over_images
def predict(
    images: tuple[str, ...],
    out: str,
    heatmaps: bool,
    calibrated_by: str | None,
    identifiers: bool,
    precision: Any,
    run: runner.Run,
) -> None:
    """Predict with a checkpoint of gigamorph train, which knows model, classes and preprocessing.

    Or with a folder of gigamorph import, an ensemble among them; or with the folder of gigamorph train --folds, as the
    mean of its networks.

    A recipe's checkpoints serve as well where they hold a classifier of whole images: those of
    morphhr and end2end, and the fine-tuned networks of dvme.

    IMAGES are image files, folders, or tables (csv or Parquet) with a column image_path; they may lie where fsspec
    reaches them, as in https://host/a.dcm or zip://a.dcm::exams.zip, or in a DICOMweb store, as
    dicomweb+https://host/dicom-web/studies/UID or ...dicom-web/studies?StudyDate=20260101-. Memory does not grow with
    their number.

    With --store a structured report (TID 1500) of each study goes to a DICOMweb store at the end, or, of masks, a DICOM
    SEG of each image.

    Each result is kept in OUT/parts as soon as it is known, whatever ends the command: --resume computes the rest.
    predictions.csv, breasts.csv (the mean of the views of each breast) and exams.csv (the highest of the breasts of
    each exam) are written at the end; predictions.json names the model. A damaged image ends the command with an error
    that names it, unless --skip-bad or --max-failures put it in quarantine.csv.

    The column split says what an image was in the training: of the training's own table, else as the table says. Areas
    under the ROC curve are given of each split alone.

    With --calibration, probabilities and log-odds are calibrated as gigamorph eval measured it on other images (of the
    split val, say), and the column called is 1 where the threshold of its middle specificity is reached.

    Of a checkpoint of --task masks, OUT/masks has a file for each image, of the image's size, with the number of the
    likeliest class in each pixel; predictions.csv has the share of each class, and Dice where the table names masks.

    Example: gigamorph predict run/best.ckpt archive.parquet --max-failures 1% --devices 4 --out predictions --resume

    Of all folds: gigamorph predict run table.csv --out predictions
    """
    from ..engine.evaluate.recalibration import read_calibration
    from ..engine.predict.masks import gives_masks
    from ..engine.predict.run import Options
    from ..engine.predict.run import predict as predicted

    if gives_masks(run.checkpoint):
        if heatmaps or calibrated_by is not None:
            raise click.UsageError("--heatmaps and --calibration are of classes of images; this checkpoint is of masks")
        if run.options["flips"]:
            raise click.UsageError("--flip averages probabilities of images; masks are not averaged, leave it out")
        predict_masks(images, Path(out), identifiers, precision, run)
        return
    calibration = None
    if calibrated_by is not None:
        calibration = read_calibration(
            calibrated_by, run.opener(device="cpu").classes, run.options["model"], run.options["flips"]
        )
    own = {"heatmaps": heatmaps, "identifiers": identifiers, "calibration": calibration, "precision": precision}
    chosen = Options(**own, **run.options)
    with runner.watching(run.as_json, chosen.device) as watch:
        found = predicted(run.opener, images, out, chosen, watch)
    if run.as_json:
        runner.tell_end(found)
    else:
        _tell(chosen, Path(out), found)


def _tell(options: Options, out: Path, found: Summary) -> None:
    """For people."""
    if not found.complete:
        of = f"shard {options.shard[0]}/{options.shard[1]}: " if options.shard[1] > 1 else ""
        told = f"{of}{counted(found.done, 'image')} predicted, {found.failed} skipped; {out / 'parts'}"
        click.echo(f"{told}; predictions.csv is written when the other shards are done")
        return
    tables = f"{out / 'predictions.csv'}, breasts.csv, exams.csv"
    click.echo(f"{counted(found.done, 'image')} predicted, {found.failed} skipped; {tables}")
    runner.tell_stored(found, options.store)
    if found.failed:
        click.echo(f"{out / 'quarantine.csv'} says why; --resume --retry-failed tries them again")
    if found.computed >= _MANY:
        rate = found.computed / max(found.seconds, 1e-9)
        click.echo(f"{rate:.3g} images/s; the device waited for images {found.idle:.1%} of the time")
    for split, note in runner.SPLITS.items():
        measured = found.scores.get(split, {})
        if any(measured.get(name) is not None for name in ("auc_image", "mae_image")):
            click.echo(f"{note}: {scores_line(measured)}")
