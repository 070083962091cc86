"""Where a training runs and what it prints: in this process, or in several; all, or warnings alone."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rich_click as click

from .interrupts import Stopped

_OF_A_PROCESS = 300 * 2**20  # what a process holds that has imported PyTorch and Lightning


class Teller:
    """What is printed of a run: all, or warnings alone."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        if quiet and verbose:
            raise click.UsageError("--quiet and --verbose exclude each other")
        self.quiet, self.verbose = quiet, verbose
        self._warned: set[str] = set()
        if quiet:
            os.environ.setdefault("WANDB_SILENT", "true")  # it prints a summary of each run otherwise
            os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # and this that it makes a database
        self.listen()

    def listen(self) -> None:
        """With --verbose, print what is done as well, in this process."""
        if self.verbose:
            from rich.logging import RichHandler

            log = logging.getLogger("gigamorph")
            log.setLevel(logging.DEBUG)
            log.handlers = [RichHandler(show_path=False)]

    def say(self, text: str) -> None:
        """Print a line that people may want."""
        if not self.quiet:
            click.echo(text)

    def warn(self, text: str) -> None:
        """Print a line that people must see, once: the folds of a cross-validation find the same."""
        if text not in self._warned:
            self._warned.add(text)
            click.echo(f"warning: {text}", err=True)


def count_processes(devices: int | None, split_image: bool | int, per_image: int | None) -> int:
    """How many processes train together; a click error where that contradicts a launcher."""
    from ..engine.parallel import launch
    from ..engine.tiling.memory import available_bytes, format_bytes

    there = int(os.environ["WORLD_SIZE"]) if launch.launched() else devices or 1
    if devices not in (None, there):
        raise click.UsageError(f"--devices {devices} in one of {there} processes that were launched; leave it out")
    needed = there * _OF_A_PROCESS
    if not launch.launched() and there > 1 and needed > available_bytes():
        told = f"{format_bytes(needed)} before any work, and {format_bytes(available_bytes())} are free"
        raise click.UsageError(f"--devices {there}: so many processes take {told}; give fewer")
    if split_image and there == 1 and not launch.launched():
        raise click.UsageError("--split-image shares an image between devices; say between how many with --devices")
    if split_image and per_image is not None:
        raise click.UsageError("--split-image shares an image between all devices, --devices-per-image between some")
    if per_image is not None and there % per_image:
        raise click.UsageError(f"--devices-per-image {per_image}: {there} devices are no multiple of it")
    return there


def start(
    function: Callable[..., None], count: int, device: str, timeout: float, stopped: Callable[[], str], *args: Any
) -> None:
    """Call a function in this process, alone or as one that a launcher has started, or in `count` new ones.

    Args:
        stopped: what a Ctrl-C, or SIGTERM, says: a line of the first process or of that which has started them.
    """
    from ..engine.parallel import launch

    with stopping(stopped):
        if launch.launched():
            with launch.process_group(device, timeout=timeout):
                function(*args)
        elif count > 1:
            launch.launch(function, count, device, *args, timeout=timeout)
        else:
            function(*args)


@contextlib.contextmanager
def stopping(stopped: Callable[[], str]) -> Iterator[None]:
    """Inside, a Ctrl-C, or SIGTERM, says this line, in the first process or in that which has started others."""
    from ..engine.parallel.launch import terminated_as_interrupted

    try:
        with terminated_as_interrupted():
            yield
    except KeyboardInterrupt as error:
        if leads():
            click.echo(stopped(), err=True)
        raise Stopped from error


def leads() -> bool:
    """Whether this process is the first of those that a launcher has started, or alone."""
    return os.environ.get("RANK", "0") == "0"


def goes_on(out: Path) -> bool:
    """Whether a launcher has started this run anew, which then goes on by itself."""
    from ..engine.parallel import launch

    return launch.restarted() and any(out.rglob("last.ckpt"))
