"""Train a classifier at native resolution: what `gigamorph train` does."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..accelerate import Accelerated, accelerate
from ..errors import DataError, GigamorphError
from ..models import create_model, load_weights
from ..models.classifier import check_classifier
from ..morph.origin import Origin
from ..parallel.process_group import ProcessGroup
from ..tiling.memory import format_bytes
from .card import Card, write_card
from .checkpoint import load_checkpoint, versions, write_atomically
from .classify import Classification, Images, balanced_weights
from .loop import run_stages
from .metrics import Prediction, as_cases, scores
from .progress import Report
from .run import Run
from .splits import hash_of
from .stages import Stage

log = logging.getLogger("gigamorph")


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
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    class_weights: bool = False
    patience: int | None = None
    """Epochs without a better validation score after which the run ends."""
    seed: int = 0
    device: str = "cpu"
    freeze: tuple[str, ...] = ()
    """Patterns of modules or parameters that do not learn; their BatchNorm keeps its statistics."""
    rates: tuple[tuple[str, float], ...] = ()
    """Patterns with a learning rate of their own."""
    split_image: bool | int = False
    """Whether all processes share each image, a band of rows each, instead of having one each; or how many do."""


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
    """The end of a run: what ``metrics.json`` holds, its predictions ("val", "test"), the best network."""

    metrics: dict[str, Any]
    predictions: dict[str, list[Prediction]]
    net: Accelerated


def fit(
    data: Data, options: TrainOptions, out: str | Path, *, resume: bool = False, report: Report | None = None
) -> Fitted:
    """Train, and write into ``out``: ``last.ckpt``, ``best.ckpt``, ``log.csv``, ``curves.png``, ``metrics.json``,
    ``model_card.md``.

    A resumed run ends with the parameters, bit for bit on the CPU, that it would have had without the interruption.
    More epochs than it was begun with extend it, also a complete one: from there on the learning rate is that of as
    many epochs.

    All processes of a group of `torch.distributed` train together when each of them calls this, see `run_stages`: with
    ``split_image`` they share each image, else each has one of its own. `gigamorph.engine.parallel.launch` starts such
    processes; in other groups a process uses its current device.

    Returns:
        The best checkpoint's scores on the validation and test images, with the hash of the split, time, peak memory
        and versions, as in ``metrics.json``; its predictions; and the network with its parameters.

    Raises:
        DataError: if the split leaks a patient or a checkpoint belongs to another split.
        GigamorphError: if the network does not take the images or gives other than a logit per class, ``out`` already
            holds a run, a file cannot be written, or ``accumulate`` is no multiple of the number of images that are
            computed at a time.
        KeyboardInterrupt: at Ctrl-C, after ``last.ckpt`` was written.
    """
    out = Path(out)
    _check(data)
    group = ProcessGroup.here(options.split_image)
    record = _record(data, options, group)
    if resume:
        last = out / "last.ckpt"
        stored = load_checkpoint(last)["gigamorph"]
        if "options" not in stored:
            raise DataError(f"{last}: is a recipe's; resume it with --recipe, or name another folder")
        _check_same(stored, record, last)
        record |= {"grown": stored["grown"]} if "grown" in stored else {}
        # The code may be newer than the run: what began the run stays on record beside what continues it.
        record["versions_at_start"] = stored.get("versions_at_start", stored["versions"])
    elif options.weights:
        origin = Origin.of_file(options.model, options.weights, data.channels)
        record |= {"grown": origin.record()} if origin else {}
    started = time.monotonic()
    torch.manual_seed(options.seed)
    net = build_network(record, None if resume else options.weights, group.split)
    if options.patience is not None and not len(data.val):
        log.warning("patience has no effect: there are no validation images, and all epochs are trained")
    shape = (1, *data.train[0]["image"].shape)
    check_classifier(net._network, options.model, shape, len(data.classes), options.device)
    labels = [image.label for image in data.train.records]
    weights = balanced_weights(labels, len(data.classes)) if options.class_weights else None
    task = Classification(net, data.train, data.val, record, weights)
    run = Run(out, options.seed, options.device, options.memory_budget, resume, options.precision, report, group=group)
    trained = run_stages(task, [_stage(options, validated=bool(len(data.val)))], run)

    metrics: dict[str, Any] = {"best_epoch": trained.best_epoch}
    predictions = {}
    for name, stage in (("val", "validate"), ("test", "test")):
        if len(data.parts[name]):
            predictions[name] = task.predict(data.parts[name], stage)
            metrics[name] = scores(predictions[name])
    metrics |= {
        "seconds": round(time.monotonic() - started, 2),
        "peak_bytes": max(row["peak_bytes"] for row in trained.rows),
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


def _stage(options: TrainOptions, validated: bool) -> Stage:
    return Stage(
        "train",
        options.epochs,
        options.lr,
        weight_decay=options.weight_decay,
        optimizer="adamw",
        accumulate=options.accumulate,
        schedule="cosine",
        patience=options.patience if validated else None,
        clip=1.0,
        frozen=options.freeze,
        rates=options.rates,
        batch_norm="trainable" if options.freeze else "train",
    )


def _card(
    data: Data,
    options: TrainOptions,
    net: Accelerated,
    metrics: dict[str, Any],
    predictions: dict[str, list[Prediction]],
) -> Card:
    kept = (
        "epochs",
        "lr",
        "rates",
        "freeze",
        "weight_decay",
        "accumulate",
        "precision",
        "class_weights",
        "patience",
        "seed",
        "device",
    )
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
            **{name.replace("_", " "): getattr(options, name) for name in kept if getattr(options, name) != ()},
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


def build_network(record: dict[str, Any], weights: str | Path | None = None, split: Any = False) -> Accelerated:
    """The accelerated network that a checkpoint's record describes, on its device, without trained parameters."""
    options = record["options"]
    if "grown" in record:
        model = Origin.from_record(record["grown"]).build(options["model"], len(record["classes"]))
        if weights is not None:
            load_weights(model, weights)
    else:
        model = create_model(options["model"], len(record["classes"]), record["channels"], weights)
    model = model.to(options["device"])
    return accelerate(model, memory_budget=options["memory_budget"], batch_norm=options["batch_norm"], split=split)


