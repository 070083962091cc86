"""``gigamorph data phantom``: synthetic mammograms with known labels."""

from __future__ import annotations

from typing import Any

import rich_click as click

from . import options
from .messages import counted


@click.command()
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for images, masks and table.")
@click.option("--patients", type=click.IntRange(1), default=60)
@click.option(
    "--size",
    default="1024x768",
    metavar="HxW",
    callback=options.parse_size,
    help="Image size in pixels; unlimited for tiff.",
)
@click.option(
    "--breasts",
    type=click.IntRange(1, 2),
    default=1,
    help="1: CC and MLO of one breast; 2: the four views of an exam, with lesions in one breast.",
)
@click.option(
    "--lesion",
    "lesions",
    multiple=True,
    type=click.Choice(["cluster", "mass", "asymmetry"]),
    default=["cluster"],
    help="Kind of lesion. Repeatable; positive patients get the kinds alternately.",
)
@click.option("--positive", type=click.FloatRange(0, 1), default=0.5, help="Share of patients with a lesion.")
@click.option(
    "--symmetry", type=click.FloatRange(0, 1), default=0.8, help="Correlation between the textures of the two breasts."
)
@click.option("--format", "file_format", type=click.Choice(["dicom", "tiff"]), default="dicom")
@click.option("--masks", is_flag=True, help="Write a mask for every lesion.")
@click.option(
    "--slices",
    type=click.IntRange(0),
    default=0,
    help="Slices of tomosynthesis volumes; lesions are in a few of them. 0: mammograms.",
)
@options.seed
@options.workers
def phantom(out: str, size: tuple[int, int], workers: int | None, **how: Any) -> None:
    """Make phantom mammograms of any size, tile by tile, with known labels, boxes and masks.

    The same options give the same bytes. An image without a cluster contains the same cluster blurred, so that the
    label is visible only at native resolution.

    Example: gigamorph data phantom --out phantoms --patients 20 --breasts 2 --size 3328x2560
    """
    from ..engine.images.parallel import available_cpus
    from ..engine.mammography.phantom import write_phantoms
    from .counter import Count

    images = how["patients"] * 2 * how["breasts"]
    with Count("pixels", images * size[0] * size[1] * max(1, how["slices"])) as count:
        table = write_phantoms(
            out, height=size[0], width=size[1], workers=workers or available_cpus(), report=count.add, **how
        )
    deep = f"{how['slices']} x " if how["slices"] else ""
    counts = f"{counted(images, 'volume' if deep else 'image')} of {counted(how['patients'], 'patient')}"
    click.echo(f"{counts}, {deep}{size[0]} x {size[1]} pixels; {table}")
