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

from ..engine.versions import OWN
from .interrupts import Commands, noted
from .streams import guarded

_COMMANDS = {
    "bench": "Measure how large, how fast, in how much memory; against stock PyTorch and its remedies.",
    "data": "Index, check, split, convert and preview images and public data sets; make phantoms.",
    "demo": "Train on phantom mammograms at native resolution and report (four minutes on two CPU cores).",
    "doctor": "Show hardware and versions, and name every known trap with its fix.",
    "eval": "Measure predictions: areas, operating points, calibration, subgroups, with intervals and a report.",
    "export": "Write a network as a Hugging Face folder that timm loads, or as ONNX, checked.",
    "explain": "Maps of what a prediction rests on, on the pixels of the file: PNG, TIFF, DICOM SEG; marks.",
    "import": "A published network becomes a folder that every command takes as a model, once its logits agree.",
    "morph": "Grow a trained network without changing what it computes; check that it did not.",
    "plan": "Say how large a tile, and how much memory, a network and an image need.",
    "predict": "Predictions, and heat maps at native resolution, for images of any size.",
    "recipe": "Published methods as recipes: their configurations, and their claims on synthetic tasks.",
    "train": "Train a classifier at native resolution inside a memory budget.",
    "view": "Exams with their predictions and evidence in a browser, down to native pixels.",
}


class LazyCommand(click.RichCommand):
    """Knows its name and its one line of help; the module with its options is imported when it runs."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        assert self.name is not None
        name = f"{self.name}_" if keyword.iskeyword(self.name) else self.name
        command = getattr(importlib.import_module(f".{name}", __package__), name)
        return command.make_context(info_name, args, parent=parent, **extra)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(OWN)
def cli() -> None:
    """Train and run ordinary ConvNets on gigapixel images, exactly, in the memory you have.

    Example: gigamorph train table.csv --model resnet50 --memory-budget 8GiB --out run
    """


for _name, _help in _COMMANDS.items():
    cli.add_command(LazyCommand(name=_name, help=_help), _name)


_LONGEST = 2000  # characters of an error line
_HELP = getattr(exceptions, "NoArgsIsHelpError", ())  # of click 8.2 and later


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors of gigamorph are one line and exit code 2, Ctrl-C is 130.

    Where the output takes nothing more the work is done to its end, and the code is that of `Lost`.
    """
    # Read when torch is first imported. By default idle OpenMP threads spin; where others use the same cores, that made
    # the many short operations of a step by tiles 10 to 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with guarded() as lost:
        try:
            code = _run(args)
        except SystemExit as end:  # of click, and of libraries
            code = end.code
    sys.exit(code or lost.exit_code())


def _run(args: list[str] | None) -> int:
    """The exit code."""
    with noted() as pressed:
        return _code(args, pressed)


def _code(args: list[str] | None, pressed: Callable[[], bool]) -> int:
    """The same. What fails after a Ctrl-C, which is ``pressed`` then, has been stopped by it."""
    try:
        code = cli.main(args, prog_name="gigamorph", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return _stopped()
    except click.ClickException as error:
        if isinstance(error, _HELP):
            error.show()
            return error.exit_code
        of = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        text = _one_line(error.format_message()).removesuffix(".")
        print(f"error: {text}{f' ({of} --help)' if of else ''}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if pressed():
            return _stopped()
        from ..engine.errors import GigamorphError

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
