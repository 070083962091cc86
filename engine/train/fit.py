"""Train a classifier at native resolution: Lightning's loop around an accelerated network."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..accelerate import Accelerated, accelerate
from ..datasets.tables import Record
from ..errors import DataError, GigamorphError
from ..models import create_model
from ..models.compat import make_torchvision_importable
from ..parallel.process_group import ProcessGroup
from ..tiling.memory import format_bytes
from .callbacks import Checkpoints, EpochLog, InterruptedTraining
from .card import Card, write_card
from .checkpoint import AtomicCheckpointIO, load_checkpoint, versions, write_atomically
from .metrics import Prediction, as_cases, scores
from .module import Classifier, balanced_weights, prediction
from .progress import Meter, Report
from .sampler import EpochSampler

make_torchvision_importable()

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import Callback, EarlyStopping  # noqa: E402

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides the result of a run besides the data; stored in the checkpoint."""

    model: str = "resnet18"
    weights: str | None = None
    memory_budget: int | None = None
    """Bytes; None lets the engine take what is free."""
    batch_norm: str | None = None
    epochs: int = 20
    lr: float = 1e-3
    weight_decay: float = 1e-4
    accumulate: int = 8
    """Images per optimizer step. Each is a batch of its own, because their sizes differ."""
    precision: str = "fp32"
    class_weights: bool = False
    patience: int | None = None
    """Epochs without a better validation score after which the run ends."""
    seed: int = 0
    device: str = "cpu"
    split_image: bool = False
    """Whether processes share each image, a band of rows each, instead of having one each."""


class Images(Protocol):
    """What `gigamorph.engine.datasets.dataset.ImageDataset` offers: records, and items that open their file."""

    records: list[Record]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Data:
    """The images of a run, split by patient.

    ``classes`` names the labels in order; ``preprocessing`` is all that turns a file into what the network sees, and
    how training images are varied. `fit` tells training images that have a ``set_epoch`` which epoch it is.
    """

    train: Images
    val: Images
    test: Images
    classes: tuple[str, ...]
    channels: int
    preprocessing: dict[str, Any]

    @property
    def parts(self) -> dict[str, Images]:
        return {"train": self.train, "val": self.val, "test": self.test}


@dataclass(frozen=True)
class Fitted:
    """The end of a run: what ``metrics.json`` holds, the predictions behind it ("val", "test"), the best network."""

    metrics: dict[str, Any]
    predictions: dict[str, list[Prediction]]
    net: Accelerated


def fit(
    data: Data, options: TrainOptions, out: str | Path, *, resume: bool = False, report: Report | None = None
) -> Fitted:
    """Train, and write into ``out``: ``last.ckpt``, ``best.ckpt``, ``log.csv``, ``curves.png``, ``metrics.json``,
    ``model_card.md``.

    A resumed run ends with the parameters, bit for bit on the CPU, that it would have had without the interruption.

    All processes of a group of `torch.distributed` train together when each of them calls this: with ``split_image``
    they share each image, else each has one of its own and the gradients are averaged, so that an optimizer step has
    ``accumulate`` images in either way. The first of them reports and writes. `gigamorph.engine.parallel.launch` starts
    such processes; in other groups a process uses its current device. BatchNorm's running statistics are those of the
    first process, as ever in DDP. Sums over processes may be rounded otherwise in a run that was resumed.

    Returns:
        The best checkpoint's scores on the validation and test images, with the hash of the split, time, peak memory
        and versions, as in ``metrics.json``; its predictions; and the network with its parameters.

    Raises:
        DataError: if the split leaks a patient or a checkpoint belongs to another split.
        GigamorphError: if ``out`` already holds a run, a file cannot be written, or ``accumulate`` is no multiple of
            the number of images that are computed at a time.
        KeyboardInterrupt: at Ctrl-C, after ``last.ckpt`` was written.
    """
    out = Path(out)
    _check(data)
    last = out / "last.ckpt"
    group = ProcessGroup.here(options.split_image)
    if options.accumulate % group.at_once:
        raise GigamorphError(
            f"{options.accumulate} images per optimizer step cannot be dealt to {group.at_once} processes; make "
            "accumulate a multiple, or let them share each image"
        )
    record = _record(data, options, group)
    stored = load_checkpoint(last) if resume else None
    if stored is not None:
        _check_same(stored["gigamorph"], record, last)
        # The code may be newer than the run: what began the run stays on record beside what continues it.
        record["versions_at_start"] = stored["gigamorph"].get("versions_at_start", stored["gigamorph"]["versions"])
    elif last.exists():
        raise GigamorphError(f"{out}: already holds a run; continue it with --resume or name another folder")
    group.wait()  # all have seen the folder as it was
    started = time.monotonic()
    torch.manual_seed(options.seed)
    meter = Meter(report if group.leads else None, group.at_once)
    net = build_network(record, None if resume else options.weights, group.split)
    net.on_tile = meter.on_tile
    module = _module(net, record, data, options, meter, group)
    # A run that was stopped early and then interrupted lacks nothing but its scores.
    if stored is None or not stored["callbacks"]["Checkpoints"]["stopped"]:
        _run(module, data, options, out, meter, group, stored)

    best = load_checkpoint(out / "best.ckpt")
    module.load_state_dict(best["state_dict"])
    metrics: dict[str, Any] = {"best_epoch": best["gigamorph"]["position"][0]}
    predictions = {}
    for name, stage in (("val", "validate"), ("test", "test")):
        if len(data.parts[name]):
            predictions[name] = evaluate(net, data.parts[name], meter, stage, group)
            metrics[name] = scores(predictions[name])
    metrics |= {
        "seconds": round(time.monotonic() - started, 2),
        "peak_bytes": max(row["peak_bytes"] for row in load_checkpoint(last)["callbacks"]["EpochLog"]["rows"]),
        "split_sha256": record["split"]["sha256"],
        "preprocessing": data.preprocessing,
        "seed": options.seed,
        "versions": record["versions"],
    }
    text = json.dumps(metrics, indent=1) + "\n"
    if group.leads:
        write_atomically(out / "metrics.json", lambda p: p.write_text(text), "metrics")
        write_card(out / "model_card.md", _card(data, options, net, metrics, predictions))
    return Fitted(metrics, predictions, net)


