"""``gigamorph data preview``: an image as the network gets it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import rich_click as click

from . import options, outputs
from .messages import warn

if TYPE_CHECKING:
    from ..engine.datasets.augment import Augment


@click.command()
@click.argument("image", type=click.Path(exists=True))
@click.option("--out", type=click.Path(dir_okay=False), help="16-bit PNG file for all pixels as the network gets them.")
@options.channels
@options.mean
@options.std
@options.voi
@click.option("--frame", type=click.IntRange(0), help="Frame of a file with several frames.")
@options.for_processing
@options.white
@options.augment
@options.seed
def preview(
    image: str,
    out: str | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: Augment | None,
    seed: int,
    **reading: Any,
) -> None:
    """Show an image exactly as the network gets it, and every step of its preprocessing.

    With --augment, show one random variation, as in training; each --seed gives another one.

    Example: gigamorph data preview exam.dcm --augment rotate=10,elastic=20,noise=0.01 --out exam.png
    """
    from rich.console import Console

    from ..engine.datasets.augment import augmented
    from ..engine.datasets.preview import preview as measure
    from ..engine.datasets.preview import thumbnail, write_preview
    from ..engine.datasets.views import NormalizedSource
    from ..engine.images.open import open_pixels
    from ..engine.images.pixels import Normalize
    from .picture import show_picture

    if out:
        outputs.require_out(out, [image])
    normalize = Normalize(mean, std)
    source = open_pixels(image, normalize=None if augment else normalize, **reading)
    if augment:
        source = NormalizedSource(augmented(source, augment, seed=seed, epoch=0, index=0), normalize)
    seen = measure(source)
    console = Console()
    rows = 2 * max(8, (console.size.height if console.is_terminal else 40) - len(seen.steps) - 6)
    show_picture(thumbnail(source, min(console.size.width - 1, 120), rows), console)
    for number, step in enumerate(seen.steps, 1):
        click.echo(f"{number:>2}. {step}")
    click.echo(
        f"{' x '.join(map(str, seen.shape))} (channels x height x width), {seen.least:.4g} to {seen.most:.4g}, "
        f"mean {seen.mean:.4g}, std {seen.std:.4g}"
    )
    click.echo(f"{seen.black:.1%} of the pixels are black, {seen.white:.1%} white")
    for warning in seen.warnings:
        warn(warning)
    if out:
        click.echo(f"{out}: {write_preview(source, out)}")
