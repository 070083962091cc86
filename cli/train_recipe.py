"""``gigamorph train --recipe``: training with a published method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import rich_click as click
from click.core import ParameterSource

from .processes import Printer, count_processes, is_restarted, start

_RECIPE_OPTIONS = {
    *("data", "out", "recipe", "config", "memory_budget", "precision", "seed", "device", "devices", "split_image"),
    "columns",
    *("devices_per_image", "timeout", "resume", "quiet", "verbose"),
}


def require_recipe_options(ctx: click.Context) -> None:
    """Refuse options that a recipe's configuration contains."""
    given = [
        p for p in ctx.command.params if p.name and ctx.get_parameter_source(p.name) is not ParameterSource.DEFAULT
    ]
    unsupported = [p.opts[0] for p in given if p.name not in _RECIPE_OPTIONS]
    if unsupported:
        raise click.UsageError(f"{', '.join(unsupported)} cannot be used with --recipe; set it in its --config")


def begin_recipe(data: str, out: Path, given: dict[str, Any], echo: Printer) -> None:
    """Start the training of a recipe with its own configuration."""
    from ..engine.config import load_config
    from ..engine.mammography.recipes import get_recipe

    count = count_processes(given["devices"], given["split_image"], given["devices_per_image"])
    kind = get_recipe(given["recipe"]).config
    settings = kind() if given["config"] is None else load_config(given["config"], kind)
    # Arguments of `Run`, which itself cannot be sent to another process.
    own = {"out": out, **{name: given[name] for name in ("seed", "device", "memory_budget", "resume", "precision")}}
    split = given["devices_per_image"] or given["split_image"]
    args = given["recipe"], settings, data, own, given["columns"], split, echo
    on_stop = f"stopped; the same command with --resume continues from the files in {out}"
    start(_train_recipe, count, given["device"], given["timeout"], lambda: on_stop, *args)


def _train_recipe(
    name: str, config: Any, data: str, own: dict[str, Any], columns: dict[str, str], split: bool | int, echo: Printer
) -> None:
    """Run a recipe in this process, alone or as one of several; only the first process prints."""
    from ..engine.datasets.tables import columns_named
    from ..engine.mammography.recipes import get_recipe
    from ..engine.parallel.process_group import ProcessGroup
    from ..engine.train.run import Run
    from .progress import ProgressView
    from .table import show_rows

    run = Run(**{**own, "resume": own["resume"] or is_restarted(own["out"])}, group=ProcessGroup.here(split))
    if not run.group.leads:
        with columns_named(columns):
            get_recipe(name).train(Path(data), config, run)
        return
    echo.listen()
    with columns_named(columns), ProgressView(device=run.device, quiet=echo.quiet) as view:
        metrics = get_recipe(name).train(Path(data), config, replace(run, report=view, say=view.say))
    if echo.quiet:
        return
    show_rows([{"measure": key, "value": value} for key, value in _plain(metrics) if not key.startswith("versions.")])
    click.echo(f"{run.out}/metrics.json contains all values")


def _plain(metrics: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield numbers and texts with their paths, as in rbf.test.auc; lists are omitted."""
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from _plain(value, f"{above}{key}.")
        elif isinstance(value, int | float | str):
            yield above + key, value
