"""The command ``gigamorph``: a group whose commands are imported only when they are called."""

from __future__ import annotations

import importlib
import keyword
import os
import sys
from collections.abc import Callable
from typing import Any

import rich_click as click
from click import exceptions

from ..engine.errors import GigamorphError
from ..engine.versions import OWN
from .interrupts import Commands, interrupt_recorded
from .streams import guarded

_COMMANDS = {
    "bench": "Measure image size, time and memory of steps, compared with stock PyTorch and other methods.",
    "data": "Index, check, split, convert and preview images and public data sets; make phantoms.",
    "demo": "Train on phantom mammograms at native resolution and write a report (two minutes on two CPU cores).",
    "doctor": "Show hardware and versions, and known problems with their fixes.",
    "eval": "Measure predictions: AUC, operating points, calibration and subgroups, with intervals and a report.",
    "export": "Write a network as a Hugging Face folder for timm, or as ONNX, and check its outputs.",
    "explain": "Map the evidence for predictions onto the image's pixels: PNG, TIFF, DICOM SEG and marks.",
    "import": "Convert a published network into a folder that every command accepts, and check its logits.",
    "morph": "Grow a trained network without changing what it computes, and check the result.",
    "plan": "Print the tile size and memory that a network and an image need.",
    "predict": "Predict images of any size, with heat maps at native resolution.",
    "recipe": "Show published methods as recipes: their configurations, and their claims on synthetic tasks.",
    "train": "Train a classifier at native resolution inside a memory budget.",
    "view": "Show exams with predictions and evidence in a browser, down to native pixels.",
}


class LazyCommand(click.RichCommand):
    """A command with its name and one line of help; its module is imported when it runs."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        assert self.name is not None
        name = f"{self.name}_" if keyword.iskeyword(self.name) else self.name
        command = getattr(importlib.import_module(f".{name}", __package__), name)
        return command.make_context(info_name, args, parent=parent, **extra)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(OWN)
def cli() -> None:
    """Train and run ordinary ConvNets on gigapixel images, exactly, in the memory you have.

    Example: gigamorph train table.csv --model resnet50 --memory-budget 8GiB --out run
    """


for _name, _help in _COMMANDS.items():
    cli.add_command(LazyCommand(name=_name, help=_help), _name)


_LONGEST = 2000  # characters of an error line
_NO_ARGS_ERROR = getattr(exceptions, "NoArgsIsHelpError", ())  # since click 8.2


def main(args: list[str] | None = None) -> None:
    """Run the command line; an error of gigamorph prints one line and exits with 2, Ctrl-C exits with 130.

    If an output cannot be written any more, the work still finishes, and `LostOutputs` gives the exit code.
    """
    # torch reads this when it is first imported. By default, idle OpenMP threads spin; if others use the same cores,
    # that makes the many short operations of a tiled step 10 to 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with guarded() as lost:
        try:
            code = _run(args)
        except SystemExit as end:  # raised by click and libraries
            code = end.code
    sys.exit(code or lost.exit_code())


def _run(args: list[str] | None) -> int:
    """Run a command and return the exit code."""
    with interrupt_recorded() as was_interrupted:
        return _exit_code(args, was_interrupted)


def _exit_code(args: list[str] | None, was_interrupted: Callable[[], bool]) -> int:
    """Run a command and return the exit code; an error after Ctrl-C (`was_interrupted`) counts as interruption."""
    try:
        code = cli.main(args, prog_name="gigamorph", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return _stopped()
    except click.ClickException as error:
        if isinstance(error, _NO_ARGS_ERROR):
            error.show()
            return error.exit_code
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        text = _one_line(error.format_message()).removesuffix(".")
        print(f"error: {text}{f' ({path} --help)' if path else ''}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if was_interrupted():
            return _stopped()
        if not isinstance(error, GigamorphError):
            raise
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return 2


def _one_line(text: str) -> str:
    """A message on one line. Its middle is left out if it quotes a value that fills the terminal."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}"


def _stopped() -> int:
    print("stopped by Ctrl-C", file=sys.stderr)
    return 130


if __name__ == "__main__":
    main()
