"""``gigamorph doctor``: what is there, what will be used and why, and every known trap with its fix."""

from __future__ import annotations

import rich_click as click


@click.command()
def doctor() -> None:
    """Show hardware, driver and versions, what will be used and why, and every known trap with its fix.

    The exit code is 1 if something prevents training.

    Example: gigamorph doctor
    """
    from .health import facts, probe, problems

    machine = probe()
    rows = facts(machine)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")
    found = problems(machine)
    for problem in found:
        click.echo(f"\n{problem.level}: {problem.what}\n  fix: {problem.fix}")
    if not found:
        click.echo("\nno known trap found")
    if any(problem.level == "error" for problem in found):
        raise SystemExit(1)
