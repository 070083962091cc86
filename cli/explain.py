"""``gigamorph explain``: maps of what a prediction rests on, as pictures, TIFF and DICOM SEG."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import rich_click as click

from . import options, runner


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
@runner.resume
@click.option("--skip-bad", is_flag=True, help="Put images that cannot be read or written so in quarantine.csv.")
@runner.max_failures
@runner.retry_failed
@runner.shard
@runner.devices
@runner.workers
@runner.engine
@runner.address
@runner.as_json
@options.memory_budget
@options.device
def explain(
    checkpoint: str,
    images: tuple[str, ...],
    out: str,
    method: Any,
    name: str | None,
    formats: tuple[Any, ...],
    resume: bool,
    skip_bad: bool,
    max_failures: float | None,
    retry_failed: bool,
    shard: tuple[int, int],
    devices: int,
    workers: int | None,
    engine: Any,
    address: str | None,
    as_json: bool,
    memory_budget: int | None,
    device: str,
) -> None:
    """Show where a prediction comes from, on every pixel of the file as stored.

    Of two classes the second is explained, of more the most probable one. Class and probability are written in the
    picture, and its colours are on one scale for all images, so that a negative is grey.

    IMAGES are image files, folders, or tables (csv or Parquet) with a column image_path. Maps are computed by tiles and
    equal those of the whole image. What is done stays done and may be shared out, as in gigamorph predict. marks.csv
    has the peaks of class activation maps, for gigamorph eval --marks. exams.csv combines the views of an exam as
    predict does, and has the place that adds most to it.

    A DICOM SEG needs highdicom, and carries what identifies the patient, as it must to be shown with its image.

    Example: gigamorph explain run/best.ckpt exam1.dcm --format png --format seg --out explained
    """
    from ..engine.explain import Options
    from ..engine.explain import explain as run
    from ..engine.models.folder import digest_of
    from ..engine.recipes.networks import open_predictor
    from ..engine.train.checkpoint import load_checkpoint

    runner.check_engine(engine, address)
    if not Path(checkpoint).is_dir():
        load_checkpoint(checkpoint)
    chosen = Options(
        model=digest_of(checkpoint),
        checkpoint=Path(checkpoint).name,
        method=method,
        label=name,
        formats=tuple(dict.fromkeys(formats)),
        resume=resume,
        retry_failed=retry_failed,
        max_failures=1.0 if skip_bad and max_failures is None else max_failures,
        shard=shard,
        devices=devices,
        device=device,
        workers=workers,
        engine=engine,
        address=address,
    )
    opener = functools.partial(open_predictor, checkpoint, memory_budget=memory_budget)
    with runner.watching(as_json, device) as watch:
        found = run(opener, images, out, chosen, watch)
    if as_json:
        runner.tell_end(found)
        return
    marks = ", marks.csv" if method == "activation" and found.complete else ""
    click.echo(f"{found.done} images explained, {found.failed} skipped; {Path(out)}{marks}")
    if found.failed:
        click.echo(f"{Path(out) / 'quarantine.csv'} says why; --resume --retry-failed tries them again")
