"""``gigamorph train``: a classifier from a table of images, at native resolution inside a memory budget."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from click.core import ParameterSource

from . import options
from .foreign_options import TrainCommand
from .numerals import counted
from .processes import Teller, count_processes, goes_on, leads, start, stopping
from .train_recipe import begin_recipe, refuse_others

if TYPE_CHECKING:
    from ..engine.train.config import TrainConfig
    from ..engine.train.inputs import Chosen

SAVED, QUARANTINE = "config.toml", "quarantine.csv"

# Where in a configuration the options of the command line stand, if not by their own name at its top.
_KEYS = {
    **dict.fromkeys(
        ("task", "labels", "channels", "mean", "std", "voi", "for_processing", "white", "augment", "downsample"), "data"
    ),
    **dict.fromkeys(("skip_bad", "folds", "views"), "data"),
    **dict.fromkeys(("lr", "rates", "weight_decay"), "optimizer"),
    "class_weights": "loss",
}
_APART = ("data", "out", "recipe", "config", "settings", "print_config", "resume", "quiet", "verbose")


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


def _parse_time(ctx: click.Context, param: click.Parameter, value: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)?", value.strip())
    seconds = float(match[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86400}[match[2] or "s"] if match else 0.0
    if not seconds:
        raise click.BadParameter(f"{value!r} is no time; write 90s, 30min or 2h", ctx, param)
    return seconds


@click.command(cls=TrainCommand)
@click.argument("data", type=click.Path(exists=True), required=False)
@click.option("--out", type=click.Path(file_okay=False), help="Folder for checkpoints, log and metrics.")
@click.option(
    "--config", type=click.Path(), help="Options from a TOML, YAML or JSON file; of --recipe, the recipe's own."
)
@click.option(
    "-o",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set one key of the configuration, as optimizer.name=sgd or loss.focal=2. Repeatable; over file and options.",
)
@click.option("--print-config", is_flag=True, help="Print all of the configuration, with defaults, and do nothing.")
@options.model
@click.option("--weights", type=click.Path(), help="Start from these weights: a safetensors or torch file.")
@click.option(
    "--init",
    metavar="WHERE",
    help="Fine-tune: a weights file; a network of gigamorph import, with its model and, unless given, channels, "
    "--mean, --std, --voi; or timm:NAME, whose pretrained weights timm fetches.",
)
@click.option(
    "--freeze",
    multiple=True,
    metavar="PATTERN",
    help="Parts that do not learn, as layer1 or blocks.[0-2]; BatchNorm in them keeps its statistics. Repeatable.",
)
@click.option(
    "--task",
    type=click.Choice(["classes", "labels", "ordinal", "numbers", "masks"]),
    default="classes",
    show_default=True,
    help="One of several classes; any of the columns label_NAME; classes in their order; numbers in label_NAME; "
    "a class for each pixel, in the files of mask_path.",
)
@click.option("--label", "labels", multiple=True, metavar="NAME", help="Of --task labels, numbers: columns to learn.")
@click.option(
    "--views",
    type=click.Choice(["mean", "max", "attention"]),
    help="Take all images of an exam (patient_id, exam_id) as one sample, its views combined so; default: each image.",
)
@options.memory_budget
@options.batch_norm
@options.channels
@click.option(
    "--mean",
    default="0",
    show_default=True,
    callback=_parse_scale,
    help="Grey value taken as zero, 0 black to 1 white; one number, or one per channel; auto for mean and std takes "
    "both of a sample of the training images.",
)
@click.option(
    "--std", default="1", show_default=True, callback=_parse_scale, help="Spread that is scaled to one; see --mean."
)
@options.voi
@options.for_processing
@options.white
@options.augment
@click.option(
    "--downsample",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Average so many pixels in both directions: a baseline of lower resolution.",
)
@click.option("--skip-bad", is_flag=True, help="Read all images first, and leave out those that cannot be read.")
@click.option(
    "--folds",
    type=click.IntRange(2),
    metavar="N",
    help="Cross-validation by patient: N runs, in fold1 ...; predict takes OUT as their mean.",
)
@click.option("--epochs", type=click.IntRange(1), default=20, show_default=True)
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True, help="Learning rate.")
@click.option(
    "--lr-of",
    "rates",
    multiple=True,
    metavar="PATTERN=RATE",
    callback=_parse_rates,
    help="A learning rate of their own for parts, as classifier=1e-3. Repeatable; the last that fits counts.",
)
@click.option("--weight-decay", type=click.FloatRange(0), default=1e-4, show_default=True)
@click.option("--accumulate", type=click.IntRange(1), default=8, show_default=True, help="Images per optimizer step.")
@options.precision
@click.option("--class-weights", is_flag=True, help="Weigh classes in the loss by the inverse of their frequency.")
@click.option("--patience", type=click.IntRange(1), help="Stop after this many epochs without a better validation AUC.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@options.device
@click.option(
    "--devices",
    type=click.IntRange(1),
    metavar="N",
    help="Train on this many GPUs, or processes on the CPU: an image on each at a time, gradients averaged.",
)
@click.option("--split-image", is_flag=True, help="Share each image between the devices instead, a band of rows each.")
@click.option(
    "--devices-per-image",
    type=click.IntRange(1),
    metavar="N",
    help="Share each image between N of the devices, and average the gradients over those that have different images.",
)
@click.option(
    "--timeout",
    metavar="TIME",
    default="2h",
    show_default=True,
    callback=_parse_time,
    help="How long processes wait for each other, as 90s, 30min or 2h; then the error names the one that is missing.",
)
@click.option(
    "--log",
    multiple=True,
    metavar="NAME",
    callback=options.named,
    help="Besides log.csv: csv, tensorboard, wandb, mlflow, or module:name of a Lightning logger. Repeatable.",
)
@click.option(
    "--callback",
    "callbacks",
    multiple=True,
    metavar="MODULE:NAME",
    callback=options.named,
    help="A callback of Lightning. Repeatable.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in --out exactly where it stopped, or begin it; --epochs extends it.",
)
@click.option("--recipe", metavar="NAME", help="Train as a published method does; gigamorph recipe list names them.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors alone.")
@click.option("--verbose", is_flag=True, help="Print the plan, the kernels and what learns at which rates as well.")
@click.pass_context
def train(ctx: click.Context, data: str | None, **given: Any) -> None:
    """Train a classifier on images of any size, with the gradients that the whole image gives.

    DATA is a csv with the columns image_path, label, patient_id and, as you like, split (train, val, test),
    laterality and view; or a folder with a sub-folder per class. Without a split, patients are drawn into one.

    All options can stand in a file: --print-config shows it, --config takes it, and --out keeps it as config.toml, with
    which --resume goes on. Files say more than options do: optimizers and schedules by name, losses, stages, averages.

    Ctrl-C finishes the image under way and leaves last.ckpt; --resume goes on from there, bit for bit on the CPU. With
    more --epochs it also goes on with a run that was complete.

    MODULE:FACTORY is a function or class of a Python module in this folder or on Python's path. It is called with
    num_classes and in_channels, each if its signature names it, and gives a torch.nn.Module that maps (N, channels, H,
    W) to logits (N, classes).

    With --recipe the model, its images and the stages of its training stand in --config; of the other options only
    --memory-budget, --precision, --seed, --device, --devices, --split-image, --devices-per-image, --timeout and
    --resume are taken.

    Example: gigamorph train table.csv --model resnet50 --weights resnet50.safetensors --batch-norm frozen
    --channels 3 --memory-budget 8GiB --augment flip=up-down,rotate=10,elastic=20,gamma=0.2 --out run
    """
    tell = Teller(given["quiet"], given["verbose"])
    if given["recipe"] is not None:
        refuse_others(ctx)
        begin_recipe(*_required(data, given["out"]), given, tell)
        return
    config = _configured(ctx, given, tell)
    device = options.usable_device(config.device)
    if given["print_config"]:
        from ..engine.config import to_toml
        from ..engine.train.option_checks import check_steps

        check_steps(config.options())
        click.echo(to_toml(config), nl=False)
        return
    from ..engine.files import require_writable

    table, out = _required(data, given["out"])
    require_writable(out / SAVED, "configuration")  # before mean and std of all images, say, are sought
    count = count_processes(config.devices, config.split_image, config.devices_per_image)
    if config.data.folds is None:
        _refuse_folds(out)
        stopped = partial(_stopped, out)
        start(_train, count, device, config.timeout, stopped, table, config, out, given["resume"], tell)
    else:
        _train_folds(table, config, out, given["resume"], tell, count, device)


def _required(data: str | None, out: str | None) -> tuple[str, Path]:
    """What only --print-config can do without."""
    if data is None:
        raise click.UsageError("Missing argument 'DATA'.")
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    return data, Path(out)


def _configured(ctx: click.Context, given: dict[str, Any], tell: Teller) -> TrainConfig:
    """The file's values, the options' over them, and those of -o over both; of a run that goes on its own file's."""
    from ..engine.config import parse_value, put, read_values
    from ..engine.train.config import make_config, read_saved
    from ..engine.trust import trust_named

    values: dict[str, Any] = {}
    source = given["config"]
    if source is not None:
        values = read_values(source)
    elif given["resume"] and given["out"] and (Path(given["out"]) / SAVED).is_file():
        source = str(Path(given["out"]) / SAVED)
        values = read_saved(source)
    for name, value in given.items():
        if name not in _APART and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            table = _KEYS.get(name)
            put(values, f"{table}.{name}" if table else name, _plain(name, value))
    for setting in given["settings"]:
        key, value = parse_value(setting)
        if key in ("model", "log", "callbacks"):  # typed, as by the option
            trust_named(*map(str, value if isinstance(value, list) else [value]))
        put(values, key, value)
    config = make_config(values, source or "options", tell.warn)
    if config.stages and ctx.get_parameter_source("epochs") is not ParameterSource.DEFAULT:
        raise click.UsageError("--epochs: each of the stages has its own; set stages in the file")
    return config


