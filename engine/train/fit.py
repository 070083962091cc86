"""Train a classifier at native resolution: what `gigamorph train` does."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ... import kernels
from ...kernels import winograd
from ..accelerate import Accelerated
from ..errors import DataError
from ..models.classifier import check_classifier
from ..models.segmenter import check_segmenter
from ..morph.origin import Origin
from ..parallel.process_group import ProcessGroup
from ..tiling.memory import format_bytes
from .card import Card, write_card
from .checkpoint import load_checkpoint, write_atomically
from .classify import Classification
from .data import Data, samples_of
from .loop import Trained, run_stages
from .mask_target import MaskTarget
from .masks import Overlap, Segmentation, scored_lines
from .metrics import Prediction, as_cases
from .network import build_network
from .options import TrainOptions
from .progress import Report
from .record import make_record, require_same, scale_told
from .run import Run
from .run_preview import proposal

log = logging.getLogger("gigamorph")

_BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Fitted:
    """The end of a run: what ``metrics.json`` holds, its predictions ("val", "test"), the best network.

    Of a run on masks ``overlaps`` are in the place of the predictions.
    """

    metrics: dict[str, Any]
    predictions: dict[str, list[Prediction]]
    net: Accelerated
    overlaps: dict[str, list[Overlap]] = field(default_factory=dict)


@dataclass(frozen=True)
class Watch:
    """Who looks on at a run.

    Attributes:
        say: called with a few lines before the run: what it will take.
        warn: called with what people should know of an image, as that all its pixels are equal.
        begun: called when all has been checked, before the first step.
        loggers, callbacks: by name, of Lightning; see `loggers`.
    """

    say: Callable[[str], object] | None = None
    warn: Callable[[str], object] = log.warning
    begun: Callable[[], object] = lambda: None
    loggers: tuple[str, ...] = ()
    callbacks: tuple[str, ...] = ()


def fit(
    data: Data,
    options: TrainOptions,
    out: str | Path,
    *,
    resume: bool = False,
    report: Report | None = None,
    watch: Watch | None = None,
) -> Fitted:
    """Train, and write into ``out``: ``last.ckpt``, ``best.ckpt``, ``log.csv``, ``curves.png``, ``metrics.json``,
    ``model_card.md``.

    A resumed run ends with the parameters, bit for bit on the CPU, that it would have had without the interruption.
    More epochs than it was begun with extend it, also a complete one: from there on the learning rate is that of as
    many epochs. Where there is no ``last.ckpt`` yet, the run begins: what starts jobs again need not know how far they
    came.

    All processes of a group of `torch.distributed` train together when each of them calls this, see `run_stages`: with
    ``split_image`` they share each image, else each has one of its own. `gigamorph.engine.parallel.launch` starts such
    processes; in other groups a process uses its current device.

    Returns:
        The best checkpoint's scores on the validation and test images, with the hash of the split, the seconds of all
        epochs, peak memory and versions, as in ``metrics.json``; its predictions; and the network with its parameters.

    Raises:
        DataError: if the split leaks a patient or a checkpoint belongs to another split.
        GigamorphError: if the network does not take the images or gives other than a logit per class, ``out`` already
            holds a run, a file cannot be written, or ``accumulate`` is no multiple of the number of images that are
            computed at a time.
        KeyboardInterrupt: at Ctrl-C or SIGTERM, after ``last.ckpt`` was written.
    """
    out = Path(out)
    data.require_fit()
    group = ProcessGroup.here(options.split_image)
    last, watch = out / "last.ckpt", watch or Watch()
    if resume and not last.exists():
        resume = False
        if watch.say is not None:
            watch.say(f"{last}: not there yet, so the run begins")
    record = _begun(make_record(data, options, group), data, options, last if resume else None)
    net = _network(record, data, options, None if resume else options.weights, group)
    if options.batch_norm == "frozen" and not any(isinstance(m, _BATCH_NORM) for m in net.modules()):
        log.warning("batch_norm has no effect: %s has no BatchNorm", options.model)
    if not len(data.val):
        log.warning("there are no validation images: the last epoch is kept")
        if options.patience is not None:
            log.warning("patience has no effect: there are no validation images, and all epochs are trained")
        if options.schedule.plateau is not None:
            log.warning("schedule.plateau has no effect: there are no validation images to wait for")
    if not resume and options.weights and (told := scale_told(options.weights, data.preprocessing)):
        watch.warn(told)
    log.debug("kernels: %s", _kernels(options.device))
    if watch.say is not None:
        for line in proposal(net, data, options):
            watch.say(line)
    task = _task(net, data, options, record, watch.warn)
    own = (out, options.seed, options.device, options.budget, resume, options.precision, report)
    run = Run(*own, log=watch.loggers, callbacks=watch.callbacks, begun=watch.begun, group=group)
    trained = run_stages(task, options.made_stages(validated=bool(len(data.val))), run)
    metrics, found = _measure(task, data, record, trained)
    if group.leads:
        text = json.dumps(metrics, indent=1) + "\n"
        write_atomically(out / "metrics.json", lambda p: p.write_text(text), "metrics")
        write_card(out / "model_card.md", _card(data, options, net, metrics, found))
    return Fitted(metrics, {}, net, found) if isinstance(task, Segmentation) else Fitted(metrics, found, net)


def _network(
    record: dict[str, Any], data: Data, options: TrainOptions, weights: str | Path | None, group: ProcessGroup
) -> Accelerated:
    """The network as it begins, after a look whether it takes the images."""
    torch.manual_seed(options.seed)
    net = build_network(record, weights, group.split)
    shape = (1, *data.train[0]["image"].shape)
    check = check_segmenter if isinstance(data.target, MaskTarget) else check_classifier
    check(net._network, options.model, shape, data.target.width, options.device)
    return net


def _kernels(device: str) -> str:
    """Whose convolutions a run takes."""
    if device.startswith("cuda"):
        lacks = kernels.missing()
        return "Triton's where they are faster" if lacks is None else f"PyTorch's ({lacks})"
    lacks = winograd.missing()
    return "Winograd's filtering for 3 x 3, else oneDNN's" if lacks is None else f"oneDNN's ({lacks})"


def _begun(record: dict[str, Any], data: Data, options: TrainOptions, last: Path | None) -> dict[str, Any]:
    """The record of a run with what it knows of its beginning: of the run that ``last`` is of, or of given weights."""
    if last is not None:
        stored = load_checkpoint(last)["gigamorph"]
        if "options" not in stored:
            raise DataError(f"{last}: is a recipe's; resume it with --recipe, or name another folder")
        require_same(stored, record, last)
        grown = {"grown": stored["grown"]} if "grown" in stored else {}
        # The code may be newer than the run: what began the run stays on record beside what continues it.
        return {**record, **grown, "versions_at_start": stored.get("versions_at_start", stored["versions"])}
    origin = Origin.of_file(options.model, options.weights, data.channels) if options.weights else None
    return record | ({"grown": origin.record()} if origin else {})


def _task(
    net: Accelerated, data: Data, options: TrainOptions, record: dict[str, Any], warn: Callable[[str], object]
) -> Classification | Segmentation:
    target, records = data.target, samples_of(data.train)
    made: Any = Segmentation if isinstance(target, MaskTarget) else Classification
    return made(
        net,
        data.train,
        data.val,
        record,
        target,
        options.loss,
        weights=target.weights(records) if options.loss.class_weights else None,
        drawn=target.rarity(records) if options.sampling == "balanced" else None,
        warn=warn,
    )


def _measure(
    task: Classification | Segmentation, data: Data, record: dict[str, Any], trained: Trained
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The scores of the best epoch, with what repeats the run, and the predictions or overlaps that they are of."""
    metrics: dict[str, Any] = {"best_epoch": trained.best_epoch}
    found: dict[str, list[Any]] = {}
    for name, stage in (("val", "validate"), ("test", "test")):
        if not len(data.parts[name]):
            continue
        found[name] = task.predict(data.parts[name], stage)
        metrics[name] = task.measures(found[name])
    metrics |= {
        "seconds": round(sum(row["seconds"] for row in trained.rows), 2),  # also of those before a run went on
        "peak_bytes": max(row["peak_bytes"] for row in trained.rows),
        "split_sha256": record["split"]["sha256"],
        "truth_sha256": record["split"]["truth_sha256"],
        "preprocessing": data.preprocessing,
        "seed": record["options"]["seed"],
        "versions": record["versions"],
    }
    return metrics, found