def _card(
    data: Data,
    options: TrainOptions,
    net: Accelerated,
    metrics: dict[str, Any],
    predictions: dict[str, list[Prediction]],
) -> Card:
    kept = ("epochs", "lr", "weight_decay", "accumulate", "precision", "class_weights", "patience", "seed", "device")
    budget = "what is free" if options.memory_budget is None else format_bytes(options.memory_budget)
    return Card(
        title=f"{options.model} for {' and '.join(data.classes)}",
        model={
            "architecture": options.model,
            "parameters": f"{sum(p.numel() for p in net.parameters()):,}",
            "input": f"images of any size, every pixel, channels: {data.channels}",
            "output": f"log-odds of {', '.join(data.classes)}",
            "batch norm": options.batch_norm or "statistics of the whole image while training",
            "preprocessing": ", ".join(f"{name} {value}" for name, value in data.preprocessing.items()),
        },
        training={
            "recipe": "cross-entropy, AdamW, cosine with warm-up (gigamorph train)",
            "begun from": "weights that were given" if options.weights else "random weights",
            **{name.replace("_", " "): getattr(options, name) for name in kept},
            "best epoch": metrics["best_epoch"],
            "memory budget of a step": budget,
            "largest memory of the process": format_bytes(metrics["peak_bytes"]),
            "seconds": metrics["seconds"],
            "hash of the split": metrics["split_sha256"],
        },
        records={name: images.records for name, images in data.parts.items()},
        classes=data.classes,
        predictions={name: as_cases(found, data.classes) for name, found in predictions.items()},
    )


def build_network(record: dict[str, Any], weights: str | Path | None = None, split: bool = False) -> Accelerated:
    """The accelerated network that a checkpoint's record describes, on its device, without trained parameters."""
    options = record["options"]
    model = create_model(options["model"], len(record["classes"]), record["channels"], weights)
    model = model.to(options["device"])
    return accelerate(model, memory_budget=options["memory_budget"], batch_norm=options["batch_norm"], split=split)


def restore_network(checkpoint: dict[str, Any], *, memory_budget: int | None, device: str) -> Accelerated:
    """The trained network of a checkpoint (`load_checkpoint`), in another budget and on another device."""
    record = checkpoint["gigamorph"]
    here = {**record["options"], "memory_budget": memory_budget, "device": device}
    net = build_network({**record, "options": here})
    net.load_state_dict({key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()})
    return net


def evaluate(net: nn.Module, images: Images, meter: Meter, stage: str, group: ProcessGroup) -> list[Prediction]:
    """Predictions of the images, in order; a collective of the group."""
    net.eval()
    meter.start(stage, len(images))
    found = []
    with torch.no_grad():
        for index in range(group.turn, len(images), group.at_once):
            item = images[index]
            meter.image(item["image"].shape[-2] * item["image"].shape[-1])
            found.append(prediction(item, net(item["image"])[0]))
            meter.image_done()
    return group.in_order(found)