def _plain(name: str, value: Any) -> Any:
    """An option's value as a file has it."""
    if name in ("augment", "white") and value is not None:
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _train(
    table: str,
    config: TrainConfig,
    out: Path,
    resume: bool,
    tell: Teller,
    fold: tuple[int, int] | None = None,
    read: Chosen | None = None,
) -> None:
    """Train in this process, alone or as one of several, of which the first reports."""
    from ..engine.config import to_toml
    from ..engine.errors import GigamorphError
    from ..engine.files import write_atomically
    from ..engine.parallel.process_group import ProcessGroup
    from ..engine.predict.tables import write_csv
    from ..engine.train.fit import Watch, fit
    from ..engine.train.folds import write_validation
    from ..engine.train.inputs import training_data
    from ..engine.train.masks import write_overlaps
    from ..engine.train.option_checks import check_choices
    from .progress import ProgressView

    resume = resume or goes_on(out)
    if not resume and (out / "last.ckpt").exists():  # said again where others may have begun it meanwhile
        raise GigamorphError(f"{out}: already holds a run; continue it with --resume or name another folder")
    group = ProcessGroup.here(config.split)
    chosen = replace(config.options(), device=options.usable_device(config.device))
    warn = tell.warn if group.leads else lambda text: None
    check_choices(chosen, config.data.channels, config.log, config.callbacks, group.at_once)
    images = training_data(table, **config.data_arguments(), fold=fold, chosen=read, warn=warn)
    watch = Watch(warn=tell.warn, loggers=config.log, callbacks=config.callbacks)
    if not group.leads:
        fit(images, chosen, out, resume=resume, watch=watch)
        return
    tell.listen()
    counts = ", ".join(f"{len(part)} {name}" for name, part in images.parts.items())
    several = "" if group.size == 1 else f" in {group.size} processes"
    kind = "classes" if config.data.task in ("classes", "ordinal") else config.data.task
    samples = "images" if config.data.views is None else f"exams ({config.data.views} of their views)"
    tell.say(f"{counts} {samples}; {kind} {', '.join(images.classes)}; {chosen.model} on {chosen.device}{several}")
    if config.data.mean == "auto":
        scale = images.preprocessing["normalize"]
        tell.say(f"mean {scale['mean']} and std {scale['std']} of the training images")

    def begun() -> None:
        text = to_toml(config)
        if fold is not None:
            (out / "metrics.json").unlink(missing_ok=True)  # of fewer epochs: the fold is not finished any more
        for folder in (out,) if fold is None else (out, out.parent):  # so that all folds go on from their folder's name
            write_atomically(folder / SAVED, lambda path: path.write_text(text, encoding="utf-8"), "configuration")
        if images.left_out:
            bad = [(str(path), reason) for path, reason in images.left_out.items()]
            write_csv(out / QUARANTINE, ["image_path", "reason"], bad)

    with ProgressView(device=chosen.device, quiet=tell.quiet) as view:
        watch = replace(watch, say=tell.say, begun=begun)
        found = fit(images, chosen, out, resume=resume, report=view, watch=watch)
    if fold is not None and found.overlaps:
        write_overlaps(out / "val.csv", found.overlaps["val"], images.classes)
    elif fold is not None:
        write_validation(out, found.predictions["val"], images)
    for part in ("val", "test"):
        if part in found.metrics:
            tell.say(f"{part}: {scores_line(found.metrics[part])}")
    written = "best.ckpt, model_card.md, metrics.json, log.csv, curves.png, config.toml"
    if images.left_out:
        written += f", {QUARANTINE} ({counted(len(images.left_out), 'image')} left out)"
    tell.say(f"best epoch {found.metrics['best_epoch']}; {out}/{written}")


