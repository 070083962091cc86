"""A Ctrl-C of which the user has been told."""

from __future__ import annotations

import rich_click as click
from click.exceptions import Exit


class Stopped(KeyboardInterrupt):
    """Raised by a command that has said in a line how it goes on."""


class Commands(click.RichGroup):
    """Commands that may end so: with 130 and no further word, others with a line that says who ended them."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except Stopped:
            raise Exit(130) from None
        except KeyboardInterrupt:  # click would print an empty line
            click.echo("stopped by Ctrl-C", err=True)
            raise Exit(130) from None
