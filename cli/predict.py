"""``gigamorph predict``: a csv per image and per breast, and heat maps at native resolution."""

from __future__ import annotations

import json
from pathlib import Path

import rich_click as click

from . import options

_SPLITS = {
    "test": "test",
    "val": "val (chose the epoch)",
    "train": "train (learnt from these, so this measures nothing)",
    "": "split not known (may hold images of the training)",
}


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
@click.option("--skip-bad", is_flag=True, help="Report damaged or missing images and go on.")
@click.option("--identifiers", is_flag=True, help="Name patients by the PatientID of DICOM files, not by numbers.")
@options.memory_budget
@options.device
def predict(
    checkpoint: str,
    images: tuple[str, ...],
    out: str,
    heatmaps: bool,
    calibrated_by: str | None,
    skip_bad: bool,
    identifiers: bool,
    memory_budget: int | None,
    device: str,
) -> None:
    """Predict with a checkpoint of gigamorph train, which knows model, classes and preprocessing.

    Or with a folder of gigamorph import, an ensemble among them.

    A recipe's checkpoints serve as well where they hold a classifier of whole images: those of
    morphhr and end2end, and the fine-tuned networks of dvme.

    IMAGES are image files, folders, or a csv with a column image_path. predictions.csv gets a line as soon as an image
    is done; breasts.csv has the mean of the views of each breast, exams.csv the highest of the breasts of each exam;
    predictions.json names the model. A damaged image ends the command with an error that names it, unless --skip-bad;
    what was computed stays.

    The column split says what an image was in the training: of the training's own table, else as the table says. Areas
    under the ROC curve are given of each split alone.

    With --calibration, probabilities and log-odds are calibrated as gigamorph eval measured it on other images (of the
    split val, say), and the column called is 1 where the threshold of its middle specificity is reached.

    Example: gigamorph predict run/best.ckpt exam1.dcm exam2.dcm --heatmaps --out predictions
    """
    from ..engine.datasets.dataset import ImageDataset
    from ..engine.datasets.grey import grey_warnings
    from ..engine.evaluate.recalibration import read_calibration
    from ..engine.files import write_atomically
    from ..engine.models.folder import digest_of
    from ..engine.recipes.networks import open_classifier
    from ..engine.train.inputs import prediction_records
    from ..engine.train.metrics import scores
    from ..engine.train.predict import predict as run
    from ..engine.train.progress import Meter
    from .progress import ProgressView

    net, classes, open_images = open_classifier(checkpoint, memory_budget=memory_budget, device=device)
    digest = digest_of(checkpoint)
    calibration = None if calibrated_by is None else read_calibration(calibrated_by, classes, digest)
    records = prediction_records(images, classes, check_files=not skip_bad)
    data = open_images(records)
    if isinstance(data, ImageDataset):
        for text in grey_warnings(data):
            click.echo(f"warning: {text}", err=True)
    with ProgressView(device=device) as view:
        meter = Meter(view)
        net.on_tile = meter.on_tile
        found, skipped = run(
            net,
            data,
            out,
            classes,
            heatmaps=heatmaps,
            skip_bad=skip_bad,
            identifiers=identifiers,
            calibration=calibration,
            meter=meter,
        )
    model = {"checkpoint": Path(checkpoint).name, "sha256": digest}
    if calibration is not None:
        model["calibrated_on"] = f"{calibration.images} images, split {calibration.split or 'not known'}"
    write_atomically(Path(out) / "predictions.json", lambda p: p.write_text(json.dumps(model) + "\n"), "note")
    click.echo(f"{len(found)} images predicted, {len(skipped)} skipped; {Path(out) / 'predictions.csv'}, breasts.csv")
    for split, note in _SPLITS.items():
        labelled = scores([p for p in found if p.label is not None and p.split == split])
        if labelled["auc_image"] is not None:
            area = f"AUC per image {labelled['auc_image']:.4f} ({labelled['images']} images)"
            click.echo(f"{note}: {area}, per breast {labelled['auc_breast']:.4f} ({labelled['breasts']} breasts)")
