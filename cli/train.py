"""``gigamorph train``: a classifier from a table of images, at native resolution inside a memory budget."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from click.core import ParameterSource

from . import options

if TYPE_CHECKING:
    from ..engine.datasets.augment import Augment
    from ..engine.train.fit import Data, TrainOptions
    from ..engine.train.run import Run


def _parse_rates(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    found = []
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not name or not 0 < rate < float("inf"):
            raise click.BadParameter(f"{value!r}; write PATTERN=RATE, as in classifier=1e-3", ctx, param)
        found.append((name, rate))
    return tuple(found)


@click.command()
@click.argument("data", type=click.Path(exists=True))
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for checkpoints, log and metrics.")
@options.model
@click.option("--weights", type=click.Path(), help="Start from these weights: a safetensors or torch file.")
@click.option(
    "--init",
    metavar="FOLDER",
    help="Fine-tune a network of gigamorph import: model, weights and, unless given, channels, --mean, --std, --voi.",
)
@click.option(
    "--freeze",
    multiple=True,
    metavar="PATTERN",
    help="Parts that do not learn, as layer1 or blocks.[0-2]; BatchNorm in them keeps its statistics. Repeatable.",
)
@options.memory_budget
@options.batch_norm
@options.channels
@options.mean
@options.std
@options.voi
@options.for_processing
@options.white
@options.augment
@click.option("--epochs", type=click.IntRange(1), default=20, show_default=True)
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True, help="Of AdamW.")
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
@click.option("--resume", is_flag=True, help="Continue the run in --out exactly where it stopped; --epochs extends it.")
@click.option("--recipe", metavar="NAME", help="Train as a published method does; gigamorph recipe list names them.")
@click.option("--config", type=click.Path(), help="Of the recipe, TOML; by default as published.")
@click.pass_context
def train(
    ctx: click.Context,
    data: str,
    out: str,
    model: str,
    weights: str | None,
    init: str | None,
    freeze: tuple[str, ...],
    memory_budget: int | None,
    batch_norm: str | None,
    channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    voi: str,
    for_processing: bool,
    white: Any,
    augment: Augment | None,
    epochs: int,
    lr: float,
    rates: tuple[tuple[str, float], ...],
    weight_decay: float,
    accumulate: int,
    precision: Any,
    class_weights: bool,
    patience: int | None,
    seed: int,
    device: str,
    devices: int | None,
    split_image: bool,
    resume: bool,
    recipe: str | None,
    config: str | None,
) -> None:
    """Train a classifier on images of any size, with the gradients that the whole image gives.

    DATA is a csv with the columns image_path, label, patient_id and, as you like, split (train, val, test),
    laterality and view; or a folder with a sub-folder per class. Without a split, patients are drawn into one.

    Ctrl-C finishes the image under way and leaves last.ckpt; --resume goes on from there, bit for bit on the CPU. With
    more --epochs it also goes on with a run that was complete.

    MODULE:FACTORY is a function or class of a Python module in this folder or on Python's path. It is called with
    num_classes and in_channels, each if its signature names it, and gives a torch.nn.Module that maps (N, channels, H,
    W) to logits (N, classes).

    With --recipe the model, its images and the stages of its training stand in --config; of the other options only
    --memory-budget, --precision, --seed, --device, --devices, --split-image and --resume are taken.

    Example: gigamorph train table.csv --model resnet50 --weights resnet50.safetensors --batch-norm frozen
    --channels 3 --memory-budget 8GiB --augment flip=up-down,rotate=10,elastic=20,gamma=0.2 --out run
    """
    if config is not None and recipe is None:
        raise click.UsageError("--config is a recipe's; name the recipe with --recipe")
    if recipe is not None:
        _refuse_others(ctx)
    count = _count_processes(devices, split_image)
    if recipe is not None:
        from ..engine.config import load_config
        from ..engine.recipes import get_recipe
        from ..engine.train.run import Run

        kind = get_recipe(recipe).config
        settings = kind() if config is None else load_config(config, kind)
        run = Run(Path(out), seed, device, memory_budget, resume, precision)
        _start(_train_recipe, count, device, recipe, settings, data, run, split_image)
        return
    from ..engine.images.pixels import Normalize
    from ..engine.models.folder import is_folder
    from ..engine.train.fit import TrainOptions
    from ..engine.train.inputs import training_data

    if init is None and is_folder(model):
        init = model
    elif init is not None and ctx.get_parameter_source("model") is not ParameterSource.DEFAULT:
        raise click.UsageError("--init says the model; omit --model")
    if init is not None:
        if weights is not None:
            raise click.UsageError(f"--weights {weights}: {init} has its own weights; omit them")
        model, weights, channels, mean, std, voi = _from_folder(ctx, init, channels, mean, std, voi)
    images = training_data(
        data,
        channels=channels,
        normalize=Normalize(mean, std),
        voi=voi,
        for_processing=for_processing,
        white=white,
        augment=augment,
        seed=seed,
        warn=lambda text: click.echo(f"warning: {text}", err=True),
    )
    if resume and ctx.get_parameter_source("epochs") is ParameterSource.DEFAULT:
        epochs = _epochs_of(Path(out) / "last.ckpt", epochs)
    chosen = TrainOptions(
        model=model,
        weights=weights,
        memory_budget=memory_budget,
        batch_norm=batch_norm,
        epochs=epochs,
        lr=lr,
        freeze=freeze,
        rates=rates,
        weight_decay=weight_decay,
        accumulate=accumulate,
        precision=precision,
        class_weights=class_weights,
        patience=patience,
        seed=seed,
        device=device,
        split_image=split_image,
    )
    _start(_train, count, device, images, chosen, out, resume)


def _from_folder(
    ctx: click.Context, folder: str, channels: int, mean: tuple[float, ...], std: tuple[float, ...], voi: str
) -> tuple[str, str, int, tuple[float, ...], tuple[float, ...], str]:
    """Model, weights, channels, mean, std and grey scale of a folder, where the options do not say otherwise."""
    from ..engine.errors import GigamorphError
    from ..engine.models.folder import read_description

    found = read_description(folder)
    if found.members:
        raise GigamorphError(f"{folder}: is an ensemble; fine-tune one of its members, as {folder}/{found.members[0]}")
    own = found.preprocessing

    def said(name: str) -> bool:
        return ctx.get_parameter_source(name) is not ParameterSource.DEFAULT

    if not own.streams and not (said("mean") and said("std")):
        size = f"{own.size[0]} x {own.size[1]} pixels" if own.size else ""
        by = f"{own.per_image} of each image" if own.per_image else ""
        click.echo(
            f"warning: {folder} was made for images brought to {' and '.join(filter(None, (size, by)))}; here it "
            "learns on every pixel, normalised by --mean and --std",
            err=True,
        )
    return (
        found.model,
        folder,
        channels if said("channels") else own.channels,
        mean if said("mean") else own.mean,
        std if said("std") else own.std,
        voi if said("voi") else own.voi,
    )


def _epochs_of(checkpoint: Path, otherwise: int) -> int:
    """As many epochs as a run was begun with."""
    from ..engine.train.checkpoint import load_checkpoint

    return load_checkpoint(checkpoint)["gigamorph"].get("options", {}).get("epochs", otherwise)


def _count_processes(devices: int | None, split_image: bool) -> int:
    from ..engine.parallel import launch

    there = int(os.environ["WORLD_SIZE"]) if launch.launched() else devices or 1
    if devices not in (None, there):
        raise click.UsageError(f"--devices {devices} in one of {there} processes that were launched; leave it out")
    if split_image and there == 1 and not launch.launched():
        raise click.UsageError("--split-image shares an image between devices; say between how many with --devices")
    return there


def _start(function: Callable[..., None], count: int, device: str, *args: Any) -> None:
    """Call a function in this process, alone or as one that a launcher has started, or in `count` new ones."""
    from ..engine.parallel import launch

    if launch.launched():
        with launch.process_group(device):
            function(*args)
    elif count > 1:
        launch.launch(function, count, device, *args)
    else:
        function(*args)


def _train(images: Data, chosen: TrainOptions, out: str, resume: bool) -> None:
    """Train in this process, alone or as one of several, of which the first reports."""
    from ..engine.parallel.process_group import ProcessGroup
    from ..engine.train.fit import fit
    from .progress import ProgressView

    group = ProcessGroup.here(chosen.split_image)
    if not group.leads:
        fit(images, chosen, out, resume=resume)
        return
    counts = ", ".join(f"{len(part)} {name}" for name, part in images.parts.items())
    several = "" if group.size == 1 else f" in {group.size} processes"
    click.echo(f"{counts} images; classes {', '.join(images.classes)}; {chosen.model} on {chosen.device}{several}")
    try:
        with ProgressView(device=chosen.device) as view:
            metrics = fit(images, chosen, out, resume=resume, report=view).metrics
    except KeyboardInterrupt:
        if (Path(out) / "last.ckpt").exists():
            click.echo(f"stopped; the same command with --resume goes on from {Path(out) / 'last.ckpt'}", err=True)
        raise
    for part in ("val", "test"):
        if part in metrics:
            click.echo(f"{part}: {_scores(metrics[part])}")
    click.echo(f"best epoch {metrics['best_epoch']}; {out}/best.ckpt, model_card.md, metrics.json, log.csv, curves.png")


def _scores(found: dict[str, float | int | None]) -> str:
    return ", ".join(
        f"AUC per {name} {'undefined' if found['auc_' + name] is None else format(found['auc_' + name], '.4f')} "
        f"({found[plural]} {plural})"
        for name, plural in (("image", "images"), ("breast", "breasts"))
    )


_OF_RECIPES = {
    "data",
    "out",
    "recipe",
    "config",
    "memory_budget",
    "precision",
    "seed",
    "device",
    "devices",
    "split_image",
    "resume",
}


def _refuse_others(ctx: click.Context) -> None:
    """What a recipe's configuration says cannot be said by an option as well."""
    given = [
        p for p in ctx.command.params if p.name and ctx.get_parameter_source(p.name) is not ParameterSource.DEFAULT
    ]
    others = [p.opts[0] for p in given if p.name not in _OF_RECIPES]
    if others:
        raise click.UsageError(f"{', '.join(others)} cannot go with --recipe; it stands in the recipe's --config")


def _train_recipe(name: str, config: Any, data: str, run: Run, split_image: bool) -> None:
    """Run a recipe in this process, alone or as one of several, of which the first reports."""
    from ..engine.parallel.process_group import ProcessGroup
    from ..engine.recipes import get_recipe
    from .progress import ProgressView
    from .table import show_rows

    run = replace(run, group=ProcessGroup.here(split_image))
    if not run.group.leads:
        get_recipe(name).train(Path(data), config, run)
        return
    try:
        with ProgressView(device=run.device) as view:
            metrics = get_recipe(name).train(Path(data), config, replace(run, report=view, say=view.say))
    except KeyboardInterrupt:
        click.echo(f"stopped; the same command with --resume goes on from what is in {run.out}", err=True)
        raise
    plain = {key: value for key, value in metrics.items() if isinstance(value, int | float | str)}
    show_rows([{"measure": key, "value": value} for key, value in plain.items()])
    click.echo(f"{run.out}/metrics.json has all of it")
