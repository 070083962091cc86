"""``gigamorph predict`` with a checkpoint of masks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import rich_click as click

from . import runner
from .numerals import counted
from .train import scores_line


def predict_masks(images: tuple[str, ...], out: Path, identifiers: bool, precision: Any, run: runner.Run) -> None:
    """Predict the masks of images, and write them and their table."""
    from ..engine.predict.job import opened_with_white
    from ..engine.predict.masks import MaskOptions, open_segmenter
    from ..engine.predict.masks import predict_masks as predicted

    opener = functools.partial(open_segmenter, run.checkpoint, memory_budget=run.memory_budget)
    opener = functools.partial(opened_with_white, opener, run.options["white"])
    options = MaskOptions(identifiers=identifiers, precision=precision, **run.options)
    with runner.watching(run.as_json, options.device) as watch:
        found = predicted(opener, images, out, options, watch)
    if run.as_json:
        runner.print_end(found)
        return
    table = f"; {out / 'masks'}, predictions.csv" if found.complete else f"; {out / 'parts'}"
    click.echo(f"{counted(found.done, 'image')} predicted, {found.failed} skipped{table}")
    runner.print_stored(found, options.store)
    if found.failed:
        click.echo(f"{out / 'quarantine.csv'} lists the reasons; --resume --retry-failed tries them again")
    for split, note in runner.SPLITS.items():
        if split in found.scores:
            click.echo(f"{note}: {scores_line(found.scores[split])}")
