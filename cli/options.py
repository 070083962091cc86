"""Options that several commands share, each declared once."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import cleandoc
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import rich_click as click

from ..engine.datasets.flips import FLIPS
from ..engine.errors import GigamorphError
from ..engine.train.options import TrainConfig
from .messages import warn

if TYPE_CHECKING:
    from ..engine.datasets.augment import Augment
    from ..engine.images.levels import White


def parsed(parse: Callable[[str], Any]) -> Callable[..., Any]:
    """Return a callback that parses the value of an option if there is one, and turns our errors into click's."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except GigamorphError as error:
            raise click.BadParameter(str(error), ctx, param) from error

    return callback


def of_key(key: str, *flags: str, help: str = "", **more: Any) -> Any:
    """Return the option of a key of `TrainConfig`: type, default, limits and help are those of the key.

    Args:
        key: as in a file, such as ``optimizer.lr``.
        flags: instead of the last part of the key; one without dashes names the parameter.
        help: more help.
        more: other arguments of `click.option`.
    """
    *tables, key = key.split(".")
    owner: Any = get_type_hints(TrainConfig)[tables[0]] if tables else TrainConfig
    wanted, own = get_type_hints(owner)[key], next(one for one in fields(owner) if one.name == key)
    wanted = get_args(wanted)[0] if get_origin(wanted) in (Union, UnionType) else wanted
    text = f"{document(owner, key)} {help}".strip()
    settings: dict[str, Any] = {} if own.default in (None, MISSING) else {"default": own.default}
    if get_origin(wanted) is Literal:
        settings["type"] = click.Choice(get_args(wanted))
    elif wanted is bool:
        settings = {"is_flag": True}
    elif get_origin(wanted) in (tuple, dict):
        settings, text = {"multiple": True}, f"{text} Repeatable."
    elif wanted in (int, float):
        least = own.metadata.get("limits", (None,))[0]
        settings["type"] = click.IntRange(least) if wanted is int else click.FloatRange(least)
    return click.option(*(flags or (f"--{key.replace('_', '-')}",)), help=text, **{**settings, **more})


def document(owner: type, key: str) -> str:
    """Return the documentation of a field as a sentence, from the docstring of its class or of the base that has it."""
    for text in (cleandoc(base.__doc__ or "") for base in owner.__mro__):
        if match := re.search(rf"^    {key}: (.+(?:\n        .+)*)", text, re.MULTILINE):
            words = " ".join(match[1].replace("`", "").split())
            return words[0].upper() + words[1:]
    return ""  # Python runs without docstrings (-OO)


@parsed
def parse_size(value: str) -> tuple[int, int]:
    """Parse ``4096x3328`` as (4096, 3328), height first."""
    match = re.fullmatch(r"([1-9]\d*)[xX×]([1-9]\d*)", value.strip())
    if match is None:
        raise GigamorphError(f"{value!r} is not a size; write height x width, as in 4096x3328")
    return int(match[1]), int(match[2])


@parsed
def parse_budget(value: str) -> int:
    from ..engine.tiling.memory import parse_bytes

    return parse_bytes(value)


def _parse_device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    return usable_device(value)


def usable_device(value: str) -> str:
    """Resolve auto, cpu or cuda to cpu or cuda; raise a click error for cuda without a GPU."""
    import torch

    usable = torch.cuda.is_available()
    if value not in ("auto", "cpu", "cuda"):
        raise click.BadParameter(f"{value!r} must be auto, cpu or cuda", param_hint="--device")
    if value == "cuda" and not usable:
        raise click.BadParameter("torch cannot use a GPU here; run gigamorph doctor", param_hint="--device")
    return ("cuda" if usable else "cpu") if value == "auto" else value


def flips(text: str) -> Any:
    """Return the option ``--flip`` (mirror images to average over); the command gets `flips`, unique and ordered."""
    return click.option(
        "--flip",
        "flips",
        multiple=True,
        type=click.Choice(list(FLIPS)),
        callback=lambda ctx, param, given: tuple(name for name in FLIPS if name in given),
        help=text,
    )


def parse_numbers(
    ctx: click.Context,
    param: click.Parameter,
    value: str | None,
    what: str = "numbers",
    example: str = "0.5 or 0.1,0.2,0.3",
) -> Any:
    """Parse a list of numbers as a tuple of floats, None as None."""
    try:
        return None if value is None else tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of {what}; write {example}", ctx, param) from error


