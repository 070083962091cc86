"""``gigamorph recipe``: what a published method claims, shown on a synthetic task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from . import options
from .processes import stopping

if TYPE_CHECKING:
    from ..engine.recipes.recipe import Claim


def _parse_seeds(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise click.BadParameter(f"{value!r}; write different whole numbers, as in 0,1,2", ctx, param)
    return tuple(int(part) for part in parts)


@click.command()
@click.argument("name")
@click.option("--synthetic", is_flag=True, help="Run the synthetic task that shows the method's claim.")
@click.option(
    "--seeds",
    default="0,1,2",
    show_default=True,
    metavar="LIST",
    callback=_parse_seeds,
    help="Of data and networks; the task runs once with each.",
)
@click.option("--out", type=click.Path(file_okay=False), help="Folder, new; recipe-NAME by default.")
@click.option("--resume", is_flag=True, help="Go on in a folder that the same command has begun: with its next seed.")
@options.device
def recipe(name: str, synthetic: bool, seeds: tuple[int, ...], out: str | None, resume: bool, device: str) -> int:
    """Published methods as recipes: list them, print a configuration, see the claim on a synthetic task.

    NAME is a recipe, or "list". Without --synthetic its configuration is printed: every published value with its
    source, as TOML, to be kept in a file, changed, and given to gigamorph train --recipe NAME --config FILE.

    The exit code of --synthetic is 0 where the claim holds, and 1 where it does not or fewer than three seeds say
    nothing.

    Example: gigamorph recipe morphhr --synthetic
    """
    from ..engine.recipes import RECIPES, default_text, get_recipe
    from .table import show_rows

    if name == "list":
        show_rows([{"recipe": key, "what it is": text} for key, text in RECIPES.items()])
        return 0
    chosen = get_recipe(name)
    if not synthetic:
        click.echo(default_text(name), nl=False)
        return 0
    from ..engine.recipes.recipe import show_claim
    from ..engine.train.run import Run
    from .progress import ProgressView

    folder = Path(out or f"recipe-{name}")
    click.echo(f"{chosen.title}\n{chosen.paper}")
    stopped = "stopped; the same command with --resume goes on with the seed under way"
    with stopping(lambda: stopped), ProgressView(device=device) as view:
        claim = show_claim(chosen, Run(folder, device=device, resume=resume, report=view, say=view.say), seeds)
    click.echo()
    show_rows(claim.rows)
    click.echo()
    show_rows(claim.judged)
    click.echo(_verdict(claim, folder))
    return 0 if claim.holds else 1


def _verdict(claim: Claim, folder: Path) -> str:
    from ..engine.recipes.claims import FEWEST

    seeds = len({row["seed"] for row in claim.rows})
    told = "holds" if claim.holds else "does not hold"
    if claim.holds is None:
        told = f"not decided by {seeds} seed{'s'[: seeds > 1]}; a claim is judged over {FEWEST} or more"
    result = f"{told} ({claim.seconds:.0f} s); {folder / 'claim.json'}"
    return f"claim   {claim.claim}\nrule    {claim.rule}\nresult  {result}"