def _stopped(out: Path, of_folds: bool = False) -> str:
    """How a run goes on after a Ctrl-C."""
    if (out / "last.ckpt").exists():
        return f"stopped; the same command with --resume goes on from {out / 'last.ckpt'}"
    again = "with --resume begins this fold anew" if of_folds else "begins anew"  # the folds before have theirs
    return f"stopped before the first checkpoint; the same command {again}"


def _refuse_folds(out: Path) -> None:
    from ..engine.errors import GigamorphError

    if (out / "fold1").is_dir():
        raise GigamorphError(f"{out}: holds the runs of a cross-validation; give --folds, or name another folder")


def _train_folds(
    table: str, config: TrainConfig, out: Path, resume: bool, tell: Teller, count: int, device: str
) -> None:
    """A run for each fold, one after the other, and what they are together."""
    from ..engine.errors import GigamorphError
    from ..engine.train.folds import summarise

    folds = config.data.folds
    assert folds is not None
    if (out / "last.ckpt").exists():
        raise GigamorphError(f"{out}: holds a run without folds, or one fold; name another folder")
    if resume:
        _require_as_many(out, folds)
    read: Chosen | None = None
    for number in range(1, folds + 1):
        folder = out / f"fold{number}"
        begun = (folder / "last.ckpt").exists()
        if begun and not resume:
            raise GigamorphError(f"{folder}: already holds a run; continue with --resume or name another folder")
        tell.say(f"fold {number} of {folds}")
        stopped = partial(_stopped, folder, of_folds=True)
        if read is None:
            with stopping(stopped):
                read = _read_for_folds(table, config, device, count, tell)
        start(_train, count, device, config.timeout, stopped, table, config, folder, begun, tell, (number, folds), read)
    for line in summarise(out, folds):
        tell.say(line)


