"""``gigamorph explain``: maps of what a prediction rests on, as pictures, TIFF and DICOM SEG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from . import runner
from .numerals import counted


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
    "--class", "name", metavar="NAME", help="Class to explain; by default the positive one of two, else the likeliest."
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
@runner.over_images
def explain(
    images: tuple[str, ...], out: str, method: Any, name: str | None, formats: tuple[Any, ...], run: runner.Run
) -> None:
    """Show where a prediction comes from, on every pixel of the file as stored.

    Of two classes the positive one by its name is explained, as gigamorph eval takes it, of more the most probable one.
    Class and probability are written in the picture, and its colours are on one scale for all images, so that a
    negative is grey.

    IMAGES are image files, folders, or tables (csv or Parquet) with a column image_path. Maps are computed by tiles and
    equal those of the whole image. What is done stays done and may be shared out, as in gigamorph predict. marks.csv
    has the peaks of class activation maps, for gigamorph eval --marks. exams.csv combines the views of an exam as
    predict does, and has the place that adds most to it.

    A DICOM SEG needs highdicom, and carries what identifies the patient, as it must to be shown with its image. With
    --store the SEGs go to a DICOMweb store at the end.

    CHECKPOINT is one of gigamorph train, its folder of --folds, or a folder of gigamorph import.

    Example: gigamorph explain run/best.ckpt exam1.dcm --format png --format seg --out explained
    """
    from ..engine.explain import Options
    from ..engine.explain import explain as explained

    if run.options["store"] and not {"seg", "binary-seg"} & set(formats):
        raise click.UsageError("--store takes DICOM SEGs; add --format seg or --format binary-seg")
    chosen = Options(method=method, label=name, formats=tuple(dict.fromkeys(formats)), **run.options)
    with runner.watching(run.as_json, chosen.device) as watch:
        found = explained(run.opener, images, out, chosen, watch)
    if run.as_json:
        runner.tell_end(found)
        return
    marks = ", marks.csv" if method == "activation" and found.complete else ""
    click.echo(f"{counted(found.done, 'image')} explained, {found.failed} skipped; {Path(out)}{marks}")
    runner.tell_stored(found, chosen.store)
    if found.failed:
        click.echo(f"{Path(out) / 'quarantine.csv'} says why; --resume --retry-failed tries them again")
