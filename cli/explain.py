"""``gigamorph explain``: maps of what a prediction rests on, as pictures, TIFF and DICOM SEG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from . import options


@click.command()
@click.argument("checkpoint", type=click.Path())
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for the maps and marks.csv.")
@click.option(
    "--method",
    type=click.Choice(["activation", "gradient"]),
    default="activation",
    show_default=True,
    help="activation: what each place adds to the log-odds; gradient: how much each pixel moves them.",
)
@click.option(
    "--class", "name", metavar="NAME", help="Class to explain; by default the second of two, else the likeliest."
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["png", "tif", "seg", "binary-seg"]),
    default=("png",),
    show_default=True,
    help="png: drawn over the image; tif: values in float32; seg: DICOM SEG, fractional or of the region. Repeatable.",
)
@click.option("--skip-bad", is_flag=True, help="Report images that cannot be read or written so, and go on.")
@options.memory_budget
@options.device
def explain(
    checkpoint: str,
    images: tuple[str, ...],
    out: str,
    method: Any,
    name: str | None,
    formats: tuple[Any, ...],
    skip_bad: bool,
    memory_budget: int | None,
    device: str,
) -> None:
    """Show where a prediction comes from, on every pixel of the file as stored.

    Of two classes the second is explained, of more the most probable one. Class and probability are written in the
    picture, and its colours are on one scale for all images, so that a negative is grey.

    IMAGES are image files, folders, or a csv with a column image_path. Maps are computed by tiles and equal those of
    the whole image. marks.csv has the peaks of class activation maps, for gigamorph eval --marks. exams.csv combines
    the views of an exam as predict does, and has the place that adds most to it.

    A DICOM SEG needs highdicom, and carries what identifies the patient, as it must to be shown with its image.

    Example: gigamorph explain run/best.ckpt exam1.dcm --format png --format seg --out explained
    """
    from ..engine.errors import DataError
    from ..engine.explain import explain as run
    from ..engine.recipes.networks import open_classifier
    from ..engine.train.inputs import prediction_records
    from ..engine.train.progress import Meter
    from .progress import ProgressView

    net, classes, open_images = open_classifier(checkpoint, memory_budget=memory_budget, device=device)
    if name is not None and name not in classes:
        raise DataError(f"{checkpoint}: has no class {name!r}; there are {', '.join(classes)}")
    records = prediction_records(images, classes, check_files=not skip_bad)
    data = open_images(records)
    with ProgressView(device=device) as view:
        meter = Meter(view)
        net.on_tile = meter.on_tile
        done, skipped = run(
            net,
            data,
            out,
            classes,
            method=method,
            output=None if name is None else classes.index(name),
            formats=formats,
            skip_bad=skip_bad,
            meter=meter,
        )
    marks = ", marks.csv" if method == "activation" else ""
    click.echo(f"{done} images explained, {len(skipped)} skipped; {Path(out)}{marks}")