def _module(
    net: nn.Module, record: dict[str, Any], data: Data, options: TrainOptions, meter: Meter, group: ProcessGroup
) -> Classifier:
    labels = [record.label for record in data.train.records]
    steps = options.epochs * -(-len(data.train) // options.accumulate)
    return Classifier(
        net,
        record,
        seed=options.seed,
        lr=options.lr,
        weight_decay=options.weight_decay,
        steps=steps,
        class_weights=balanced_weights(labels, len(data.classes)) if options.class_weights else None,
        meter=meter,
        group=group,
    )


def _run(
    module: Classifier,
    data: Data,
    options: TrainOptions,
    out: Path,
    meter: Meter,
    group: ProcessGroup,
    stored: dict[str, Any] | None,
) -> None:
    checkpoints = Checkpoints(out, group)
    callbacks: list[Callback] = [EpochLog(out, meter, group), checkpoints]
    if options.patience is not None and len(data.val):
        # NaN never occurs: val_score falls back on the loss.
        callbacks.insert(0, EarlyStopping("val_score", mode="max", patience=options.patience, verbose=False))
    # Images that vary from epoch to epoch are told which one it is.
    tell = getattr(data.train, "set_epoch", None)
    sampler = EpochSampler(len(data.train), options.seed, group=group, on_epoch=tell)
    if stored is not None:
        sampler.epoch, sampler.skip = stored["gigamorph"]["position"]
    with warnings.catch_warnings():
        # Lightning advises on workers, loggers and folders; none of it concerns sources that are read by tiles.
        warnings.filterwarnings("ignore", module="lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        trainer = pl.Trainer(
            accelerator="gpu" if options.device.startswith("cuda") else "cpu",
            # Lightning sees one process of its own everywhere; what several have in common is the group's.
            devices=[torch.cuda.current_device()] if options.device.startswith("cuda") else 1,
            max_epochs=options.epochs,
            accumulate_grad_batches=options.accumulate // group.at_once,
            precision=PRECISIONS[options.precision],  # type: ignore[arg-type]
            gradient_clip_val=1.0,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(group.leads)],
            default_root_dir=out,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=True,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        train = DataLoader(cast(Any, data.train), sampler=sampler, collate_fn=list)
        shared = group.share(range(len(data.val)))
        val = DataLoader(cast(Any, data.val), sampler=shared, collate_fn=list) if shared else None
        try:
            if stored is None:
                trainer.fit(module, train, val)
            else:
                trainer.fit(module, train, val, ckpt_path=out / "last.ckpt", weights_only=True)
        except (InterruptedTraining, SystemExit) as error:  # Lightning makes an exit of a second Ctrl-C
            raise KeyboardInterrupt from error
        finally:
            checkpoints.restore_handler()


def _check(data: Data) -> None:
    if not len(data.train):
        raise DataError("no training images: give rows of split 'train', or leave the column out to have it made")
    where: dict[str, str] = {}
    for name, images in data.parts.items():
        for record in images.records:
            if record.label < 0:
                raise DataError(f"{record.path}: has no label; training needs one for each image")
            if where.setdefault(record.patient_id, name) != name:
                raise DataError(
                    f"patient {record.patient_id} is in both {where[record.patient_id]} and {name}; split by patient"
                )


def _record(data: Data, options: TrainOptions, group: ProcessGroup) -> dict[str, Any]:
    # The last two parts of a path: the folder may have moved when a run is resumed.
    split = {
        name: [["/".join(r.path.parts[-2:]), r.patient_id, r.label] for r in images.records]
        for name, images in data.parts.items()
    }
    return {
        "format": 1,
        "options": asdict(options),
        "images_at_once": group.at_once,
        "classes": list(data.classes),
        "channels": data.channels,
        "preprocessing": data.preprocessing,
        # A checkpoint is passed on: it tells whether a split is the same, not who is in it.
        "split": {
            "sha256": hashlib.sha256(json.dumps(split, sort_keys=True).encode()).hexdigest(),
            **{name: len(rows) for name, rows in split.items()},
        },
        "versions": versions(),
    }


def _check_same(stored: dict[str, Any], record: dict[str, Any], path: Path) -> None:
    if stored["split"]["sha256"] != record["split"]["sha256"]:
        raise DataError(f"{path}: belongs to another split of the data; resume with the table it was begun with")
    if stored.get("images_at_once", 1) != record["images_at_once"]:
        raise GigamorphError(
            f"{path}: was begun with {stored.get('images_at_once', 1)} images at a time, each on a device of its own, "
            f"not {record['images_at_once']}; resume with as many devices"
        )
    for name, value in stored["options"].items():
        # Where and in how much memory a step is computed does not change what it computes.
        if name not in ("memory_budget", "device", "weights", "split_image") and record["options"].get(name) != value:
            raise GigamorphError(
                f"{path}: was begun with {name}={value!r}, not {record['options'].get(name)!r}; resume with the same"
            )
    if stored["preprocessing"] != record["preprocessing"]:
        raise GigamorphError(f"{path}: was begun with another preprocessing; resume with {stored['preprocessing']}")