_LEARNT = {
    "classes": "one of the classes",
    "ordinal": "classes in their order",
    "labels": "any of the labels",
    "numbers": "numbers",
    "masks": "a class for each pixel",
}
_KEPT = ("epochs", "accumulate", "precision", "patience", "average", "sampling", "freeze", "seed", "device")


def _told(options: TrainOptions) -> dict[str, Any]:
    """Of a card: the settings by name; those of optimizer, schedule and loss together."""
    parts = {}
    for name in ("optimizer", "schedule", "loss"):
        values = {key: value for key, value in asdict(getattr(options, name)).items() if value not in (None, {})}
        parts[name] = ", ".join(f"{key} {value}" for key, value in values.items())
    stages = ", ".join(f"{stage.epochs} epochs {stage.name}".strip() for stage in options.stages)
    kept = {name: getattr(options, name) for name in _KEPT}
    return {name: value for name, value in {**kept, **parts, "stages": stages}.items() if value not in (None, (), "")}


def _card(
    data: Data,
    options: TrainOptions,
    net: Accelerated,
    metrics: dict[str, Any],
    found: dict[str, list[Any]],
) -> Card:
    masks = isinstance(data.target, MaskTarget)
    budget = "what is free" if options.budget is None else format_bytes(options.budget)
    return Card(
        title=f"{options.model} for {' and '.join(data.classes)}",
        model={
            "architecture": options.model,
            "parameters": f"{sum(p.numel() for p in net.parameters()):,}",
            "input": f"images of any size, every pixel, channels: {data.channels}",
            "output": f"{'a map with ' if masks else ''}log-odds of {', '.join(data.classes)}",
            "batch norm": options.batch_norm or "statistics of the whole image while training",
            "preprocessing": ", ".join(f"{name} {value}" for name, value in data.preprocessing.items()),
        },
        training={
            "recipe": "gigamorph train",
            "learnt": _LEARNT[data.target.kind],
            "begun from": "weights that were given" if options.weights else "random weights",
            **_told(options),
            "best epoch": metrics["best_epoch"],
            "memory budget of a step": budget,
            "largest memory of the process": format_bytes(metrics["peak_bytes"]),
            "seconds of all epochs": metrics["seconds"],
            "hash of the split": metrics["split_sha256"],
            f"hash of the {'masks' if masks else 'labels'}": metrics["truth_sha256"],
        },
        records={name: images.records for name, images in data.parts.items()},
        classes=data.classes,
        predictions={} if masks else {name: as_cases(one, data.classes) for name, one in found.items()},
        measured=scored_lines(metrics) if masks else (),
        labelled=not masks,
    )
