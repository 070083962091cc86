"""``gigamorph train``: a classifier from a table of images, at native resolution inside a memory budget."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from click.core import ParameterSource

from ..engine.errors import GigamorphError
from . import options
from .foreign_options import TrainCommand
from .messages import counted
from .processes import Printer, count_processes, is_first_process, is_restarted, printing_stop, start
from .train_recipe import begin_recipe, require_recipe_options

if TYPE_CHECKING:
    from ..engine.train.config import TrainConfig
    from ..engine.train.inputs import Chosen

SAVED, QUARANTINE = "config.toml", "quarantine.csv"

_NOT_IN_FILE = ("data", "out", "recipe", "config", "settings", "print_config", "resume", "quiet", "verbose")


def _parse_rates(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not name or not 0 < rate < float("inf"):
            raise click.BadParameter(f"{value!r}; write PATTERN=RATE, as in classifier=1e-3", ctx, param)
        found[name] = rate
    return found


def _parse_scale(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    return value if value == "auto" else options.parse_numbers(ctx, param, value)


@options.parsed
def _parse_time(value: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)?", value.strip())
    seconds = float(match[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86400}[match[2] or "s"] if match else 0.0
    if not seconds:
        raise GigamorphError(f"{value!r} is not a time; write 90s, 30min or 2h")
    return seconds


@click.command(cls=TrainCommand)
@click.argument("data", type=click.Path(exists=True), required=False)
@click.option("--out", type=click.Path(file_okay=False), help="Folder for checkpoints, log and metrics.")
@click.option(
    "--config", type=click.Path(), help="Options from a TOML, YAML or JSON file; with --recipe, those of the recipe."
)
@click.option(
    "-o",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a key of the configuration, as in optimizer.name=sgd; overrides file and options. Repeatable.",
)
@click.option("--print-config", is_flag=True, help="Print the whole configuration with defaults, and exit.")
@options.model
@options.of_key("weights", type=click.Path())
@options.of_key("init", metavar="SOURCE")
@options.of_key("freeze", metavar="PATTERN")
@options.of_key("data.task")
@options.columns
@options.of_key("data.labels", "--label", "labels", metavar="NAME")
@options.of_key("data.views")
@options.memory_budget
@options.batch_norm
@options.channels
@options.of_key("data.mean", default="0", callback=_parse_scale, type=str)
@options.of_key("data.std", default="1", callback=_parse_scale, type=str)
@options.voi
@options.for_processing
@options.white
@options.augment
@options.of_key("data.downsample")
@options.of_key("data.skip_bad")
@options.of_key("data.folds", metavar="N")
@options.of_key("epochs")
@options.of_key("optimizer.lr", type=click.FloatRange(0, min_open=True))
@options.of_key("optimizer.rates", "--lr-of", "rates", metavar="PATTERN=RATE", callback=_parse_rates)
@options.of_key("optimizer.weight_decay")
@options.of_key("accumulate")
@options.precision
@options.of_key("loss.class_weights")
@options.of_key("patience")
@options.seed
@options.device
@options.of_key("devices", metavar="N")
@options.of_key("split_image")
@options.of_key("devices_per_image", metavar="N")
@options.of_key("timeout", metavar="TIME", type=str, default="2h", callback=_parse_time, help="As in 90s, 30min or 2h.")
@options.of_key("log", metavar="NAME", callback=options.named)
@options.of_key("callbacks", "--callback", "callbacks", metavar="MODULE:NAME", callback=options.named)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in --out exactly where it stopped, or start it; --epochs extends it.",
)
@click.option("--recipe", metavar="NAME", help="Train with a published method; gigamorph recipe list names them.")
@click.option("--quiet", is_flag=True, help="Print only warnings and errors.")
@click.option("--verbose", is_flag=True, help="Also print the plan, the kernels and the learning rates of modules.")
@click.pass_context
def train(ctx: click.Context, data: str | None, **given: Any) -> None:
    """Train a classifier on images of any size, with the gradients of the whole image.

    DATA is a csv with the columns image_path, label, patient_id and optionally split (train, val, test), laterality
    and view; or a folder with a sub-folder per class. Without a split, patients are assigned at random.

    A configuration file can contain all options: --print-config prints it, --config reads it, and --out stores it as
    config.toml, which --resume uses. Files have further settings: optimizers and schedules by name, losses, stages and
    averages.

    Ctrl-C finishes the current image and writes last.ckpt; --resume continues from there, bit for bit on the CPU. With
    more --epochs, it also continues a finished run.

    MODULE:FACTORY is a function or class of a Python module in this folder or on Python's path. It gets num_classes and
    in_channels if its signature names them, and returns a torch.nn.Module that maps (N, channels, H, W) to logits (N,
    classes).

    With --recipe, --config contains the model, its images and the stages of its training. The only other options are
    --memory-budget, --precision, --seed, --device, --devices, --split-image, --devices-per-image, --timeout and
    --resume.

    Example: gigamorph train table.csv --model resnet50 --weights resnet50.safetensors --batch-norm frozen
    --channels 3 --memory-budget 8GiB --augment flip=up-down,rotate=10,elastic=20,gamma=0.2 --out run
    """
    given["columns"] = ctx.meta[options.COLUMNS]
    echo = Printer(given["quiet"], given["verbose"])
    if given["recipe"] is not None:
        require_recipe_options(ctx)
        begin_recipe(*_required(data, given["out"]), given, echo)
        return
    config = _make_config(ctx, given, echo)
    device = options.usable_device(config.device)
    if given["print_config"]:
        from ..engine.config import to_toml
        from ..engine.train.option_checks import check_stages

        check_stages(config.options().made_stages(validated=True))
        click.echo(to_toml(config), nl=False)
        return
    from ..engine.files import require_writable

    table, out = _required(data, given["out"])
    require_writable(out / SAVED, "configuration")  # before slow work, such as measuring mean and std
    count = count_processes(config.devices, config.split_image, config.devices_per_image)
    if config.data.folds is None:
        _require_no_folds(out)
        on_stop = partial(_stop_message, out)
        start(_train, count, device, config.timeout, on_stop, table, config, out, given["resume"], echo)
    else:
        _train_folds(table, config, out, given["resume"], echo, count, device)


def _required(data: str | None, out: str | None) -> tuple[str, Path]:
    """Return the arguments that every mode but --print-config needs."""
    if data is None:
        raise click.UsageError("Missing argument 'DATA'.")
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    return data, Path(out)


def _make_config(ctx: click.Context, given: dict[str, Any], echo: Printer) -> TrainConfig:
    """Merge the values of the file (of a resumed run, its own), of the options and of -o; later ones win."""
    from ..engine.config import nested_keys, parse_value, put, read_values
    from ..engine.train.config import TrainConfig, make_config, read_saved
    from ..engine.trust import trust_named

    values = dict[str, Any]()
    source = given["config"]
    if source is not None:
        values = read_values(source)
    elif given["resume"] and given["out"] and (Path(given["out"]) / SAVED).is_file():
        source = str(Path(given["out"]) / SAVED)
        values = read_saved(source)
    for name, value in given.items():
        if name not in _NOT_IN_FILE and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            if name == "columns":
                value = {**values.get("data", {}).get("columns", {}), **value}
            put(values, next(iter(nested_keys(TrainConfig, name)), name), _plain(name, value))
    for setting in given["settings"]:
        key, value = parse_value(setting)
        if key in ("model", "log", "callbacks"):  # typed by the user, as in the option
            trust_named(*map(str, value if isinstance(value, list) else [value]))
        put(values, key, value)
    config = make_config(values, source or "options", echo.warn)
    if config.stages and ctx.get_parameter_source("epochs") is not ParameterSource.DEFAULT:
        raise click.UsageError("--epochs cannot be used with stages; set the epochs of each stage in the file")
    return config


def _plain(name: str, value: Any) -> Any:
    """Convert the value of an option to its form in a file."""
    if name in ("augment", "white") and value is not None:
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _train(
    table: str,
    config: TrainConfig,
    out: Path,
    resume: bool,
    echo: Printer,
    fold: tuple[int, int] | None = None,
    read: Chosen | None = None,
) -> None:
    """Train in this process, alone or as one of several; only the first process prints."""
    from ..engine.config import to_toml
    from ..engine.datasets.tables.cells import write_csv
    from ..engine.files import write_atomically
    from ..engine.parallel.process_group import ProcessGroup
    from ..engine.train.fit import FitWatch, fit
    from ..engine.train.folds import write_validation
    from ..engine.train.inputs import training_data
    from ..engine.train.mask_target import write_overlaps
    from ..engine.train.option_checks import check_choices
    from .progress import ProgressView

    resume = resume or is_restarted(out)
    if not resume and (out / "last.ckpt").exists():  # checked again: another process may have begun it
        raise GigamorphError(f"{out}: already holds a run; continue it with --resume or name another folder")
    group = ProcessGroup.here(config.split)
    chosen = replace(config.options(), device=options.usable_device(config.device))
    warn = echo.warn if group.leads else lambda text: None
    check_choices(chosen, config.data.channels, config.log, config.callbacks, group.at_once)
    images = training_data(table, **config.data_arguments(), fold=fold, chosen=read, warn=warn)
    watch = FitWatch(warn=echo.warn, loggers=config.log, callbacks=config.callbacks)
    if not group.leads:
        fit(images, chosen, out, resume=resume, watch=watch)
        return
    echo.listen()
    counts = ", ".join(f"{len(part)} {name}" for name, part in images.parts.items())
    several = "" if group.size == 1 else f" in {group.size} processes"
    kind = "classes" if config.data.task in ("classes", "ordinal") else config.data.task
    samples = "images" if config.data.views is None else f"exams ({config.data.views} of their views)"
    echo.say(f"{counts} {samples}; {kind} {', '.join(images.classes)}; {chosen.model} on {chosen.device}{several}")
    if config.data.mean == "auto":
        scale = images.preprocessing["normalize"]
        echo.say(f"mean {scale['mean']} and std {scale['std']} of the training images")

    def on_begin() -> None:
        text = to_toml(config)
        if fold is not None:
            (out / "metrics.json").unlink(missing_ok=True)  # stale: the fold continues with more epochs
        for folder in (out,) if fold is None else (out, out.parent):  # --resume of all folds reads the parent's
            write_atomically(folder / SAVED, lambda path: path.write_text(text, encoding="utf-8"), "configuration")
        if images.left_out:
            bad = [(str(path), reason) for path, reason in images.left_out.items()]
            write_csv(out / QUARANTINE, ["image_path", "reason"], bad)

    with ProgressView(device=chosen.device, quiet=echo.quiet) as view:
        watch = replace(watch, say=echo.say, begun=on_begin)
        found = fit(images, chosen, out, resume=resume, report=view, watch=watch)
    if fold is not None and found.overlaps:
        write_overlaps(out / "val.csv", found.overlaps["val"], images.classes)
    elif fold is not None:
        write_validation(out, found.predictions["val"], images)
    for part in ("val", "test"):
        if part in found.metrics:
            echo.say(f"{part}: {scores_line(found.metrics[part])}")
    written = "best.ckpt, model_card.md, metrics.json, log.csv, curves.png, config.toml"
    if images.left_out:
        written += f", {QUARANTINE} ({counted(len(images.left_out), 'image')} left out)"
    echo.say(f"best epoch {found.metrics['best_epoch']}; {out}/{written}")


def _stop_message(out: Path, of_folds: bool = False) -> str:
    """Return the line printed after Ctrl-C, which says how to continue."""
    if (out / "last.ckpt").exists():
        return f"stopped; the same command with --resume continues from {out / 'last.ckpt'}"
    again = "with --resume starts this fold again" if of_folds else "starts again"  # earlier folds have checkpoints
    return f"stopped before the first checkpoint; the same command {again}"


def _require_no_folds(out: Path) -> None:
    if (out / "fold1").is_dir():
        raise GigamorphError(f"{out}: holds a cross-validation; give --folds, or name another folder")


def _train_folds(
    table: str, config: TrainConfig, out: Path, resume: bool, echo: Printer, count: int, device: str
) -> None:
    """Train the folds one after the other, and summarise them."""
    from ..engine.train.folds import summarise

    folds = config.data.folds
    assert folds is not None
    if (out / "last.ckpt").exists():
        raise GigamorphError(f"{out}: holds a run without folds, or one fold; name another folder")
    if resume:
        _require_same_folds(out, folds)
    read: Chosen | None = None
    for number in range(1, folds + 1):
        folder = out / f"fold{number}"
        begun = (folder / "last.ckpt").exists()
        if begun and not resume:
            raise GigamorphError(f"{folder}: already holds a run; continue with --resume or name another folder")
        echo.say(f"fold {number} of {folds}")
        on_stop = partial(_stop_message, folder, of_folds=True)
        if read is None:
            with printing_stop(on_stop):
                read = _read_for_folds(table, config, device, count, echo)
        start(_train, count, device, config.timeout, on_stop, table, config, folder, begun, echo, (number, folds), read)
    for line in summarise(out, folds):
        echo.say(line)


def _require_same_folds(out: Path, folds: int) -> None:
    """Refuse to resume with another number of folds, which would assign patients to other folds."""
    from ..engine.train.config import read_saved

    if (out / SAVED).is_file():
        before = read_saved(out / SAVED).get("data", {}).get("folds")
        if before is not None and before != folds:
            raise GigamorphError(f"{out}: was started with {before} folds, not {folds}; resume with the same number")


def _read_for_folds(table: str, config: TrainConfig, device: str, count: int, echo: Printer) -> Chosen:
    """Read the images of all folds, so that they are read and reported once."""
    from ..engine.train.inputs import choose_images
    from ..engine.train.option_checks import check_choices

    at_once = 1 if config.split is True else count // max(1, config.split)
    chosen = replace(config.options(), device=options.usable_device(device))
    check_choices(chosen, config.data.channels, config.log, config.callbacks, at_once)
    return choose_images(table, **config.data_arguments(), warn=echo.warn if is_first_process() else lambda text: None)


def scores_line(found: dict[str, float | int | None]) -> str:
    """Format the scores of a split: per image, breast and exam, or Dice of masks."""
    from ..engine.train.metrics import SHOWN

    if "dice" in found:
        values = (f"{k.removeprefix('dice_')} {'undefined' if v is None else f'{v:.4f}'}" for k, v in found.items())
        return f"Dice of {', '.join(list(values)[2:])} ({counted(int(found['images'] or 0), 'image')})"
    parts = []
    for level, plural in (("image", "images"), ("breast", "breasts"), ("exam", "exams")):
        if level == "breast" and found.get("breasts") == found.get("images"):
            continue  # breasts equal images, for example if sides are unknown
        for name in (own for own in found if own.endswith(f"_{level}")):
            value = found[name]
            shown = SHOWN[name.replace(level, "image")]
            text = "undefined" if value is None else f"{value:.4f}"
            parts.append(f"{shown} per {level} {text} ({found[plural]} {plural})")
    return ", ".join(parts)
