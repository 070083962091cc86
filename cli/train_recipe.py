"""``gigamorph train --recipe``: a published method in the place of the command's own training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from click.core import ParameterSource

from .starting import Teller, count_processes, goes_on, start

if TYPE_CHECKING:
    from ..engine.train.run import Run

_OF_RECIPES = {
    *("data", "out", "recipe", "config", "memory_budget", "precision", "seed", "device", "devices", "split_image"),
    *("devices_per_image", "timeout", "resume", "quiet", "verbose"),
}


def refuse_others(ctx: click.Context) -> None:
    """What a recipe's configuration says cannot be said by an option as well."""
    given = [
        p for p in ctx.command.params if p.name and ctx.get_parameter_source(p.name) is not ParameterSource.DEFAULT
    ]
    others = [p.opts[0] for p in given if p.name not in _OF_RECIPES]
    if others:
        raise click.UsageError(f"{', '.join(others)} cannot go with --recipe; it stands in the recipe's --config")


def begin_recipe(data: str, out: Path, given: dict[str, Any], tell: Teller) -> None:
    """Train as a recipe does, by its own configuration."""
    from ..engine.config import load_config
    from ..engine.recipes import get_recipe
    from ..engine.train.run import Run

    count = count_processes(given["devices"], given["split_image"], given["devices_per_image"])
    kind = get_recipe(given["recipe"]).config
    settings = kind() if given["config"] is None else load_config(given["config"], kind)
    run = Run(out, given["seed"], given["device"], given["memory_budget"], given["resume"], given["precision"])
    args = given["recipe"], settings, data, run, given["devices_per_image"] or given["split_image"], tell
    start(_train_recipe, count, given["device"], given["timeout"], *args)


def _train_recipe(name: str, config: Any, data: str, run: Run, split: bool | int, tell: Teller) -> None:
    """Run a recipe in this process, alone or as one of several, of which the first reports."""
    from ..engine.parallel.process_group import ProcessGroup
    from ..engine.recipes import get_recipe
    from .progress import ProgressView
    from .table import show_rows

    run = replace(run, group=ProcessGroup.here(split), resume=run.resume or goes_on(run.out))
    if not run.group.leads:
        get_recipe(name).train(Path(data), config, run)
        return
    try:
        with ProgressView(device=run.device, quiet=tell.quiet) as view:
            metrics = get_recipe(name).train(Path(data), config, replace(run, report=view, say=view.say))
    except KeyboardInterrupt:
        click.echo(f"stopped; the same command with --resume goes on from what is in {run.out}", err=True)
        raise
    if tell.quiet:
        return
    plain = {key: value for key, value in metrics.items() if isinstance(value, int | float | str)}
    show_rows([{"measure": key, "value": value} for key, value in plain.items()])
    click.echo(f"{run.out}/metrics.json has all of it")
