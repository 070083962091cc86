"""``gigamorph predict``: predictions for any number of images, per image, breast and exam, and heat maps."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import rich_click as click

from . import options, runner


@click.command()
@click.argument("checkpoint", type=click.Path())
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for the predictions.")
@click.option("--heatmaps", is_flag=True, help="Draw the maps of explain, on every pixel of each stored image.")
@click.option(
    "--calibration",
    "calibration_file",
    type=click.Path(dir_okay=False),
    help="calibration.json of this checkpoint, from gigamorph eval: calibrated probabilities, and a column called.",
)
@click.option(
    "--identifiers",
    is_flag=True,
    help="Write PatientID and StudyInstanceUID of DICOM files instead of numbers for patients and exams.",
)
@options.precision
@runner.over_images
def predict(
    images: tuple[str, ...],
    out: str,
    heatmaps: bool,
    calibration_file: str | None,
    identifiers: bool,
    run: runner.ImageRun,
) -> None:
    """Predict with a checkpoint of gigamorph train, which contains model, classes and preprocessing.

    CHECKPOINT can also be a folder of gigamorph import (a network or an ensemble), a folder of gigamorph train --folds
    (the mean of its networks), or a recipe's checkpoint with a classifier of whole images: those of morphhr and
    end2end, and the fine-tuned networks of dvme.

    IMAGES are image files, folders, or tables (csv or Parquet) with a column image_path. They can also be URLs of
    fsspec, as in https://host/a.dcm or zip://a.dcm::exams.zip, or of a DICOMweb store, as in
    dicomweb+https://host/dicom-web/studies/UID or ...dicom-web/studies?StudyDate=20260101-. Memory does not grow with
    the number of images.

    Each result is stored in OUT/parts at once, so that --resume computes only the rest. At the end, the command writes
    predictions.csv, breasts.csv (mean of the views of each breast), exams.csv (highest of the breasts of each exam) and
    predictions.json (the model). A damaged image stops the command with an error that names it, unless --skip-bad or
    --max-failures put it in quarantine.csv.

    The column split is the split of the image in the training's table, otherwise that of the given table. The area
    under the ROC curve is reported for each split separately.

    With --calibration, probabilities and log-odds are calibrated as measured by gigamorph eval on other images (for
    example, split val). The column called is 1 if the threshold of its middle specificity is reached.

    For a checkpoint of --task masks, OUT/masks has a file for each image, of the same size, with the number of the most
    probable class of each pixel. predictions.csv has the share of each class, and Dice if the table names masks.

    With --store, the command sends a structured report (TID 1500) of each study to a DICOMweb store at the end; for
    masks, a DICOM SEG of each image.

    Example: gigamorph predict run/best.ckpt archive.parquet --max-failures 1% --devices 4 --out predictions --resume

    With all folds: gigamorph predict run table.csv --out predictions
    """
    from ..engine.evaluate.recalibration import read_calibration
    from ..engine.predict.job import opened_with_white
    from ..engine.predict.masks import MaskOptions, gives_masks, open_segmenter, predict_masks
    from ..engine.predict.run import PredictOptions
    from ..engine.predict.run import predict as predicted

    masks = gives_masks(run.checkpoint)
    if masks and (heatmaps or calibration_file is not None):
        raise click.UsageError("--heatmaps and --calibration do not support checkpoints of masks; omit them")
    if masks and run.options["flips"]:
        raise click.UsageError("--flip averages probabilities of images and does not support masks; omit it")
    calibration = None
    if calibration_file is not None:
        classes = run.opener(device="cpu").classes
        calibration = read_calibration(calibration_file, classes, run.options["model"], run.options["flips"])
    with runner.watching(run.as_json, run.options["device"]) as watch:
        if masks:
            opener: Any = functools.partial(open_segmenter, run.checkpoint, memory_budget=run.memory_budget)
            opener = functools.partial(opened_with_white, opener, run.options["white"])
            found = predict_masks(opener, images, out, MaskOptions(identifiers=identifiers, **run.options), watch)
            files = f"{Path(out) / 'masks'}, predictions.csv"
        else:
            own = {"heatmaps": heatmaps, "identifiers": identifiers, "calibration": calibration}
            found = predicted(run.opener, images, out, PredictOptions(**own, **run.options), watch)
            files = f"{Path(out) / 'predictions.csv'}, breasts.csv, exams.csv"
    runner.print_end(run, Path(out), found, "predicted", files)
