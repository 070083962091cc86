"""``gigamorph explain``: maps of the evidence for a prediction, as pictures, TIFF and DICOM SEG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from . import runner


@click.command()
@click.argument("checkpoint", type=click.Path())
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for the maps and marks.csv.")
@click.option(
    "--method",
    type=click.Choice(["activation", "gradient"]),
    default="activation",
    help="activation: what each location adds to the log-odds; gradient: how strongly each pixel changes them.",
)
@click.option(
    "--class", "name", metavar="NAME", help="Class to explain; by default the positive of two, else the most probable."
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["png", "tif", "seg", "binary-seg"]),
    default=("png",),
    help="png: over the image; tif: float32 values; seg, binary-seg: DICOM SEG, fractional or binary. Repeatable.",
)
@runner.over_images
def explain(
    images: tuple[str, ...], out: str, method: Any, name: str | None, formats: tuple[Any, ...], run: runner.ImageRun
) -> None:
    """Map the evidence for a prediction onto every pixel of the stored file.

    For two classes, the positive one is explained, chosen by its name as in gigamorph eval; for more classes, the most
    probable one. Each picture shows class and probability. All pictures share one colour scale, so that a negative
    image stays grey.

    IMAGES are image files, folders, or tables (csv or Parquet) with a column image_path. Maps are computed in tiles and
    equal those of the whole image. Runs can be resumed and divided into shards, as in gigamorph predict.

    marks.csv contains the peaks of class activation maps, for gigamorph eval --marks. exams.csv combines the views of
    an exam as predict does, and contains the location with the largest contribution.

    DICOM SEG files need highdicom. They contain the patient's identity, so that viewers show them with their image.
    With --store, they are sent to a DICOMweb store at the end.

    CHECKPOINT is one of gigamorph train, its folder of --folds, or a folder of gigamorph import.

    Example: gigamorph explain run/best.ckpt exam1.dcm --format png --format seg --out explained
    """
    from ..engine.explain import ExplainOptions
    from ..engine.explain import explain as explained

    if run.options["store"] and not {"seg", "binary-seg"} & set(formats):
        raise click.UsageError("--store needs DICOM SEGs; add --format seg or --format binary-seg")
    chosen = ExplainOptions(method=method, label=name, formats=tuple(dict.fromkeys(formats)), **run.options)
    with runner.watching(run.as_json, chosen.device) as watch:
        found = explained(run.opener, images, out, chosen, watch)
    marks = ", marks.csv" if method == "activation" else ""
    runner.print_end(run, Path(out), found, "explained", f"{out}{marks}")
