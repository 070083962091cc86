"""``gigamorph train``: a classifier from a table of images, at native resolution inside a memory budget."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from . import options

if TYPE_CHECKING:
    from ..engine.data.augment import Augment
    from ..engine.train.fit import Data, TrainOptions


@click.command()
@click.argument("data", type=click.Path(exists=True))
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for checkpoints, log and metrics.")
@options.model
@click.option("--weights", type=click.Path(), help="Start from these weights: a safetensors or torch file.")
@options.memory_budget
@options.batch_norm
@options.channels
@options.mean
@options.std
@options.voi
@options.for_processing
@options.augment
@click.option("--epochs", type=click.IntRange(1), default=20, show_default=True)
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True, help="Of AdamW.")
@click.option("--weight-decay", type=click.FloatRange(0), default=1e-4, show_default=True)
@click.option("--accumulate", type=click.IntRange(1), default=8, show_default=True, help="Images per optimizer step.")
@options.precision
@click.option("--class-weights", is_flag=True, help="Weigh classes in the loss by the inverse of their frequency.")
@click.option("--patience", type=click.IntRange(1), help="Stop after so many epochs without a better validation AUC.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@options.device
@click.option(
    "--devices",
    type=click.IntRange(1),
    metavar="N",
    help="Train on so many GPUs, or in so many processes on the CPU: an image on each at a time, gradients averaged.",
)
@click.option("--split-image", is_flag=True, help="Share each image between the devices instead, a band of rows each.")
@click.option("--resume", is_flag=True, help="Continue the run in --out exactly where it stopped.")
def train(
    data: str,
    out: str,
    model: str,
    weights: str | None,
    memory_budget: int | None,
    batch_norm: str | None,
    channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    voi: str,
    for_processing: bool,
    augment: Augment | None,
    epochs: int,
    lr: float,
    weight_decay: float,
    accumulate: int,
    precision: str,
    class_weights: bool,
    patience: int | None,
    seed: int,
    device: str,
    devices: int | None,
    split_image: bool,
    resume: bool,
) -> None:
    """Train a classifier on images of any size, with the gradients that the whole image gives.

    DATA is a csv with the columns image_path, label, patient_id and, as you like, split (train, val, test),
    laterality and view; or a folder with a sub-folder per class. Without a split, patients are drawn into one.

    Ctrl-C finishes the image under way and leaves last.ckpt; --resume goes on from there, bit for bit on the CPU.

    Example: gigamorph train table.csv --model resnet50 --weights resnet50.safetensors --batch-norm frozen
    --channels 3 --memory-budget 8GiB --augment flip=up-down,rotate=10,elastic=20,gamma=0.2 --out run
    """
    from ..engine.pixels import Normalize
    from ..engine.train import launch
    from ..engine.train.fit import TrainOptions
    from ..engine.train.inputs import training_data

    there = int(os.environ["WORLD_SIZE"]) if launch.launched() else devices or 1
    if devices not in (None, there):
        raise click.UsageError(f"--devices {devices} in one of {there} processes that were launched; leave it out")
    if split_image and there == 1 and not launch.launched():
        raise click.UsageError("--split-image shares an image between devices; say between how many with --devices")
    images = training_data(
        data,
        channels=channels,
        normalize=Normalize(mean, std),
        voi=voi,
        for_processing=for_processing,
        augment=augment,
        seed=seed,
    )
    chosen = TrainOptions(
        model=model,
        weights=weights,
        memory_budget=memory_budget,
        batch_norm=batch_norm,
        epochs=epochs,
        lr=lr,
        weight_decay=weight_decay,
        accumulate=accumulate,
        precision=precision,
        class_weights=class_weights,
        patience=patience,
        seed=seed,
        device=device,
        split_image=split_image,
    )
    if launch.launched():
        with launch.group(device):
            _train(images, chosen, out, resume)
    elif there > 1:
        launch.launch(_train, there, device, images, chosen, out, resume)
    else:
        _train(images, chosen, out, resume)


def _train(images: Data, chosen: TrainOptions, out: str, resume: bool) -> None:
    """Train in this process, alone or as one of several, of which the first reports."""
    from ..engine.train.fit import fit
    from ..engine.train.team import Team
    from .progress import ProgressView

    team = Team.here(chosen.split_image)
    if not team.leads:
        fit(images, chosen, out, resume=resume)
        return
    counts = ", ".join(f"{len(part)} {name}" for name, part in images.parts.items())
    several = "" if team.size == 1 else f" in {team.size} processes"
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
    click.echo(f"best epoch {metrics['best_epoch']}; {out}/best.ckpt, metrics.json, log.csv, curves.png")


def _scores(found: dict[str, float | int | None]) -> str:
    return ", ".join(
        f"AUC per {name} {'undefined' if found['auc_' + name] is None else format(found['auc_' + name], '.4f')} "
        f"({found[plural]} {plural})"
        for name, plural in (("image", "images"), ("breast", "breasts"))
    )