def _require_as_many(out: Path, folds: int) -> None:
    """Patients are drawn into other folds by another number."""
    from ..engine.errors import GigamorphError
    from ..engine.train.config import read_saved

    if (out / SAVED).is_file():
        before = read_saved(out / SAVED).get("data", {}).get("folds")
        if before is not None and before != folds:
            raise GigamorphError(f"{out}: was begun with {before} folds, not {folds}; resume with as many")


def _read_for_folds(table: str, config: TrainConfig, device: str, count: int, tell: Teller) -> Chosen:
    """What all folds take: read once, and told once."""
    from ..engine.train.inputs import choose_images
    from ..engine.train.option_checks import check_choices

    at_once = 1 if config.split is True else count // max(1, config.split)
    chosen = replace(config.options(), device=options.usable_device(device))
    check_choices(chosen, config.data.channels, config.log, config.callbacks, at_once)
    return choose_images(table, **config.data_arguments(), warn=tell.warn if leads() else lambda text: None)


def scores_line(found: dict[str, float | int | None]) -> str:
    """The measures of a split, per image, per breast where some have several images, or of its masks, for people."""
    from ..engine.train.metrics import SHOWN

    if "dice" in found:
        told = (f"{k.removeprefix('dice_')} {'undefined' if v is None else f'{v:.4f}'}" for k, v in found.items())
        return f"Dice of {', '.join(list(told)[2:])} ({counted(int(found['images'] or 0), 'image')})"
    parts = []
    for level, plural in (("image", "images"), ("breast", "breasts"), ("exam", "exams")):
        if level == "breast" and found.get("breasts") == found.get("images"):
            continue  # they are the images, as where no side is known
        for name in (own for own in found if own.endswith(f"_{level}")):
            value = found[name]
            shown = SHOWN[name.replace(level, "image")]
            told = "undefined" if value is None else f"{value:.4f}"
            parts.append(f"{shown} per {level} {told} ({found[plural]} {plural})")
    return ", ".join(parts)
