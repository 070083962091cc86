"""Where a training runs and what it prints: in this process, or in several; all, or warnings alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import rich_click as click


class Teller:
    """What is printed of a run: all, or warnings alone."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        if quiet and verbose:
            raise click.UsageError("--quiet and --verbose exclude each other")
        self.quiet = quiet
        if verbose:
            from rich.logging import RichHandler

            log = logging.getLogger("gigamorph")
            log.setLevel(logging.DEBUG)
            log.handlers = [RichHandler(show_path=False)]

    def say(self, text: str) -> None:
        """Print a line that people may want."""
        if not self.quiet:
            click.echo(text)

    def warn(self, text: str) -> None:
        """Print a line that people must see."""
        click.echo(f"warning: {text}", err=True)


def count_processes(devices: int | None, split_image: bool) -> int:
    """How many processes train together; a click error where that contradicts a launcher."""
    from ..engine.parallel import launch

    there = int(os.environ["WORLD_SIZE"]) if launch.launched() else devices or 1
    if devices not in (None, there):
        raise click.UsageError(f"--devices {devices} in one of {there} processes that were launched; leave it out")
    if split_image and there == 1 and not launch.launched():
        raise click.UsageError("--split-image shares an image between devices; say between how many with --devices")
    return there


def start(function: Callable[..., None], count: int, device: str, *args: Any) -> None:
    """Call a function in this process, alone or as one that a launcher has started, or in `count` new ones."""
    from ..engine.parallel import launch

    if launch.launched():
        with launch.process_group(device):
            function(*args)
    elif count > 1:
        launch.launch(function, count, device, *args)
    else:
        function(*args)
