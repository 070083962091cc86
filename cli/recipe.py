"""``gigamorph recipe``: published methods, and their claims on synthetic tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from ..engine.errors import GigamorphError
from . import options
from .processes import printing_stop

if TYPE_CHECKING:
    from ..engine.mammography.recipes.recipe import Claim


@options.parsed
def _parse_seeds(value: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise GigamorphError(f"{value!r}; write different whole numbers, as in 0,1,2")
    return tuple(int(part) for part in parts)


@click.command()
@click.argument("name")
@click.option("--synthetic", is_flag=True, help="Run the synthetic task that tests the method's claim.")
@click.option(
    "--seeds",
    default="0,1,2",
    metavar="LIST",
    callback=_parse_seeds,
    help="Seeds of data and networks; the task runs once with each.",
)
@click.option("--out", type=click.Path(file_okay=False), help="New folder; by default recipe-NAME.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run of the same command at its next seed.")
@options.device
def recipe(name: str, synthetic: bool, seeds: tuple[int, ...], out: str | None, resume: bool, device: str) -> int:
    """Show published methods as recipes: list them, print a configuration, or test a claim on a synthetic task.

    NAME is a recipe, or "list". Without --synthetic, the command prints the configuration as TOML: every published
    value with its source. Save it to a file, edit it, and pass it to gigamorph train --recipe NAME --config FILE.

    With --synthetic, the exit code is 0 if the claim holds, and 1 if it does not hold or if fewer than three seeds
    leave it undecided.

    Example: gigamorph recipe morphhr --synthetic
    """
    from ..engine.mammography.recipes import RECIPES, default_text, get_recipe
    from .table import show_rows

    if name == "list":
        show_rows([{"recipe": key, "what it is": text} for key, text in RECIPES.items()])
        return 0
    chosen = get_recipe(name)
    if not synthetic:
        click.echo(default_text(name), nl=False)
        return 0
    from ..engine.mammography.recipes.recipe import show_claim
    from ..engine.train.run import Run
    from .progress import ProgressView

    folder = Path(out or f"recipe-{name}")
    click.echo(f"{chosen.title}\n{chosen.paper}")
    on_stop = "stopped; the same command with --resume continues with the current seed"
    with printing_stop(lambda: on_stop), ProgressView(device=device) as view:
        claim = show_claim(chosen, Run(folder, device=device, resume=resume, report=view, say=view.say), seeds)
    click.echo()
    show_rows(claim.rows)
    click.echo()
    show_rows(claim.judged)
    click.echo(_verdict(claim, folder))
    return 0 if claim.holds else 1


def _verdict(claim: Claim, folder: Path) -> str:
    from ..engine.mammography.recipes.claims import FEWEST

    seeds = len({row["seed"] for row in claim.rows})
    text = "holds" if claim.holds else "does not hold"
    if claim.holds is None:
        text = f"undecided with {seeds} seed{'s'[: seeds > 1]}; a claim needs {FEWEST} or more"
    result = f"{text} ({claim.seconds:.0f} s); {folder / 'claim.json'}"
    return f"claim   {claim.claim}\nrule    {claim.rule}\nresult  {result}"