@parsed
def _parse_augment(value: str) -> Augment:
    from ..engine.datasets.augment import Augment

    return Augment.parse(value)


@parsed
def _parse_white(value: str) -> White:
    from ..engine.images.levels import parse_white

    return parse_white(value)


COLUMNS = "gigamorph.columns"
"""The names of --column, in the context's `meta`."""


def _parse_columns(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    from ..engine.datasets.tables import columns_named

    for text in given:
        if not all(text.partition("=")[::2]):
            raise click.BadParameter(f"{text!r} must be NAME=COLUMN, as in label=cancer", ctx, param)
    pairs = [(name.strip(), column.strip()) for name, _, column in (text.partition("=") for text in given)]
    names = dict(pairs)
    if len(names) < len(pairs):
        raise click.BadParameter("a name is given two columns; name one", ctx, param)
    used = ctx.with_resource(columns_named(names))
    if ctx.command.name != "train":  # which reads its table in other processes too
        ctx.call_on_close(lambda: [warn(f"no table had a column {names[name]}") for name in names if name not in used])
    ctx.meta[COLUMNS] = names
    return names


def given_columns() -> dict[str, str]:
    """Return the names of --column of the running command."""
    ctx = click.get_current_context(silent=True)
    return {} if ctx is None else ctx.meta.get(COLUMNS, {})


columns: Any = click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME=COLUMN",
    expose_value=False,
    callback=_parse_columns,
    help="Read COLUMN of the table as NAME, as in label=cancer or image_path=Datei. Repeatable.",
)


def channels_of(model: str, channels: int) -> int:
    """Return the image channels of a model: those of a folder of gigamorph import, else `channels`."""
    from ..engine.models.folder import is_folder, read_description

    return read_description(model).preprocessing.channels if is_folder(model) else channels


def named(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Trust modules that the user typed: they may be imported, also if a file names them."""
    from ..engine.trust import trust_named

    trust_named(*(value if isinstance(value, tuple) else (value,)))
    return value


def _trust(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    if value:
        from ..engine.trust import ALL, trust

        trust(ALL)
    return value


_TRUST = "Import modules that only a file names, which runs their code; use it only if you trust the file's author."
trust: Any = click.option("--trust", is_flag=True, expose_value=False, callback=_trust, help=_TRUST)
trust_pickles: Any = click.option(
    "--trust", is_flag=True, callback=_trust, help=f"{_TRUST} Pickled modules are opened in a separate process."
)
_model: Any = click.option(
    "--model",
    default="resnet18",
    metavar="SPEC",
    callback=named,
    help="lesionnet, resnet18, resnet34, resnet50, timm:NAME, or your own module:factory (see gigamorph train), with "
    "arguments as in timm:NAME?global_pool=max; or a folder of gigamorph import, with its weights.",
)


def model(command: Any) -> Any:
    """Add ``--model``, and ``--trust`` for folders of gigamorph import."""
    return _model(trust(command))


memory_budget: Any = of_key("memory_budget", metavar="SIZE", type=str, callback=parse_budget)
batch_norm: Any = of_key("batch_norm")
precision: Any = of_key("precision")
device: Any = of_key("device", callback=_parse_device)
channels: Any = of_key("data.channels")
channel_count: Any = of_key("data.channels", type=click.IntRange(1))
classes_count: Any = click.option("--classes", type=click.IntRange(1), default=2, help="Outputs of the model.")
mean: Any = click.option(
    "--mean",
    default="0",
    callback=parse_numbers,
    help="Grey value that maps to zero, from 0 (black) to 1 (white); one number, or one per channel.",
)
std: Any = click.option("--std", default="1", callback=parse_numbers, help="Standard deviation that is scaled to one.")
voi: Any = of_key("data.voi")
white: Any = of_key("data.white", callback=_parse_white, metavar="LEVEL", type=str)
for_processing: Any = of_key("data.for_processing")
augment: Any = of_key("data.augment", metavar="LIST", callback=_parse_augment)
seed: Any = of_key("seed")
workers: Any = click.option("--workers", type=click.IntRange(1), help="Processes; by default one per CPU.")