def restore_network(checkpoint: dict[str, Any], *, memory_budget: int | None, device: str) -> Accelerated:
    """The trained network of a checkpoint (`load_checkpoint`), in another budget and on another device."""
    record = checkpoint["gigamorph"]
    here = {**record["options"], "memory_budget": memory_budget, "device": device}
    net = build_network({**record, "options": here})
    try:
        net.load_state_dict({key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()})
    except RuntimeError as error:
        raise DataError(
            f"the checkpoint's weights are not those of {here['model']!r} as it is built today: "
            f"{str(error).strip().splitlines()[-1].strip()}"
        ) from error
    return net


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
    parts = {name: images.records for name, images in data.parts.items()}
    return {
        "format": 1,
        "options": asdict(options),
        "images_at_once": group.at_once,
        "classes": list(data.classes),
        "channels": data.channels,
        "preprocessing": data.preprocessing,
        # A checkpoint is passed on: it tells whether a split is the same, not who is in it.
        "split": {
            "sha256": hash_of(parts),
            **{name: len(records) for name, records in parts.items()},
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
        if name in ("memory_budget", "device", "weights", "split_image"):
            continue
        now = record["options"].get(name)
        if name == "epochs" and now > value:
            continue
        if now != value:
            raise GigamorphError(
                f"{path}: was begun with {name}={value!r}, not {now!r}; resume with the same"
                + (" or more" if name == "epochs" else "")
            )
    if stored["preprocessing"] != record["preprocessing"]:
        raise GigamorphError(f"{path}: was begun with another preprocessing; resume with {stored['preprocessing']}")
