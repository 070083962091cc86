"""``gigamorph train --recipe``: a published method in the place of the command's own training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import rich_click as click
from click.core import ParameterSource

from .processes import Teller, count_processes, goes_on, start

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

    count = count_processes(given["devices"], given["split_image"], given["devices_per_image"])
    kind = get_recipe(given["recipe"]).config
    settings = kind() if given["config"] is None else load_config(given["config"], kind)
    # What a Run is made of, which cannot be sent to another process itself.
    own = {"out": out, **{name: given[name] for name in ("seed", "device", "memory_budget", "resume", "precision")}}
    args = given["recipe"], settings, data, own, given["devices_per_image"] or given["split_image"], tell
    told = f"stopped; the same command with --resume goes on from what is in {out}"
    start(_train_recipe, count, given["device"], given["timeout"], lambda: told, *args)


def _train_recipe(name: str, config: Any, data: str, own: dict[str, Any], split: bool | int, tell: Teller) -> None:
    """Run a recipe in this process, alone or as one of several, of which the first reports."""
    from ..engine.parallel.process_group import ProcessGroup
    from ..engine.recipes import get_recipe
    from ..engine.train.run import Run
    from .progress import ProgressView
    from .table import show_rows

    run = Run(**{**own, "resume": own["resume"] or goes_on(own["out"])}, group=ProcessGroup.here(split))
    if not run.group.leads:
        get_recipe(name).train(Path(data), config, run)
        return
    tell.listen()
    with ProgressView(device=run.device, quiet=tell.quiet) as view:
        metrics = get_recipe(name).train(Path(data), config, replace(run, report=view, say=view.say))
    if tell.quiet:
        return
    show_rows([{"measure": key, "value": value} for key, value in _plain(metrics) if not key.startswith("versions.")])
    click.echo(f"{run.out}/metrics.json has all of it")


def _plain(metrics: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and texts by where they stand, as rbf.test.auc; what is in lists is for metrics.json."""
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from _plain(value, f"{above}{key}.")
        elif isinstance(value, int | float | str):
            yield above + key, value
