"""``gigamorph doctor``: hardware and versions, what will be used and why, and known problems with their fixes."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import rich_click as click

if TYPE_CHECKING:
    from .health import HealthProblem, Machine


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print facts and problems as JSON.")
@click.option("--report", is_flag=True, help="Print them as Markdown for a bug report, without paths or user names.")
def doctor(as_json: bool, report: bool) -> None:
    """Show hardware, driver and versions, what will be used and why, and known problems with their fixes.

    The exit code is 1 if something prevents training.

    Example: gigamorph doctor
    """
    if as_json and report:
        raise click.UsageError("--json and --report exclude each other")
    from .health import facts, probe, problems

    machine = probe()
    rows, found = facts(machine), problems(machine)
    if as_json:
        values = {"facts": dict(rows), "machine": asdict(machine), "problems": [asdict(problem) for problem in found]}
        click.echo(json.dumps(values, indent=1))
    elif report:
        click.echo(_markdown(machine, rows, found))
    else:
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            click.echo(f"{name:<{width}}  {value}")
        for problem in found:
            click.echo(f"\n{problem.level}: {problem.what}\n  fix: {problem.fix}")
        if not found:
            click.echo("\nno known problem found")
    if any(problem.level == "error" for problem in found):
        raise SystemExit(1)


def _markdown(machine: Machine, rows: Sequence[tuple[str, str]], found: Sequence[HealthProblem]) -> str:
    """Return the template of a bug report with the facts filled in."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = [
        "### What happened",
        "",
        "(the command, its output, and what you expected)",
        "",
        "### Machine",
        "",
        *(f"- {name}: {value}" for name, value in rows),
        f"- python: {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"- packages: {versions}",
        *(f"- cannot be imported: {name}: {error}" for name, error in machine.import_errors.items()),
        "",
        "### Known problems",
        "",
        *(f"- {problem.level}: {problem.what}" for problem in found),
        *([] if found else ["none found"]),
    ]
    return "\n".join(lines)
