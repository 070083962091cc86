"""Processes of a training, and what they print: in this process or in several; all messages or only warnings."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rich_click as click

from .interrupts import Stopped
from .messages import warn

_BYTES_PER_PROCESS = 300 * 2**20  # memory of a process after importing PyTorch and Lightning


class Printer:
    """Prints the messages of a run: all, or only warnings with --quiet."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        if quiet and verbose:
            raise click.UsageError("--quiet and --verbose exclude each other")
        self.quiet, self.verbose = quiet, verbose
        self._warned: set[str] = set()
        if quiet:
            os.environ.setdefault("WANDB_SILENT", "true")  # otherwise it prints a summary of each run
            os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # otherwise it prints that it creates a database
        self.listen()

    def listen(self) -> None:
        """With --verbose, also print debug messages of this process."""
        if self.verbose:
            from rich.logging import RichHandler

            log = logging.getLogger("gigamorph")
            log.setLevel(logging.DEBUG)
            log.handlers = [RichHandler(show_path=False)]

    def say(self, text: str) -> None:
        """Print a line unless --quiet is given."""
        if not self.quiet:
            click.echo(text)

    def warn(self, text: str) -> None:
        """Print a warning once, because the folds of a cross-validation repeat it."""
        if text not in self._warned:
            self._warned.add(text)
            warn(text)


def count_processes(devices: int | None, split_image: bool | int, per_image: int | None) -> int:
    """Return how many processes train together; raise a click error if the options contradict a launcher."""
    from ..engine.parallel import launch
    from ..engine.tiling.memory import available_bytes, format_bytes

    processes = int(os.environ["WORLD_SIZE"]) if launch.launched() else devices or 1
    if devices not in (None, processes):
        raise click.UsageError(f"--devices {devices} contradicts the launcher, which started {processes}; omit it")
    needed = processes * _BYTES_PER_PROCESS
    if not launch.launched() and processes > 1 and needed > available_bytes():
        text = f"{format_bytes(needed)} at start, but only {format_bytes(available_bytes())} are free"
        raise click.UsageError(f"--devices {processes}: these processes need {text}; give fewer")
    if split_image and processes == 1 and not launch.launched():
        raise click.UsageError("--split-image splits an image between devices; give their number with --devices")
    if split_image and per_image is not None:
        raise click.UsageError("--split-image and --devices-per-image exclude each other")
    if per_image is not None and processes % per_image:
        raise click.UsageError(f"--devices-per-image {per_image}: {processes} devices are not a multiple of it")
    return processes


def start(
    function: Callable[..., None], count: int, device: str, timeout: float, on_stop: Callable[[], str], *args: Any
) -> None:
    """Call a function in this process (alone, or started by a launcher), or in `count` new processes.

    Args:
        on_stop: returns the line that Ctrl-C or SIGTERM prints, in the first or the parent process.
    """
    from ..engine.parallel import launch

    with printing_stop(on_stop):
        if launch.launched():
            with launch.process_group(device, timeout=timeout):
                function(*args)
        elif count > 1:
            launch.launch(function, count, device, *args, timeout=timeout)
        else:
            function(*args)


@contextlib.contextmanager
def printing_stop(on_stop: Callable[[], str]) -> Iterator[None]:
    """Print a line on Ctrl-C or SIGTERM inside this context, in the first or the parent process."""
    from ..engine.parallel.launch import terminated_as_interrupted

    try:
        with terminated_as_interrupted():
            yield
    except KeyboardInterrupt as error:
        if is_first_process():
            click.echo(on_stop(), err=True)
        raise Stopped from error


def is_first_process() -> bool:
    """Whether this process is the first one of a launcher, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_restarted(out: Path) -> bool:
    """Whether a launcher has restarted this run, which then resumes automatically."""
    from ..engine.parallel import launch

    return launch.restarted() and any(out.rglob("last.ckpt"))
